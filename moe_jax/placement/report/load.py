"""Load of every device in every layer before and after, over the mean of its layer."""

from collections.abc import Sequence

import numpy as np

from moe_jax.placement.report import heat, parts
from moe_jax.placement.report.markup import Markup, joined
from moe_jax.placement.report.parts import Groups, Section
from moe_jax.placement.report.view import View


def section(before: View, after: View, layers: Sequence[str]) -> Section:
    groups = Groups.of(after.load_LM.shape[1])
    loads = [groups.largest(one.load_over_mean_LM) for one in (before, after)]
    reach = max(*(float(np.abs(load_LG - 1).max()) for load_LG in loads), 0.05)
    pictures = [
        _picture(one, load_LG, reach, layers, groups)
        for one, load_LG in zip((before, after), loads, strict=True)
    ]
    lowest = max(1 - reach, 0.0)
    values = sorted({lowest, (1 + lowest) / 2, 1.0, 1 + reach / 2, 1 + reach})
    steps = [((value - 1) / reach, f"{value:.2f}") for value in values]
    text = parts.caption(
        "Rows that a device computes over the mean of its layer: 1 is even, and the layer waits "
        "for the largest, which is framed and written at the end of its row."
        + (groups.note and groups.note + " The fullest of them is shown.")
    )
    figure = joined([text, heat.scale("load over the mean:", steps), parts.pair(*pictures)])
    tables = tuple(
        parts.matrix(f"{one.name}: load over the mean", "layer \\ device", layers, groups.names, x)
        for one, x in zip((before, after), loads, strict=True)
    )
    return Section("load", "Load of layers and devices", figure, tables)


def _picture(one: View, load_LG, reach: float, layers, groups: Groups) -> tuple[str, Markup]:
    largest_L = load_LG.max(axis=1)

    def tip(r: int, c: int) -> str:
        return f"layer {layers[r]}, device {groups.names[c]}: {load_LG[r, c]:.3f} x the mean"

    heading = (
        f"{one.name}: largest {largest_L.mean():.3f} (mean of layers), "
        f"{largest_L.max():.3f} (worst layer)"
    )
    picture = heat.heat_map(
        heading,
        (load_LG - 1) / reach,
        tip,
        ("layer", layers),
        ("device", groups.names),
        load_LG.argmax(axis=1).tolist(),
        [f"{value:.2f}" for value in largest_L],
    )
    return heading, picture
