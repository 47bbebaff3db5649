"""The few numbers that tell what a placement changed, once, for console, page and JSON alike.

Rows are given per token and layer: totals over all device pairs divided by the number of (token,
layer) pairs that were routed. A change is relative to the value before.
"""

import dataclasses

import numpy as np

from moe_jax.sim.measurement import Measurement, ratio_to_mean
from moe_jax.sim.replay import Prediction


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of the table."""

    key: str
    label: str
    before: float
    after: float

    @property
    def change(self) -> float | None:
        """(after - before) / before, or None where there was nothing before."""
        return (self.after - self.before) / self.before if self.before else None


# dispatch -> how its two phases are called
PHASES = {
    "exchange": ("rows out to the experts", "rows back home"),
    "hierarchical": ("rows out to the experts, of every hop", "rows back home, of every hop"),
    "coherent": ("rows out to the experts", "rows on to the best expert's device"),
    "gathered": ("rows of the all-gather", "rows of the reduce-scatter"),
}


def figures(
    before: Measurement, after: Measurement, predicted: tuple[Prediction, Prediction]
) -> list[Figure]:
    """All lines of the table, in reading order."""
    columns = [_column(measured, p) for measured, p in zip((before, after), predicted, strict=True)]
    out, back = PHASES[before.meta.dispatch]
    labels = {
        "rows_out": f"{out}, measured",
        "rows_back": f"{back}, measured",
        "rows": "both ways, measured",
        "padding": "padding of the transport, both ways, measured",
        "rows_deduplicated": "one row per device out and back (not run), predicted",
        "load_mean": "load, max / mean: mean of the layers",
        "load_worst": "load, max / mean: worst layer",
    }
    return [Figure(key, label, *(c[key] for c in columns)) for key, label in labels.items()]


def _column(measured: Measurement, predicted: Prediction) -> dict[str, float]:
    routed = max(1, int(measured.routed_TL.sum()))
    out, back = int(measured.dispatch_LMM.sum()), int(measured.combine_LMM.sum())
    worst_L = ratio_to_mean(measured.load_LM).max(1)
    return {
        "rows_out": out / routed,
        "rows_back": back / routed,
        "rows": (out + back) / routed,
        "padding": int(measured.padding_LMM.sum()) / routed,
        "rows_deduplicated": predicted.partial_rows / routed,
        "load_mean": float(np.mean(worst_L)),
        "load_worst": float(np.max(worst_L)),
    }


def change_text(figure: Figure) -> str:
    """The change as people read it; a hyphen where there is no relative change."""
    return "-" if figure.change is None else f"{100 * figure.change:+.1f} %"
