"""Weights in 8 bits with a scale for each block of 128 x 128, as DeepSeek-V3 publishes them.

    NAME            float8 E4M3 [O, I]
    NAME_scale_inv  float32 [ceil(O / 128), ceil(I / 128)], what a block's values are times

(arXiv 2412.19437, section 3.3.) A product is rounded to float32 here, and to bfloat16 where a model
computes in it: the same numbers that the published conversion makes. That activations are
rounded to 8 bits as well, where a reference computes in them, is left out.

Axes: O, I out and in of a projection; P, J blocks of each.
"""

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, UInt8

BLOCK = 128
LARGEST = 448.0
ROWS = BLOCK  # rows of a weight that share their scales
SCALES = "_scale_inv"
# The tensors of a weight by the ends of their names, and the dtypes that each may have.
PARTS = {"": ("F8_E4M3",), SCALES: ("F32",)}

_FLOAT32 = np.dtype(np.float32)
_BYTE = np.arange(128)
_EXPONENT, _MANTISSA = _BYTE >> 3, _BYTE & 7
_MAGNITUDES = np.where(
    _EXPONENT > 0,
    np.ldexp(1 + _MANTISSA / 8, _EXPONENT - 7),
    np.ldexp(_MANTISSA / 8, -6),
)
_MAGNITUDES[127] = np.nan  # there is no infinity
_VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES]).astype(np.float32)


def shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Of the two tensors that hold a weight of this shape."""
    return {"": shape, SCALES: tuple(-(-size // BLOCK) for size in shape)}


def shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Of the weight that codes of this shape hold."""
    return blocks


def decode(
    weights_OI: UInt8[np.ndarray, "O I"],
    scales_PJ: Float32[np.ndarray, "P J"],
    dtype: np.dtype = _FLOAT32,
) -> Float[np.ndarray, "O I"]:
    """Values, computed in float32 a row of blocks at a time, so that little is held beside them.

    NaN where a byte says so, infinity beyond the dtype.
    """
    values_OI = np.empty(weights_OI.shape, dtype)
    with np.errstate(over="ignore"):  # it becomes infinity, and the reader refuses that
        for number, scales_J in enumerate(scales_PJ):
            rows = slice(number * BLOCK, (number + 1) * BLOCK)
            scales_I = np.repeat(scales_J, BLOCK)[: weights_OI.shape[1]]
            values_OI[rows] = _VALUES[weights_OI[rows]] * scales_I[None]
    return values_OI


def encode(
    values_OI: Float[np.ndarray, "O I"],
    weights_OI: UInt8[np.ndarray, "O I"],
    scales_PJ: Float32[np.ndarray, "P J"],
) -> tuple[UInt8[np.ndarray, "O I"], Float32[np.ndarray, "P J"]]:
    """Codes of values; blocks that mean what they did before keep their codes, byte for byte.

    In others the scale is that of which the largest value is 448 times (the published way, arXiv
    2412.19437, section 3.3), and values are rounded to the nearest, ties to even.

    Args:
      weights_OI, scales_PJ: the codes before.
    """
    weights_OI, scales_PJ = weights_OI.copy(), scales_PJ.copy()
    before_OI = decode(weights_OI, scales_PJ, values_OI.dtype)
    for p, j in np.ndindex(*scales_PJ.shape):
        block = (slice(p * BLOCK, (p + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
        if (before_OI[block] == values_OI[block]).all():
            continue
        values = values_OI[block].astype(np.float32)
        scale = np.abs(values).max() / np.float32(LARGEST) or np.float32(1)
        rounded = np.clip(values / scale, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)
        weights_OI[block], scales_PJ[p, j] = rounded.view(np.uint8), scale
    return weights_OI, scales_PJ
