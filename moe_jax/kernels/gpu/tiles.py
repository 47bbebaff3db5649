"""Sizes of tiles on Hopper, by rule: what fits into registers and shared memory.

Two warpgroups compute, one copies. A warpgroup's 128 threads have 240 registers each; sums that
fill more than half of them would be spilled beside an epilogue. Axes may end anywhere: copies fill
up with zeros, and drop what is beyond.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax.errors import Refused
from moe_jax.kernels.operands import Operands, Result

WARPGROUPS = 2  # that compute
ROWS = 64  # of a warpgroup's tile: those of one wgmma
SUMMED = 64  # values of a step, 128 bytes in 16 bits: the widest swizzle
WIDTHS = (256, 192, 128, 64)
SUMS = 256  # columns of all sums of a warpgroup: 128 registers a thread
STAGES = 4  # steps in flight, at most
PIECE = 128  # columns that are written out at a time; wider ones take the compiler minutes
SHARED = 216 * 1024  # bytes of the 227 KiB that a block can have; the rest is for barriers
MULTIPLE = 8  # of every axis but rows: strides of copies are multiples of 16 bytes


def padding(size: int) -> int:
    """Zeros behind an axis, so that copies can be told of it."""
    return -size % MULTIPLE


def for_rows(operands: Operands, results: Sequence[Result], width: int) -> tuple[int, int]:
    """Columns of a tile of results of `width` columns, and steps in flight.

    Raises:
      Refused: no tile fits.
    """
    itemsize = operands.lhs[0].dtype.itemsize
    # a buffer for each type
    written = sum({jnp.dtype(r.dtype).itemsize for r in results if not r.row_sum})
    rows = WARPGROUPS * ROWS

    def stages(tile: int) -> int:
        step = SUMMED * (len(operands.lhs) * rows + len(operands.weights) * tile)
        return (SHARED - rows * piece(tile) * written) // (step * itemsize)

    return _widest(width, SUMS // len(operands.products), stages)


def for_columns(d_ff: int, itemsize: int, written: int) -> tuple[int, int]:
    """Columns of a tile of dw, and steps in flight; itemsize of x, and of what is written."""
    rows = WARPGROUPS * ROWS

    def stages(tile: int) -> int:
        return (SHARED - rows * piece(tile) * written) // (SUMMED * (rows + tile) * itemsize)

    return _widest(d_ff, SUMS, stages)


def piece(tile: int) -> int:
    """Columns that are written out at a time."""
    return PIECE if tile % PIECE == 0 else PIECE // 2


def _widest(width: int, most: int, stages) -> tuple[int, int]:
    """Of the tiles that fit, the widest of those that reach least beyond the end."""
    fit = [tile for tile in WIDTHS if tile <= most and stages(tile) >= 2]
    if not fit:
        rule = "no tile of this operation fits on chip"
        raise Refused("implementation", "pallas_gpu", rule, "pass implementation='cpu'")
    tile = min(fit, key=lambda tile: (pl.cdiv(width, tile) * tile, -tile))
    return tile, min(stages(tile), STAGES)
