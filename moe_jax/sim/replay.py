"""Measured against predicted, and before against after: every entry, as integers and as bits.

The prediction replays the recorded routing through the planner's own cost module, so agreement
means that what the planner minimised is what the running program moves. Nothing here has a
tolerance: a check either holds for every entry or names the first that differs.

Axes: see measurement.py.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe_jax.placement import cost
from moe_jax.placement.plan import Placement
from moe_jax.sim.measurement import Measurement

_PAIR = ("layer", "source device", "destination device")
_SLOT = ("layer", "slot")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the planner says for a measurement's tokens under a placement."""

    dispatch_LMM: np.ndarray
    combine_LMM: np.ndarray
    computed_LP: np.ndarray
    partial_rows: int  # both ways, if each device sent one row out and one partial sum back


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that must be equal; `problem` names the first entry that is not."""

    name: str
    entries: int
    problem: str | None

    @property
    def holds(self) -> bool:
        return self.problem is None


def predict(measured: Measurement, placement: Placement) -> Prediction:
    """Counts the rows of the measured tokens under `placement`."""
    ids_TLK, home_T = measured.expert_ids_TLK, measured.home_T
    meta = measured.meta
    # What the copy rule goes by beside homes.
    where = (meta.num_devices // meta.num_nodes, measured.position_T)
    sent = cost.rows(ids_TLK, placement, meta.dispatch, home_T, meta.combine, *where)
    direct = "coherent" if meta.dispatch == "coherent" else "exchange"
    merged = cost.rows(ids_TLK, placement, direct, home_T, "partial", *where)
    return Prediction(
        dispatch_LMM=sent.dispatch_LMM,
        combine_LMM=sent.combine_LMM,
        computed_LP=cost.computed_LP(ids_TLK, placement, meta.dispatch, home_T, *where),
        partial_rows=int(merged.total_LMM.sum()),
    )


def check_counts(
    side: str, measured: Measurement, predicted: Prediction, layer_ids: Sequence[int]
) -> list[Check]:
    """Measured rows are the predicted rows, for every pair of devices and every slot.

    `layer_ids` are the model's own numbers of the layers, which messages name.
    """
    words = ("measured", "predicted")
    pairs = [
        (f"rows out, {side}", measured.dispatch_LMM, predicted.dispatch_LMM, _PAIR),
        (f"rows back, {side}", measured.combine_LMM, predicted.combine_LMM, _PAIR),
        (f"rows computed, {side}", measured.computed_LP, predicted.computed_LP, _SLOT),
    ]
    return [_check(name, left, right, axes, words, layer_ids) for name, left, right, axes in pairs]


def check_answers(before: Measurement, after: Measurement, layer_ids: Sequence[int]) -> list[Check]:
    """The model answered the same: logits in every bit, text and routing in every id."""
    words = ("before", "after")
    logits = _check(
        "logits",
        before.logits_BSV,
        after.logits_BSV,
        ("sequence", "position", "vocabulary entry"),
        words,
    )
    left, right = before.meta.logits_digest, after.meta.logits_digest
    digests = None if left == right else f"SHA-256 {left} before, {right} after"
    text_axes, id_axes = ("sequence", "position"), ("token", "layer", "choice")
    return [
        logits,
        Check("digest of all logits", 1, digests),
        _check("greedy text", before.text_ids_BS, after.text_ids_BS, text_axes, words),
        _check(
            "expert ids", before.expert_ids_TLK, after.expert_ids_TLK, id_axes, words, layer_ids
        ),
    ]


def _check(
    name: str,
    left: np.ndarray,
    right: np.ndarray,
    axes: tuple[str, ...],
    words: tuple[str, str],
    layer_ids: Sequence[int] = (),
) -> Check:
    if left.shape != right.shape:
        problem = f"shape {left.shape} {words[0]}, {right.shape} {words[1]}"
        return Check(name, left.size, problem)
    differs = _bits(left) != _bits(right)
    if not differs.any():
        return Check(name, left.size, None)
    index = tuple(int(i) for i in np.argwhere(differs)[0])
    named = [layer_ids[i] if axis == "layer" else i for axis, i in zip(axes, index, strict=True)]
    where = ", ".join(f"{axis} {i}" for axis, i in zip(axes, named, strict=True))
    found = f"{_shown(left[index])} {words[0]}, {_shown(right[index])} {words[1]}"
    problem = f"{where}: {found} ({int(differs.sum()):,} of {left.size:,} entries differ)"
    return Check(name, left.size, problem)


def _bits(array: np.ndarray) -> np.ndarray:
    """Floats as their bits: -0.0 is not 0.0, and equal NaNs are equal."""
    return array.view(np.uint32) if array.dtype == np.float32 else array


def _shown(value: np.generic) -> str:
    if isinstance(value, np.float32):
        return f"{float(value)!r} (0x{int(value.view(np.uint32)):08x})"
    return str(int(value))
