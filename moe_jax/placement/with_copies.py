"""The search with replicas, whatever the objective: a base without copies, filled, then counted.

A plan made for balance alone comes first; it says how even loads can be, and it is the answer for
`load`. Other objectives solve the plan without copies (where the devices do not divide the experts
there is none: they keep one copy each of the first plan) and fill its spare slots: one by one by
what they save, and by exchanges of copies (spare.py, exchanges.py, the rule `local`), for `exflow`
slots and shares together by integer programs (staying.py, the rule `stay`). What is kept is decided
by true counts under the copy rule.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator

import numpy as np

from moe_jax.placement import (
    bounds,
    clock,
    copies_bound,
    copies_relax,
    exchanges,
    hops_bound,
    replication,
    sampled,
    spare,
    staying,
)
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.layout import Layout
from moe_jax.placement.limits.caps import SLACK
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.placement.spare import Judged, Valued

BASE_SHARE = 0.5  # of the time, for plans without replicas
BOUND_SHARE = 0.15  # of the time, at most, for the bound
RELAX_SHARE = 0.5  # of the time for the bound, for relaxations: the search gains more by the rest
DEVIATIONS, LEAST_AIM = 2.5, 0.95  # below a load cap, of what is only expected; and at least
ROUND_SHARE = 0.4  # of the time that is left, for one round of exchanges
CAPPED_COUNTS = 2  # of a plan with layers above their caps, where homes follow the layer before
MADE_UP = 4  # starts with loads that are made up
LITTLE = 1e-4  # of the objective: a round that wins less was the last one
SAFETY = 1 - 1e-9  # of sums of rounded numbers


def lower_bound(problem: Problem, deadline: float) -> tuple[float, str]:
    """No placement with so many slots has less; and the argument in words."""
    if problem.objective == "hops":
        note = "bound: ways to the nearest copy, or prices of slots over all sets of devices"
        return hops_bound.fewest_hops(problem, deadline), note
    mean_L = problem.mean_L
    deadline = clock.share(deadline, RELAX_SHARE)
    if problem.objective == "load":
        return 1.0, "bound: the fullest device has at least the mean load"
    if problem.objective == "seconds":
        # slow devices may get fewer rows for the shared experts that they have as well
        row_seconds = problem.rows_per_step * problem.work.row_flops / problem.topology.mean_flops
        shared = float(seconds_lib.shared_seconds(problem.topology, problem.work).max())
        each_L = np.maximum((mean_L + problem.shared_load) * row_seconds, shared)
        note = "bound: the fullest device computes at least the mean load"
        return SAFETY * float(each_L.mean()), note
    if problem.objective == "exflow":
        note = "bound: what devices hold of adjacent layers, counted or by a relaxation"
        return max(SAFETY * problem.hops(_most_kept(problem, deadline)), 0.0), note
    note = "bound: what devices and homes hold of a token's experts, counted or by a relaxation"
    return copies_bound.fewest_rows(problem, deadline), note


def _most_kept(problem: Problem, deadline: float) -> float:
    assert problem.num_slots is not None
    nodes, like = problem.topology.nodes, max(problem.node_likeness, 0.0)  # as in relax.py
    flat, far = _most_kept_flat(problem, deadline), 0.0
    for keep_EE in problem.top1_LEE if like else ():
        # as many slots in every node as the largest one has
        slots = problem.num_slots // problem.num_devices * int(nodes.size_N.max()) * nodes.count
        far += bounds.kept_with_copies(keep_EE, slots, nodes.count)
    return (1 - like) * flat + like * far


def _most_kept_flat(problem: Problem, deadline: float) -> float:
    """Most transitions that can stay on a device."""
    assert problem.num_slots is not None
    slots, devices, keep_LEE = problem.num_slots, problem.num_devices, problem.top1_LEE
    counted = sum([bounds.kept_with_copies(keep_EE, slots, devices) for keep_EE in keep_LEE])
    layout = Layout(problem.trace.num_layers, problem.trace.num_experts, 2)
    nothing_LEE = np.zeros((layout.layers, layout.experts, layout.experts))
    together_N = layout.flat(nothing_LEE, keep_LEE)
    return min(counted, copies_relax.most(layout, devices, slots, together_N, deadline))


@dataclasses.dataclass(eq=False)
class Run:
    """The best plan so far, and how to make better ones.

    Attributes:
      problem: with its replicas.
      best: by true counts.
      cap_L: largest load of each layer, over the device's speed.
      base: the problem without replicas whose plan is filled; None: there is no need, or no plan.
      base_share: of the time, for it.
      bound_share: of the time, at most, for the bound.
      count_seconds: that it takes to count a plan, which the search leaves for the end.
      last: the plan that was filled last, whether it keeps the caps or not.
    """

    problem: Problem
    best: Valued
    cap_L: np.ndarray
    base: Problem | None
    base_share: float
    bound_share: float = BOUND_SHARE
    count_seconds: float = 0.0
    last: Placement | None = None

    def filled(self, device_LE: np.ndarray, seed: int, deadline: float) -> Iterator[Valued]:
        """The best so far after every plan with all slots filled, from one without copies."""
        end = deadline - self.count_seconds
        if self.problem.objective != "exflow":
            self.last = spare.filled(self.problem, device_LE, self.aim_L, seed, end)
            self.best = spare.better(self.problem, self.best, self.last, self.cap_L)
            yield self.best
            return
        sweeps = deadline - 5 * self.count_seconds
        for found in staying.search(self.problem, device_LE, self.cap_L, seed, sweeps, end):
            fits = (found.counted.largest_L <= self.cap_L * (1 + 1e-9)).all()
            if fits and found.counted.hops < self.best.value:
                self.best = Valued(found.placement, np.array([found.counted.hops]))
            yield self.best

    @property
    def aim_L(self) -> np.ndarray:
        """float64: what expected or sampled loads have to keep for counted ones to keep the cap."""
        problem = self.problem
        if problem.objective not in exchanges.OBJECTIVES:
            return self.cap_L  # its loads are exact
        counted = problem.trace.num_tokens if problem.separable else sampled.size(problem)
        spread = np.sqrt(problem.num_devices / (counted * problem.trace.top_k))
        return self.cap_L * max(1 - DEVIATIONS * spread, LEAST_AIM)

    def exchanged(self, even: Placement, seed: int, deadline: float) -> Iterator[Valued]:
        """The best so far after exchanges of copies, round after round, while they help.

        Every round draws another sample of tokens. Layers that turn out to be above their cap go on
        under a narrower one. Then it begins anew: with the plan for balance alone, and with plans
        for loads that are made up; but not where layers are tied, as all would have to be better
        at once.
        """
        problem, end = self.problem, deadline - self.count_seconds
        if problem.objective not in exchanges.OBJECTIVES:
            return
        plan = self.best.placement if self.last is None else self.last
        aim_L, others = self.aim_L, itertools.chain([even], _made_up(problem, seed))
        for draw in itertools.count(seed):
            if clock.late(end):
                return
            before, share = self.best.value, clock.share(end, ROUND_SHARE)
            plan = exchanges.exchanged(problem, plan, aim_L, draw, share)
            over_L = np.ones(len(aim_L))
            if np.isfinite(self.cap_L).any():
                over_L = np.maximum(spare.largest_L(problem, plan) / self.cap_L, 1.0)
                aim_L = aim_L / over_L
            self.best = spare.better(problem, self.best, plan, self.cap_L)
            yield self.best
            go_on = self.best.value < before * (1 - LITTLE)
            if not go_on:
                if not problem.separable or (other := next(others, None)) is None:
                    return
                plan = other
            elif problem.separable or not (over_L > 1 + SLACK).any():
                plan = spare.mixed(plan, self.best.placement, over_L > 1 + SLACK)


def _made_up(problem: Problem, seed: int) -> Iterator[Placement]:
    """Plans that are even for loads that are not those of the trace."""
    assert problem.num_slots is not None
    rng = np.random.default_rng(seed)
    for _ in range(MADE_UP):
        load_LE = (problem.load_LE + 1) * rng.lognormal(0, 1, problem.load_LE.shape)
        yield replication.balanced_slots(load_LE, problem.num_slots, problem.num_devices)


def begin(problem: Problem) -> Run:
    """The plan for balance alone, and what is to be tried after it; pins and budgets aside."""
    problem = problem.unrestricted
    balanced = spare.balanced(problem)
    if problem.objective != "exflow":
        none = problem.objective == "load" or problem.needs_copies
        base = None if none else spare.without(problem)
        cap_L = np.full(problem.trace.num_layers, np.inf)
        started = time.monotonic()
        if problem.load_cap is not None:
            cap_L = spare.caps(problem, spare.largest_L(problem, balanced))
        best = spare.valued(problem, balanced)
        count_seconds = time.monotonic() - started
        if problem.load_cap is not None and not problem.separable:
            count_seconds *= CAPPED_COUNTS
        return Run(problem, best, cap_L, base, BASE_SHARE, count_seconds=count_seconds)
    even = staying.flows(problem, balanced, problem.mean_L / staying.AIM)
    started = time.monotonic()
    counted = staying.counted(problem, even)
    count_seconds = time.monotonic() - started
    cap_L = spare.caps(problem, counted.largest_L)
    base = None if problem.needs_copies else spare.without(problem)
    if base is not None and base.load_cap is not None:
        base = spare.without(dataclasses.replace(problem, load_cap=_of_base(base)))
    best, share = Valued(even, np.array([counted.hops])), staying.BASE_SHARE
    return Run(problem, best, cap_L, base, share, staying.BOUND_SHARE, count_seconds)


def _of_base(base: Problem) -> LoadCap:
    """Wider, as copies take load off; narrower where layers are too large for a program of that."""
    cap = base.load_cap
    assert cap is not None
    large = base.trace.num_experts * base.num_devices > staying.BINARIES
    factor = cap.factor * (staying.NARROWER if large else staying.WIDER)
    return dataclasses.replace(cap, factor=factor if cap.rows else max(factor, 1.0))


def judged(problem: Problem, placement: Placement, cap_L: np.ndarray) -> Judged:
    """Counts a plan under the copy rule; its loads first, and no more above a cap."""
    reached_L = np.zeros(len(cap_L))
    if problem.objective == "exflow":
        placement = staying.flows(problem, placement, cap_L)
        counted = staying.counted(problem, placement)
        reached_L = counted.largest_L
    elif np.isfinite(cap_L).any():
        reached_L = spare.largest_L(problem, placement)
    if (reached_L > cap_L * (1 + SLACK)).any():
        return Judged(placement, np.inf, reached_L, False)
    value = counted.hops if problem.objective == "exflow" else problem.value_of(placement)
    return Judged(placement, value, reached_L, True)
