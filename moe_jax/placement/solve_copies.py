"""The search with replicas: free, or within pins and a budget of moves from the plan in use.

`free` begins with the plan for balance alone, fills plans without copies, and exchanges copies
(with_copies.py).
`within_limits` begins with the plan in use and looks between it and the free plan
(limits/slots.py). Both ask for plans of other problems through `inner`, solve.solve_problem.
"""

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement import clock, spare, with_copies
from moe_jax.placement.clock import Watch
from moe_jax.placement.limits import slots
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.placement.solution import Interrupted, Progress, Report, Solution, cut_by
from moe_jax.placement.spare import Judged

FREE_SHARE = 0.5  # of the time for plans without limits, or without copies
QUICK = 0.1  # seconds that counting may take for plans to be counted even where no time is left

Tell = Callable[[Progress], None] | None
Inner = Callable[[Problem, int, float, Tell], Solution]


@dataclasses.dataclass(eq=False)
class _Best:
    """The best plan so far, and how it came about."""

    problem: Problem
    started: float
    time_limit: float
    progress: Tell
    bound: float
    note: str
    placement: Placement
    value: float
    watch: Watch

    def __post_init__(self):
        self.first = self.value
        self.history = [(time.monotonic() - self.started, self.value, self.bound)]

    def take(self, placement: Placement, value: float) -> None:
        self.placement, self.value = placement, value
        spent = time.monotonic() - self.started
        self.history.append((spent, value, min(self.bound, value)))
        if self.progress is not None:
            self.progress(Progress("replicas", spent, self.time_limit, value, self.bound))

    def telling(self) -> Tell:
        """For plans without copies, which have no bound of their own: beside that with copies."""
        tell = self.progress
        if tell is None:
            return None
        return lambda step: tell(dataclasses.replace(step, bound=min(self.bound, step.objective)))

    def solution(self, stopped: KeyboardInterrupt | None) -> Solution:
        """As it stands; raises Interrupted after Ctrl-C."""
        problem, placement, finished = self.problem, self.placement, not self.watch.cut
        if problem.previous is not None:
            placement = problem.previous.slotted(placement)
        report = Report(
            objective_name=problem.objective,
            dispatch=problem.dispatch,
            unit=problem.unit,
            objective=self.value,
            bound=min(self.bound, self.value),
            greedy=self.first,
            seconds=time.monotonic() - self.started,
            finished=finished,
            history=tuple(self.history),
            note=self.note if finished or stopped else f"{self.note}; {cut_by(self.time_limit)}",
        )
        if stopped is not None:
            raise Interrupted(Solution(placement, report)) from stopped
        return Solution(placement, report)


def free(problem: Problem, seed: int, time_limit: float, progress: Tell, inner: Inner) -> Solution:
    """Plans without copies, filled; the plan for balance alone is where it begins.

    Raises:
      Interrupted: with the best placement so far.
    """
    started = time.monotonic()
    with clock.watched() as watch:
        run = with_copies.begin(problem)
        bound, note = with_copies.lower_bound(problem, started + run.bound_share * time_limit)
        first = run.best.placement, run.best.value
        best = _Best(problem, started, time_limit, progress, bound, note, *first, watch)
        return _freely(run, best, seed, inner)


def _freely(run: with_copies.Run, best: _Best, seed: int, inner: Inner) -> Solution:
    """From what has begun: see `free`."""
    deadline, even, stopped = best.started + best.time_limit, best.placement, None
    try:
        if run.problem.objective != "load" and (left := _to_count(run, deadline)) is not None:
            device_LE = spare.first_copies(even)
            if run.base is not None:
                share = min(run.base_share * best.time_limit, FREE_SHARE * left)
                without, _ = inner(run.base, seed, share, best.telling())
                device_LE = without.device_LE.astype(np.int64)
            if _to_count(run, deadline) is not None:
                for found in run.filled(device_LE, seed, deadline):
                    best.take(found.placement, found.value)
        for found in run.exchanged(even, seed, deadline):
            best.take(found.placement, found.value)
    except KeyboardInterrupt as stop:
        stopped = stop
    return best.solution(stopped)


def _to_count(run: with_copies.Run, deadline: float) -> float | None:
    """Seconds that are left if a plan is counted after them; None where that takes too long."""
    left = clock.left(deadline - run.count_seconds)
    return left if left or run.count_seconds < QUICK else None


def within_limits(
    problem: Problem, seed: int, time_limit: float, progress: Tell, inner: Inner
) -> Solution:
    """From the plan in use, or with pins.

    Raises:
      Refused: no plan within the load cap was found so near to the plan in use.
      Interrupted: with the best placement so far.
    """
    started = time.monotonic()
    deadline = started + time_limit
    with clock.watched() as watch:
        run, stopped = with_copies.begin(problem), None
        cap_L = run.cap_L
        bound, note = with_copies.lower_bound(problem, started + run.bound_share * time_limit)
        judging = time.monotonic()
        start = with_copies.judged(problem, slots.start(problem, cap_L, seed), cap_L)
        capped, value = start.fits, start.value
        if not capped:
            value = problem.value_of(start.placement)
        judge_seconds = time.monotonic() - judging

        def judge(plan: Placement) -> Judged | None:
            """Not where it would be counted after the limit, once there is a plan to keep."""
            slow = capped and judge_seconds >= QUICK
            if slow and clock.late(deadline - judge_seconds):
                return None
            return with_copies.judged(problem, plan, cap_L)

        first = start.placement, value
        best = _Best(problem, started, time_limit, progress, bound, note, *first, watch)
        try:
            if (left := clock.left(deadline - judge_seconds)) or not capped:
                now, even = time.monotonic(), (run.best.placement, run.best.value)
                goal, _ = _freely(
                    run,
                    _Best(run.problem, now, FREE_SHARE * left, progress, bound, note, *even, watch),
                    seed,
                    inner,
                )
                for found in slots.search(problem, start, goal, cap_L, deadline, judge):
                    if found.fits and (found.value < best.value or not capped):
                        best.take(found.placement, found.value)
                        capped = True
        except KeyboardInterrupt as stop:
            stopped = stop
        if not capped and stopped is None:
            where, ways = [], ["more load"]
            if problem.previous is not None:
                where, ways = ["that near to the plan in use"], [*ways, "more moves"]
            if problem.pins is not None:
                where, ways = [*where, "with these pins"], [*ways, "fewer pins"]
            ways += ["more time"] * watch.cut
            rule = f"no plan within it was found {' and '.join(where)}"
            fix = f"Allow {', '.join(ways[:-1])} or {ways[-1]}"
            raise Refused("load_cap", str(problem.load_cap), rule, fix)
        return best.solution(stopped)
