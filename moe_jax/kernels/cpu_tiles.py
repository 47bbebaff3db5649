"""Tiles of rows in plain JAX loops: the walk over groups that `cpu` does its work in.

Axes: N rows, D columns of a buffer, G groups, T rows of one tile; weights as of cpu.py.

Algorithm: an outer loop visits the non-empty groups and slices their weights once. A group's first
rows go into one tile, of the smallest size that holds them, such that what is left is whole tiles
of one size. Only that first tile can reach beyond its group: it alone is read and written through a
mask, and no buffer needs padding. It sets dw, the whole tiles add to it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moe_jax.kernels.scaled import Scaled


class Groups(NamedTuple):
    """Rows of each group, and which of the weights belongs to the first one."""

    size_G: Array
    first: Array


class Sizes(NamedTuple):
    """Rows of a tile: `whole` ones, and the choices for the first of a group, ascending.

    Each size is a loop to compile, so there are few. They depend on nothing but D and F: that makes
    the bits of dw independent of the buffer. Where weights are large each tile pays for reading
    them, and rows that a first tile has too many cost more than where they are small.
    """

    whole: int
    first: tuple[int, ...]


class Tile(NamedTuple):
    """`size` consecutive rows of one group from `start` on, `real` of them its own.

    `group` is the index of its weights.
    """

    group: Array
    size: int
    start: Array
    real: Array | None  # of a group's first tile; None: a whole tile, which lies inside the buffer

    def read(self, x_ND: Array) -> Array:
        """The tile's rows in float32; those past `real` are zero."""
        if self.real is None:
            return _f32(lax.dynamic_slice_in_dim(x_ND, self.start, self.size))
        start, shift = self._inside(x_ND.shape[0])
        x_TD = _rotate(lax.dynamic_slice_in_dim(x_ND, start, self.size), shift)
        row_T1 = np.arange(self.size, dtype=np.int32)[:, None]
        return jnp.where(row_T1 < self.real, _f32(x_TD), 0.0)

    def write(self, out_ND: Array, y_TD: Array) -> Array:
        y_TD = y_TD.astype(out_ND.dtype)
        if self.real is None:
            return lax.dynamic_update_slice_in_dim(out_ND, y_TD, self.start, 0)
        start, shift = self._inside(out_ND.shape[0])
        row_T1 = np.arange(self.size, dtype=np.int32)[:, None] - shift
        mine_T1 = (row_T1 >= 0) & (row_T1 < self.real)
        old_TD = lax.dynamic_slice_in_dim(out_ND, start, self.size)
        new_TD = jnp.where(mine_T1, _rotate(y_TD, -shift), old_TD)
        return lax.dynamic_update_slice_in_dim(out_ND, new_TD, start, 0)

    def add(self, dw_GDF: Array, dw_DF: Array) -> Array:
        """Adds to the tile's group, in place; the first tile finds nothing there yet."""
        if self.real is None:
            dw_DF = dw_DF + lax.dynamic_index_in_dim(dw_GDF, self.group, keepdims=False)
        return lax.dynamic_update_index_in_dim(dw_GDF, dw_DF, self.group, 0)

    def _inside(self, num_rows: int) -> tuple[Array, Array]:
        """Where to slice so that the tile ends inside the buffer, and by how much that is early."""
        start = jnp.minimum(self.start, num_rows - self.size)
        return start, self.start - start


def _rotate(x_TD: Array, shift: Array) -> Array:
    """Row i of the result is row (i + shift) mod T of x_TD, for |shift| < T.

    Only a tile at the end of the buffer has a shift: a loop of no turns copies nothing.
    """

    def turn(_, x_TD):
        start = jnp.where(shift < 0, shift + x_TD.shape[0], shift)
        return lax.dynamic_slice_in_dim(jnp.concatenate([x_TD, x_TD]), start, x_TD.shape[0])

    return _repeat((shift != 0).astype(jnp.int32), turn, x_TD)


def for_each_tile(
    groups: Groups,
    weights: Sequence[Array | Scaled | None],
    buffers: Any,
    visit: Callable[[Any, Any, Tile], Any],
    num_rows: int,
    sizes: Sizes,
) -> Any:
    """Runs `buffers = visit(buffers, weights of the group, tile)` over all tiles of all groups.

    A weight that is None is not there.
    """
    if not groups.size_G.shape[0]:
        return buffers
    ends_G = jnp.minimum(jnp.cumsum(groups.size_G), num_rows)
    starts_G = jnp.concatenate([jnp.zeros_like(ends_G[:1]), ends_G[:-1]])
    occupied_G = ends_G > starts_G
    (groups_G,) = jnp.nonzero(occupied_G, size=occupied_G.shape[0], fill_value=0)

    def group_body(visited: Array, buffers: Any) -> Any:
        group = groups_G[visited]
        of = groups.first + group
        group_weights = jax.tree.map(
            lambda w: _f32(lax.dynamic_index_in_dim(w, of, keepdims=False)), list(weights)
        )
        for size, first, times, real in _cut(sizes, starts_G[group], ends_G[group], num_rows):

            def tile_body(i, buffers, size=size, first=first, real=real):
                return visit(buffers, group_weights, Tile(of, size, first + i * size, real))

            buffers = _repeat(times, tile_body, buffers)
        return buffers

    return _repeat(jnp.sum(occupied_G, dtype=jnp.int32), group_body, buffers)


def _cut(
    sizes: Sizes, start: Array, end: Array, num_rows: int
) -> list[tuple[int, Array, Array, Array | None]]:
    """(tile size, first row, number of tiles, real rows of a first tile) in row order.

    Exactly one of the first sizes has a tile; those no group can need are left out.
    """
    cuts: list[tuple[int, Array, Array, Array | None]] = []
    num_whole = jnp.maximum(end - start - 1 - sizes.first[-1] + sizes.whole, 0) // sizes.whole
    rest, smaller = end - start - num_whole * sizes.whole, 0
    for size in sizes.first:
        fits = (smaller < rest) & (rest <= size)
        cuts.append((size, start, fits.astype(jnp.int32), rest))
        smaller = size
        if size >= num_rows:
            return cuts
    return [*cuts, (sizes.whole, start + rest, num_whole, None)]


def _repeat(times: Array, body: Callable[[Array, Any], Any], carry: Any) -> Any:
    def step(state):
        i, carry = state
        return i + 1, body(i, carry)

    return lax.while_loop(lambda state: state[0] < times, step, (jnp.int32(0), carry))[1]


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)
