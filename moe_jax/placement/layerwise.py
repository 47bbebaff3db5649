"""Search for objectives whose layers are independent: each layer by itself, kept if it is better.

Axes: L MoE layers, E experts, M devices, P swaps.

For each layer: clusterings by co-activation under a ladder of load caps (rows and balance pull in
opposite directions, seconds lie in between), judged by the exact objective; the best of them is
polished with exact swaps (contacts.py), and with rotations: one expert is taken out of each device
and the M of them are put back by an exact assignment program. `whole_layer` decides a layer that is
small enough by one integer program, with proof.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import optimize

from moe_jax.placement import clock, clusters, greedy, ilp, seating, swaps
from moe_jax.placement.problem import Problem

LADDER: tuple[float, ...] = (
    np.inf,
    1.6,
    1.35,
    1.2,
    1.1,
    1.04,
    1.01,
)  # caps, as multiples of what is reachable
PILOTS, KEPT = 3, 2
STARTS = 16
SHAKES = 6
ROTATIONS = 30
POLISHED = 3  # best clusterings that are polished
BALANCE_SECONDS = 0.4  # of the integer program that evens one layer's load
WHOLE = 250  # contacts up to which a layer is solved as one integer program


def search(
    problem: Problem, device_LE: np.ndarray, rng: np.random.Generator, deadline: float
) -> Iterator[np.ndarray]:
    """Yields the whole placement after every layer that got better.

    The first PILOTS layers climb the whole ladder and take more time; the others only try the KEPT
    caps that did best there.
    """
    device_LE = device_LE.copy()
    layers, factors = problem.trace.num_layers, LADDER
    if problem.objective == "rows":  # the loosest cap is always the best one
        factors = LADDER[:1]
    losses: list[np.ndarray] = []
    for layer in range(layers):
        if clock.late(deadline):
            return
        parts = max(layers - layer, 1) / (len(LADDER) if layer < PILOTS else 1)
        share = clock.share(deadline, 1 / max(parts, 1))
        found = best_of_layer(problem, layer, device_LE[layer], factors, rng, share)
        if not np.array_equal(found.device_E, device_LE[layer]):
            device_LE[layer] = found.device_E
            yield device_LE.copy()
        if layer < PILOTS and len(factors) > KEPT and found.loss_F is not None:
            losses.append(found.loss_F)
            if layer == PILOTS - 1:
                best_F = np.argsort(np.mean(losses, axis=0), kind="stable")[:KEPT]
                factors = tuple(factors[f] for f in sorted(best_F))


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The best labels of a layer, and by how much each rung of the ladder missed the best rung."""

    device_E: np.ndarray
    loss_F: np.ndarray | None = None


def best_of_layer(
    problem: Problem,
    layer: int,
    start_E: np.ndarray,
    factors: Sequence[float],
    rng: np.random.Generator,
    deadline: float,
) -> Found:
    """The best labels of one layer that were found; `start_E` if nothing is better."""
    found, loss_F = [start_E, problem.balanced_LE[layer]], None
    if problem.objective == "load" or problem.dispatch == "gathered":
        found.append(_evened(problem, layer, deadline))
    else:
        rungs = [
            seating.seated(problem, layer, device_E, deadline)
            for device_E in _rungs(problem, layer, factors, rng, deadline)
        ]
        value_F = np.array([_value(problem, layer, device_E) for device_E in rungs])
        if np.isfinite(value_F).all():
            loss_F = value_F / max(value_F.min(), 1e-300)
        found = sorted(found + rungs, key=lambda device_E: _value(problem, layer, device_E))
        found += [_polished(problem, layer, d, rng, deadline) for d in found[:POLISHED]]
    best_E = min(found, key=lambda device_E: _value(problem, layer, device_E))
    return Found(best_E, loss_F)


def clustered(
    problem: Problem,
    layer: int,
    cap: float,
    near_E: np.ndarray | None,
    rng: np.random.Generator,
    deadline: float,
) -> np.ndarray:
    """int64 [E]: groups by co-activation under a cap, `near_E` being one of the starts if given."""
    task = problem.layer(layer, cap)
    experts, devices = problem.trace.num_experts, problem.num_devices
    count = max(2, min(STARTS, 2**17 // (experts * experts)))
    starts = clusters.random_starts(experts, devices, count, rng)
    starts[0] = greedy.grown(task, problem.slots) if near_E is None else near_E
    starts[1] = problem.balanced_LE[layer]
    return clusters.improve(task, starts, rng, SHAKES, deadline)


def capped(cap, reachable, factor: float):
    """The largest load on a rung of the ladder, never above the problem's own cap.

    A layer without load needs none: no rung of it differs from another.
    """
    return np.minimum(cap, np.where(reachable > 0, reachable, np.inf) * factor)


def _rungs(problem: Problem, layer: int, factors, rng, deadline: float) -> list[np.ndarray]:
    """Clusterings under tighter and tighter caps, each from the one before it."""
    least = float(problem.relative_M(layer, problem.balanced_LE[layer]).max())
    found: list[np.ndarray] = []
    for rung, factor in enumerate(factors):
        # half of the time is for polishing
        share = clock.share(deadline, 1 / (len(factors) - rung + 1))
        cap = capped(problem.cap_L[layer], least, factor)
        near_E = found[-1] if found else None
        found.append(clustered(problem, layer, cap, near_E, rng, share))
    return found


def _evened(problem: Problem, layer: int, deadline: float) -> np.ndarray:
    """Least largest load: the integer program, where packing and swaps leave something to gain."""
    balanced_E = problem.balanced_LE[layer]
    device_E = None
    speed_M = None if problem.even_speed else problem.topology.speed_M
    extra = 0.0 if speed_M is None else problem.shared_load
    worth = extra or problem.load_excess(layer, balanced_E) > 1e-4
    if worth and (left := clock.left(deadline)):
        limit = min(left, BALANCE_SECONDS)
        device_E = ilp.balance(problem.load_LE[layer], problem.num_devices, limit, speed_M, extra)
    return balanced_E if device_E is None else device_E


def _polished(problem: Problem, layer: int, device_E: np.ndarray, rng, deadline) -> np.ndarray:
    if not problem.allowed(layer, device_E):
        return device_E
    device_E = _swapped(problem, layer, device_E, deadline)
    if problem.devices_differ:
        device_E = seating.seated(problem, layer, device_E, deadline)
        device_E = _swapped(problem, layer, device_E, deadline)
    if problem.objective == "rows" and problem.node_likeness == 0:
        for _ in range(ROTATIONS):
            if clock.late(deadline):
                break
            device_E = _rotated(problem, layer, device_E, rng)
        device_E = _swapped(problem, layer, device_E, deadline)
    return device_E


def _swapped(problem: Problem, layer: int, device_E: np.ndarray, deadline: float) -> np.ndarray:
    """Best-swap descent on the exact objective; swaps that pass the cap do not count.

    Where nodes count (hierarchical), swaps between nodes are tried once none inside helps.
    """
    device_E, value = device_E.copy(), problem.layer_value(layer, device_E)
    first = problem.dispatch != "hierarchical"
    everywhere = first
    while not clock.late(deadline):
        score, e, f = _best_swap(problem, layer, device_E, everywhere)
        if score < value * (1 - 1e-9):
            value, everywhere = score, first
            device_E[e], device_E[f] = device_E[f], device_E[e]
        elif everywhere:
            break
        else:
            everywhere = True
    return device_E


def _best_swap(
    problem: Problem, layer: int, device_E: np.ndarray, everywhere: bool
) -> tuple[float, int, int]:
    """The value after the best swap of all, or of those inside a node, and its two experts."""
    label_E = problem.topology.node_M[device_E]
    apart_EE = device_E[:, None] != device_E[None, :]
    if not everywhere:
        apart_EE &= label_E[:, None] == label_E[None, :]
    e_P, f_P = np.nonzero(np.triu(apart_EE))
    if not e_P.size:
        return np.inf, 0, 0
    score_P = swaps.values_P(problem, layer, device_E, e_P, f_P)
    best = int(score_P.argmin())
    return float(score_P[best]), int(e_P[best]), int(f_P[best])


def _rotated(problem: Problem, layer: int, device_E: np.ndarray, rng) -> np.ndarray:
    """One expert out of each device, put back by the assignment with the fewest contacts."""
    devices, load_E = problem.num_devices, problem.load_LE[layer]
    members_MS = np.argsort(device_E, kind="stable").reshape(devices, -1)
    out_E = members_MS[np.arange(devices), rng.integers(members_MS.shape[1], size=devices)]
    arrivals_EM = problem.sets[layer].arrivals_EM(device_E, devices, out_E)
    rest_M = np.bincount(device_E, weights=load_E, minlength=devices) - load_E[out_E]
    cap_M = problem.cap_L[layer] * problem.topology.speed_M
    over_EM = rest_M[None, :] + load_E[out_E][:, None] > cap_M * (1 + 1e-9)
    arrivals_EM[over_EM] += 10 * problem.sets[layer].count_Q.sum()
    now = np.trace(arrivals_EM)
    rows, columns = optimize.linear_sum_assignment(arrivals_EM)
    if not arrivals_EM[rows, columns].sum() < now * (1 - 1e-12):
        return device_E
    device_E = device_E.copy()
    device_E[out_E[rows]] = columns
    return device_E


def whole_layer(problem: Problem, layer: int, deadline: float) -> ilp.Solved | None:
    """The layer with the fewest contacts and the proof; None where that is too large."""
    sets = problem.sets[layer]
    flat = problem.node_likeness == 0 and not np.isfinite(problem.cap_L[layer])
    size = len(sets.count_Q) * problem.num_devices
    if problem.objective != "rows" or not flat or size > WHOLE:
        return None
    if not (left := clock.left(deadline)):
        return None
    return ilp.whole_layer(sets.member_QE, sets.count_Q, problem.num_devices, left)


def _value(problem: Problem, layer: int, device_E: np.ndarray) -> float:
    allowed = problem.allowed(layer, device_E)
    return problem.layer_value(layer, device_E) if allowed else np.inf
