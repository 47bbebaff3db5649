"""The three plots of a run: loss, traffic between device pairs, load by device and layer.

Each function returns PNG bytes. Nothing global is touched (no pyplot, no backend to choose), the
same numbers always give the same bytes, and colours are told apart by people with any colour
vision: Okabe-Ito for lines, single-hue or blue-orange maps for cells, and figures inside the cells
where they fit. `narrow` figures stack their panels, for screens as wide as a telephone.

Axes: L layers, M devices.
"""

import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_jax.sim.curves import Curves
from moe_jax.sim.measurement import ratio_to_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Width = Literal["wide", "narrow"]
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#555555"  # Okabe-Ito
MOST_ANNOTATED = 12  # a map with more columns than this has no room for figures


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of the comparison: what moved and what was computed."""

    name: str
    dispatch_LMM: np.ndarray
    combine_LMM: np.ndarray
    load_LM: np.ndarray


def loss(curves: Curves, width: Width = "wide") -> bytes:
    """Train loss, held-out loss and the unigram line over steps."""
    figure = _figure((9.0, 4.2) if width == "wide" else (4.4, 3.9))
    axes = figure.subplots()
    axes.plot(
        list(curves.train), list(curves.train.values()), color=BLUE, linewidth=1.0, label="train"
    )
    if curves.heldout:
        steps, values = list(curves.heldout), list(curves.heldout.values())
        label = f"held-out text, last {values[-1]:.3f}"
        axes.plot(steps, values, "o-", color=VERMILION, linewidth=1.8, markersize=4, label=label)
    if curves.unigram is not None:
        label = f"unigram model, {curves.unigram:.3f}"
        axes.axhline(curves.unigram, color=GREY, linestyle="--", linewidth=1.4, label=label)
    axes.set_xlabel("training step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title("Loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _png(figure)


def traffic(before: Side, after: Side, width: Width = "wide") -> bytes:
    """Rows by (source, destination) pair, summed over layers: out and back, before and after."""
    wide = width == "wide"
    figure = _figure((9.0, 8.2) if wide else (4.4, 14.6))
    panels = [
        (way, side, getattr(side, field).sum(0), getattr(before, field).sum())
        for way, field in (("Out to the experts", "dispatch_LMM"), ("Back home", "combine_LMM"))
        for side in (before, after)
    ]
    highest = max(1, *(int(rows_MM.max()) for _, _, rows_MM, _ in panels))
    grid = figure.subplots(*((2, 2) if wide else (4, 1)), squeeze=False)
    images = []
    for axes, (way, side, rows_MM, baseline) in zip(grid.flat, panels, strict=True):
        change = "" if side is before else f" ({_percent(int(rows_MM.sum()), int(baseline))})"
        axes.set_title(f"{way}, {side.name}\n{rows_MM.sum():,} rows{change}")
        own = np.eye(len(rows_MM), dtype=bool)
        cells = np.ma.masked_array(rows_MM, own)
        images.append(_cells(axes, cells, "YlGnBu", (0, highest), _rows_text))
        devices = range(len(rows_MM))
        _named_axes(axes, ("destination device", devices), ("source device", devices))
    bar = figure.colorbar(
        images[-1], ax=grid, location="bottom", shrink=0.7, aspect=40 if wide else 22, pad=0.02
    )
    bar.set_label("rows, summed over layers (one scale for all)")
    return _png(figure)


def load(before: Side, after: Side, layer_ids: Sequence[int], width: Width = "wide") -> bytes:
    """Rows computed by each device in each layer, as a multiple of the layer's mean.

    `layer_ids` are the model's own numbers of the layers.
    """
    wide = width == "wide"
    num_layers = len(before.load_LM)
    height = min(1.9 + 0.42 * num_layers, 9.0)
    figure = _figure((9.0, height + 0.5) if wide else (4.4, 2 * height))
    grid = figure.subplots(*((1, 2) if wide else (2, 1)), squeeze=False)
    ratios = [ratio_to_mean(side.load_LM) for side in (before, after)]
    spread = max(0.1, *(float(np.abs(ratio_LM - 1).max()) for ratio_LM in ratios))
    images = []
    for axes, side, ratio_LM in zip(grid.flat, (before, after), ratios, strict=True):
        worst_L = ratio_LM.max(1)
        axes.set_title(
            f"Load {side.name}\nmax / mean: {worst_L.mean():.3f} mean, {worst_L.max():.3f} worst"
        )
        limits = (1 - spread, 1 + spread)
        images.append(_cells(axes, ratio_LM, "PuOr_r", limits, "{:.2f}".format))
        _named_axes(axes, ("device", range(ratio_LM.shape[1])), ("layer", layer_ids))
    bar = figure.colorbar(
        images[-1], ax=grid, location="bottom", shrink=0.7, aspect=40 if wide else 22, pad=0.04
    )
    bar.ax.set_xlim(max(0, 1 - spread), 1 + spread)  # colours are as far from the mean either way
    bar.set_label("rows computed / mean of the layer's devices")
    return _png(figure)


def _figure(size: tuple[float, float]) -> "Figure":
    from matplotlib.figure import Figure  # half a second: only when there is something to draw

    return Figure(figsize=size, dpi=130, layout="constrained", facecolor="white")


def _cells(
    axes: "Axes",
    values: np.ndarray,
    colours: str,
    limits: tuple[float, float],
    text: Callable[[float], str],
) -> Any:
    """Draws a matrix as coloured cells, with the figures in them where they fit."""
    image = axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.set_facecolor("#eeeeee")  # masked cells: a device sends nothing to itself
    if max(values.shape) > MOST_ANNOTATED:
        return image
    for (row, column), value in np.ndenumerate(np.ma.getdata(values)):
        if np.ma.getmaskarray(values)[row, column]:
            continue
        axes.text(
            column,
            row,
            text(float(value)),
            ha="center",
            va="center",
            fontsize=7.5,
            color=_ink(image.cmap(image.norm(value))),
        )
    return image


def _ink(colour: Sequence[float] | np.ndarray) -> str:
    """Black or white, whichever stands out more on the colour (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if luminance < 0.179 else "black"


def _named_axes(axes: "Axes", *named: tuple[str, Sequence[int]]) -> None:
    """What columns and rows are, and the number of each, or of some."""
    for axis, (label, numbers) in zip((axes.xaxis, axes.yaxis), named, strict=True):
        axis.set_label_text(label)
        every = max(1, -(-len(numbers) // 16))
        axis.set_ticks(range(0, len(numbers), every), [str(n) for n in numbers[::every]])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _rows_text(rows: float) -> str:
    """A count in at most five characters, as wide as a cell."""
    if rows < 1e5:
        return f"{rows:.0f}"
    return f"{rows / 1e3:.0f}k" if rows < 1e6 else f"{rows / 1e6:.3g}M"


def _percent(value: float, baseline: float) -> str:
    return f"{100 * (value - baseline) / baseline:+.1f} %" if baseline else "no rows before"


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    # no version or date inside: the same numbers give the same file
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
