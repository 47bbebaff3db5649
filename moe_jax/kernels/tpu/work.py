"""Work items of the TPU kernels: pairs (group, tile of rows) that overlap, in row order.

They are listed by a few integer operations before a kernel and read by it from scalar memory.
Tiles of T rows are aligned with the buffer.

Axes: N rows, G groups, T rows of a tile, W work items.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl


class Work(NamedTuple):
    """What the kernels read from scalar memory, all int32."""

    group_W: Array
    tile_W: Array
    active_W: Array  # 1 where the item has rows to multiply
    start_G: Array  # first row of each group
    end_G: Array

    def rows(self, item: Array, tile_rows: int) -> tuple[Array, Array]:
        """First and last + 1 of the item's own rows, counted from the first of its tile."""
        group, first = self.group_W[item], self.tile_W[item] * tile_rows
        start = jnp.maximum(self.start_G[group] - first, 0)
        return start, jnp.minimum(self.end_G[group] - first, tile_rows)


def list_work(sizes_G: Array, num_rows: int, tile_rows: int, least: int) -> Work:
    """At least `least` items per group.

    The number of items depends on the sizes, the length of the list does not: it is filled up with
    inactive items of the last group.
    """
    num_groups, num_tiles = sizes_G.shape[0], pl.cdiv(num_rows, tile_rows)
    end_G = jnp.cumsum(sizes_G).astype(jnp.int32)
    start_G = end_G - sizes_G.astype(jnp.int32)
    first_tile_G = start_G // tile_rows
    overlaps_G = jnp.where(end_G > start_G, (end_G - 1) // tile_rows - first_tile_G + 1, 0)
    items_G = jnp.maximum(overlaps_G, least)
    item_end_G = jnp.cumsum(items_G)

    item_W = jnp.arange(num_tiles + num_groups, dtype=jnp.int32)
    before_WG = item_end_G[None, :] <= item_W[:, None]
    group_W = jnp.minimum(jnp.sum(before_WG, axis=1, dtype=jnp.int32), num_groups - 1)
    nth_W = item_W - (item_end_G - items_G)[group_W]
    tile_W = jnp.minimum(first_tile_G[group_W] + nth_W, num_tiles - 1)
    active_W = nth_W < overlaps_G[group_W]
    return Work(group_W, tile_W, active_W.astype(jnp.int32), start_G, end_G)


def with_unused(group_sizes_G: Array, num_rows: int, tile_rows: int) -> Work:
    """Items for a result with every row: the unused rows are one more group, without weights."""
    sizes_G = cut_off(group_sizes_G, num_rows)
    unused = (num_rows - jnp.sum(sizes_G, dtype=sizes_G.dtype))[None]
    work = list_work(jnp.concatenate([sizes_G, unused]), num_rows, tile_rows, least=0)
    has_weights_W = (work.group_W < group_sizes_G.shape[0]).astype(jnp.int32)
    return work._replace(active_W=work.active_W * has_weights_W)


def cut_off(group_sizes_G: Array, num_rows: int) -> Array:
    """Sizes without the rows that the buffer does not have."""
    end_G = jnp.minimum(jnp.cumsum(group_sizes_G), num_rows)
    return jnp.diff(end_G, prepend=jnp.zeros_like(end_G[:1]))


def inside(first: Array | int, num_rows: int, start: Array, end: Array, axis: int = 0) -> Array:
    """Which of `num_rows` rows from `first` on lie in start .. end: [T, 1], or [1, T] (axis 1)."""
    shape = (num_rows, 1) if axis == 0 else (1, num_rows)
    row = lax.broadcasted_iota(jnp.int32, shape, axis) + first
    return (start <= row) & (row < end)
