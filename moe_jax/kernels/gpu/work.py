"""Which rows of which group a block of threads takes: one list for any number of groups.

Copies of the tensor memory accelerator begin at multiples of 8 rows, where tiles in shared memory
are swizzled. So a group's first tile begins up to 7 rows before it, and each item says which of
its rows are the group's own. What a row's result is does not depend on where its tile begins.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

ALIGNED = 8  # rows: a swizzled tile's height


WINDOW = 8  # items whose tiles are next to one another in time


class Work(NamedTuple):
    """Items (group, tile of rows), W of them, of which the first `count` have rows.

    Attributes:
      count_1: how many items there are.
      group_W: G for rows of no group.
      eighth_W: the tile begins at row 8 eighth.
      low_W, high_W: rows low <= i < high of the tile are the group's.
    """

    count_1: Array
    group_W: Array
    eighth_W: Array
    low_W: Array
    high_W: Array

    def turns(self, num_tiles: int) -> Array:
        """How many (item, tile of columns) there are; the arrays may be references."""
        return self.count_1[0] * num_tiles

    def turn(self, index: Array, num_tiles: int) -> tuple[Array, Array]:
        """(item, tile of columns) of a turn.

        Blocks of threads are at a run of turns at any time: some items by some tiles of columns,
        nearly square, which reads fewest bytes of both. Items go first within a window.
        """
        window = lax.div(index, WINDOW * num_tiles)
        first = window * WINDOW
        items = jnp.minimum(WINDOW, self.count_1[0] - first)
        within = index - first * num_tiles
        return first + lax.rem(within, items), lax.div(within, items)


def list_work(group_sizes_G: Array, num_rows: int, tile_rows: int) -> tuple[Work, Array]:
    """The items in order of rows, and for each row [N] item * tile_rows + its place in the tile.

    Args:
      group_sizes_G: cut off where they sum to more than num_rows.
    """
    ends_G = jnp.minimum(jnp.cumsum(group_sizes_G.astype(jnp.int32)), num_rows)
    ends_H = jnp.append(ends_G, jnp.int32(num_rows))  # H: the groups, and the rows of none
    starts_H = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_G])
    first_H = starts_H - starts_H % ALIGNED
    tiles_H = jnp.where(ends_H > starts_H, -(-(ends_H - first_H) // tile_rows), 0)
    last_H = jnp.cumsum(tiles_H)
    num_groups = ends_H.shape[0]
    num_items = (num_rows + (ALIGNED - 1) * num_groups) // tile_rows + num_groups
    item_W = jnp.arange(num_items, dtype=jnp.int32)
    group_W = _before(last_H, item_W)
    there_W = group_W < num_groups
    group_W = jnp.minimum(group_W, num_groups - 1)
    base_W = first_H[group_W] + (item_W - (last_H - tiles_H)[group_W]) * tile_rows
    low_W = jnp.clip(starts_H[group_W] - base_W, 0, tile_rows)
    high_W = jnp.where(there_W, jnp.clip(ends_H[group_W] - base_W, 0, tile_rows), low_W)
    eighth_W = jnp.where(there_W, base_W, 0) // ALIGNED
    row_N = jnp.arange(num_rows, dtype=jnp.int32)
    group_N = _before(ends_H, row_N)
    before_N = row_N - first_H[group_N]
    place_N = (last_H - tiles_H)[group_N] * tile_rows + before_N
    work = Work(last_H[-1:].astype(jnp.int32), group_W, eighth_W, low_W, high_W)
    return work, place_N.astype(jnp.int32)


def padded(x_NA: Array) -> Array:
    """With rows of zeros up to a multiple of 8: what is copied is made of 8 rows by 128 bytes."""
    missing = -x_NA.shape[0] % ALIGNED
    return jnp.pad(x_NA, ((0, missing), (0, 0))) if missing else x_NA


def _before(ends_H: Array, index_X: Array) -> Array:
    """How many ends are at or before an index: one comparison with all, not a search in turns."""
    return jnp.sum(ends_H[None] <= index_X[:, None], axis=1, dtype=jnp.int32)
