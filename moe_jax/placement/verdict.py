"""Is a better placement worth it? Planned on window A, judged on window B, the move counted.

Axes: B bootstrap samples, L MoE layers.

The rule, on the seconds of window B that the new placement saves against the one in use, with the
95 % interval over sequences (paired.py), W being "the move pays for itself within `steps` steps,
and the saving is at least `min_gain` of the time":
- not enough data: fewer than MIN_SEQUENCES sequences judge; or the interval contains 0 and at its
  upper end W holds, so that more sequences may decide it;
- recommended: the interval's lower end is above 0, and W holds for the saving itself;
- not recommended: everything else.
The rule looks at seconds whatever the objective of the plan was. It does not look at the cost of
planning, nor at a pause of the server while experts move.

Beside it, with figures of window B throughout:
- the null test: the same on the same trace without affinity (windows.py). It keeps what popularity
  alone is worth; the rest of the gain is affinity.
- more recording: plans from a half, a quarter and an eighth of window A. Where the last doubling
  still gained, the next one may.
- for split=time: the gain on window A itself (in-sample, so optimistic) and on each quarter of
  window B. Where it falls, the plan goes stale.
- for split=name: the gain on every group, from the plan that never saw it. The gain of the whole is
  the mean over groups by tokens, and the move that is counted is the dearest one.

Time: --time-limit for the plan, as much for the null test, and a quarter for each of the four plans
of the third table: TIMES x time limit at most. Windows share these. Counting, shuffling and judging
come on top, about SECONDS_PER_ID for every expert id of every window.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.errors import Refused
from moe_jax.placement import move as move_lib
from moe_jax.placement import paired, paired_copies, solve
from moe_jax.placement import windows as windows_lib
from moe_jax.placement.evidence import MIN_SEQUENCES
from moe_jax.placement.move import Move
from moe_jax.placement.paired import Gain
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.placement.solution import Interrupted, Progress, Report, Solution
from moe_jax.placement.windows import Window
from moe_jax.routing.trace import Trace

RECOMMENDED, NOT_RECOMMENDED, NOT_ENOUGH = "recommended", "not recommended", "not enough data"
SHARES = (1.0, 0.5, 0.25, 0.125)  # of window A
SHARE_LIMIT = 0.25  # of the time limit, for each of them
TIMES = 3  # time limits that everything takes together
SECONDS_PER_ID = 0.8e-6
GATHERED = "gathered dispatch moves the same rows whatever the placement: it can gain by load only"

Tell = Callable[[Progress], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked, besides the problem.

    Attributes:
      split: one of windows.SPLITS.
      seed: of the halves, the search, the resampling and the null test.
      time_limit: seconds of the plan.
      steps: within which the move has to pay for itself.
      expert_bytes: that move with an expert; None: three matrices of d_model x d_ff.
      min_gain: share of a layer's time that has to be saved.
    """

    split: str = "sequence"
    seed: int = 0
    time_limit: float = 60.0
    steps: int = 100_000
    expert_bytes: int | None = None
    min_gain: float = 0.0

    def __post_init__(self):
        for field, least in (("steps", 1), ("expert_bytes", 1), ("seed", 0)):
            value = getattr(self, field)
            if value is not None and not least <= value < 2**62:
                raise Refused(field, value, f"a whole number of at least {least}", "Correct it")
        if not 0 <= self.time_limit < float("inf"):
            raise Refused("time_limit", self.time_limit, "seconds, at least 0", "Use 60")
        if not 0 <= self.min_gain < 1:
            shown = f"{100 * self.min_gain:g}"
            raise Refused("min_gain", shown, "percent, from 0 to below 100", "Use 2")


@dataclasses.dataclass(frozen=True)
class Named:
    """A gain of the seconds on a part of the trace.

    Attributes:
      name: of the part.
      sequences: in it; for the table of evidence, that were planned on.
      gain: None where no plan could be made (the load cap is out of reach of so few sequences).
    """

    name: str
    sequences: int
    gain: Gain | None

    def to_json(self) -> dict[str, Any]:
        gain = self.gain.to_json() if self.gain else None
        return {"name": self.name, "sequences": self.sequences, "seconds": gain}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The answer and all its figures.

    Attributes:
      answer: RECOMMENDED, NOT_RECOMMENDED or NOT_ENOUGH.
      reason: one sentence.
      planned, judged: sequences; every sequence is judged once.
      gains: of seconds (per layer and step), rows and load.
      null: the same without affinity.
      move: what it costs; before_relabelling: what it would without the new device numbers.
      steps: to pay for the move; None: never. steps_low: at the lower end of the interval.
      parts: groups (split=name), or in-sample and quarters (split=time).
      evidence: plans from less of window A.
      notes: what a reader has to know.
      placement: the new one, with the device numbers that move least; of the dearest move where
        there are several windows.
      search: how that plan was found.
    """

    answer: str
    reason: str
    settings: Settings
    planned: int
    judged: int
    gains: dict[str, Gain]
    null: dict[str, Gain]
    move: Move
    before_relabelling: Move
    steps: float | None
    steps_low: float | None
    parts: tuple[Named, ...]
    evidence: tuple[Named, ...]
    notes: tuple[str, ...]
    placement: Placement
    search: Report

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON data."""
        return {
            "verdict": self.answer,
            "reason": self.reason,
            "split": self.settings.split,
            "within_steps": self.settings.steps,
            "min_gain": self.settings.min_gain,
            "plan_digest": self.placement.digest,
            "objective": self.search.objective,
            "bound": self.search.bound,
            "gap": self.search.gap,
            "planned_on_sequences": self.planned,
            "judged_on_sequences": self.judged,
            "gains": {name: gain.to_json() for name, gain in self.gains.items()},
            "null_test": {name: gain.to_json() for name, gain in self.null.items()},
            "move": {
                **self.move.to_json(),
                "bytes_before_relabelling": self.before_relabelling.bytes,
                "steps_to_pay": self.steps,
                "steps_to_pay_at_lower_end": self.steps_low,
            },
            "parts": [part.to_json() for part in self.parts],
            "evidence": [part.to_json() for part in self.evidence],
            "notes": list(self.notes),
        }


def verdict(
    problem: Problem,
    before: Placement | None = None,
    settings: Settings | None = None,
    progress: Tell | None = None,
    say: Callable[[str], None] | None = None,
    planned: Callable[[Placement], None] | None = None,
) -> Verdict:
    """Plans, judges, counts the move, and says what that comes to.

    Args:
      problem: the whole trace, the machine, and what a plan minimises.
      before: what is in use; contiguous if None.
      settings: how it is split and judged.
      progress: called at every step of every plan.
      say: is told how long it will take, once the input is accepted.
      planned: is told the plan of every window before it is judged, its devices numbered so that
        least moves; after Ctrl-C in the search the best so far.
    """
    settings = settings or Settings()
    trace = problem.trace
    if before is None:
        before = contiguous(problem)
    found = windows_lib.windows(trace, settings.split, settings.seed)
    for window in found:
        here = solve.resolved(dataclasses.replace(problem, trace=window.plan))
        if not here.needs_copies:
            _ = here.cap_L  # refuses caps out of reach
    if say is not None:
        say(estimate(settings, found))
    judge = _Judge(problem, before, found, settings, progress)
    try:
        solutions = judge.solutions("plan", [window.plan for window in found])
    except KeyboardInterrupt as stop:
        last = stop.solution if isinstance(stop, Interrupted) else judge.last
        if planned is not None and last is not None:
            planned(move_lib.relabelled(problem, before, last.placement))
        raise
    raw = [solution.placement for solution in solutions]
    after = [move_lib.relabelled(problem, before, placement) for placement in raw]
    if planned is not None:
        for placement in after:
            planned(placement)
    gains = judge.gains(after)
    size = problem.work.expert_bytes if settings.expert_bytes is None else settings.expert_bytes
    moves = [move_lib.move(before, plan, problem.topology, size) for plan in after]
    raw_moves = [move_lib.move(before, plan, problem.topology, size) for plan in raw]
    dearest = max(range(len(moves)), key=lambda index: moves[index].seconds)
    move, layers = moves[dearest], trace.num_layers
    judged = sum(window.judge.num_sequences for window in found)
    saved = gains["seconds"].difference
    answer, reason = decide(
        gains["seconds"], move, layers, judged, settings.steps, settings.min_gain
    )
    return Verdict(
        answer,
        reason,
        settings,
        planned=max(window.plan.num_sequences for window in found),
        judged=judged,
        gains=gains,
        null=judge.without_affinity(),
        move=move,
        before_relabelling=raw_moves[dearest],
        steps=move.steps(layers * saved.value),
        steps_low=move.steps(layers * saved.low),
        parts=tuple(judge.parts(after)),
        evidence=tuple(judge.evidence()),
        notes=(GATHERED,) if problem.dispatch == "gathered" else (),
        placement=after[dearest],
        search=solutions[dearest].report,
    )


def contiguous(problem: Problem) -> Placement:
    """What is in use where nobody says."""
    trace = problem.trace
    if problem.needs_copies:
        rule = f"{problem.num_devices} devices do not divide {trace.num_experts} experts"
        raise Refused("before", "contiguous", rule, "Give the plan in use")
    return Placement.contiguous(trace.num_layers, trace.num_experts, problem.num_devices)


def decide(
    gain: Gain, move: Move, layers: int, judged: int, steps: int, min_gain: float = 0.0
) -> tuple[str, str]:
    """The verdict and its reason in a sentence; the rule is at the head of this file.

    Args:
      gain: of the seconds per layer and step.
      move: what it costs.
      layers: of the model.
      judged: sequences that judged.
      steps: within which the move has to pay for itself.
      min_gain: share of the time that has to be saved.
    """
    saved, share = gain.difference, gain.share

    def worth(seconds: float) -> bool:
        needed = move.steps(layers * seconds)
        return needed is not None and needed <= steps and seconds >= min_gain * gain.before

    interval = f"{percent(share.low)} to {percent(share.high)} of the time of a layer"
    if judged < MIN_SEQUENCES:
        return NOT_ENOUGH, (
            f"only {judged} sequences judge, at least {MIN_SEQUENCES} are needed: record more"
        )
    if saved.low <= 0 <= saved.high:
        if worth(saved.high):
            return NOT_ENOUGH, (
                f"the saving is {interval}, which contains 0 but may be worth it: record more"
            )
        return NOT_RECOMMENDED, f"the saving is {interval}: nothing that would pay for a move"
    if saved.low > 0 and worth(saved.value):
        needed = move.steps(layers * saved.value)
        return RECOMMENDED, (
            f"it saves {interval}, and the move has paid for itself after "
            f"{steps_of(needed)} ({steps:,} were allowed)"
        )
    if saved.low > 0 and share.value < min_gain:
        return NOT_RECOMMENDED, (
            f"it saves {interval}, on the whole {percent(share.value)}, less than the "
            f"{percent(min_gain)} that were asked for"
        )
    if saved.low > 0:
        return NOT_RECOMMENDED, (
            f"it saves {interval}, but the move needs {steps_of(move.steps(layers * saved.value))} "
            f"to pay for itself, more than the {steps:,} allowed"
        )
    return NOT_RECOMMENDED, f"the saving is {interval}: the plan costs time"


class _Judge:
    """The windows, what is in use, and the plans and gains that are asked of them."""

    def __init__(
        self,
        problem: Problem,
        before: Placement,
        windows: Sequence[Window],
        settings: Settings,
        progress: Tell | None,
    ):
        self._problem, self._before, self._windows = problem, before, windows
        self._settings, self._progress = settings, progress
        self.last: Solution | None = None  # of the plans that were made
        total = sum(window.judge.num_sequences for window in windows)
        # one draw over all windows; a group that is not drawn has no tokens in that sample
        weight_BS = paired.weights(total, settings.seed)
        self._weights, start = [], 0
        for window in windows:
            self._weights.append(weight_BS[:, start : start + window.judge.num_sequences])
            start += window.judge.num_sequences

    def plans(self, stage: str, traces: Sequence[Trace], share: float = 1.0) -> list[Placement]:
        return [solution.placement for solution in self.solutions(stage, traces, share)]

    def solutions(self, stage: str, traces: Sequence[Trace], share: float = 1.0) -> list[Solution]:
        """One plan for each trace; they share the time limit (or this share of it)."""
        limit = share * self._settings.time_limit / len(traces)
        made = []
        for number, trace in enumerate(traces, start=1):
            name = stage if len(traces) == 1 else f"{stage} {number} of {len(traces)}"
            problem = dataclasses.replace(self._problem, trace=trace)
            tell = self._telling(name)
            self.last = solve.solve_problem(problem, self._settings.seed, limit, tell)
            made.append(self.last)
            report = self.last.report
            if tell is not None:
                tell(Progress("judging", report.seconds, limit, report.objective, report.bound))
        return made

    def gains(
        self, after: Sequence[Placement], judges: Sequence[Trace] | None = None
    ) -> dict[str, Gain]:
        """Of one plan per window, on the windows' judging parts (or others of the same sizes)."""
        if judges is None:
            judges = [window.judge for window in self._windows]
        before_all, after_all = [], []
        for trace, placement, weight_BS in zip(judges, after, self._weights, strict=True):
            judging = self._judging(trace)
            before_all.append(paired_copies.sample(judging, self._before, weight_BS))
            after_all.append(paired_copies.sample(judging, placement, weight_BS))
        return paired.gains(paired.pooled(before_all), paired.pooled(after_all))

    def without_affinity(self) -> dict[str, Gain]:
        """The gains when both parts of every window have lost their affinity."""
        seed = self._settings.seed
        shuffled = [windows_lib.without_affinity(window.plan, seed) for window in self._windows]
        judges = [windows_lib.without_affinity(window.judge, seed + 1) for window in self._windows]
        return self.gains(self.plans("null test", shuffled), judges)

    def parts(self, after: Sequence[Placement]) -> list[Named]:
        """Groups, or how the gain develops in time."""
        if self._settings.split == "name":
            pairs = zip(self._windows, after, strict=True)
            return [self._alone(window.name, window.judge, plan) for window, plan in pairs]
        if self._settings.split == "time":
            window, plan = self._windows[0], after[0]
            rows = [self._alone("planned on (in-sample)", window.plan, plan)]
            for number, trace in enumerate(windows_lib.quarters(window.judge), start=1):
                rows.append(self._alone(f"quarter {number} after", trace, plan))
            return rows
        return []

    def evidence(self) -> list[Named]:
        """What plans from a share of window A gain."""
        rows: dict[int, Named] = {}
        for share in SHARES:
            traces = [windows_lib.part(w.plan, share, self._settings.seed) for w in self._windows]
            sequences = max(trace.num_sequences for trace in traces)
            if sequences in rows:
                continue
            stage = f"plan from 1/{round(1 / share)}"
            try:
                gain = self.gains(self.plans(stage, traces, SHARE_LIMIT))["seconds"]
            except Refused:  # few sequences may be harder to balance than all of them
                gain = None
            name = "all" if share == 1 else f"1/{round(1 / share)}"
            rows[sequences] = Named(name, sequences, gain)
        return list(rows.values())

    def _alone(self, name: str, trace: Trace, placement: Placement) -> Named:
        weight_BS = paired.weights(trace.num_sequences, self._settings.seed)
        judging = self._judging(trace)
        before = paired_copies.sample(judging, self._before, weight_BS)
        after = paired_copies.sample(judging, placement, weight_BS)
        return Named(name, trace.num_sequences, paired.gains(before, after)["seconds"])

    def _judging(self, trace: Trace) -> Problem:
        return dataclasses.replace(self._problem.unrestricted, trace=trace, load_cap=None)

    def _telling(self, name: str) -> Tell | None:
        tell = self._progress
        if tell is None:
            return None
        return lambda step: tell(dataclasses.replace(step, stage=f"{name}: {step.stage}"))


def estimate(settings: Settings, windows: Sequence[Window]) -> str:
    """How long it will take, for people who wait."""
    ids = sum(w.plan.expert_ids_TLK.size + w.judge.expert_ids_TLK.size for w in windows)
    return (
        f"At most about {TIMES * settings.time_limit + SECONDS_PER_ID * ids:.0f} s: {TIMES} x the "
        f"time limit of {settings.time_limit:g} s (the plan, the null test, plans from fewer "
        f"sequences), and counting and judging (windows: {len(windows)})."
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def steps_of(steps: float | None) -> str:
    if steps is None:
        return "never"
    whole = math.ceil(steps)
    return f"{whole:,} step" + ("" if whole == 1 else "s")
