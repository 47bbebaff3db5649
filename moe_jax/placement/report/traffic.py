"""Traffic between devices before and after, one pair of heat maps per tier, one scale per tier."""

import numpy as np
from jaxtyping import Bool

from moe_jax.placement.report import heat, parts
from moe_jax.placement.report.markup import Markup, joined
from moe_jax.placement.report.parts import Groups, Section
from moe_jax.placement.report.view import PER, View
from moe_jax.placement.topology import Topology

UNIT = f"rows per {PER:,.0f} tokens and layer"


def section(before: View, after: View, topology: Topology, dispatch: str) -> Section:
    groups = Groups.of(topology.num_devices)
    same_MM = topology.node_M[:, None] == topology.node_M[None, :]
    self_MM = np.eye(topology.num_devices, dtype=bool)
    tiers = [("Inside a node", same_MM & ~self_MM), ("Between nodes", ~same_MM)]
    figures = [
        _tier(name, mask_MM, before, after, groups) for name, mask_MM in tiers if mask_MM.any()
    ]
    text = parts.caption(
        f"True {UNIT} under {dispatch} dispatch, out and back, counted token by token with homes "
        "drawn uniformly. Rows that stay on their device are not on the wire."
        + groups.note
        + (" Gathered dispatch moves the same rows whatever the plan." * (dispatch == "gathered"))
    )
    tables = tuple(
        parts.matrix(
            f"{one.name}: {UNIT}",
            "from \\ to",
            groups.names,
            groups.names,
            groups.sums(one.traffic_MM),
        )
        for one in (before, after)
    )
    return Section("traffic", "Traffic between devices", joined([text, *figures]), tables)


def _tier(
    tier: str, mask_MM: Bool[np.ndarray, "M M"], before: View, after: View, groups: Groups
) -> Markup:
    shown_GG = groups.any(mask_MM)
    rows = [groups.sums(np.where(mask_MM, one.traffic_MM, 0.0)) for one in (before, after)]
    most = max(*(float(rows_GG.max()) for rows_GG in rows), 1e-300)
    pictures = [
        _picture(f"{tier}, {one.name}", rows_GG, shown_GG, most, groups)
        for one, rows_GG in zip((before, after), rows, strict=True)
    ]
    steps = [(share, f"{share * most:.3g}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return joined([heat.scale(f"{tier}, {UNIT}:", steps), parts.pair(*pictures)])


def _picture(title, rows_GG, shown_GG, most: float, groups: Groups) -> tuple[str, Markup]:
    names = groups.names

    def tip(r: int, c: int) -> str:
        return f"from {names[r]} to {names[c]}: {rows_GG[r, c]:.4g} {UNIT}"

    total, largest = float(rows_GG.sum()), float(rows_GG.max())
    heading = f"{title}: {parts.short(total)} in all, largest {parts.short(largest)}"
    strength_GG = np.where(shown_GG, rows_GG / most, np.nan)
    picture = heat.heat_map(heading, strength_GG, tip, ("from", names), ("to device", names))
    return heading, picture
