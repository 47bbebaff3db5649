"""Weights in MXFP4: 4-bit values, 32 of them with one scale (OCP Microscaling Formats 1.0, 2023).

    NAME_blocks  uint8 [..., G, 16]  two values a byte, the one of lower index in the lower bits
    NAME_scales  uint8 [..., G]      the power of two of each 32 values, less 127 (E8M0)

A value has a sign, two bits of exponent and one of mantissa (E2M1). All of them times their scales
are numbers that bfloat16 holds exactly, down to 2^-128, so nothing is rounded when they are read.
A value has several codes (0.5 x 2 = 1 x 1): what is written keeps those that it had.

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
# From here on a size is rounded to the next magnitude; in the middle to the one of even mantissa.
_MIDDLES = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2
_ROUND_UP = np.where(np.arange(7) % 2, _MIDDLES, np.nextafter(_MIDDLES, np.float32(8)))
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


def shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Of the weight that blocks of this shape hold."""
    *outer, groups, _ = blocks
    return (*outer, groups * GROUP)


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


def encode(
    values_ZV: Float[np.ndarray, "*Z V"],
    blocks_ZGX: UInt8[np.ndarray, "*Z G 16"],
    scales_ZG: UInt8[np.ndarray, "*Z G"],
) -> tuple[UInt8[np.ndarray, "*Z G 16"], UInt8[np.ndarray, "*Z G"]]:
    """Codes of values; groups that mean what they did before keep their codes, byte for byte.

    In others the scale is by the standard (section 6.3): the power of two of the largest value,
    less two, so that it lies below 8; values are rounded to the nearest, ties to even, at most 6.

    Args:
      blocks_ZGX, scales_ZG: the codes before.
    """
    blocks_ZGX, scales_ZG = blocks_ZGX.copy(), scales_ZG.copy()
    before_ZV = decode(blocks_ZGX, scales_ZG, values_ZV.dtype)
    grouped_ZGV = values_ZV.reshape(*scales_ZG.shape, GROUP)
    changed_ZG = (before_ZV.reshape(grouped_ZGV.shape) != grouped_ZGV).any(-1)
    values_NV = grouped_ZGV[changed_ZG].astype(np.float32)
    power_N = np.frexp(np.abs(values_NV).max(-1, initial=0))[1] - 1 - 2  # frexp is from 0.5 on
    power_N = np.clip(power_N, -127, 127)
    size_NV = np.ldexp(np.abs(values_NV), -power_N[:, None])
    code_NV = np.searchsorted(_ROUND_UP, size_NV, side="right") | (np.signbit(values_NV) << 3)
    blocks_ZGX[changed_ZG] = code_NV[:, ::2] | code_NV[:, 1::2] << 4
    scales_ZG[changed_ZG] = power_N + 127
    return blocks_ZGX, scales_ZG
