"""Transitions of one pair of adjacent layers, expert by expert, as a picture of dots.

256 experts make 65,536 cells, too many for drawing them one by one: the dots are a PNG, and what
carries names, borders and tips of the devices lies over it. Beyond MOST experts, neighbours share a
dot. The same counts on both sides, in the order of the devices before and after, on one scale.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

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
        edges = self._edges[:-1]
        sorted_EE = self.transition_EE[from_E][:, to_E].astype(float)
        return np.add.reduceat(np.add.reduceat(sorted_EE, edges, axis=0), edges, axis=1)

    def borders(self, one: View, groups: Groups) -> Float[np.ndarray, "2 B"]:
        """Where the experts of a group begin, and the last ones end: in both layers, in dots."""
        count = groups.devices // groups.size
        number_2E = one.first_LE[self.index : self.index + 2] // groups.size
        count_2G = np.stack([np.bincount(row_E, minlength=count) for row_E in number_2E])
        end_2G = np.pad(count_2G.cumsum(axis=1), ((0, 0), (1, 0)))
        return np.interp(end_2G, self._edges, np.arange(len(self._edges)))

    @property
    def _edges(self) -> Int[np.ndarray, " X"]:
        """The first expert of every dot, and how many there are."""
        experts = len(self.transition_EE)
        return np.append(np.arange(0, experts, self.each), experts)

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
    kind = "fine" if count > FINE else "grid"
    down, across = pair.borders(one, groups) * (SIDE / len(share_PP))
    for y, x in zip(down, across, strict=True):
        shapes.append(svg.line(LEFT + x, TOP, LEFT + x, TOP + SIDE, kind))
        shapes.append(svg.line(LEFT, TOP + y, LEFT + SIDE, TOP + y, kind))
    block_GG = groups.sums(one.flow_JMM[pair.index])
    for r, c in np.ndindex(count, count):
        share = parts.percent(float(block_GG[r, c]))
        tip = f"from device {names[r]} to {names[c]}: {share} of the tokens"
        corner, wide, high = (LEFT + across[c], TOP + down[r]), np.diff(across)[c], np.diff(down)[r]
        shapes.append(svg.box(*corner, wide, high, tip, class_="blank"))
    texts = [
        svg.words(0, 11, f"layer {pair.names[0]} ↓"),
        svg.words(svg.WIDTH - 4, 11, f"layer {pair.names[1]}, experts by device →", "end"),
    ]
    for middle, name in _labels(down, names):
        texts.append(svg.words(LEFT - 5, TOP + middle + 4, name, "end"))
    for middle, name in _labels(across, names):
        texts.append(svg.words(LEFT + middle, TOP - 7, name, "middle"))
    share = parts.percent(float(one.stays_J[pair.index]))
    heading = f"{one.name}: {share} of the tokens stay on their device"
    return heading, svg.canvas(TOP + SIDE + 4, heading, *shapes, *texts)


def _labels(borders: np.ndarray, names: Sequence[str]) -> Iterator[tuple[float, str]]:
    """The middles of groups that have experts and room for a name beside the last one's."""
    room, last = svg.CHARACTER * len(names[-1]) + 5, -math.inf
    for name, low, high in zip(names, borders[:-1], borders[1:], strict=True):
        middle = float(low + high) / 2
        if low < high and middle >= last + room * (1 - 1e-9):
            yield middle, name
            last = middle
