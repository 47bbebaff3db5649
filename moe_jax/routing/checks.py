"""What must hold for a trace: each rule answers with `Refused`, naming the first bad entry.

`check_*` only look; `valid_*` also return the value in its canonical type. Axes: see trace.py.
"""

from typing import Any

import numpy as np

from moe_jax.errors import Refused


def valid_layer_ids(layer_ids: Any, num_layers: int) -> tuple[int, ...]:
    """Distinct, non-negative numbers, one per layer; the empty tuple stands for 0..L-1."""
    if layer_ids is None or (isinstance(layer_ids, tuple) and not layer_ids):
        return tuple(range(num_layers))
    layer_ids = list(layer_ids) if isinstance(layer_ids, (list, tuple, np.ndarray)) else [None]
    valid = all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in layer_ids)
    if not valid or min(layer_ids, default=0) < 0 or len(set(layer_ids)) != len(layer_ids):
        raise Refused(
            "layer_ids", layer_ids, "distinct layer numbers >= 0", "Number the layers as the model"
        )
    if len(layer_ids) != num_layers:
        raise Refused(
            "layer_ids", layer_ids, f"there are {num_layers} layers", "Give one number per layer"
        )
    return tuple(int(n) for n in layer_ids)


def check_shape(ids: np.ndarray) -> None:
    if ids.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise Refused(
            "expert_ids dtype",
            str(ids.dtype),
            "ids are uint8 or uint16",
            "Convert them; 255 / 65535 means no expert",
        )
    if ids.ndim != 3:
        raise Refused(
            "expert_ids shape",
            ids.shape,
            "the axes are tokens, layers, experts per token",
            "Reshape to [T, L, K]",
        )
    if 0 in ids.shape:
        raise Refused(
            "expert_ids shape",
            ids.shape,
            "an empty trace has nothing to plan on",
            "Record at least one token",
        )


def valid_num_experts(num_experts: Any, ids: np.ndarray) -> int:
    limit = np.iinfo(ids.dtype).max
    whole = isinstance(num_experts, (int, np.integer)) and not isinstance(num_experts, bool)
    if not whole or not 1 <= num_experts <= limit:
        raise Refused(
            "num_experts",
            num_experts,
            f"a whole number from 1 to {limit} for {ids.dtype} ids",
            "Give the number of experts of a layer",
        )
    if num_experts < ids.shape[2]:
        raise Refused(
            "num_experts",
            num_experts,
            f"a token has {ids.shape[2]} distinct experts",
            "Give the number of experts of a layer",
        )
    return int(num_experts)


def check_ids(ids: np.ndarray, num_experts: int) -> None:
    none = np.iinfo(ids.dtype).max
    bad = (ids >= num_experts) & (ids != none)
    if bad.any():
        t, layer, k = (int(i) for i in np.unravel_index(int(bad.argmax()), ids.shape))
        raise Refused(
            f"expert_ids[{t}][{layer}][{k}]",
            int(ids[t, layer, k]),
            f"ids go from 0 to {num_experts - 1}, and {none} means no expert",
            "Give the right num_experts, or record the trace again",
        )
    for k in range(1, ids.shape[2]):
        for j in range(k):
            same = (ids[:, :, k] == ids[:, :, j]) & (ids[:, :, k] != none)
            if same.any():
                t, layer = (int(i) for i in np.unravel_index(int(same.argmax()), same.shape))
                raise Refused(
                    f"expert_ids[{t}][{layer}][{k}]",
                    int(ids[t, layer, k]),
                    "a token chooses an expert once per layer",
                    "Record the trace again",
                )


def valid_numbers(field: str, value: Any, count: int | None, each: str = "sequence") -> np.ndarray:
    """One whole number below 2**31 for each sequence, or token."""
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
        raise Refused(
            field,
            f"{array.dtype} {array.shape}",
            f"one whole number per {each}",
            "Give an int32 vector",
        )
    if count is not None and len(array) != count:
        raise Refused(
            f"{field} length", len(array), f"there are {count} {each}s", f"Give one per {each}"
        )
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise Refused(
            field,
            int(array.min() if array.min() < 0 else array.max()),
            "numbers from 0 to 2**31 - 1",
            "Correct the array",
        )
    return array.astype(np.int32)


def check_seq_len(seq_len: np.ndarray, tokens: int) -> None:
    if seq_len.min() < 1:
        raise Refused(
            f"seq_len[{int(seq_len.argmin())}]",
            int(seq_len.min()),
            "a sequence has at least one token",
            "Leave empty sequences out",
        )
    if (total := int(seq_len.sum(dtype=np.int64))) != tokens:
        raise Refused(
            "sum(seq_len)",
            total,
            f"expert_ids has {tokens} tokens",
            "Record the trace again: sequences and tokens disagree",
        )


def valid_weights(weights: Any, ids: np.ndarray) -> np.ndarray:
    weights = np.asarray(weights)
    if weights.shape != ids.shape or weights.dtype.kind != "f":
        raise Refused(
            "expert_weights",
            f"{weights.dtype} {weights.shape}",
            f"float16 of the shape of expert_ids, {ids.shape}",
            "Correct it or leave it out",
        )
    weights = weights.astype(np.float16)
    if not np.isfinite(weights).all():
        raise Refused(
            "expert_weights", "NaN or infinite", "weights are finite", "Record the trace again"
        )
    return weights


def valid_names(names: Any, count: int) -> tuple[str, ...]:
    if isinstance(names, str) or len(names) != count:
        raise Refused(
            "seq_name", names, f"one name per sequence, {count} in all", "Correct or leave it out"
        )
    return tuple(str(name) for name in names)
