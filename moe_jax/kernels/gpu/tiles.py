"""Sizes of tiles on Hopper, by rule: what fits into registers and shared memory.

Two warpgroups compute, one copies. A thread that computes has 232 registers. Tiles may reach beyond
an axis: copies fill up with zeros, and drop what is beyond. What is copied is made of 8 rows by 128
bytes, so axes themselves are filled up to multiples of these.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax.errors import Refused
from moe_jax.kernels.operands import Operands, Result

WARPGROUPS = 2  # that compute
ROWS = 64  # of a warpgroup's tile: those of one wgmma
SUMMED = 64  # values of a step, 128 bytes in 16 bits: the widest swizzle
WIDTHS = (256, 192, 128, 64)
# columns of all sums of a warpgroup; half as many registers a thread. Where three sums have an
# epilogue, wider tiles are worth the registers that it spills
SUMS = {1: 256, 2: 256, 3: 384}
STAGES = 4  # steps in flight, at most
PIECE = 64  # columns that are written out at a time
WRITTEN = 2  # pieces in flight
SHARED = 225 * 1024  # bytes of the 227 KiB that a block can have; the rest is for barriers
MULTIPLE = 64  # of every axis but rows: what is copied is made of 8 rows by 128 bytes


def padding(size: int) -> int:
    """Zeros behind an axis, so that copies can be told of it."""
    return -size % MULTIPLE


class Phase(NamedTuple):
    """Steps that read the same operands, along one lhs.

    Attributes:
      lhs: its index.
      terms: (index of weight, index of sum) of each product.
      slots: of the ring, for each of the weights.
    """

    lhs: int
    terms: Sequence[tuple[int, int]]
    slots: Sequence[int]


def phases(operands: Operands) -> tuple[list[Phase], list[bool]]:
    """The phases of a tile, and for each slot for weights whether they are stored transposed."""
    found, slots = [], list[bool]()
    for lhs in range(len(operands.lhs)):
        pairs = [
            (weight, place)
            for place, terms in enumerate(operands.products)
            for i, weight in terms
            if i == lhs
        ]
        flags = [operands.weights[weight].transposed for weight, _ in pairs]
        for flag in (False, True):
            slots += [flag] * (flags.count(flag) - slots.count(flag))
        found.append((lhs, pairs, flags))

    def places(flags):
        free = list(range(len(slots)))
        for flag in flags:
            place = next(i for i in free if slots[i] == flag)
            free.remove(place)
            yield place

    return [Phase(lhs, pairs, list(places(flags))) for lhs, pairs, flags in found], slots


def for_rows(operands: Operands, results: Sequence[Result], width: int) -> tuple[int, int]:
    """Columns of a tile of results of `width` columns, and steps in flight.

    Raises:
      Refused: no tile fits.
    """
    itemsize = operands.lhs[0].dtype.itemsize
    # buffers for each type
    written = sum({jnp.dtype(r.dtype).itemsize for r in results if not r.row_sum})
    rows = WARPGROUPS * ROWS
    slots = len(phases(operands)[1])

    def stages(tile: int) -> int:
        step = SUMMED * (rows + slots * tile)
        return (SHARED - WRITTEN * rows * PIECE * written) // (step * itemsize)

    return _widest(width, SUMS[len(operands.products)] // len(operands.products), stages)


def for_columns(d_ff: int, itemsize: int, written: int) -> tuple[int, int]:
    """Columns of a tile of dw, and steps in flight; itemsize of x, and of what is written."""
    rows = WARPGROUPS * ROWS

    def stages(tile: int) -> int:
        out = WRITTEN * rows * PIECE * written
        return (SHARED - out) // (SUMMED * (rows + tile) * itemsize)

    return _widest(d_ff, SUMS[1], stages)


def _widest(width: int, most: int, stages: Callable[[int], int]) -> tuple[int, int]:
    """Of the tiles that fit, the widest of those that reach least beyond the end."""
    fit = [tile for tile in WIDTHS if tile <= most and stages(tile) >= 2]
    if not fit:
        rule = "no tile of this operation fits on chip"
        raise Refused("implementation", "pallas_gpu", rule, "pass implementation='cpu'")
    tile = min(fit, key=lambda tile: (pl.cdiv(width, tile) * tile, -tile))
    return tile, min(stages(tile), STAGES)
