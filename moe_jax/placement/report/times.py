"""Where the time of every layer goes before and after: stacked columns on one scale."""

from collections.abc import Sequence

from moe_jax.placement.report import parts, svg
from moe_jax.placement.report.markup import Markup, element, joined
from moe_jax.placement.report.parts import Section
from moe_jax.placement.report.view import View

PHASES = ("compute", "exchange", "waiting")
LEFT, RIGHT, TOP, HEIGHT, FOOT = 46.0, 10.0, 22.0, 200.0, 34.0
MICRO = 1e6


def section(before: View, after: View, layers: Sequence[str]) -> Section:
    most = max(MICRO * float(one.clock.total_L.max()) for one in (before, after))
    pictures = [_picture(one, max(most, 1e-300), layers) for one in (before, after)]
    text = parts.caption(
        "Microseconds of a layer and step, modelled from the counts and the sizes and speeds below."
        " Compute and exchange are what the devices need for their own rows, waiting is how long"
        " they wait for the slowest device and the slowest link, all as means over devices;"
        " together they are the time of the layer."
    )
    figure = joined([text, _legend(), parts.pair(*pictures)])
    rows = [
        [name, *(f"{us:.4g}" for one in (before, after) for us in _micro(one, layer))]
        for layer, name in enumerate(layers)
    ]
    heads = [f"{phase}, {one.name}" for one in (before, after) for phase in PHASES]
    tables = (parts.table("microseconds per layer and step", ["layer", *heads], rows),)
    return Section("time", "Where the time goes", figure, tables)


def _picture(one: View, most: float, layers: Sequence[str]) -> tuple[str, Markup]:
    wide = (svg.WIDTH - LEFT - RIGHT) / len(layers)
    gap = min(wide * 0.2, 3.0)
    floor = TOP + HEIGHT
    shapes, texts = [], [svg.words(LEFT - 6, 11, "µs", "end")]
    for value in svg.ticks(0, most, 4):
        y = floor - HEIGHT * value / most
        shapes.append(svg.line(LEFT, y, svg.WIDTH - RIGHT, y, "grid"))
        texts.append(svg.words(LEFT - 6, y + 4, f"{value:,.6g}", "end"))
    for layer, name in enumerate(layers):
        us, x, y = _micro(one, layer), LEFT + wide * layer, floor
        tip = ", ".join(
            f"{phase} {parts.short(part)} µs" for phase, part in zip(PHASES, us, strict=True)
        )
        column = [element("title", f"layer {name}: {tip}, together {parts.short(sum(us))} µs")]
        for phase, part in zip(PHASES, us, strict=True):
            high = HEIGHT * part / most
            y -= high
            column.append(svg.box(x + gap / 2, y, wide - gap, high, class_=phase))
        shapes.append(element("g", *column))
    widest = svg.CHARACTER * max(len(name) for name in layers) + 5
    for layer in range(0, len(layers), svg.every(len(layers), wide * len(layers), widest)):
        texts.append(svg.words(LEFT + wide * (layer + 0.5), floor + 15, layers[layer], "middle"))
    texts.append(svg.words(LEFT, floor + 31, "layer →"))
    means = [MICRO * float(part_L.mean()) for part_L in _parts(one)]
    mean = ", ".join(
        f"{phase} {parts.short(part)}" for phase, part in zip(PHASES, means, strict=True)
    )
    heading = f"{one.name}: {parts.short(sum(means))} µs in the mean ({mean})"
    return heading, svg.canvas(floor + FOOT, heading, *shapes, *texts)


def _parts(one: View):
    return one.clock.compute_L, one.clock.exchange_L, one.clock.waiting_L


def _micro(one: View, layer: int) -> list[float]:
    return [MICRO * float(part_L[layer]) for part_L in _parts(one)]


def _legend() -> Markup:
    items = [
        element("li", element("span", "", class_=f"key {phase}"), " " + phase) for phase in PHASES
    ]
    return element("ul", *items, class_="scale")
