"""All baselines and the planner on one trace: planned on one half, judged on the other.

Baselines are those of baselines/registry.py that apply to the machine and the slots; then come the
planner's own construction (`greedy`) and the planner. Those with integer programs get SLOW_SHARE of
the time limit each, and say when it ended them. Pins are kept by the planner and, without replicas,
by `greedy`, which is then what the planner has before any search; baselines know none, and how many
they break stands beside them. Bytes to move are counted from contiguous. Devices of a plan without
copies are numbered so that least moves, in all layers alike (method_costs.py), and every figure is
of the plan as --out-plans writes it.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement import baselines, evidence, method_costs, solve, spare
from moe_jax.placement.baselines import registry
from moe_jax.placement.baselines.registry import Made
from moe_jax.placement.evidence import Evidence, Figure
from moe_jax.placement.limits.previous import holds_LEM
from moe_jax.placement.method_costs import Costs
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.placement.solution import Progress, Report
from moe_jax.routing.trace import Halves

RANDOMS = 10
SLOW_SHARE = 0.2  # of the time limit, for each baseline that solves integer programs
OWN = ("greedy", "planner")


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to place experts, judged on the held-out half.

    Attributes:
      key: for `--methods`.
      name: for the table.
      made: its plan; the first one, where the figures are a mean over several.
      seconds: to make it.
      planned: objective on the planning half.
      held_out_objective: objective on the held-out half.
      held_out: figures on the held-out half.
      costs: seconds, evenness and the move.
      broken_pins: that the plan does not keep.
      report: of the solver, for solved ones.
    """

    key: str
    name: str
    made: Made
    seconds: float
    planned: float
    held_out_objective: float
    held_out: Evidence
    costs: Costs
    broken_pins: int = 0
    report: Report | None = None

    @property
    def placement(self) -> Placement:
        return self.made.placement

    @property
    def duplicates(self) -> int:
        """Slots whose expert is on their device already, over all layers."""
        return self.made.duplicates

    @property
    def padding(self) -> int:
        """Slots of a layer that stay empty."""
        return max(self.placement.num_slots - self.placement.num_experts, 0) * (
            not self.placement.has_replicas
        )

    def to_json(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "key": self.key,
            "name": self.name,
            "seconds": self.seconds,
            "cut": self.made.cut,
            "objective": self.planned,
            "held_out_objective": self.held_out_objective,
            "plan_digest": self.placement.digest,
            "valid_plan": self.made.valid,
            "slots": self.placement.num_slots,
            "empty_slots": self.padding,
            "duplicated_slots": self.duplicates,
            "broken_pins": self.broken_pins,
            "held_out": self.held_out.to_json(),
            **self.costs.to_json(),
        }
        if self.report is not None:
            fields |= {"bound": self.report.bound, "gap": self.report.gap}
        return fields


def methods(
    plan: Problem,
    judge: Problem,
    seed: int,
    time_limit: float,
    progress: Callable[[Progress], None] | None = None,
    keys: Sequence[str] | None = None,
) -> list[Method]:
    """The methods in the order of the table; `judge` is `plan` with the held-out trace.

    Args:
      keys: of the baselines (registry.ALL) and `greedy`; all if None. The planner is always last.
    """
    if plan.needs_copies and "greedy" in (keys or ()):
        rule = "needs devices that divide the experts"
        raise Refused("methods", "greedy", rule, "Leave it out")
    plan.prepare()
    made: list[Method] = []
    free = plan.unrestricted  # baselines know no pins
    for baseline in registry.chosen(keys, free, OWN):
        if baseline.key == "random":
            made.append(_mean_random(plan, judge, seed))
            continue
        share = SLOW_SHARE * time_limit if baseline.slow else 0.0
        started = time.monotonic()
        one = baseline.make(free, seed, share)
        seconds = time.monotonic() - started
        one = _numbered(free, one)
        made.append(_judged(baseline.key, baseline.name, one, seconds, plan, judge))
    if not plan.needs_copies and (keys is None or "greedy" in keys):
        started = time.monotonic()
        greedy = Made(_greedy(plan, seed))
        seconds = time.monotonic() - started
        greedy = _numbered(free if plan.has_replicas else plan, greedy)
        made.append(_judged("greedy", "greedy", greedy, seconds, plan, judge))
    name = "greedy + ILP + replicas" if plan.has_replicas else "greedy + ILP"
    placement, report = solve.solve_problem(plan, seed, time_limit, progress)
    best = _numbered(plan, Made(placement, cut=not report.finished))
    solved = _judged("planner", name, best, report.seconds, plan, judge)
    return [*made, dataclasses.replace(solved, report=report)]


def _numbered(problem: Problem, made: Made) -> Made:
    return dataclasses.replace(made, placement=method_costs.numbered(problem, made.placement))


def _greedy(plan: Problem, seed: int) -> Placement:
    """The planner's construction; with pins what it makes of it before any search."""
    if plan.pins is not None and not plan.has_replicas:
        return solve.unproven(plan, seed, 0.0).placement
    device_LE = solve.constructed(spare.without(plan.unrestricted))
    return Placement.from_device_LE(device_LE, plan.num_devices)


def halves_of(halves: Halves, like: Problem) -> tuple[Problem, Problem]:
    """The same problem on the planning half and on the held-out half."""
    return (
        solve.resolved(dataclasses.replace(like, trace=halves.plan_half)),
        dataclasses.replace(like, trace=halves.judge_half, load_cap=None),
    )


def _judged(
    key: str, name: str, made: Made, seconds: float, plan: Problem, judge: Problem
) -> Method:
    placement = made.placement
    return Method(
        key,
        name,
        made,
        seconds,
        plan.value_of(placement),
        judge.value_of(placement),
        evidence.judge(
            judge.trace,
            placement,
            judge.topology,
            step_tokens=judge.work.batch_tokens,
            dispatch=judge.dispatch,
        ),
        method_costs.costs(judge, placement),
        0 if plan.pins is None else plan.pins.broken(holds_LEM(placement)),
    )


def _mean_random(plan: Problem, judge: Problem, seed: int) -> Method:
    sizes = (plan.trace.num_layers, plan.trace.num_experts, plan.num_devices)
    several, name = [], f"random (mean of {RANDOMS})"
    for draw in range(seed, seed + RANDOMS):
        started = time.monotonic()
        device_LE = baselines.random(*sizes, seed=draw)
        seconds = time.monotonic() - started
        made = Made(Placement.from_device_LE(device_LE, plan.num_devices))
        made = _numbered(plan.unrestricted, made)
        several.append(_judged("random", name, made, seconds, plan, judge))
    return dataclasses.replace(
        several[0],
        seconds=float(np.mean([method.seconds for method in several])),
        planned=float(np.mean([method.planned for method in several])),
        held_out_objective=float(np.mean([method.held_out_objective for method in several])),
        held_out=_mean([method.held_out for method in several]),
        costs=_mean([method.costs for method in several]),
        broken_pins=round(np.mean([method.broken_pins for method in several])),
    )


def _mean(several: list[Any]) -> Any:
    """Means of all figures; an interval's ends are the means of its ends."""
    first = several[0]
    if isinstance(first, dict):
        return {key: _mean([value[key] for value in several]) for key in first}
    if isinstance(first, Figure | Evidence | Costs):
        names = [field.name for field in dataclasses.fields(first)]
        return type(first)(**{n: _mean([getattr(one, n) for one in several]) for n in names})
    return float(np.mean(several))
