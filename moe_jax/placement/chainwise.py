"""Search for objectives that tie layers together: ExFlow's transitions, and coherent dispatch.

`transitions`: alternating exact re-assignment from many starts, all partitions into a pool, the
best chain through the pool by dynamic programming (chain.py), alternate again; half of the starts
are fresh, half are the best so far with a few layers shaken.

`coherent`: rows there are 2 |S| per layer less the chance that the next layer needs the device on
which the token waits. Partitions by co-activation under a ladder of load caps, joined along the
chain by best-to-all transitions, each judged by the exact objective.
"""

import time
from collections.abc import Iterator

import numpy as np

from moe_jax.placement import chain as chain_lib
from moe_jax.placement import clusters, ilp, layerwise
from moe_jax.placement.problem import Problem

POOL = 24
STARTS = 8  # between two dynamic programs
ROUNDS = 60
PATIENCE = 8  # rounds without gain after which the search ends
WHOLE = 400  # variables up to which all layers are solved as one integer program


def transitions(
    problem: Problem, device_LE: np.ndarray, rng: np.random.Generator, deadline: float
) -> Iterator[np.ndarray]:
    """Yields better and better placements for `exflow`."""
    chain = problem.chain(problem.top1_LEE)
    pool = chain_lib.Pool(chain, POOL)
    best_LE = chain_lib.alternate(chain, device_LE, deadline)
    best = chain.value(best_LE)
    pool.add(best_LE)
    yield best_LE
    idle = 0
    for _ in range(ROUNDS):
        before = best
        for start in range(STARTS + 1):
            if time.monotonic() >= deadline:
                return
            if start == STARTS:
                new_LE = pool.best_chain(deadline)
                if new_LE is None:
                    return
            elif start % 2:
                new_LE = _shaken(best_LE, rng)
            else:
                new_LE = chain_lib.sweep(chain, _first(problem, rng), deadline)
            new_LE = chain_lib.alternate(chain, problem.repaired(new_LE), deadline)
            pool.add(new_LE)
            if chain.value(new_LE) > best * (1 + 1e-12) and problem.all_allowed(new_LE):
                best_LE, best = new_LE, chain.value(new_LE)
                yield best_LE
        idle = 0 if best > before else idle + 1
        if idle >= PATIENCE:
            return


def coherent(
    problem: Problem, device_LE: np.ndarray, rng: np.random.Generator, deadline: float
) -> Iterator[np.ndarray]:
    """Yields placements for coherent dispatch; the caller keeps what is better."""
    chain = problem.chain(problem.best_to_all_LEE)
    factors = (np.inf,) if problem.objective == "rows" else layerwise.LADDER
    reachable_L = np.array(
        [
            np.bincount(device_E, weights=load_E).max()
            for device_E, load_E in zip(problem.balanced_LE, problem.load_LE, strict=True)
        ]
    )
    yield chain_lib.align(chain, problem.balanced_LE)
    near_LE: list[np.ndarray | None] = [None] * problem.trace.num_layers
    for rung, factor in enumerate(factors):
        now = time.monotonic()
        if now >= deadline:
            return
        share = now + (deadline - now) / (len(factors) - rung)
        cap_L = np.minimum(problem.cap_L, reachable_L * factor)
        for layer, cap in enumerate(cap_L):
            near_LE[layer] = layerwise.clustered(problem, layer, cap, near_LE[layer], rng, share)
        part_LE = np.stack([device_E for device_E in near_LE if device_E is not None])
        yield chain_lib.align(chain, problem.repaired(part_LE))


def whole(problem: Problem, deadline: float) -> ilp.Solved | None:
    """All layers as one integer program, with proof; None where that is too large."""
    keep_LEE, devices = problem.top1_LEE, problem.num_devices
    size = devices * (problem.load_LE.size + np.count_nonzero(keep_LEE))
    left = deadline - time.monotonic()
    flat = problem.topology.num_nodes == 1 and problem.load_cap is None
    if problem.objective != "exflow" or not flat or size > WHOLE or left <= 0:
        return None
    return ilp.whole_chain(keep_LEE, devices, left)


def _first(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    if problem.load_cap is not None:
        return problem.balanced_LE[0]
    return clusters.random_starts(problem.trace.num_experts, problem.num_devices, 1, rng)[0]


def _shaken(device_LE: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A few experts of a few neighbouring layers change places."""
    device_LE = device_LE.copy()
    layers, experts = device_LE.shape
    width = int(rng.integers(1, max(2, layers // 3) + 1))
    first = int(rng.integers(0, max(layers - width, 0) + 1))
    for layer in range(first, min(first + width, layers)):
        chosen = rng.choice(experts, size=max(2, experts // 4), replace=False)
        device_LE[layer, chosen] = device_LE[layer, rng.permutation(chosen)]
    return device_LE
