"""The planner against every baseline: dispatches, machines, with and without a load cap.

Axes: none. One line a combination: the best baseline, the planner, and their ratio, on the planning
half and on the held-out half. Baselines know neither dispatch nor cap, so each is made once per
machine; the one with the best value counts even if it breaks the cap or the pins that the planner
keeps, or holds more experts on a device than there are slots. Those at random count as their mean.
The planner gives every device as many experts, so the best baseline that does so counts apart. One
that does not needs more slots, as all devices have as many as its fullest: the planner is asked for
a plan with so many, too, which it fills with copies.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement import cost, solve, tables, uneven
from moe_jax.placement import topology as topology_lib
from moe_jax.placement.baselines import registry
from moe_jax.placement.compare import RANDOMS, SLOW_SHARE
from moe_jax.placement.limits import pins as pins_lib
from moe_jax.placement.limits.pins import Pins
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.placement.solution import Progress
from moe_jax.placement.topology import Topology
from moe_jax.routing.trace import Halves

SAME = 1e-9  # of an objective: sums in another order


@dataclasses.dataclass(frozen=True)
class Side:
    """One half of the sequences.

    Attributes:
      best: name of the best baseline there.
      theirs: its objective.
      ours: the planner's.
      best_equal, theirs_equal: the same of the best with as many experts on every device.
      slots: of a layer, as many as the best baseline needs.
      ours_slots: the planner's with as many.
    """

    best: str
    theirs: float
    ours: float
    best_equal: str
    theirs_equal: float
    slots: int
    ours_slots: float

    @property
    def ratio(self) -> float:
        """The planner's objective over the best baseline's: below 1 the planner is better."""
        return self.ours / max(self.theirs, 1e-300)

    @property
    def ratio_equal(self) -> float:
        """The same, over the best with as many experts on every device."""
        return self.ours / max(self.theirs_equal, 1e-300)

    @property
    def ratio_slots(self) -> float:
        """The same over the best of all, the planner having as many slots."""
        return self.ours_slots / max(self.theirs, 1e-300)


@dataclasses.dataclass(frozen=True)
class Line:
    """One combination.

    Attributes:
      dispatch, machine, cap: which one; cap is `none` or as in --load-cap.
      planned: on the half that was planned on.
      held_out: on the other half.
      gap: of the planner's objective to its proven bound, as a share.
    """

    dispatch: str
    machine: str
    cap: str
    planned: Side
    held_out: Side
    gap: float

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        for name in ("planned", "held_out"):
            side = getattr(self, name)
            fields[name] |= {
                "ratio": side.ratio,
                "ratio_equal": side.ratio_equal,
                "ratio_slots": side.ratio_slots,
            }
        return fields


def machine(name: str) -> Topology:
    """`flat8`, `2x4`, or a preset."""
    if found := re.fullmatch(r"flat([1-9]\d{0,4})", name):
        return topology_lib.flat(int(found[1]))
    if found := re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", name):
        nodes, each = int(found[1]), int(found[2])
        return topology_lib.nodes_by_devices(nodes, nodes * each)
    return topology_lib.preset(name)


def lines(
    halves: Halves,
    like: Problem,
    machines: Sequence[Topology],
    caps: Sequence[str],
    dispatches: Sequence[str],
    seed: int,
    time_limit: float,
    progress: Callable[[Progress], None] | None = None,
    pins: Sequence[str] = (),
) -> Iterator[Line]:
    """The combinations, as they are done.

    Args:
      like: objective and sizes; its machine, dispatch and cap do not matter.
      time_limit: of the planner, for each combination.
      pins: as typed (limits/pins.py); their devices have to be there on every machine.
    """
    for dispatch in dispatches:
        if dispatch not in cost.DISPATCHES:
            fix = f"Use some of {','.join(cost.DISPATCHES)}"
            raise Refused("dispatches", dispatch, "not known", fix)
    held = [_pinned(like, one, pins) for one in machines]  # all of them, before the first is solved
    for one, pinned in zip(machines, held, strict=True):
        plan = dataclasses.replace(like, trace=halves.plan_half, topology=one, load_cap=None)
        made = _made(plan, seed, SLOW_SHARE * time_limit)
        for dispatch in dispatches:
            if plan.objective == "rows" and dispatch == "gathered":
                continue  # the same under every placement
            free = dataclasses.replace(plan, dispatch=dispatch)
            halves_of = (free, dataclasses.replace(free, trace=halves.judge_half))
            theirs = [_best(problem, made) for problem in halves_of]
            for cap in caps:
                limit = None if cap == "none" else LoadCap.parse(cap)
                problem = dataclasses.replace(free, load_cap=limit, pins=pinned)
                ours = {}
                for slots in sorted({plan.trace.num_experts, *(one.slots for one in theirs)}):
                    copied = slots > plan.trace.num_experts and plan.objective != "moetuner"
                    more = slots if copied else None  # MoETuner's objective knows no copies
                    asked = dataclasses.replace(problem, num_slots=more)
                    ours[slots] = solve.solve_problem(asked, seed, time_limit, progress)
                placement, report = ours[plan.trace.num_experts]
                planned, held_out = (
                    Side(
                        rival.best,
                        rival.theirs,
                        half.value_of(placement),
                        rival.best_equal,
                        rival.theirs_equal,
                        rival.slots,
                        half.value_of(ours[rival.slots].placement),
                    )
                    for rival, half in zip(theirs, halves_of, strict=True)
                )
                yield Line(dispatch, one.name, cap, planned, held_out, report.gap)


def _pinned(like: Problem, one: Topology, words: Sequence[str]) -> Pins | None:
    if not words:
        return None
    trace = like.trace
    pins = pins_lib.parse(words, trace.num_experts, one.num_devices, trace.layer_ids)
    return dataclasses.replace(like, topology=one, pins=pins).pins  # refuses what none can keep


def text(done: Sequence[Line]) -> str:
    """The table, and how often the planner is better."""
    cells = ["theirs", "ours", "ratio", "slots", "with as many"]
    heads = ["dispatch", "machine", "cap", "planned: best", *cells, "gap %"]
    heads += ["held out: best", *cells]
    rows = [
        [
            *(one.dispatch, one.machine, one.cap, *_cells(one.planned)),
            *(f"{100 * one.gap:.1f}", *_cells(one.held_out)),
        ]
        for one in done
    ]
    return "\n".join([tables.table(heads, rows), "", *_counts(done)])


def _counts(done: Sequence[Line]) -> list[str]:
    """How often the planner is better, as good, worse: than all, than those of equal sizes, and
    than all where it has as many slots as the best of them.
    """
    said = [f"The planner's objective beside the best baseline's, in {len(done)} combinations:"]
    kinds = [("any", "ratio"), ("with equal devices", "ratio_equal")]
    for of, ratio in [*kinds, ("any, at as many slots", "ratio_slots")]:
        for half, side in (("planning half", "planned"), ("held out", "held_out")):
            ratios = np.array([getattr(getattr(one, side), ratio) for one in done])
            better, worse = int((ratios < 1 - SAME).sum()), int((ratios > 1 + SAME).sum())
            same = len(done) - better - worse
            said.append(f"  {of}, {half}: better in {better}, the same in {same}, worse in {worse}")
    return said


def _cells(side: Side) -> list[str]:
    values = [f"{side.theirs:.5g}", f"{side.ours:.5g}", f"{side.ratio:.4f}"]
    return [side.best, *values, str(side.slots), f"{side.ratio_slots:.4f}"]


def _made(plan: Problem, seed: int, seconds: float) -> dict[str, list[Placement]]:
    """The plans of every baseline on one machine; several where the mean counts."""
    found: dict[str, list[Placement]] = {}
    for one in registry.chosen(None, plan):
        draws = range(seed, seed + RANDOMS) if one.key == "random" else (seed,)
        found[one.key] = [
            one.make(plan, draw, seconds if one.slow else 0.0).placement for draw in draws
        ]
    return found


class _Rival(NamedTuple):
    """The best baseline of all, and the best with as many experts on every device."""

    best: str
    theirs: float
    best_equal: str
    theirs_equal: float
    slots: int


def _best(problem: Problem, made: dict[str, list[Placement]]) -> _Rival:
    values = {
        key: float(np.mean([problem.value_of(one) for one in several]))
        for key, several in made.items()
    }
    equal = [key for key, several in made.items() if not isinstance(several[0], uneven.Uneven)]
    best, best_equal = (min(names, key=lambda name: values[name]) for names in (values, equal))
    slots = made[best][0].num_slots
    return _Rival(best, values[best], best_equal, values[best_equal], slots)
