"""The objective and its proven bound over the time of the search."""

import itertools
import math

from moe_jax.placement.report import parts, svg
from moe_jax.placement.report.markup import Markup, element, joined
from moe_jax.placement.report.parts import Section
from moe_jax.placement.solution import Report

LEFT, TOP, HEIGHT, FOOT = 52.0, 22.0, 190.0, 34.0
SOONEST = 1e-3  # seconds; the axis is logarithmic
Point = tuple[float, float]


def section(report: Report) -> Section:
    unit, factor = report.unit, 1.0
    if unit.startswith("s "):
        unit, factor = f"µs {unit[2:]}", 1e6
    values = [(s, factor * value) for s, value, _ in report.history]
    bounds = [(s, factor * bound) for s, _, bound in report.history if bound > 0]
    proven = f"{factor * report.bound:,.4g}" if report.bound > 0 else "none"
    label = (
        f"objective from {values[0][1]:,.4g} to {factor * report.objective:,.4g}, bound {proven}, "
        f"{unit}, in {report.seconds:.3g} s"
    )
    note = (
        "No bound is proven for this plan."
        if not bounds
        else ("No plan is below the bound, so the best one lies between the two lines.")
    )
    text = parts.caption(
        "On the sequences that were planned on, so these figures are optimistic and only show how "
        f"the search went. {note}"
        + (f" {report.note[0].upper()}{report.note[1:]}." if report.note else "")
    )
    figure = element(
        "figure", element("figcaption", label), _picture(label, values, bounds, report)
    )
    rows = [
        [f"{s:.3f}", f"{factor * value:.6g}", f"{factor * bound:.6g}" if bound > 0 else "none"]
        for s, value, bound in report.history
    ]
    table = parts.table(unit, ["seconds", "objective", "bound"], rows)
    return Section("search", "The search", joined([text, _legend(), figure]), (table,))


def _picture(label: str, values: list[Point], bounds: list[Point], report: Report) -> Markup:
    every = [value for _, value in (*values, *bounds)]
    low, high = min(every), max(every)
    margin = max(high - low, 1e-9 * abs(high), 1e-300) * 0.08
    low, high = low - margin, high + margin
    end = max(report.seconds, values[-1][0], 2 * SOONEST)
    first = math.log(max(min(values[0][0], end / 2), SOONEST))

    def at(point: Point) -> Point:
        seconds, value = point
        along = (math.log(max(seconds, math.exp(first))) - first) / (math.log(end) - first)
        x = LEFT + (svg.WIDTH - LEFT - 12) * along
        return x, TOP + HEIGHT * (high - value) / (high - low)

    shapes, texts = [], []
    for value in svg.ticks(low, high, 4):
        y = at((end, value))[1]
        shapes.append(svg.line(LEFT, y, svg.WIDTH - 12, y, "grid"))
        texts.append(svg.words(LEFT - 6, y + 4, f"{value:,.6g}", "end"))
    for mark in _marks(math.exp(first), end):
        x = at((mark, low))[0]
        shapes.append(svg.line(x, TOP, x, TOP + HEIGHT, "grid"))
        texts.append(svg.words(x, TOP + HEIGHT + 15, f"{mark:g} s", "middle"))
    for points, class_ in ((bounds, "bound"), (values, "objective")):
        if points:
            stairs = _stairs([*points, (end, points[-1][1])])
            shapes.append(svg.path([at(point) for point in stairs], class_))
    texts.append(svg.words(LEFT, TOP + HEIGHT + 31, "seconds of the search (logarithmic) →"))
    return svg.canvas(TOP + HEIGHT + FOOT, label, *shapes, *texts)


def _marks(low: float, high: float) -> list[float]:
    """Round seconds on a logarithmic axis: a few, whatever it spans."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1.0, 2.0, 5.0), (1.0,)):
        marks = [step * 10.0**power for power in powers for step in steps]
        marks = [mark for mark in marks if low <= mark <= high]
        if len(marks) <= 6:
            break
    return marks


def _stairs(points: list[Point]) -> list[Point]:
    """A value holds until the next one."""
    stairs = points[:1]
    for (_, held), (seconds, value) in itertools.pairwise(points):
        stairs += [(seconds, held), (seconds, value)]
    return stairs


def _legend() -> Markup:
    names = (("objective", "objective of the best plan so far"), ("bound", "proven bound"))
    items = [
        element("li", element("span", "", class_=f"key {key}"), " " + name) for key, name in names
    ]
    return element("ul", *items, class_="scale")
