"""Fewest hops of plans with copies: facility location, bounded by its Lagrangian.

Axes: E experts, M devices, s slots of a device, H homes, B balls; L layers.

Whatever the copy rule, an assignment travels at least as far as from its home to the nearest copy.
With the devices of a home in order of their ways d_0 < d_1 < ..., that is d_0 and, for every step
that no copy lies within, the step: b runs over the balls {m: way <= d_j} of all homes, equal ones
added up. With y_em = 1 where e has a copy on m, a layer has at least
    base + sum_eb w_eb max(0, 1 - sum_{m in b} y_em),    w_eb = load_e x (steps of b) / H,
where sum_m y_em >= 1 and sum_e y_em <= s. For all multipliers 0 <= r_eb <= w_eb and u_e >= 0 this
is at least (Lagrange)
    base + sum r + sum u - sum_m (the s largest over e of sum_{b with m} r_eb + u_e),
since a device holds s experts at most. Any multipliers prove; the best ones are duals of the linear
relaxation (HiGHS), cut to their ranges, so that no error of the solver matters. Layers that it has
no time for take full weights for small balls, and none for others. On small machines prices of
slots over all sets of devices (hops_sets.py; on one node of up to 16 devices hops_ranks.py), which
know the copy rule itself, come after that.
Load caps do not enter.
"""

import itertools
import time

import numpy as np
from scipy import optimize, sparse

from moe_jax.placement import hops_counts, hops_ranks, hops_sets
from moe_jax.placement.hops import Ways
from moe_jax.placement.problem import Problem

SAFETY = 1 - 1e-9  # of sums of rounded numbers
LARGEST = 2**20  # unknowns of a relaxation
NEAREST = 0.2  # of the time, for ways to the nearest copy, where ranks come after them


def fewest_hops(problem: Problem, deadline: float) -> float:
    """The objective `hops` of a plan with replicas is at least this."""
    assert problem.num_slots is not None
    slots, experts = problem.num_slots // problem.num_devices, problem.trace.num_experts
    least, every = [], problem.hop_ways
    started = time.monotonic()
    ranked = hops_ranks.knows(problem) and not hops_sets.small(experts, problem.num_devices)
    nearest = started + NEAREST * (deadline - started) if ranked else deadline
    for load_E, ways in zip(problem.load_LE, every, strict=True):
        one = _Layer(load_E, ways, slots)
        found = one.proves_at_once()
        left = nearest - time.monotonic()
        if left > 0 and one.weight_EB.size + experts * problem.num_devices < LARGEST:
            duals = one.duals(left)
            found = found if duals is None else max(found, one.proves(*duals))
        least.append(one.base + max(found, 0.0))
    if hops_sets.small(experts, problem.num_devices):
        for layer, ways in enumerate(every):
            if time.monotonic() >= deadline:
                break
            ids_TK, nodes = problem.trace.expert_ids_TLK[:, layer], problem.topology.nodes
            counts = hops_counts.Layer(ids_TK, experts, ways, nodes)
            sets = hops_sets.Sets(counts, problem.num_devices, slots)
            price_M = sets.prices(deadline - time.monotonic())
            least[layer] = max(least[layer], sets.proves(price_M))
    elif ranked:
        least = np.maximum(least, hops_ranks.fewest_L(problem, deadline)).tolist()
    return SAFETY * float(sum(least)) / problem.token_layers


class _Layer:
    """One layer's balls and weights.

    Attributes:
      base: hops that no copy saves.
      load_E: assignments of every expert.
      in_BM: bool, which devices a ball has.
      weight_EB: what it costs to have no copy in a ball.
    """

    def __init__(self, load_E: np.ndarray, ways: Ways, slots: int):
        self.load_E, self._slots = load_E, slots
        homes = len(ways.home_H)
        self.base = float(load_E.sum() * ways.way_HM.min(axis=1).sum() / homes)
        balls: dict[bytes, float] = {}
        for way_M in ways.way_HM:
            steps = np.unique(way_M)
            for near, far in itertools.pairwise(steps):
                ball = (way_M <= near).tobytes()
                balls[ball] = balls.get(ball, 0.0) + float(far - near) / homes
        found = [np.frombuffer(ball, bool) for ball in balls]
        self.in_BM = np.stack(found) if found else np.zeros((0, ways.way_HM.shape[1]), bool)
        self.weight_EB = load_E[:, None] * np.array(list(balls.values()))[None, :]

    def proves_at_once(self) -> float:
        """The best of: full weight for balls of so many devices at most, nothing for others."""
        size_B, none_E = self.in_BM.sum(axis=1), np.zeros(len(self.load_E))
        found = [
            self.proves(self.weight_EB * (size_B <= size), none_E) for size in np.unique(size_B)
        ]
        return max(found, default=0.0)

    def proves(self, r_EB: np.ndarray, u_E: np.ndarray) -> float:
        """The bound less `base`, of any multipliers: they are cut to their ranges here."""
        r_EB, u_E = np.clip(r_EB, 0.0, self.weight_EB), np.maximum(u_E, 0.0)
        worth_EM = r_EB @ self.in_BM + u_E[:, None]
        held = np.sort(worth_EM, axis=0)[-self._slots :].sum()
        return float(r_EB.sum() + u_E.sum() - held)

    def duals(self, seconds: float) -> tuple[np.ndarray, np.ndarray] | None:
        """Multipliers of the linear relaxation; None if it does not end in time."""
        experts, balls = self.weight_EB.shape
        devices, scale = self.in_BM.shape[1], max(float(self.weight_EB.max(initial=0.0)), 1.0)
        each = sparse.eye(experts)
        reach = sparse.hstack(
            [sparse.kron(each, self.in_BM.astype(float)), sparse.eye(experts * balls)]
        )
        unmet = sparse.csr_matrix((experts, experts * balls))
        some = sparse.hstack([sparse.kron(each, np.ones((1, devices))), unmet])
        full = sparse.hstack(
            [
                sparse.kron(np.ones((1, experts)), sparse.eye(devices)),
                sparse.csr_matrix((devices, experts * balls)),
            ]
        )
        found = optimize.linprog(
            np.concatenate([np.zeros(experts * devices), self.weight_EB.ravel() / scale]),
            A_ub=sparse.vstack([-reach, -some, full]).tocsr(),
            b_ub=np.concatenate(
                [-np.ones(experts * balls + experts), np.full(devices, self._slots)]
            ),
            bounds=(0, 1),
            method="highs",
            options={"time_limit": max(seconds, 1e-3)},
        )
        if found.status != 0:
            return None
        dual = -scale * found.ineqlin.marginals
        r_EB = dual[: experts * balls].reshape(experts, balls)
        return r_EB, dual[experts * balls : experts * balls + experts]
