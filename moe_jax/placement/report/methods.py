"""What other ways to place experts reach on the same held-out sequences, as bars."""

from collections.abc import Sequence

from moe_jax.placement.report import parts, svg
from moe_jax.placement.report.markup import element, joined
from moe_jax.placement.report.parts import Section

ROW, BAR, TOP = 36.0, 13.0, 4.0


def section(values: Sequence[tuple[str, float]], unit: str) -> Section:
    """`values`: name and held-out objective of every method; the planner is the last one."""
    most = max(*(value for _, value in values), 1e-300)
    shapes = []
    for number, (name, value) in enumerate(values):
        y = TOP + ROW * number
        shown = parts.quantity(value, unit)
        class_ = "objective" if number == len(values) - 1 else "other"
        bar = svg.box(0, y + 17, svg.WIDTH * value / most, BAR, f"{name}: {shown}", class_=class_)
        shapes += [svg.words(0, y + 12, name), svg.words(svg.WIDTH, y + 12, shown, "end"), bar]
    label = f"held-out objective of {len(values)} methods, {unit}"
    picture = svg.canvas(TOP + ROW * len(values), label, *shapes)
    text = parts.caption("The objective on the held-out sequences; less is better.")
    figure = element("figure", element("figcaption", label), picture)
    table = parts.table(unit, ["method", "held out"], [[n, f"{v:.6g}"] for n, v in values])
    return Section("methods", "Other ways to place experts", joined([text, figure]), (table,))
