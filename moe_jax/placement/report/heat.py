"""Heat maps: a matrix as coloured cells, and the scale that several of them share.

A strength from 0 to 1 is the opacity of the warm colour, from 0 to -1 that of the cool one; nan is
no cell. Values are read from the scale, from the tip of a cell and from the tables of the page.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from moe_jax.placement.report import svg
from moe_jax.placement.report.markup import Markup, element, joined

LEFT, TOP, ROW = 46.0, 36.0, 14.0
Tip = Callable[[int, int], str]


def heat_map(
    label: str,
    strength_RC: Float[np.ndarray, "R C"],
    tip: Tip,
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    marked_R: Sequence[int] = (),
    notes_R: Sequence[str] = (),
) -> Markup:
    """One heat map.

    Args:
      label: for those who do not see it.
      strength_RC: see the head of this file.
      tip: what a cell says when the pointer rests on it.
      rows, columns: what they are, and their names.
      marked_R: the column of each row whose cell gets a frame.
      notes_R: a few characters at the end of each row.
    """
    count_rows, count_columns = strength_RC.shape
    right = 8.0 + svg.CHARACTER * max((len(note) for note in notes_R), default=0)
    wide = (svg.WIDTH - LEFT - right) / count_columns
    high = ROW if notes_R else min(wide, 40.0)
    cells = [
        svg.box(
            LEFT + wide * c + 0.5,
            TOP + high * r + 0.5,
            wide - 1.0,
            high - 1.0,
            tip(r, c),
            class_="hot" if strength_RC[r, c] >= 0 else "cool",
            fill_opacity=min(abs(float(strength_RC[r, c])), 1.0),
        )
        for r, c in np.ndindex(strength_RC.shape)
        if not np.isnan(strength_RC[r, c])
    ]
    frames = [
        svg.box(LEFT + wide * c + 1, TOP + high * r + 1, wide - 2, high - 2, class_="frame")
        for r, c in enumerate(marked_R)
    ]
    step_r = svg.every(count_rows, high * count_rows, svg.FONT + 1)
    step_c = svg.every(count_columns, wide * count_columns, _widest(columns[1]) + 5)
    beside = max(LEFT, svg.CHARACTER * (len(rows[0]) + 4))
    texts = [svg.words(0, 11, f"{rows[0]} ↓"), svg.words(beside, 11, f"{columns[0]} →")]
    for r in range(0, count_rows, step_r):
        middle = TOP + high * (r + 0.5) + 4
        texts.append(svg.words(LEFT - 5, middle, rows[1][r], "end"))
    for c in range(0, count_columns, step_c):
        texts.append(svg.words(LEFT + wide * (c + 0.5), TOP - 7, columns[1][c], "middle"))
    for r, note in enumerate(notes_R):
        texts.append(svg.words(svg.WIDTH - 2, TOP + high * (r + 0.5) + 4, note, "end"))
    return svg.canvas(TOP + high * count_rows + 4, label, *cells, *frames, *texts)


def scale(label: str, steps: Sequence[tuple[float, str]], warm: str = "hot") -> Markup:
    """What the colours mean: (strength, value) from left to right; `warm`: their class."""
    items = [
        element(
            "li",
            element(
                "svg",
                svg.box(
                    0, 0, 28, 14, class_=warm if s >= 0 else "cool", fill_opacity=float(abs(s))
                ),
                svg.box(0.5, 0.5, 27, 13, class_="edge"),
                viewBox="0 0 28 14",
                width=28,
                height=14,
                role="img",
                aria_label=name,
            ),
            " " + name,
        )
        for s, name in steps
    ]
    return element("ul", element("li", label), joined(items), class_="scale")


def _widest(names: Sequence[str]) -> float:
    return svg.CHARACTER * max((len(name) for name in names), default=0)
