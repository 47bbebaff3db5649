"""What one placement puts on which links, and which device and which link the others wait for.

Axes: L MoE layers, M devices, W ways (out, back), R tiers of links (inside nodes, between nodes).
Rows are those of cost.py with homes drawn uniformly, seconds those of seconds.py. A device's link
of a tier is busy with the larger one of what it sends and what it receives (on a torus: with the
busiest link that leaves the device). What attention sends is left out: no placement changes it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num

from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement import tables
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem

WAYS, TIERS = ("out", "back"), ("inside", "between")
MOST = 16  # devices of which the whole matrix of pairs is printed; of more the HEAVIEST pairs
HEAVIEST = 20
PER = 1000  # tokens that rows of pairs are printed for


class Slowest(NamedTuple):
    """The slowest one of every layer: seconds in the mean of the layers, and the worst layer."""

    mean: float
    worst: float
    layer: int
    device: int


@dataclasses.dataclass(frozen=True, eq=False)
class Wires:
    """One placement in one dispatch.

    Attributes:
      pair_MM: rows per token and layer from device to device, both ways.
      same_MM: the pairs inside a node.
      row_bytes: bytes of a layer and step that one row per token and layer makes.
      compute_LM: seconds that a device computes in a layer and step.
      link_LWRM: seconds that a device's link is busy.
      layer_seconds: of a layer and step, mean of the layers.
      layer_ids: the model's numbers of the layers.
    """

    pair_MM: Float[np.ndarray, "M M"]
    same_MM: Bool[np.ndarray, "M M"]
    row_bytes: float
    compute_LM: Float[np.ndarray, "L M"]
    link_LWRM: Float[np.ndarray, "L W R M"]
    layer_seconds: float
    layer_ids: tuple[int, ...]

    @property
    def tier_rows(self) -> dict[str, float]:
        """Rows per token and layer of every tier."""
        masks = zip(TIERS, (self.same_MM, ~self.same_MM), strict=True)
        return {tier: float(self.pair_MM[mask_MM].sum()) for tier, mask_MM in masks}

    @property
    def slowest_device(self) -> Slowest:
        return _slowest(self.compute_LM, self.layer_ids)[0]

    @property
    def slowest_link(self) -> tuple[Slowest, str, str]:
        """With its tier and its way in the worst layer."""
        layers, ways, tiers, devices = self.link_LWRM.shape
        found, at = _slowest(self.link_LWRM.reshape(layers, -1), self.layer_ids)
        way, tier, device = (int(i) for i in np.unravel_index(at, (ways, tiers, devices)))
        return found._replace(device=device), TIERS[tier], WAYS[way]

    def to_json(self, pairs: bool) -> dict[str, Any]:
        link, tier, way = self.slowest_link
        fields: dict[str, Any] = {
            "rows": self.tier_rows,
            "bytes": {name: self.row_bytes * rows for name, rows in self.tier_rows.items()},
            "slowest_device": self.slowest_device._asdict(),
            "slowest_link": {**link._asdict(), "tier": tier, "way": way},
        }
        return {**fields, "pairs": self.pair_MM.tolist()} if pairs else fields


def of(problem: Problem, placement: Placement) -> Wires:
    """A placement on the trace and machine of a problem, in its dispatch, whatever it minimises."""
    trace, topology, work = problem.trace, problem.topology, problem.work
    rows, load_LM = problem.counts(placement)
    how = (topology, work, problem.dispatch, trace.num_tokens)
    token_bytes = work.batch_tokens / trace.num_tokens * work.row_bytes
    gathered = problem.dispatch == "gathered"
    link_LWRM = np.stack(
        [
            np.stack(seconds_lib.tier_seconds(way_LMM * token_bytes, topology, gathered), axis=1)
            for way_LMM in (rows.dispatch_LMM, rows.combine_LMM)
        ],
        axis=1,
    )
    return Wires(
        pair_MM=rows.total_LMM.sum(axis=0) / problem.token_layers,
        same_MM=topology.nodes.same_MM,
        row_bytes=problem.token_layers / trace.num_layers * token_bytes,
        compute_LM=seconds_lib.compute_seconds(load_LM, topology, work, trace.num_tokens),
        link_LWRM=link_LWRM,
        layer_seconds=float(seconds_lib.seconds(rows, load_LM, *how).total_L.mean()),
        layer_ids=tuple(trace.layer_ids),
    )


def _slowest(seconds_LN: Num[np.ndarray, "L N"], layer_ids: tuple[int, ...]) -> tuple[Slowest, int]:
    """Of N things; and which of them it is."""
    layer, at = (int(i) for i in np.unravel_index(seconds_LN.argmax(), seconds_LN.shape))
    slowest_L = seconds_LN.max(axis=1)
    worst = float(slowest_L[layer])
    return Slowest(float(slowest_L.mean()), worst, layer_ids[layer], at), at


def tier_text(named: Sequence[tuple[str, str, Wires]]) -> str:
    """Rows and bytes of every tier; (plan, dispatch, wires) a line."""
    tiers = TIERS if any(not one.same_MM.all() for _, _, one in named) else TIERS[:1]
    heads = ["plan", "dispatch", *(head for tier in tiers for head in (f"{tier} nodes", "MB"))]
    lines = [
        [plan, f"{dispatch:12}"]
        + [
            cell
            for tier in tiers
            for cell in (
                f"{one.tier_rows[tier]:.4f}",
                f"{1e-6 * one.row_bytes * one.tier_rows[tier]:.1f}",
            )
        ]
        for plan, dispatch, one in named
    ]
    return tables.table(heads, lines)


def slowest_text(named: Sequence[tuple[str, str, Wires]]) -> str:
    """The slowest device and the slowest link; (plan, dispatch, wires) a line."""
    heads = ["plan", "dispatch", "device us", "worst", "which", "link us", "worst", "which"]
    lines = []
    for plan, dispatch, one in named:
        device, (link, tier, way) = one.slowest_device, one.slowest_link
        lines.append(
            [
                *(plan, f"{dispatch:12}"),
                *(f"{1e6 * device.mean:.1f}", f"{1e6 * device.worst:.1f}"),
                f"{device.device} in layer {device.layer}",
                *(f"{1e6 * link.mean:.1f}", f"{1e6 * link.worst:.1f}"),
                f"{link.device} in layer {link.layer}, {way}, {tier} nodes",
            ]
        )
    return tables.table(heads, lines)


def pair_text(one: Wires) -> str:
    """Rows from device to device per PER tokens and layer: all pairs, or the heaviest."""
    rows_MM = PER * one.pair_MM
    devices = len(rows_MM)
    if devices <= MOST:
        names = [str(m) for m in range(devices)]
        cells = [
            [name, *("-" if s == d else f"{rows:.1f}" for d, rows in enumerate(rows_M))]
            for s, (name, rows_M) in enumerate(zip(names, rows_MM, strict=True))
        ]
        return tables.table(["from \\ to", *names], cells)
    order = np.argsort(-rows_MM, axis=None, kind="stable")[:HEAVIEST]
    pairs = [divmod(int(at), devices) for at in order]
    return tables.table(
        [f"from ({HEAVIEST} heaviest pairs)", "to", "nodes", "rows"],
        [
            [str(s), str(d), TIERS[0 if one.same_MM[s, d] else 1], f"{rows_MM[s, d]:.1f}"]
            for s, d in pairs
        ],
    )
