"""Sizes of the TPU kernels' tiles: from the table where a shape is in it, else by a rule.

The rule: the summed axis whole if that fits, because then weights are read once for each group;
the widest tile of the result that fits beside it; 512 rows, which are cut at a group's edge into
parts of 128 (the height at which multipliers of 128 x 128 load weights as fast as they use them).

Axes: N rows, A the axis that is summed over, B the axis of the result.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from moe_jax.errors import Refused
from moe_jax.kernels.tpu import chips
from moe_jax.kernels.tpu.table import TABLE

if TYPE_CHECKING:
    from moe_jax.kernels.tpu.rows import Operands, Result

PART_ROWS = 128
_LANES = 128
_WIDTHS = (2048, 1024, 512, 256, 128)
_LONGEST_WHOLE = 4096  # a summed axis that 128 does not divide; it fits on every chip
_CHUNKS = (1024, 512, 256)


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


class Rule(NamedTuple):
    """What tiles are made of where the table says nothing.

    Attributes:
      rows: of a tile, if there are so many.
      width: of a tile's result, at most.
      products: multiply-adds that the compiler unrolls; 2^28 are 4,096 bundles on a chip with four
        multipliers of 128 x 128.
    """

    rows: int = 512
    width: int = 2048
    products: int = 2**28


class Plan(NamedTuple):
    """One kernel as it was traced, for predictions; `bytes` as of `bytes_moved`."""

    kind: str
    tile: Tile
    num_rows: int
    num_groups: int
    num_sum: int
    num_out: int
    num_products: int
    bytes: int


_RULE: contextvars.ContextVar[Rule] = contextvars.ContextVar("rule", default=Rule())  # noqa: B039
_PLANS: contextvars.ContextVar[list[Plan] | None] = contextvars.ContextVar("plans", default=None)


@contextlib.contextmanager
def traced(rule: Rule) -> Iterator[list[Plan]]:
    """The kernels that are traced inside, cut by `rule` where the table says nothing."""
    plans: list[Plan] = []
    tokens = _RULE.set(rule), _PLANS.set(plans)
    try:
        yield plans
    finally:
        _RULE.reset(tokens[0])
        _PLANS.reset(tokens[1])


def note(plan: Plan) -> None:
    """Remembers a kernel where somebody listens."""
    plans = _PLANS.get()
    if plans is not None:
        plans.append(plan)


def vmem_limit() -> int:
    """Bytes that a kernel may use on chip; the compiler needs some itself."""
    return chips.CHIPS[chips.current()].vmem * 15 // 16


def for_rows(kind: str, operands: "Operands", results: "Sequence[Result]") -> Tile:
    """Tile of `rows.grouped_rows`; `kind` names the operation in the table.

    A summed axis that is cut must be a multiple of 128: see `padding`.
    """
    num_rows, num_sum = operands.lhs[0].shape
    num_out = width(operands)
    dtype = operands.lhs[0].dtype
    same = all(w.array.dtype == dtype for w in operands.weights)
    key = chips.current(), kind, dtype.name, num_sum, num_out
    known = TABLE.get(key) if same else None
    if known is not None:
        return Tile(row_tile(num_rows, known[0]), *known[1:])
    rows = row_tile(num_rows, _RULE.get().rows)
    for part in _cuts(num_sum):
        for out in _outs(num_out):
            tile = Tile(rows, part, out, chunk(out, rows * part))
            if on_chip(tile, operands, results) <= _budget():
                return tile
    raise Refused(
        "x_ND.shape",
        (num_rows, num_sum),
        f"no tile of {num_sum} x {num_out} weights fits on a {chips.current()}: "
        f"{num_sum} is no multiple of {_LANES}",
        "Fill the axis up to a multiple of 128, or pass implementation='cpu'",
    )


def on_chip(tile: Tile, operands: "Operands", results: "Sequence[Result]") -> int:
    """Bytes on chip: each block twice, one being fetched; sums in float32 once, and once more where
    they are kept because the summed axis is cut."""
    rows, part, out, _ = tile
    twice = rows * part * _itemsizes(operands.lhs)
    stored = [w.array.dtype.itemsize for w in operands.weights]
    twice += part * out * sum(stored)
    twice += rows * out * _itemsizes(operands.by_both)
    twice += rows * out * sum(jnp.dtype(r.dtype).itemsize for r in results if not r.row_sum)
    narrow = operands.lhs[0].dtype.itemsize * sum(
        w.array.dtype != operands.lhs[0].dtype for w in operands.weights
    )
    cut = part < operands.lhs[0].shape[1]
    kept = rows * out * 4 * len(operands.products) * (2 if cut else 1)
    return 2 * twice + part * out * narrow + kept


def for_columns(kind: str, x_ND: Array, dys: Sequence[Array], out_dtype: DTypeLike) -> Tile:
    """Tile of `columns.grouped_columns`: rows, D, F."""
    (num_rows, d_model), d_ff = x_ND.shape, dys[0].shape[1]
    known = TABLE.get((chips.current(), kind, x_ND.dtype.name, d_model, d_ff))
    if known is not None:
        return Tile(row_tile(num_rows, known[0]), *known[1:])
    rows = row_tile(num_rows, _RULE.get().rows)
    pairs = [(d, f) for d in _outs(d_model) for f in _outs(d_ff)]
    per_result = len(dys) * (2 * jnp.dtype(out_dtype).itemsize + 2 * 4)
    # squares move the least for their work
    for d, f in sorted(pairs, key=lambda p: (-p[0] * p[1] / (p[0] + p[1]), -p[1])):
        twice = rows * (d * x_ND.dtype.itemsize + f * _itemsizes(dys))
        if 2 * twice + d * f * per_result <= _budget():
            break
    else:
        d, f = (min(length, _LANES) for length in (d_model, d_ff))
    return Tile(rows, d, f, chunk(d, rows * f))


def padding(num_sum: int) -> int:
    """Zeros behind a summed axis that may have to be cut and that 128 does not divide."""
    return -num_sum % 512 if num_sum > _LONGEST_WHOLE and num_sum % _LANES else 0


def bytes_moved(operands: "Operands", results: "Sequence[Result]", tile: Tile) -> int:
    """Bytes between HBM and the chip in `rows.grouped_rows`, if all groups have equally many rows.

    Blocks are fetched when their index changes: rows once for each tile of the result, weights once
    if the summed axis is whole, else once for each work item.
    """
    num_rows, num_sum = operands.lhs[0].shape
    num_groups, num_out = operands.weights[0].array.shape[0], width(operands)
    tiles_out, steps = pl.cdiv(num_out, tile.out), num_sum // tile.sum
    total = tiles_out * num_rows * num_sum * _itemsizes(operands.lhs)
    times = num_groups if steps == 1 else num_items(num_rows, num_groups, tile.rows)
    total += times * num_sum * num_out * sum(w.array.dtype.itemsize for w in operands.weights)
    total += sum(a.size * a.dtype.itemsize for a in (*operands.by_group, *operands.by_both))
    total += len(operands.by_row) * tiles_out * num_rows * 4
    for result in results:
        columns = tiles_out if result.row_sum else num_out
        total += num_rows * columns * jnp.dtype(result.dtype).itemsize
    return total


def num_items(num_rows: int, num_groups: int, tile_rows: int) -> int:
    """Work items of groups of equal size."""
    tiles = pl.cdiv(num_rows, tile_rows)
    return tiles if num_rows % (num_groups * tile_rows) == 0 else tiles + num_groups - 1


def chunk(length: int, per_column: int) -> int:
    """Columns (of dw: rows) of a result that are computed at a time: the most that divide a tile's
    and whose products, `per_column` for each, do not make the program too long; but no fewer than
    a multiplier has, of which the rest would stand idle."""
    least = chips.CHIPS[chips.current()].multiplier
    if length % _LANES:
        return length
    fitting = (
        c
        for c in _CHUNKS
        if length % c == 0 and (c <= least or c * per_column <= _RULE.get().products)
    )
    return next(fitting, _LANES)


def row_tile(num_rows: int, most: int) -> int:
    """A multiple of the parts, or all rows where there are less."""
    return max(min(most, num_rows // PART_ROWS * PART_ROWS), min(num_rows, PART_ROWS))


def _cuts(num_sum: int) -> list[int]:
    """The whole axis, then its divisors that are multiples of 128, the largest first."""
    return [num_sum] + [
        num_sum // n
        for n in range(2, num_sum // _LANES + 1)
        if num_sum % n == 0 and num_sum // n % _LANES == 0
    ]


def _outs(num_out: int) -> list[int]:
    """Widths of a tile, the widest first; the last tile of an axis may reach beyond it. Cores share
    the tiles, so each has at least one where the axis is wide enough."""
    cores = chips.CHIPS[chips.current()].cores
    share, most = num_out // cores, _RULE.get().width
    if num_out <= _CHUNKS[-1] and (share % _LANES or not share):
        share = num_out  # see chunk: an uneven axis is a tile if it is short, not worth two cores
    whole = [share] if share <= most and (share % _LANES == 0 or share == num_out) else []
    return whole + [width for width in _WIDTHS if width < share and width <= most]


def _budget() -> int:
    # a product lies on chip as well before it is written
    return vmem_limit() * 3 // 4


def width(operands: "Operands") -> int:
    """B: columns of the result."""
    weight = operands.weights[0]
    return weight.array.shape[1 if weight.transposed else 2]


def _itemsizes(arrays: Sequence[Array | jax.ShapeDtypeStruct]) -> int:
    return sum(a.dtype.itemsize for a in arrays)
