"""What a tile costs on a chip, by formula: bytes it moves, and the time that tiles are chosen by.

Axes: N rows, G groups, A the axis that is summed over, B the axis of the result, T rows of a tile,
S rows of a part of it.

    seconds = FLOPs of what is computed / peak + sums that are added to on chip + bytes / bandwidth

as if nothing overlapped: where the multipliers are the bound, fewer bytes still count. Groups are
taken as they come, N / G rows on average and no edge where a tile has one, because tiles that are
good only for groups of equal size are of no use.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from moe_jax.kernels.tpu.chips import Chip

if TYPE_CHECKING:
    from moe_jax.kernels.operands import Operands, Result

Shaped = Array | jax.ShapeDtypeStruct
PART_ROWS = 128
_STORED = 8 * 128  # float32 values that a core writes to its own memory in a cycle


class Tile(NamedTuple):
    """Attributes:
    rows: of x.
    sum: length of the summed axis; for dw: of D.
    out: of the result; for dw: of F.
    chunk: columns of the result (for dw: of D) that are computed at a time.
    """

    rows: int
    sum: int
    out: int
    chunk: int


# --- bytes -----------------------------------------------------------------------------------


def equal_items(num_rows: int, num_groups: int, tile_rows: int) -> int:
    """Work items of groups of equal size."""
    aligned = num_rows % (num_groups * tile_rows) == 0
    return (
        pl.cdiv(num_rows, tile_rows) if aligned else uneven_items(num_rows, num_groups, tile_rows)
    )


def uneven_items(num_rows: int, num_groups: int, tile_rows: int) -> int:
    """Work items of groups that end anywhere: each but the last one shares a tile with the next."""
    return pl.cdiv(num_rows, tile_rows) + num_groups - 1


def bytes_of_rows(operands: "Operands", results: "Sequence[Result]", tile: Tile, items: int) -> int:
    """Bytes between HBM and the chip in `rows.grouped_rows`.

    Blocks are fetched when their index changes: if the summed axis is whole, rows once for each
    tile of the result and weights once; else both once for each work item.
    """
    num_rows, num_sum = operands.lhs[0].shape
    num_groups, num_out = operands.weights[0].array.shape[0], width(operands)
    tiles_out, cut = pl.cdiv(num_out, tile.out), tile.sum < num_sum
    rows, times = (items * tile.rows, items) if cut else (num_rows, num_groups)
    total = tiles_out * rows * num_sum * itemsizes(operands.lhs)
    total += times * num_sum * num_out * sum(w.array.dtype.itemsize for w in operands.weights)
    total += sum(a.size * a.dtype.itemsize for a in (*operands.by_group, *operands.by_both))
    total += len(operands.by_row) * tiles_out * num_rows * 4
    for result in results:
        columns = tiles_out if result.row_sum else num_out
        total += num_rows * columns * jnp.dtype(result.dtype).itemsize
    return total


def bytes_of_columns(
    x_ND: Shaped, dys: Sequence[Shaped], num_groups: int, dtype: DTypeLike, tile: Tile
) -> int:
    """Bytes between HBM and the chip in `columns.grouped_columns`, whose result has this dtype: x
    is read once for each tile of F, every dy once for each tile of D."""
    (num_rows, d_model), d_ff = x_ND.shape, dys[0].shape[1]
    total = pl.cdiv(d_ff, tile.out) * num_rows * d_model * x_ND.dtype.itemsize
    total += pl.cdiv(d_model, tile.sum) * num_rows * d_ff * itemsizes(dys)
    return total + len(dys) * num_groups * d_model * d_ff * jnp.dtype(dtype).itemsize


def width(operands: "Operands") -> int:
    """B: columns of the result."""
    weight = operands.weights[0]
    return weight.array.shape[1 if weight.transposed else 2]


def itemsizes(arrays: Sequence[Shaped]) -> int:
    return sum(a.dtype.itemsize for a in arrays)


# --- seconds ---------------------------------------------------------------------------------


def seconds_of_rows(
    chip: Chip, operands: "Operands", results: "Sequence[Result]", tile: Tile
) -> float:
    num_rows, num_sum = operands.lhs[0].shape
    num_groups, num_out = operands.weights[0].array.shape[0], width(operands)
    whole, parts = _pieces(num_rows, num_groups, tile.rows)
    columns = chip.cores * tile.out * pl.cdiv(pl.cdiv(num_out, tile.out), chip.cores)
    products = sum(len(terms) for terms in operands.products)
    rows = _filled_rows(chip, whole, parts, tile.rows)
    compute = 2.0 * rows * num_sum * columns * products / chip.flops
    if tile.sum < num_sum:  # each step adds to sums of all its rows
        kept = (whole * tile.rows + parts * min(PART_ROWS, tile.rows)) * columns
        compute += _adding(chip, kept * len(operands.products) * num_sum / tile.sum)
    items = uneven_items(num_rows, num_groups, tile.rows)
    return compute + bytes_of_rows(operands, results, tile, items) / chip.bandwidth


def seconds_of_columns(
    chip: Chip,
    x_ND: Shaped,
    dys: Sequence[Shaped],
    num_groups: int,
    dtype: DTypeLike,
    tile: Tile,
) -> float:
    (num_rows, d_model), d_ff = x_ND.shape, dys[0].shape[1]
    whole, parts = _pieces(num_rows, num_groups, tile.rows)
    area = chip.cores * tile.sum * pl.cdiv(pl.cdiv(d_model, tile.sum), chip.cores)
    area *= tile.out * pl.cdiv(d_ff, tile.out)
    rows = _filled_rows(chip, whole, parts, tile.rows)
    compute = 2.0 * rows * area * len(dys) / chip.flops
    # every piece of rows, however few, adds to the sums of all its group's weights
    compute += _adding(chip, (whole + parts) * area * len(dys))
    return compute + bytes_of_columns(x_ND, dys, num_groups, dtype, tile) / chip.bandwidth


def _pieces(num_rows: int, num_groups: int, tile_rows: int) -> tuple[float, float]:
    """(tiles inside a group, parts at edges) to expect of groups that end anywhere."""
    rows = num_rows / num_groups
    whole = max(rows / tile_rows - 1.0, 0.0)
    parts = (rows - whole * tile_rows) / min(PART_ROWS, tile_rows) + 1.0
    return num_groups * whole, num_groups * parts


def _filled_rows(chip: Chip, whole: float, parts: float, tile_rows: int) -> float:
    """Rows that the multipliers are busy for: to load weights takes as long as a square of them."""
    part = min(PART_ROWS, tile_rows)
    return whole * max(tile_rows, chip.multiplier) + parts * max(part, chip.multiplier)


def _adding(chip: Chip, values: float) -> float:
    return values / (_STORED * chip.clock * chip.cores)
