"""What the kernels of `fused` are given, on every platform.

Axes: N rows, G groups, T rows of a tile, A the axis that is summed over, B that of the result.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax import Array
from jax.typing import DTypeLike


class Weight(NamedTuple):
    """Attributes:
    array: [G, A, B], or [G, B, A] where `transposed`.
    """

    array: Array
    transposed: bool = False


class Operands(NamedTuple):
    """What a kernel reads, and which products are summed to what.

    Attributes:
      lhs: [N, A] each.
      weights: one or several.
      products: for each sum the pairs (index of lhs, index of weight) that add up to it.
      by_group: [G, B] each, for the epilogue.
      by_row: [N] each, for the epilogue.
      by_both: [N, B] each, for the epilogue.
    """

    lhs: Sequence[Array]
    weights: Sequence[Weight]
    products: Sequence[Sequence[tuple[int, int]]]
    by_group: Sequence[Array] = ()
    by_row: Sequence[Array] = ()
    by_both: Sequence[Array] = ()


class Result(NamedTuple):
    """Attributes:
    dtype: of the result.
    row_sum: the epilogue's value is summed over B: the result is [N], in float32.
    """

    dtype: DTypeLike
    row_sum: bool = False


# (sums, by_group, by_row, by_both) of a tile, all float32 -> a value [T, B] for each result
Epilogue = Callable[[list[Array], list[Array], list[Array], list[Array]], Sequence[Array]]


class Kernels(NamedTuple):
    """The two kernels of a platform.

    Attributes:
      rows: (kind, operands, group_sizes_G, epilogue, results) -> results [N, B], or [N] for sums
        of rows; rows of no group are exactly zero. `kind` names the operation in tables of tiles.
      columns: (kind, x_ND, dys, group_sizes_G, dtype) -> dw [G, D, F] for each dy [N, F], zero for
        an empty group.
      padding: zeros that an axis of this length is filled up with.
    """

    rows: Callable[..., list[Array]]
    columns: Callable[..., list[Array]]
    padding: Callable[[int], int]


def split(refs: Sequence[Any], counts: Sequence[int]) -> list[Sequence[Any]]:
    """Consecutive runs of the given lengths, and what is left."""
    parts, start = [], 0
    for count in counts:
        parts.append(refs[start : start + count])
        start += count
    return [*parts, refs[start:]]
