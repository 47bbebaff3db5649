"""What figures have in common: a section, two pictures side by side, names and numbers."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from moe_jax.placement.report.markup import Markup, element, joined

MOST = 32  # devices that are drawn one by one; of more, neighbours are drawn together


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
      key: its id.
      title: its heading.
      figure: what is drawn, with its captions.
      tables: the same figures as numbers.
    """

    key: str
    title: str
    figure: Markup
    tables: tuple[Markup, ...] = ()

    def markup(self) -> Markup:
        parts = [element("h2", self.title), self.figure]
        if self.tables:
            summary = element("summary", "These figures as numbers")
            parts.append(element("details", summary, joined(self.tables)))
        return element("section", *parts, id=self.key)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Devices, or neighbouring devices drawn together where there are more than MOST.

    Attributes:
      devices: of the machine.
      size: devices of a group; divides them.
    """

    devices: int
    size: int

    @classmethod
    def of(cls, devices: int) -> "Groups":
        sizes = (n for n in range(1, devices + 1) if devices % n == 0)
        return cls(devices, next(n for n in sizes if devices // n <= MOST))

    @property
    def names(self) -> list[str]:
        if self.size == 1:
            return [str(m) for m in range(self.devices)]
        return [f"{m}-{m + self.size - 1}" for m in range(0, self.devices, self.size)]

    @property
    def note(self) -> str:
        each = self.size
        return f" {each} neighbouring devices are drawn as one." if each > 1 else ""

    def sums(self, value_MM: Float[np.ndarray, "M M"]) -> Float[np.ndarray, "G G"]:
        """Of every pair of groups."""
        count = self.devices // self.size
        return value_MM.reshape(count, self.size, count, self.size).sum(axis=(1, 3))

    def any(self, mask_MM: Bool[np.ndarray, "M M"]) -> Bool[np.ndarray, "G G"]:
        return self.sums(mask_MM.astype(float)) > 0

    def largest(self, value_LM: Float[np.ndarray, "L M"]) -> Float[np.ndarray, "L G"]:
        """The largest of every group."""
        return value_LM.reshape(len(value_LM), -1, self.size).max(axis=2)


def caption(*sentences: object) -> Markup:
    return element("p", joined(sentences, " "), class_="soft")


def pair(before: tuple[str, Markup], after: tuple[str, Markup]) -> Markup:
    """Two pictures side by side, or one above the other on a phone."""
    figures = (
        element("figure", element("figcaption", title), picture)
        for title, picture in (before, after)
    )
    return element("div", *figures, class_="pair")


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """Numbers; scrolls within its own frame where it is wider than the page."""
    head = element("tr", *(element("th", name, scope="col") for name in heads))
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
        )
        for row in rows
    ]
    inside = element(
        "table", element("caption", title), element("thead", head), element("tbody", *body)
    )
    return element("div", inside, class_="scroll", tabindex=0)


def matrix(
    title: str, corner: str, rows: Sequence[str], columns: Sequence[str], value_RC: np.ndarray
) -> Markup:
    """A matrix as a table; nan is empty."""
    cells = [
        [name, *("" if np.isnan(value) else f"{value:.4g}" for value in row)]
        for name, row in zip(rows, value_RC, strict=True)
    ]
    return table(title, [corner, *columns], cells)


def short(value: float) -> str:
    """About four digits, without exponents where people do not expect them."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def quantity(value: float, unit: str) -> str:
    """An objective in the unit that people read."""
    if unit.startswith("s "):
        return f"{short(1e6 * value)} µs {unit[2:]}"
    return f"{short(value)} {unit}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
