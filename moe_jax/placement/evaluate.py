"""Figures of a plan on a trace: evidence, seconds by dispatch, rows with recorded homes."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from moe_jax.placement import cost, evidence, tables
from moe_jax.placement.evidence import Evidence
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import Problem
from moe_jax.placement.seconds import Work
from moe_jax.placement.topology import Topology
from moe_jax.routing.trace import Trace

RecordedRows = dict[str, dict[str, dict[str, int]]]  # by dispatch, combine, "out" or "back"


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One plan on one trace.

    Attributes:
      path: of the plan.
      plan_digest: of its map.
      topology: name of the machine it was judged for.
      figures: locality, rows, load, with intervals.
      seconds: per layer and step, by dispatch.
      recorded_rows: exact rows with the homes in the trace; None where it has none that fit.
    """

    path: str
    plan_digest: str
    topology: str
    figures: Evidence
    seconds: dict[str, float]
    recorded_rows: RecordedRows | None

    def to_json(self) -> dict[str, Any]:
        return {
            "plan": self.path,
            "plan_digest": self.plan_digest,
            "topology": self.topology,
            "figures": self.figures.to_json(),
            "seconds_per_layer": self.seconds,
            "recorded_homes": self.recorded_rows,
        }


def evaluate(path: str, plan: Plan, trace: Trace, topology: Topology, work: Work) -> Evaluated:
    """Judges one plan; nothing is planned, so the whole trace counts."""
    placement = plan.placement
    seconds = {
        dispatch: Problem(trace, topology, "seconds", dispatch, work).value_of(placement)
        for dispatch in cost.DISPATCHES
    }
    figures = evidence.judge(trace, placement, topology)
    rows = recorded_rows(trace, placement, topology)
    return Evaluated(str(path), plan.digest, topology.name, figures, seconds, rows)


def recorded_rows(trace: Trace, placement: Placement, topology: Topology) -> RecordedRows | None:
    """Exact integer rows with the homes in the trace."""
    if trace.seq_home is None or int(trace.seq_home.max()) >= placement.num_devices:
        return None
    found: RecordedRows = {}
    for dispatch in cost.DISPATCHES:
        found[dispatch] = {}
        for combine in cost.COMBINES:
            rows = cost.rows(
                trace.expert_ids_TLK,
                placement,
                dispatch,
                trace.home_T,
                combine,
                topology.devices_per_node,
            )
            out, back = int(rows.dispatch_LMM.sum()), int(rows.combine_LMM.sum())
            found[dispatch][combine] = {"out": out, "back": back}
    return found


def text(evaluated: Sequence[Evaluated]) -> str:
    """The table, its legend, and the rows of recorded homes where there are any."""
    heads = ["plan", *(name for name, _ in tables.COLUMNS)]
    heads += [f"ms {dispatch}" for dispatch in ("exch.", "hier.", "coh.", "gath.")]
    rows = [
        [
            pathlib.Path(one.path).name,
            *tables.evidence_cells(one.figures),
            *(f"{1e3 * one.seconds[dispatch]:.4g}" for dispatch in cost.DISPATCHES),
        ]
        for one in evaluated
    ]
    lines = [tables.table(heads, rows), "", tables.legend()]
    lines.append("  ms ...    milliseconds per layer and step, by dispatch")
    for one in evaluated:
        if one.recorded_rows is not None:
            lines += ["", f"{pathlib.Path(one.path).name}, rows with the homes in the trace:"]
            lines += [f"  {line}" for line in _home_lines(one.recorded_rows)]
    return "\n".join(lines)


def _home_lines(rows: RecordedRows) -> list[str]:
    return [
        f"{dispatch:12} {combine:8} out {way['out']:,}, back {way['back']:,}"
        for dispatch, by_combine in rows.items()
        for combine, way in by_combine.items()
    ]
