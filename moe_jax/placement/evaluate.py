"""Figures of a plan on a trace: evidence, seconds and links by dispatch, recorded homes."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from moe_jax.errors import plain
from moe_jax.placement import cost, evidence, proxies, tables, wires
from moe_jax.placement.evidence import Evidence
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import Problem
from moe_jax.placement.proxies import Pairs, Proxy
from moe_jax.placement.seconds import Work
from moe_jax.placement.topology import Topology
from moe_jax.placement.wires import Wires
from moe_jax.routing.trace import Trace

RecordedRows = dict[str, dict[str, dict[str, int]]]  # by dispatch, combine, "out" or "back"


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """One plan on one trace.

    Attributes:
      path: of the plan.
      plan_digest: of its map.
      topology: the machine it was judged for.
      figures: locality, rows, load, with intervals.
      wires: seconds per layer and step, tiers, pairs, slowest device and link, by dispatch.
      recorded_rows: exact rows with the homes in the trace; None where it has none that fit.
      proxies: what counts of pairs say of the rows; empty with replicas.
    """

    path: str
    plan_digest: str
    topology: Topology
    figures: Evidence
    wires: dict[str, Wires]
    recorded_rows: RecordedRows | None
    proxies: tuple[Proxy, ...]

    def to_json(self, pairs: str | None = None) -> dict[str, Any]:
        """With the pairs of devices of the dispatch `pairs`, if one is given."""
        return {
            "plan": self.path,
            "plan_digest": self.plan_digest,
            "topology": self.topology.name,
            "devices": self.topology.num_devices,
            "nodes": self.topology.num_nodes,
            "figures": self.figures.to_json(),
            "seconds_per_layer": {name: one.layer_seconds for name, one in self.wires.items()},
            "wires": {name: one.to_json(name == pairs) for name, one in self.wires.items()},
            "recorded_homes": self.recorded_rows,
            "proxies": [proxy.to_json() for proxy in self.proxies],
        }


def evaluate(
    path: str, plan: Plan, trace: Trace, pairs: Pairs, topology: Topology, work: Work
) -> Evaluated:
    """Judges one plan; nothing is planned, so the whole trace counts. `pairs` are the trace's."""
    placement = plan.placement
    found = {
        dispatch: wires.of(
            Problem(trace, topology, "seconds", dispatch, work, num_slots=placement.num_slots),
            placement,
        )
        for dispatch in cost.DISPATCHES
    }
    figures = evidence.judge(trace, placement, topology, step_tokens=work.batch_tokens)
    rows = recorded_rows(trace, placement, topology, work.batch_tokens)
    true = {name: figure.value for name, figure in figures.rows.items()}
    against = proxies.of(pairs, placement, topology, true)
    return Evaluated(str(path), plan.digest, topology, figures, found, rows, against)


def recorded_rows(
    trace: Trace, placement: Placement, topology: Topology, step_tokens: int | None = None
) -> RecordedRows | None:
    """Exact integer rows with the homes in the trace (but shuffled dispatch chooses its own)."""
    if trace.seq_home is None or int(trace.seq_home.max()) >= placement.num_devices:
        return None
    found: RecordedRows = {}
    for dispatch in cost.DISPATCHES:
        found[dispatch] = {}
        for combine in ("partial", "exact"):  # "reproducible" moves the rows of "partial"
            rows = cost.rows(
                trace.expert_ids_TLK,
                placement,
                dispatch,
                trace.home_T,
                combine,
                topology.devices_per_node,
                step_tokens=step_tokens,
            )
            out, back = int(rows.dispatch_LMM.sum()), int(rows.combine_LMM.sum())
            found[dispatch][combine] = {"out": out, "back": back}
    return found


def text(evaluated: Sequence[Evaluated], pairs: str | None = None) -> str:
    """The tables, their legend, proxies, and the rows of recorded homes where there are any.

    Args:
      evaluated: the plans.
      pairs: a dispatch whose pairs of devices are printed as well.
    """
    heads = ["plan", *(name for name, _ in tables.COLUMNS)]
    heads += [f"ms {dispatch}" for dispatch in ("exch.", "hier.", "coh.", "shuf.", "gath.")]
    rows = [
        [
            pathlib.Path(one.path).name,
            *tables.evidence_cells(one.figures),
            *(f"{1e3 * one.wires[dispatch].layer_seconds:.4g}" for dispatch in cost.DISPATCHES),
        ]
        for one in evaluated
    ]
    lines = [tables.table(heads, rows), "", tables.legend()]
    lines.append("  ms ...    milliseconds per layer and step, by dispatch")
    lines += ["", *_wire_lines(evaluated, pairs)]
    lines += ["", "Rows per token and layer as pairs of experts tell them, against the true ones:"]
    lines += _proxy_lines(evaluated)
    for one in evaluated:
        if one.recorded_rows is not None:
            lines += ["", f"{pathlib.Path(one.path).name}, rows with the homes in the trace:"]
            lines += [f"  {line}" for line in _home_lines(one.recorded_rows)]
    return "\n".join(lines)


def machines(evaluated: Sequence[Evaluated]) -> list[str]:
    """Which plans are judged for which machine, a line each."""
    plans: dict[str, list[str]] = {}
    for one in evaluated:
        sizes = {"device": one.topology.num_devices, "node": one.topology.num_nodes}
        parts = (f"{number} {what}{'s' * (number > 1)}" for what, number in sizes.items())
        machine = f"{plain(one.topology.name)}: {', '.join(parts)}"
        plans.setdefault(machine, []).append(pathlib.Path(one.path).name)
    of = {machine: f", {', '.join(names)}" for machine, names in plans.items() if len(plans) > 1}
    return [f"Judged in every dispatch{of.get(machine, '')} on {machine}" for machine in plans]


def _wire_lines(evaluated: Sequence[Evaluated], pairs: str | None) -> list[str]:
    named = [
        (pathlib.Path(one.path).name, dispatch, one.wires[dispatch])
        for one in evaluated
        for dispatch in cost.DISPATCHES
    ]
    lines = [
        "Rows per token and layer by tier of links, and megabytes of a layer and step (both ways):",
        wires.tier_text(named),
        "",
        "The slowest device computing and the slowest link (what a device sends or receives one "
        "way), microseconds",
        "of a layer and step: mean of the layers, worst layer and which it is there:",
        wires.slowest_text(named),
    ]
    for name, dispatch, one in named:
        if dispatch == pairs:
            lines += ["", f"{name}, {dispatch}: rows from device to device per {wires.PER:,} "]
            lines[-1] += "tokens and layer (both ways):"
            lines.append(wires.pair_text(one))
    return lines


def _proxy_lines(evaluated: Sequence[Evaluated]) -> list[str]:
    heads = ["plan", "dispatch", "pairs counted", "proxy", "true", "error"]
    rows = [
        [
            pathlib.Path(one.path).name,
            f"{proxy.dispatch:12}",
            f"{proxy.pairs:30}",
            f"{proxy.value:.4f}",
            f"{proxy.true:.4f}",
            f"{100 * proxy.error:+.1f} %",
        ]
        for one in evaluated
        for proxy in one.proxies
    ]
    with_copies = [pathlib.Path(one.path).name for one in evaluated if not one.proxies]
    lines = [tables.table(heads, rows)] if rows else []
    return lines + [f"  {name}: none; pairs do not say which copy serves" for name in with_copies]


def _home_lines(rows: RecordedRows) -> list[str]:
    return [
        f"{dispatch:12} {combine:8} out {way['out']:,}, back {way['back']:,}"
        for dispatch, by_combine in rows.items()
        for combine, way in by_combine.items()
    ]
