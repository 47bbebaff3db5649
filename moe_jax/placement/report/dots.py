"""Transitions of one pair of adjacent layers, expert by expert, as a picture of dots.

256 experts make 65,536 cells, too many for drawing them one by one: the dots are a PNG, and what
carries names, borders and tips of the devices lies over it. Beyond MOST experts, neighbours share a
dot. The same counts on both sides, in the order of the devices before and after, on one scale.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from moe_jax.placement.report import heat, parts, png, svg
from moe_jax.placement.report.markup import Markup, joined, raw
from moe_jax.placement.report.parts import Groups
from moe_jax.placement.report.view import View

COLOUR = (37, 110, 190)  # as .dot of the style sheet: readable on light and dark pages
MOST = 128  # dots of a side
IN_TABLE = 64  # experts whose transitions stand in a table of their own
FINE = 16  # from this many devices on, borders are fine lines
LEFT, TOP = 46.0, 36.0
SIDE = svg.WIDTH - LEFT - 4


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """Two adjacent layers.

    Attributes:
      index: of the first one.
      names: of both.
      transition_EE: tokens by their best expert in the first and in the second.
    """

    index: int
    names: tuple[str, str]
    transition_EE: Int[np.ndarray, "E E"]

    def dots(self, one: View) -> Float[np.ndarray, "P P"]:
        """Tokens of every dot, experts in the order of the devices."""
        from_E, to_E = one.order_LE[self.index], one.order_LE[self.index + 1]
        edges = np.arange(0, len(from_E), self.each)
        sorted_EE = self.transition_EE[from_E][:, to_E].astype(float)
        return np.add.reduceat(np.add.reduceat(sorted_EE, edges, axis=0), edges, axis=1)

    @property
    def each(self) -> int:
        """Experts that share a dot, in each direction."""
        return -(-len(self.transition_EE) // MOST)


def figure(before: View, after: View, pair: Pair, groups: Groups) -> Markup:
    dots = [pair.dots(one) for one in (before, after)]
    most = max(*(float(dots_PP.max()) for dots_PP in dots), 1.0)
    pictures = [
        _picture(one, dots_PP / most, pair, groups)
        for one, dots_PP in zip((before, after), dots, strict=True)
    ]
    first, second = pair.names
    text = parts.caption(
        f"One pair of layers, {first} to {second}, expert by expert (the pair whose share that "
        "stays is the middle one, after). Experts are sorted by device and lines part the devices. "
        "The colour grows with the square root of the tokens."
        + (f" A dot is {pair.each} x {pair.each} neighbouring experts." if pair.each > 1 else "")
    )
    steps = [(s, f"{s * s * most:,.0f}") for s in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return joined([text, heat.scale("tokens of a dot:", steps, "dot"), parts.pair(*pictures)])


def tables(before: View, after: View, pair: Pair, groups: Groups) -> list[Markup]:
    """By device for both, by expert where that is not too long."""
    where = f"layer {pair.names[0]} to {pair.names[1]}"
    found = [
        parts.matrix(
            f"{one.name}: percent of tokens, {where}, by device",
            "from \\ to",
            groups.names,
            groups.names,
            100 * groups.sums(one.flow_JMM[pair.index]),
        )
        for one in (before, after)
    ]
    experts = [str(expert) for expert in range(len(pair.transition_EE))]
    if len(experts) <= IN_TABLE:
        title = f"tokens by expert, {where} (the same before and after)"
        counts_EE = pair.transition_EE.astype(float)
        found.append(parts.matrix(title, "from \\ to", experts, experts, counts_EE))
    return found


def _picture(one: View, share_PP, pair: Pair, groups: Groups) -> tuple[str, Markup]:
    count, names = groups.devices // groups.size, groups.names
    url = png.data_url(png.opacity_png(np.sqrt(share_PP), COLOUR))
    shapes = [svg.picture(LEFT, TOP, SIDE, SIDE, raw(url), class_="dots")]
    kind, wide = "fine" if count > FINE else "grid", SIDE / count
    for border in range(count + 1):
        at = wide * border
        shapes.append(svg.line(LEFT + at, TOP, LEFT + at, TOP + SIDE, kind))
        shapes.append(svg.line(LEFT, TOP + at, LEFT + SIDE, TOP + at, kind))
    block_GG = groups.sums(one.flow_JMM[pair.index])
    for r, c in np.ndindex(count, count):
        share = parts.percent(float(block_GG[r, c]))
        tip = f"from device {names[r]} to {names[c]}: {share} of the tokens"
        shapes.append(svg.box(LEFT + wide * c, TOP + wide * r, wide, wide, tip, class_="blank"))
    texts = [
        svg.words(0, 11, f"layer {pair.names[0]} ↓"),
        svg.words(svg.WIDTH - 4, 11, f"layer {pair.names[1]}, experts by device →", "end"),
    ]
    for group in range(0, count, _label_step(count, names)):
        middle = wide * (group + 0.5)
        texts.append(svg.words(LEFT - 5, TOP + middle + 4, names[group], "end"))
        texts.append(svg.words(LEFT + middle, TOP - 7, names[group], "middle"))
    share = parts.percent(float(one.stays_J[pair.index]))
    heading = f"{one.name}: {share} of the tokens stay on their device"
    return heading, svg.canvas(TOP + SIDE + 4, heading, *shapes, *texts)


def _label_step(count: int, names: Sequence[str]) -> int:
    return svg.every(count, SIDE, svg.CHARACTER * len(names[-1]) + 5)
