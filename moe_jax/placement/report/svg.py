"""Drawing primitives. Coordinates: a canvas WIDTH units wide, which a narrow phone shows at about
one pixel per unit, so a FONT of 12 units is never below 11 pixels; wider screens enlarge it.

Colours are classes of the style sheet (style.py), which follow the reader's light or dark setting.
"""

import math
from collections.abc import Sequence

from moe_jax.placement.report.markup import Markup, element, number

WIDTH = 360.0
FONT = 12.0
CHARACTER = 0.58 * FONT  # width of a character, about


def canvas(height: float, label: str, *children: object) -> Markup:
    """One picture, with its label for those who do not see it."""
    return element(
        "svg",
        element("title", label),
        *children,
        viewBox=f"0 0 {number(WIDTH)} {number(height)}",
        role="img",
        aria_label=label,
    )


def box(x: float, y: float, width: float, height: float, tip: str = "", **attributes) -> Markup:
    """A rectangle; `tip` appears when the pointer rests on it."""
    inside = [element("title", tip)] if tip else []
    return element("rect", *inside, x=x, y=y, width=width, height=height, **attributes)


def picture(x: float, y: float, width: float, height: float, url: Markup, **attributes) -> Markup:
    """An image that travels inside the page."""
    return element("image", href=url, x=x, y=y, width=width, height=height, **attributes)


def words(x: float, y: float, what: object, anchor: str = "start", **attributes) -> Markup:
    """A line of text; `anchor`: start, middle or end."""
    return element("text", what, x=x, y=y, text_anchor=anchor, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """A line through points."""
    joined = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return element("polyline", points=joined, class_=class_)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`, about as many as asked for."""
    span = max(high - low, 1e-300)
    rough = span / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def every(count: int, room: float, label: float) -> int:
    """So that labels `label` units wide fit: every n-th of `count` that share `room`."""
    return max(1, math.ceil(count * label / max(room, 1e-9)))
