"""Plans: greedy first, then search with exact integer programs, and a proven bound beside it.

    Solution = solve(trace, topology, objective=..., dispatch=..., seed=..., time_limit=...)

Where a layer has few placements, all of them come in place of a search (enumerated.py).

Anytime: greedy answers in milliseconds, everything after only replaces it by something better; but
for the last step, which gives a little up where `Problem.steady` asks for it (steady.py).
Seeded and deterministic, unless the time limit cuts the search or a part of it short
(`Report.finished` says so, clock.py remembers it).
Ctrl-C ends the search with `Interrupted`, which carries the best placement so far.
The bound is proven (bounds.py, or an integer program that ran to its end) and never above the
objective.

With replicas (num_slots above the experts) the plan without them is solved first and its spare
slots are filled (solve_copies.py, with_copies.py); the plan made for balance alone
(replication.py) is the other candidate, and the answer for the objective `load`. Values are then
counted under the copy rule.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement import (
    baselines,
    chain,
    chainwise,
    clock,
    coherent,
    coherent_seconds,
    enumerated,
    greedy,
    hops,
    layerwise,
    moetuner_search,
    relax,
    shuffled,
    solve_copies,
    starts,
    steady,
    unseen,
)
from moe_jax.placement.clock import Watch
from moe_jax.placement.limits import search as limits_search
from moe_jax.placement.limits import whole as whole_lib
from moe_jax.placement.limits.pins import Pins
from moe_jax.placement.limits.previous import Previous
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.placement.seconds import Work
from moe_jax.placement.solution import Interrupted, Progress, Report, Solution, cut_by
from moe_jax.placement.topology import Topology
from moe_jax.routing.trace import Trace

ALL_SHARE = 0.5  # of the time, at most, for a look at all placements
SURE = 0.5  # of that: within a budget what is expected to take longer is not begun
BOUND_SHARE = 0.3  # of the time, at most
FIRST_SHARE = 0.5  # of the time, at most, for descent before the bound (coherent seconds)
FREE_SHARE = 0.5  # of the time for the plan without restrictions, where there are some
STEADY_SHARE, STEADY_MOST = 0.3, 5.0  # of the search's time, and seconds, for steady.py
WHOLE_SECONDS = 5.0  # of the integer programs of the whole


def solve(
    trace: Trace,
    topology: Topology,
    *,
    objective: str = "seconds",
    dispatch: str = "exchange",
    work: Work | None = None,
    load_cap: LoadCap | None = None,
    num_slots: int | None = None,
    pins: Pins | None = None,
    previous: Previous | None = None,
    seed: int = 0,
    time_limit: float = 60.0,
    progress: Callable[[Progress], None] | None = None,
) -> Solution:
    """The best placement that was found for this trace and machine.

    One seed gives one plan, as long as the report says `finished`.

    Args:
      trace: what to plan on; judge on another one (trace.split).
      topology: the machine.
      objective: one of problem.OBJECTIVES.
      dispatch: how rows travel, one of cost.DISPATCHES.
      work: sizes of the model and the step, for `seconds`.
      load_cap: largest device load of any layer.
      num_slots: slots of a layer; above the experts there are replicas. None: one per expert.
      pins: experts that have to be on a device.
      previous: the plan in use, and how much may move away from it.
      seed: of the search.
      time_limit: seconds; 0 returns the greedy placement, or what a budget allows of it.
      progress: called at every step with a `Progress`.
    """
    problem = Problem(
        trace,
        topology,
        objective,
        dispatch,
        work or Work(),
        load_cap,
        num_slots,
        pins=pins,
        previous=previous,
    )
    return solve_problem(problem, seed, time_limit, progress)


def check_time_limit(time_limit: float) -> None:
    """Refuses what is not a number of seconds."""
    if not 0 <= time_limit < float("inf"):
        raise Refused("time_limit", time_limit, "seconds, at least 0", "Use 60")


def solve_problem(
    problem: Problem,
    seed: int,
    time_limit: float,
    progress: Callable[[Progress], None] | None = None,
) -> Solution:
    """`solve` for a problem that is put together already.

    Raises:
      Interrupted: with the best placement so far, on Ctrl-C once there is one.
    """
    return _solved(problem, seed, time_limit, progress, BOUND_SHARE)


def unproven(
    problem: Problem,
    seed: int,
    time_limit: float,
    progress: Callable[[Progress], None] | None = None,
) -> Solution:
    """`solve_problem` for plans that others begin with: no time goes into a bound."""
    return _solved(problem, seed, time_limit, progress, 0.0)


def _solved(
    problem: Problem,
    seed: int,
    time_limit: float,
    progress: Callable[[Progress], None] | None,
    bound_share: float,
) -> Solution:
    check_time_limit(time_limit)
    started = time.monotonic()
    problem = resolved(problem)
    if problem.has_replicas:
        if problem.pins is not None or problem.previous is not None:
            return solve_copies.within_limits(problem, seed, time_limit, progress, unproven)
        return solve_copies.free(problem, seed, time_limit, progress, unproven)
    with clock.watched() as watch:
        run = _Run(problem, started, time_limit, progress, bound_share, watch)
        try:
            if problem.pins is not None or problem.previous is not None:
                return _restricted(problem, run, seed, started, time_limit)
            return _searched(problem, run, seed, started, time_limit)
        except KeyboardInterrupt as stop:
            if not np.isfinite(run.best):
                raise
            raise Interrupted(run.solution("")) from stop


def resolved(problem: Problem) -> Problem:
    """The problem, with what unseen sequences add to a cap that is meant for them (unseen.py)."""
    return unseen.resolved(problem, constructed)


def _searched(
    problem: Problem, run: "_Run", seed: int, started: float, time_limit: float
) -> Solution:
    run.offer("greedy", constructed(problem))
    deadline = started + time_limit
    if time_limit == 0:
        clock.cut()
        run.bounded(deadline, steps=1)
        return run.solution("time limit 0: this is the greedy placement")
    if not run.all_placements(deadline):
        for device_LE in starts.offered(problem, run.best_LE):
            if clock.late(deadline):
                break  # counting one may take longer than all of a short limit
            run.offer("baselines", device_LE)
        if not clock.late(deadline):
            first = clock.share(deadline, FIRST_SHARE)
            for device_LE in coherent_seconds.begun(problem, run.best_LE, first):
                run.offer("swaps", device_LE)
        run.bounded(deadline)
        if not clock.late(deadline):
            run.search(seed, deadline)
    run.ended(seed, deadline)
    return run.solution(run.note)


def _restricted(
    problem: Problem, run: "_Run", seed: int, started: float, time_limit: float
) -> Solution:
    """Pins, or a budget of moves from the plan in use: the free plan, and what lies before it."""
    deadline = started + time_limit
    start_LE = limits_search.start(problem)
    run.offer("plan in use" if problem.previous else "greedy", start_LE)
    if problem.previous is None and run.all_placements(deadline):
        return run.solution(run.note)
    left = max(deadline - time.monotonic(), 0.0)
    with clock.apart():
        free = solve_problem(
            problem.unrestricted, seed, FREE_SHARE * left, run.telling("without limits")
        )
    run.prove("bound", free.report.bound)
    whole = None if problem.previous is None else run.all_within(deadline)
    if whole is not None and whole.complete:  # the free plan gave a bound alone
        return run.solution(run.note, whole.value_B)
    if not free.report.finished:
        clock.cut()
    free_LE, value_B = free.placement.device_LE.astype(np.int64), np.zeros(0)
    for step in limits_search.search(problem, start_LE, free_LE, deadline):
        run.offer("within limits", step.device_LE)
        value_B = step.value_B
    if whole is not None:
        found_B = np.concatenate([whole.value_B, value_B[len(whole.value_B) :]])
        value_B = np.minimum.accumulate(found_B)  # what was searched for may be above the optima
    if problem.previous is not None and value_B.size:
        moves = problem.previous.moves - problem.previous.left(run.best_LE)
        value_B[moves:] = np.minimum(value_B[moves:], run.best)
    return run.solution(run.note, value_B)


def constructed(problem: Problem) -> np.ndarray:
    """int64 [L, E]: the best of the constructions, all of which keep the load cap; no search."""
    layers = range(problem.trace.num_layers)
    candidates = [problem.balanced_LE]
    far = time.monotonic() + 3600.0
    if problem.objective == "exflow":
        first_E = problem.balanced_LE[0]
        swept_LE = chain.sweep(problem.chain(problem.top1_LEE), first_E, far)
        candidates.append(problem.repaired(swept_LE))
    elif problem.objective == "hops":
        hops_MM = problem.topology.hops_MM
        free_LE = hops.hops_optimal(problem.load_LE, hops_MM, problem.dispatcher)
        candidates.append(problem.repaired(free_LE))
    elif problem.objective != "load":
        grown_LE = np.stack(
            [greedy.grown(problem.layer(n, problem.cap_L[n]), problem.slots) for n in layers]
        )
        candidates.append(_labelled(problem, problem.repaired(grown_LE)))
    return min(candidates, key=problem.value)


class _Run:
    """The best placement and bound so far, and how they came about."""

    def __init__(
        self,
        problem: Problem,
        started: float,
        time_limit: float,
        progress,
        bound_share: float,
        watch: Watch,
    ):
        self._problem, self._started, self._limit = problem, started, time_limit
        self._progress, self._bound_share, self._watch = progress, bound_share, watch
        self._history: list[tuple[float, float, float]] = []
        self.best, self.bound, self.greedy = np.inf, 0.0, np.inf
        self.best_LE = baselines.contiguous(
            problem.trace.num_layers, problem.trace.num_experts, problem.num_devices
        )

    @property
    def note(self) -> str:
        """What a reader has to know of how it ended."""
        return cut_by(self._limit) if self._watch.cut else ""

    def offer(self, stage: str, device_LE: np.ndarray) -> None:
        if not self._problem.all_allowed(device_LE):
            return
        value = self._problem.value(device_LE)
        if value < self.best:
            if not np.isfinite(self.best):
                self.greedy = value
            self.best, self.best_LE = value, device_LE
            self._remember()
        self.tell(stage)

    def prove(self, stage: str, bound: float) -> None:
        if (proven := min(bound, self.best)) > self.bound:
            self.bound = proven
            self._remember()
        self.tell(stage)

    def bounded(self, deadline: float, steps: int = relax.STEPS) -> None:
        """The bound of relax.py, for its share of the time."""
        if not self._bound_share:
            return
        self.tell("bound")
        end = clock.share(deadline, self._bound_share)
        self.prove("bound", relax.lower_bound(self._problem, end, steps))

    def all_placements(self, deadline: float) -> bool:
        """The optimum, where layers have so few placements that all are looked at in time."""
        self.tell("all placements")
        now = time.monotonic()
        left = ALL_SHARE * (deadline - now)
        found = enumerated.solved(self._problem, left, now + left)
        if found is None:
            return False
        self.offer("all placements", found.device)
        self.prove("all placements", found.bound * relax.SAFETY)
        return True

    def all_within(self, deadline: float) -> whole_lib.Whole | None:
        """The same within a budget of moves; None where that is not looked at."""
        self.tell("all placements")
        now = time.monotonic()
        left = ALL_SHARE * (deadline - now)
        found = whole_lib.solved(self._problem, SURE * left, now + left)
        if found is not None:
            self.offer("all placements", found.device_LE)
            self.prove("all placements", found.bound * relax.SAFETY)
        return found

    def search(self, seed: int, deadline: float) -> None:
        self.tell("search")
        problem, rng = self._problem, np.random.default_rng(seed)
        if problem.objective == "hops":
            self._fewest_hops(deadline)
            return
        searched = deadline
        if problem.steady and problem.objective in steady.OBJECTIVES:
            searched -= min(STEADY_SHARE * clock.left(deadline), STEADY_MOST)
        for device_LE in _steps(problem, self.best_LE, rng, searched):
            self.offer("search", device_LE)
            if clock.late(searched):
                break  # counting the next one may take a time of its own
        self._whole(deadline)

    def ended(self, seed: int, deadline: float) -> None:
        """What follows a search: even loads, and numbers that keep tokens where they are."""
        problem = self._problem
        if problem.objective == "hops":
            return
        self._steady(seed, deadline)
        if problem.separable and problem.trace.num_layers > 1:
            labelled_LE = _labelled(problem, self.best_LE)
            if not problem.labels_count or problem.value(labelled_LE) <= self.best:
                self.best_LE = labelled_LE

    def _steady(self, seed: int, deadline: float) -> None:
        """Gives up a share of the objective for loads that stay even (steady.py)."""
        problem = self._problem
        if not problem.steady:
            return
        steady_LE = steady.steadied(problem, self.best_LE, seed, deadline)
        if steady_LE is None or not problem.all_allowed(steady_LE):
            return
        self.best, self.best_LE = problem.value(steady_LE), steady_LE
        self._remember()

    def solution(self, note: str, value_B: np.ndarray | None = None) -> Solution:
        problem = self._problem
        placement = Placement.from_device_LE(self.best_LE, problem.num_devices)
        tradeoff: tuple[tuple[int, float], ...] = ()
        if problem.previous is not None:
            placement = problem.previous.slotted(placement)
            tradeoff = limits_search.corners(value_B) if value_B is not None else ()
        report = Report(
            objective_name=problem.objective,
            dispatch=problem.dispatch,
            unit=problem.unit,
            objective=self.best,
            bound=self.bound,
            greedy=self.greedy,
            seconds=time.monotonic() - self._started,
            finished=not self._watch.cut,
            history=tuple(self._history),
            note=note,
            tradeoff=tradeoff,
        )
        return Solution(placement, report)

    def _fewest_hops(self, deadline: float) -> None:
        """Every layer solved exactly, under caps as an integer program."""
        problem = self._problem
        cap_LM = problem.cap_L[:, None] * problem.topology.speed_M
        found = hops.solved(problem.hop_costs, problem.load_LE, cap_LM, self.best_LE, deadline)
        self.offer("integer program", found.device_LE)
        self.prove("integer program", found.bound / problem.token_layers * relax.SAFETY)

    def _whole(self, deadline: float) -> None:
        """Integer programs of the whole, where they are small enough to prove optimality."""
        problem, stage = self._problem, "integer program"
        deadline = min(deadline, time.monotonic() + WHOLE_SECONDS)
        if (all_layers := chainwise.whole(problem, deadline)) is not None:
            self.offer(stage, all_layers.device)
            self.prove(stage, problem.hops(all_layers.bound) * relax.SAFETY)
        if problem.objective != "rows" or not problem.separable:
            return
        contacts, device_LE = 0.0, self.best_LE.copy()
        for layer in range(problem.trace.num_layers):
            solved = layerwise.whole_layer(problem, layer, deadline)
            if solved is None:
                return
            contacts += solved.bound
            if problem.layer_value(layer, solved.device) < problem.layer_value(
                layer, device_LE[layer]
            ):
                device_LE[layer] = solved.device
        self.offer(stage, device_LE)
        devices = problem.num_devices
        rows = contacts * 2 * (devices - 1) / devices / problem.token_layers
        self.prove(stage, rows * relax.SAFETY)

    def _remember(self) -> None:
        self._history.append((time.monotonic() - self._started, self.best, self.bound))

    def telling(self, stage: str) -> Callable[[Progress], None] | None:
        """For a search inside this one: its stages, under this name."""
        tell = self._progress
        if tell is None:
            return None
        return lambda step: tell(
            dataclasses.replace(step, stage=f"{stage}: {step.stage}", time_limit=self._limit)
        )

    def tell(self, stage: str) -> None:
        if self._progress is not None:
            seconds = time.monotonic() - self._started
            self._progress(Progress(stage, seconds, self._limit, self.best, self.bound))


def _steps(problem: Problem, start_LE, rng, deadline: float) -> Iterator[np.ndarray]:
    if problem.objective == "exflow":
        return chainwise.transitions(problem, start_LE, rng, deadline)
    if problem.objective == "moetuner":
        even_LE = problem.balanced_LE
        return moetuner_search.search(problem.tuner, start_LE, even_LE, rng, deadline)
    if problem.separable:
        return layerwise.search(problem, start_LE, rng, deadline)
    if problem.objective == "seconds" and problem.dispatch == "coherent":
        return coherent_seconds.search(problem, start_LE, rng, deadline)
    if problem.dispatch == "shuffled":
        return shuffled.search(problem, start_LE, rng, deadline)
    return coherent.search(problem, start_LE, rng, deadline)


def _labelled(problem: Problem, part_LE: np.ndarray) -> np.ndarray:
    """Device numbers that keep tokens where they are from layer to layer; costs nothing else."""
    return chain.align(problem.chain(problem.top1_LEE), part_LE)
