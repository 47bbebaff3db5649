"""Weights in MXFP4: 4-bit values, 32 of them with one scale (OCP Microscaling Formats 1.0, 2023).

    NAME_blocks  uint8 [..., G, 16]  two values a byte, the one of lower index in the lower bits
    NAME_scales  uint8 [..., G]      the power of two of each 32 values, less 127 (E8M0)

A value has a sign, two bits of exponent and one of mantissa (E2M1). All of them times their scales
are numbers that bfloat16 holds exactly, down to 2^-128, so nothing is rounded here.

Axes: G groups of 32 values.
"""

import numpy as np
from jaxtyping import Float, UInt8

GROUP = 32
BLOCKS, SCALES = "_blocks", "_scales"
# The tensors of a weight by the ends of their names, and the dtypes that each may have.
PARTS = {BLOCKS: ("U8",), SCALES: ("U8", "F8_E8M0")}
ROWS = 1  # rows of a weight that share their scales
NO_NUMBER = 255  # the scale that means NaN

_FLOAT32 = np.dtype(np.float32)
_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
_BYTE = np.arange(256)
# Of every byte: both values side by side, looked up as one number of 8 bytes, which takes a third
# of the time of two; as a scale, its power of two.
_PAIRS = np.stack([_VALUES[_BYTE & 15], _VALUES[_BYTE >> 4]], axis=1).view(np.uint64)[:, 0]
_POWERS = np.append(np.ldexp(np.float32(1), _BYTE[:NO_NUMBER] - 127), np.float32(np.nan))


def shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Of the two tensors that hold a weight of this shape, by the ends of their names.

    Its last axis is that of groups, a multiple of 32.
    """
    *outer, width = shape
    groups = (*outer, width // GROUP)
    return {BLOCKS: (*groups, GROUP // 2), SCALES: groups}


def decode(
    blocks_ZGX: UInt8[np.ndarray, "*Z G 16"],
    scales_ZG: UInt8[np.ndarray, "*Z G"],
    dtype: np.dtype = _FLOAT32,
) -> Float[np.ndarray, "*Z V"]:
    """Values, V = 32 G; NaN where a scale says so, infinity beyond float32."""
    values_ZGV = np.take(_PAIRS, blocks_ZGX).view(np.float32)
    with np.errstate(over="ignore"):  # it becomes infinity, and the reader refuses that
        values_ZGV *= _POWERS[scales_ZG][..., None]
    return values_ZGV.reshape(*scales_ZG.shape[:-1], -1).astype(dtype, copy=False)
