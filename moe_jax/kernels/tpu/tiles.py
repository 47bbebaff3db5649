"""Sizes of the TPU kernels' tiles: from the table where a shape is in it, else by a rule.

The rule: of all tiles that fit on chip the one with the least time by cost.py. Mostly the summed
axis stays whole, because then weights are read once for each group; where several weights share the
chip and tiles of the result would become narrow, it is cut. At a group's edge tiles are cut into
parts of 128 rows (the height at which multipliers of 128 x 128 load weights as fast as they use
them).

Axes: N rows, A the axis that is summed over, B the axis of the result.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from moe_jax.errors import Refused
from moe_jax.kernels.tpu import chips, cost
from moe_jax.kernels.tpu.cost import PART_ROWS, Tile
from moe_jax.kernels.tpu.table import TABLE

if TYPE_CHECKING:
    from moe_jax.kernels.operands import Operands, Result

_LANES = 128
_ROWS = (256, 512, 1024)
_WIDTHS = (*range(128, 1024, 128), *range(1024, 2048, 256), *range(2048, 4097, 512))
_LONGEST_WHOLE = 4096  # a summed axis that 128 does not divide; it fits on every chip
_CHUNKS = (1024, 512, 256)


class Rule(NamedTuple):
    """What tiles are made of where the table says nothing.

    Attributes:
      products: multiply-adds that the compiler unrolls; 2^28 are 4,096 bundles on a chip with four
        multipliers of 128 x 128.
    """

    products: int = 2**28


class Plan(NamedTuple):
    """One kernel as it was traced, for predictions.

    Attributes:
      bytes: between HBM and the chip, if groups have equally many rows.
      most_bytes: the same if all groups end inside tiles.
    """

    kind: str
    tile: Tile
    num_rows: int
    num_groups: int
    num_sum: int
    num_out: int
    num_products: int
    bytes: int
    most_bytes: int


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
    num_out = cost.width(operands)
    dtype = operands.lhs[0].dtype
    same = all(w.array.dtype == dtype for w in operands.weights)
    key = chips.current(), kind, dtype.name, num_sum, num_out
    known = TABLE.get(key) if same else None
    if known is not None:
        return Tile(row_tile(num_rows, known[0]), *known[1:])
    candidates = (
        Tile(rows, part, out, chunk(out, rows * part))
        for rows in _row_tiles(num_rows)
        for part in _cuts(num_sum)
        for out in _outs(num_out)
    )
    fitting = [t for t in candidates if on_chip(t, operands, results) <= _budget()]
    if fitting:
        chip = chips.CHIPS[chips.current()]
        return min(fitting, key=lambda t: (cost.seconds_of_rows(chip, operands, results, t), t))
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
    twice = rows * part * cost.itemsizes(operands.lhs)
    stored = [w.array.dtype.itemsize for w in operands.weights]
    twice += part * out * sum(stored)
    twice += rows * out * cost.itemsizes(operands.by_both)
    twice += rows * out * sum(jnp.dtype(r.dtype).itemsize for r in results if not r.row_sum)
    narrow = operands.lhs[0].dtype.itemsize * sum(
        w.array.dtype != operands.lhs[0].dtype for w in operands.weights
    )
    cut = part < operands.lhs[0].shape[1]
    kept = rows * out * 4 * len(operands.products) * (2 if cut else 1)
    return 2 * twice + part * out * narrow + kept


def for_columns(
    kind: str, x_ND: Array, dys: Sequence[Array], num_groups: int, out_dtype: DTypeLike
) -> Tile:
    """Tile of `columns.grouped_columns`: rows, D, F."""
    (num_rows, d_model), d_ff = x_ND.shape, dys[0].shape[1]
    known = TABLE.get((chips.current(), kind, x_ND.dtype.name, d_model, d_ff))
    if known is not None:
        return Tile(row_tile(num_rows, known[0]), *known[1:])
    candidates = [
        Tile(rows, d, f, chunk(d, rows * f))
        for rows in _row_tiles(num_rows)
        for d in _outs(d_model)
        for f in _outs(d_ff)
    ]
    per_result = len(dys) * (2 * jnp.dtype(out_dtype).itemsize + 2 * 4)

    def fits(tile: Tile) -> bool:
        twice = tile.rows * (tile.sum * x_ND.dtype.itemsize + tile.out * cost.itemsizes(dys))
        return 2 * twice + tile.sum * tile.out * per_result <= _budget()

    chip = chips.CHIPS[chips.current()]
    args = chip, x_ND, dys, num_groups, out_dtype
    return min(filter(fits, candidates), key=lambda t: (cost.seconds_of_columns(*args, t), t))


def padding(num_sum: int) -> int:
    """Zeros behind a summed axis that may have to be cut and that 128 does not divide."""
    return -num_sum % 512 if num_sum > _LONGEST_WHOLE and num_sum % _LANES else 0


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


def _row_tiles(num_rows: int) -> list[int]:
    """A multiplier of 256 x 256 would load weights half of the time for 256 rows."""
    least = 2 * chips.CHIPS[chips.current()].multiplier
    return sorted({row_tile(num_rows, rows) for rows in _ROWS if rows >= least})


def _outs(num_out: int) -> list[int]:
    """Widths of a tile; the last tile of an axis may reach beyond it. An axis that 128 does not
    divide is a tile only if it is short: see chunk."""
    multiplier = chips.CHIPS[chips.current()].multiplier
    whole = num_out <= _WIDTHS[-1] and (num_out % _LANES == 0 or num_out <= _CHUNKS[-1])
    cut = [w for w in _WIDTHS if w < num_out and (w % multiplier == 0 or num_out <= multiplier)]
    return [*cut, num_out] if whole or not cut else cut


def _budget() -> int:
    # a product lies on chip as well before it is written
    return vmem_limit() * 3 // 4
