"""Plans: greedy first, then search with exact integer programs, and a proven bound beside it.

    Solution = solve(trace, topology, objective=..., dispatch=..., seed=..., time_limit=...)

Anytime: greedy answers in milliseconds, everything after only replaces it by something better; but
for the last step, which gives a little up where `Problem.steady` asks for it (steady.py).
Seeded and deterministic, unless the time limit cuts the search short (`Report.finished` says so).
Ctrl-C ends the search with `Interrupted`, which carries the best placement so far.
The bound is proven (bounds.py, or an integer program that ran to its end) and never above the
objective.

With replicas (num_slots above the experts) the plan without them is solved first and its spare
slots are filled (with_copies.py); the plan made for balance alone (replication.py) is the other
candidate, and the answer for the objective `load`. Values are then counted under the copy rule.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement import (
    baselines,
    chain,
    chainwise,
    coherent,
    coherent_seconds,
    greedy,
    hops,
    layerwise,
    moetuner_moves,
    moetuner_search,
    relax,
    starts,
    steady,
    with_copies,
)
from moe_jax.placement.limits import search as limits_search
from moe_jax.placement.limits import slots
from moe_jax.placement.limits.pins import Pins
from moe_jax.placement.limits.previous import Previous
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import UNITS, LoadCap, Problem
from moe_jax.placement.seconds import Work
from moe_jax.placement.topology import Topology
from moe_jax.routing.trace import Trace

BOUND_SHARE = 0.3  # of the time, at most
FIRST_SHARE = 0.5  # of the time, at most, for descent before the bound (coherent seconds)
FREE_SHARE = 0.5  # of the time for the plan without restrictions, where there are some
STEADY_SHARE, STEADY_MOST = 0.3, 5.0  # of the search's time, and seconds, for steady.py
WHOLE_SECONDS = 5.0  # of the integer programs of the whole
INTERRUPTED = "interrupted: the best so far"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a running solve stands."""

    stage: str
    seconds: float
    time_limit: float
    objective: float
    bound: float

    @property
    def gap(self) -> float:
        return _gap(self.objective, self.bound)


@dataclasses.dataclass(frozen=True)
class Report:
    """How a placement came about.

    Attributes:
      objective_name, dispatch, unit: what was minimised.
      objective: its value on the trace that was planned on.
      bound: proven; no placement has less.
      greedy: value of the greedy start; with replicas, of the plan made for balance alone.
      seconds: wall time.
      finished: the search ended by itself, before the time limit.
      history: (seconds, objective, bound) after every improvement of either.
      note: what a reader has to know, in words.
      interrupted: Ctrl-C ended the search.
      tradeoff: (moves, least objective found with so many), where there is a plan in use.
    """

    objective_name: str
    dispatch: str
    unit: str
    objective: float
    bound: float
    greedy: float
    seconds: float
    finished: bool
    history: tuple[tuple[float, float, float], ...]
    note: str = ""
    interrupted: bool = False
    tradeoff: tuple[tuple[int, float], ...] = ()

    @property
    def gap(self) -> float:
        return _gap(self.objective, self.bound)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "gap": self.gap}


class Solution(NamedTuple):
    """A placement and its report."""

    placement: Placement
    report: Report


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a search that had a placement already.

    Attributes:
      solution: the best so far, its report marked as interrupted.
    """

    def __init__(self, solution: Solution):
        super().__init__("interrupted")
        note = "; ".join(filter(None, [solution.report.note, INTERRUPTED]))
        report = dataclasses.replace(solution.report, finished=False, interrupted=True, note=note)
        self.solution = Solution(solution.placement, report)


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
    check_time_limit(time_limit)
    started = time.monotonic()
    if problem.has_replicas:
        if problem.pins is not None or problem.previous is not None:
            return _restricted_replicas(problem, seed, time_limit, progress)
        return _with_replicas(problem, seed, time_limit, progress)
    run = _Run(problem, started, time_limit, progress)
    try:
        if problem.pins is not None or problem.previous is not None:
            return _restricted(problem, run, seed, started + time_limit)
        return _searched(problem, run, seed, started, time_limit)
    except KeyboardInterrupt as stop:
        if not np.isfinite(run.best):
            raise
        raise Interrupted(run.solution("")) from stop


def _searched(
    problem: Problem, run: "_Run", seed: int, started: float, time_limit: float
) -> Solution:
    run.offer("greedy", constructed(problem))
    deadline = started + time_limit
    if time_limit == 0:
        run.prove("bound", relax.lower_bound(problem, deadline, steps=1))
        return run.solution("time limit 0: this is the greedy placement")
    for device_LE in starts.offered(problem, run.best_LE):
        run.offer("baselines", device_LE)
    now = time.monotonic()
    first = now + FIRST_SHARE * (deadline - now)
    for device_LE in coherent_seconds.begun(problem, run.best_LE, first):
        run.offer("swaps", device_LE)
    run.tell("bound")
    now = time.monotonic()
    run.prove("bound", relax.lower_bound(problem, now + BOUND_SHARE * (deadline - now)))
    run.search(seed, deadline)
    return run.solution("" if run.finished else "the time limit ended the search")


def _restricted(problem: Problem, run: "_Run", seed: int, deadline: float) -> Solution:
    """Pins, or a budget of moves from the plan in use: the free plan, and what lies before it."""
    start_LE = limits_search.start(problem)
    run.offer("plan in use" if problem.previous else "greedy", start_LE)
    left = max(deadline - time.monotonic(), 0.0)
    free = solve_problem(
        problem.unrestricted, seed, FREE_SHARE * left, run.telling("without limits")
    )
    run.prove("bound", free.report.bound)
    free_LE, value_B = free.placement.device_LE.astype(np.int64), np.zeros(0)
    for step in limits_search.search(problem, start_LE, free_LE, deadline):
        run.offer("within limits", step.device_LE)
        value_B = step.value_B
    run.finished = free.report.finished and time.monotonic() < deadline
    return run.solution("" if run.finished else "the time limit ended the search", value_B)


def _with_replicas(
    problem: Problem,
    seed: int,
    time_limit: float,
    progress: Callable[[Progress], None] | None,
) -> Solution:
    started = time.monotonic()
    deadline = started + time_limit
    bound, note = with_copies.lower_bound(problem)
    run = with_copies.begin(problem)
    best = start = run.best
    history, stopped = [(time.monotonic() - started, best.value, bound)], None
    try:
        for base in run.bases:
            if len(history) > 1 and time.monotonic() >= deadline:
                break  # filling and counting another one takes a time of its own
            share = run.base_share * time_limit
            device_LE = solve_problem(base, seed, share, progress).placement.device_LE
            for best in run.filled(device_LE.astype(np.int64), seed, deadline):
                history.append((time.monotonic() - started, best.value, bound))
                if progress is not None:
                    spent = time.monotonic() - started
                    progress(Progress("replicas", spent, time_limit, best.value, bound))
    except KeyboardInterrupt as stop:
        best, stopped = run.best, stop
    seconds = time.monotonic() - started
    finished = not run.bases or seconds < time_limit
    report = Report(
        objective_name=problem.objective,
        dispatch=problem.dispatch,
        unit=UNITS[problem.objective],
        objective=best.value,
        bound=bound,
        greedy=start.value,
        seconds=seconds,
        finished=finished,
        history=tuple(history),
        note=note if finished or stopped else f"{note}; the time limit ended the search",
    )
    solution = Solution(best.placement, report)
    if stopped is not None:
        raise Interrupted(solution) from stopped
    return solution


def _restricted_replicas(
    problem: Problem,
    seed: int,
    time_limit: float,
    progress: Callable[[Progress], None] | None,
) -> Solution:
    """As `_restricted`, with replicas."""
    started = time.monotonic()
    cap_L = with_copies.begin(problem).cap_L
    start = with_copies.shared(problem, slots.start(problem, cap_L, seed), cap_L)
    best, value = start, problem.value_of(start)
    capped = not with_copies.over_L(problem, start, cap_L).any()
    first, history, stopped, report = value, [], None, None
    try:
        free, report = solve_problem(problem.unrestricted, seed, FREE_SHARE * time_limit, progress)
        for found in slots.search(problem, start, free, cap_L, started + time_limit):
            plan = with_copies.shared(problem, found, cap_L)
            if with_copies.over_L(problem, plan, cap_L).any():
                continue
            if (new := problem.value_of(plan)) < value or not capped:
                best, value, capped = plan, new, True
                history.append((time.monotonic() - started, value, report.bound))
    except KeyboardInterrupt as stop:
        stopped = stop
    if not capped and stopped is None:
        rule = "no plan within it was found that far from the plan in use"
        raise Refused("load_cap", str(problem.load_cap), rule, "Allow more load, or more moves")
    seconds = time.monotonic() - started
    finished = report is not None and report.finished and seconds < time_limit
    bound, note = with_copies.lower_bound(problem)
    done = Report(
        objective_name=problem.objective,
        dispatch=problem.dispatch,
        unit=UNITS[problem.objective],
        objective=value,
        bound=min(bound, value),
        greedy=first,
        seconds=seconds,
        finished=finished,
        history=tuple(history),
        note=note if finished or stopped else f"{note}; the time limit ended the search",
    )
    solution = Solution(problem.previous.slotted(best) if problem.previous else best, done)
    if stopped is not None:
        raise Interrupted(solution) from stopped
    return solution


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

    def __init__(self, problem: Problem, started: float, time_limit: float, progress):
        self._problem, self._started, self._limit = problem, started, time_limit
        self._progress = progress
        self._history: list[tuple[float, float, float]] = []
        self.best, self.bound, self.greedy, self.finished = np.inf, 0.0, np.inf, False
        self.best_LE = baselines.contiguous(
            problem.trace.num_layers, problem.trace.num_experts, problem.num_devices
        )

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

    def search(self, seed: int, deadline: float) -> None:
        self.tell("search")
        problem, rng = self._problem, np.random.default_rng(seed)
        if problem.objective == "hops":
            self._fewest_hops(deadline)
            return
        searched = deadline
        if problem.steady and problem.objective in steady.OBJECTIVES:
            searched -= min(STEADY_SHARE * (deadline - time.monotonic()), STEADY_MOST)
        for device_LE in _steps(problem, self.best_LE, rng, searched):
            self.offer("search", device_LE)
        self._whole(deadline)
        self._steady(seed, deadline)
        if problem.separable and problem.trace.num_layers > 1:
            labelled_LE = _labelled(problem, self.best_LE)
            if not problem.labels_count or problem.value(labelled_LE) <= self.best:
                self.best_LE = labelled_LE
        self.finished = time.monotonic() < deadline

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
            unit=UNITS[problem.objective],
            objective=self.best,
            bound=self.bound,
            greedy=self.greedy,
            seconds=time.monotonic() - self._started,
            finished=self.finished,
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
        self.finished = time.monotonic() < deadline

    def _whole(self, deadline: float) -> None:
        """Integer programs of the whole, where they are small enough to prove optimality."""
        problem, stage = self._problem, "integer program"
        deadline = min(deadline, time.monotonic() + WHOLE_SECONDS)
        if (all_layers := chainwise.whole(problem, deadline)) is not None:
            self.offer(stage, all_layers.device)
            self.prove(stage, problem.hops(all_layers.bound) * relax.SAFETY)
        if problem.objective == "moetuner":
            found = moetuner_moves.whole(problem.tuner, problem.slots, deadline)
            if found is not None:
                self.offer(stage, found.device)
                self.prove(stage, found.bound * relax.SAFETY)
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
    if problem.objective == "seconds":
        return coherent_seconds.search(problem, start_LE, rng, deadline)
    return coherent.search(problem, start_LE, rng, deadline)


def _labelled(problem: Problem, part_LE: np.ndarray) -> np.ndarray:
    """Device numbers that keep tokens where they are from layer to layer; costs nothing else."""
    return chain.align(problem.chain(problem.top1_LEE), part_LE)


def _gap(objective: float, bound: float) -> float:
    return (objective - bound) / objective if objective > 0 else 0.0
