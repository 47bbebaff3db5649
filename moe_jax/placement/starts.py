"""Where a search starts beside its own construction: what the cheap baselines make.

Axes: L MoE layers, E experts, M devices.

So the planner is never worse than they are. Where layers are independent each takes the best of all
plans; where they are tied the labels are aligned along the chain as well, which moves fewer tokens.
Layers that break a load cap are replaced by the most even ones.
"""

from collections.abc import Sequence

import numpy as np

from moe_jax.placement import baselines, chain
from moe_jax.placement.baselines import affinity_groups
from moe_jax.placement.problem import Problem


def offered(problem: Problem, own_LE: np.ndarray) -> list[np.ndarray]:
    """int64 [L, E] each: what a search for seconds or rows begins with beside its own plan."""
    if problem.objective not in ("seconds", "rows"):
        return []
    if problem.separable:
        return [merged(problem, [own_LE, *plans(problem)])]
    return [aligned(problem, device_LE) for device_LE in plans(problem)]


def plans(problem: Problem) -> list[np.ndarray]:
    """int64 [L, E] each: milliseconds, unlike those with programs of their own."""
    load_LE, pairs_LEE, devices = problem.load_LE, problem.coactivation_LEE, problem.num_devices
    made = [affinity_groups.cooccurrence(load_LE, pairs_LEE, devices)]
    if problem.objective == "rows":
        made.append(affinity_groups.occult(pairs_LEE, devices))
    else:  # the fullest device decides
        made.append(baselines.lpt(load_LE, devices))
    return [problem.repaired(device_LE) for device_LE in made]


def aligned(problem: Problem, device_LE: np.ndarray) -> np.ndarray:
    """The same groups, their devices numbered along the chain for what ties the layers."""
    return chain.align(problem.chain(problem.best_to_all_LEE), device_LE)


def merged(problem: Problem, several: Sequence[np.ndarray]) -> np.ndarray:
    """Every layer the best of its kind, where layers are independent."""
    layers = range(problem.trace.num_layers)
    value_CL = np.array([[problem.layer_value(n, one_LE[n]) for n in layers] for one_LE in several])
    return np.stack([several[c][n] for n, c in enumerate(value_CL.argmin(axis=0))])
