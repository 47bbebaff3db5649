"""Transitions of the best expert between adjacent layers, before and after, sorted by device.

Device by device as the mean over the pairs of layers, and expert by expert for one pair (dots.py).
"""

from moe_jax.placement.report import dots, heat, parts
from moe_jax.placement.report.dots import Pair
from moe_jax.placement.report.markup import Markup, joined
from moe_jax.placement.report.parts import Groups, Section
from moe_jax.placement.report.view import View


def section(before: View, after: View, pair: Pair) -> Section:
    groups = Groups.of(after.load_LM.shape[1])
    flows = [groups.sums(one.flow_JMM.mean(axis=0)) for one in (before, after)]
    most = max(*(float(flow_GG.max()) for flow_GG in flows), 1e-300)
    maps = [_flow(one, x, most, groups) for one, x in zip((before, after), flows, strict=True)]
    steps = [(share, parts.percent(share * most)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    text = parts.caption(
        "Where tokens go from the device of their best expert to that of the next layer: what lies "
        "on the diagonal stays. This is what coherent dispatch and ExFlow's objective save; where "
        "tokens return home after every layer it saves nothing by itself." + groups.note
    )
    figure = joined(
        [
            text,
            heat.scale("share of tokens, mean over pairs of layers:", steps),
            parts.pair(*maps),
            dots.figure(before, after, pair, groups),
        ]
    )
    tables = [
        parts.matrix(
            f"{one.name}: percent of tokens, mean over pairs of layers",
            "from \\ to",
            groups.names,
            groups.names,
            100 * flow_GG,
        )
        for one, flow_GG in zip((before, after), flows, strict=True)
    ]
    tables += dots.tables(before, after, pair, groups)
    return Section("transitions", "From layer to layer", figure, tuple(tables))


def _flow(one: View, flow_GG, most: float, groups: Groups) -> tuple[str, Markup]:
    names = groups.names

    def tip(r: int, c: int) -> str:
        return f"from {names[r]} to {names[c]}: {parts.percent(float(flow_GG[r, c]))} of tokens"

    heading = f"{one.name}: {parts.percent(float(one.stays_J.mean()))} stay on their device"
    axes = ("from", names), ("to device", names)
    picture = heat.heat_map(heading, flow_GG / most, tip, *axes, list(range(len(names))))
    return heading, picture
