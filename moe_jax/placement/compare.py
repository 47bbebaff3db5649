"""All baselines and the planner on one trace: planned on one half, judged on the other.

Methods: contiguous, round-robin, random (mean of 10), EPLB-style packing without spare slots,
greedy, greedy + integer programs. The first five also show what the planner's search is worth.
Where replicas are asked for: EPLB as published (hierarchical, with every expert its own group, and
global; on one node they are the same), balanced slots, and the planner's plan with spare slots
filled. EPLB's rows say how many of its slots repeat an expert on its device.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.placement import baselines, eplb, evidence, solve, spare, tables
from moe_jax.placement.evidence import Evidence, Figure
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.placement.solve import Progress
from moe_jax.routing.trace import Halves

RANDOMS = 10


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to place experts, judged on the held-out half.

    Attributes:
      name: for the table.
      placement: the first one, where the figures are a mean over several.
      seconds: to make it.
      planned: objective on the planning half.
      held_out_objective: objective on the held-out half.
      held_out: figures on the held-out half.
      report: of the solver, for solved ones.
      duplicates: slots whose expert is on their device already, over all layers.
    """

    name: str
    placement: Placement
    seconds: float
    planned: float
    held_out_objective: float
    held_out: Evidence
    report: solve.Report | None = None
    duplicates: int = 0

    def to_json(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "name": self.name,
            "seconds": self.seconds,
            "objective": self.planned,
            "held_out_objective": self.held_out_objective,
            "plan_digest": self.placement.digest,
            "slots": self.placement.num_slots,
            "duplicated_slots": self.duplicates,
            "held_out": self.held_out.to_json(),
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
) -> list[Method]:
    """Every method, in the order of the table; `judge` is `plan` with the held-out trace."""
    sizes = (plan.trace.num_layers, plan.trace.num_experts, plan.num_devices)
    plain = spare.without(plan)
    made = [
        _made("contiguous", lambda: baselines.contiguous(*sizes), plan, judge),
        _made("round-robin", lambda: baselines.round_robin(*sizes), plan, judge),
        _mean_random(sizes, plan, judge, seed),
        _made("EPLB-style packing", lambda: baselines.lpt(plan.load_LE, sizes[2]), plan, judge),
        _made("greedy", lambda: solve.constructed(plain), plan, judge),
    ]
    name = "greedy + ILP"
    if plan.has_replicas:
        made += _with_replicas(plan, judge)
        name = "greedy + ILP + replicas"
    placement, report = solve.solve_problem(plan, seed, time_limit, progress)
    made.append(
        dataclasses.replace(_judged(name, placement, report.seconds, plan, judge), report=report)
    )
    return made


def _with_replicas(plan: Problem, judge: Problem) -> list[Method]:
    """Balance by replicas: EPLB's two ways, and ours."""
    experts, slots, devices = plan.trace.num_experts, plan.num_slots, plan.num_devices
    nodes = plan.topology.num_nodes
    assert slots is not None
    made: list[Method] = []
    ways = [("EPLB global", 1, 1)]
    if nodes > 1 and experts % nodes == 0:
        ways.insert(0, ("EPLB hierarchical", experts, nodes))
    for name, num_groups, num_nodes in ways:
        started = time.monotonic()
        maps = eplb.rebalance_experts(plan.load_LE, slots, num_groups, num_nodes, devices)
        seconds = time.monotonic() - started
        published = eplb.Published(maps.physical_to_logical_LR, experts, devices)
        method = _judged(name, published, seconds, plan, judge)
        duplicates = eplb.duplicates(maps.physical_to_logical_LR, devices)
        made.append(dataclasses.replace(method, duplicates=duplicates))
    if nodes == 1:
        made.insert(0, dataclasses.replace(made[0], name="EPLB hierarchical"))
    started = time.monotonic()
    balanced = spare.balanced(plan)
    made.append(_judged("balanced slots", balanced, time.monotonic() - started, plan, judge))
    return made


def print_table(made: list[Method], problem: Problem) -> str:
    """The table, one row per method, and what its columns mean."""
    heads = ["held-out half", "objective", *(name for name, _ in tables.COLUMNS), "solve s"]
    rows = [
        [
            method.name + (f" ({method.duplicates} doubled)" if method.duplicates else ""),
            f"{method.held_out_objective:.5g}",
            *tables.evidence_cells(method.held_out),
            f"{method.seconds:.2f}",
        ]
        for method in made
    ]
    return tables.table(heads, rows)


def notes(made: list[Method]) -> list[str]:
    """What the table needs explained, where there are replicas."""
    slots = made[-1].placement.num_slots
    if not made[-1].placement.has_replicas:
        return []
    return [
        f"  replicas: EPLB, balanced slots and the last row have {slots} slots per layer, the "
        f"others {made[0].placement.num_slots}",
        "  doubled   slots, of all layers, whose expert is on their device already (wasted)",
    ]


def halves_of(halves: Halves, like: Problem) -> tuple[Problem, Problem]:
    """The same problem on the planning half and on the held-out half."""
    return (
        dataclasses.replace(like, trace=halves.plan_half),
        dataclasses.replace(like, trace=halves.judge_half, load_cap=None),
    )


def _made(name: str, make: Callable[[], np.ndarray], plan: Problem, judge: Problem) -> Method:
    plan.prepare()
    started = time.monotonic()
    device_LE = make()
    seconds = time.monotonic() - started
    placement = Placement.from_device_LE(device_LE, plan.num_devices)
    return _judged(name, placement, seconds, plan, judge)


def _judged(
    name: str, placement: Placement, seconds: float, plan: Problem, judge: Problem
) -> Method:
    return Method(
        name,
        placement,
        seconds,
        plan.value_of(placement),
        judge.value_of(placement),
        evidence.judge(judge.trace, placement, judge.topology),
    )


def _mean_random(sizes, plan: Problem, judge: Problem, seed: int) -> Method:
    several = [
        _made("random", lambda s=draw: baselines.random(*sizes, seed=s), plan, judge)  # type: ignore[misc]
        for draw in range(seed, seed + RANDOMS)
    ]
    first = several[0]
    return dataclasses.replace(
        first,
        name=f"random (mean of {RANDOMS})",
        planned=float(np.mean([method.planned for method in several])),
        held_out_objective=float(np.mean([method.held_out_objective for method in several])),
        held_out=_mean([method.held_out for method in several]),
    )


def _mean(several: list[Evidence]) -> Evidence:
    """Means of all figures; an interval's ends are the means of its ends."""

    def mean(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: mean([value[key] for value in values]) for key in values[0]}
        if isinstance(values[0], Figure):
            return Figure(*np.mean([dataclasses.astuple(v) for v in values], axis=0).tolist())
        return float(np.mean(values))

    fields = [field.name for field in dataclasses.fields(Evidence)]
    return Evidence(**{name: mean([getattr(e, name) for e in several]) for name in fields})
