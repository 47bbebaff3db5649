"""Tokens that do not return home: where they stay, how they move on, what all devices share.

ExFlow (arXiv 2401.08383): a token goes on from the device of its best expert. Every device knows
where all X tokens of the expert group are (`Residence`), hence all indices follow without talk.
The rows of the tokens that are here lie packed, tokens in their order, in buffers that could hold
all X; work is done in tiles of a fixed number of rows (`fill`), as many as there are tokens, so
that it follows the number of tokens and a row's bits do not depend on who else is here.

    Leg     the row of each item from the device where it is to the one where it goes
    share   a row of each token, from where it is, to every device
    whole   rows of which each device of `tensor` has a part of the sum

Axes: X tokens of all devices of the group, T = X / M at home on each, M devices, R >= X packed
rows, N items (tokens, or assignments of tokens), W rows a tile, Z values a row.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import mesh as mesh_lib
from moe_jax.model.dispatch.hop import indices_of_true
from moe_jax.model.dispatch.traffic import away
from moe_jax.model.dispatch.wire import Pairs, Wire
from moe_jax.pytree import Leaf

# Rows that `share` sends of each device, in units of its tokens at home. From 2 on a sum over all
# X rows (a reduce-scatter and an all-gather) moves no more than an all-gather.
_LADDER = (1.0, 1.125, 1.25, 1.5, 1.75)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residence:
    """Where all tokens of the group are; the same on every device but for `token_R` and `count`.

    Attributes:
      at_X: int32 device of each token; -1 at positions without a token.
      rank_X: its place among the tokens there, which are in their order.
      count_M: tokens on each device.
      token_R: the tokens here, packed; arbitrary valid ones beyond.
      count: of them.
    """

    at_X: Leaf
    rank_X: Leaf
    count_M: Leaf
    token_R: Leaf
    count: Leaf

    @classmethod
    def of(cls, at_X: jax.Array, axes: mesh_lib.Axis, num_rows: int) -> "Residence":
        """Where tokens are, with room for `num_rows` >= X packed rows."""
        size, me = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
        here_MX = at_X[None] == jnp.arange(size, dtype=jnp.int32)[:, None]
        before_MX = jnp.cumsum(here_MX, axis=1, dtype=jnp.int32) - 1
        rank_X = jnp.take_along_axis(before_MX, jnp.maximum(at_X, 0)[None], axis=0)[0]
        count_M = here_MX.sum(axis=1, dtype=jnp.int32)
        token_X = indices_of_true(here_MX[me], size=at_X.size)
        token_R = jnp.pad(token_X, (0, num_rows - at_X.size))
        return cls(at_X, rank_X, count_M, token_R, count_M[me])


def fill(
    compute: Callable[[jax.Array], tuple[jax.Array, Any]], num_tiles: jax.Array, buffers: Any
) -> Any:
    """Writes tiles into buffers, one after the other.

    Args:
      compute: of the number of a tile: its first row, and its rows for each buffer. A tile may
        reach beyond its own rows if the next one overwrites what is too much.
      num_tiles: may differ between devices: no collectives in `compute`.
      buffers: [R, ...] each, with room for the last tile.
    """

    def write(i, buffers):
        start, rows = compute(i)
        put = jax.lax.dynamic_update_slice_in_dim
        return jax.tree.map(lambda old, new: put(old, new, start, axis=0), buffers, rows)

    return jax.lax.fori_loop(0, num_tiles, write, buffers)


def share(
    value_RZ: jax.Array, residence: Residence, axes: mesh_lib.Axis, num_tokens: int
) -> jax.Array:
    """A row of each token, packed where the tokens are, on all devices in the order of tokens.

    How much travels follows the fullest device, in steps. All devices of the mesh take the same
    step, which is what makes a collective inside a branch legal.

    Args:
      num_tokens: T.

    Returns:
      [X, Z]; zeros at positions without a token.
    """
    capacities = _capacities(num_tokens, residence.at_X.size)
    me = jax.lax.axis_index(axes)

    def gather(capacity: int) -> Callable[[jax.Array], jax.Array]:
        def branch(value_RZ):
            value_NZ = jax.lax.all_gather(value_RZ[:capacity], axes, tiled=True)
            row_X = jnp.maximum(residence.at_X, 0) * capacity + residence.rank_X
            return jnp.where((residence.at_X >= 0)[:, None], value_NZ[row_X], 0)

        return branch

    def add(value_RZ):
        """One device has the row, the others add zeros: as integers, so that no bit changes."""
        bits_RZ = jax.lax.bitcast_convert_type(value_RZ, f"uint{8 * value_RZ.dtype.itemsize}")
        mine_X1 = (residence.at_X == me)[:, None]
        bits_XZ = jnp.where(mine_X1, bits_RZ[jnp.maximum(residence.rank_X, 0)], 0)
        return jax.lax.bitcast_convert_type(jax.lax.psum(bits_XZ, axes), value_RZ.dtype)

    step = _step(residence, capacities)
    return jax.lax.switch(step, [*map(gather, capacities), add], value_RZ)


def whole(value_RZ: jax.Array, residence: Residence, num_tokens: int) -> jax.Array:
    """Packed rows [R, Z], summed over `tensor`: as many as the fullest device has, rounded up to a
    step of `share`; rows beyond are arbitrary.

    Devices of `tensor` hold the same tokens, and all of the mesh take the same step.

    Args:
      num_tokens: T.
    """
    if jax.lax.axis_size(mesh_lib.TENSOR) == 1:
        return value_RZ
    capacities = _capacities(num_tokens, residence.at_X.size)

    def add(num_rows: int) -> Callable[[jax.Array], jax.Array]:
        def branch(value_RZ):
            return value_RZ.at[:num_rows].set(jax.lax.psum(value_RZ[:num_rows], mesh_lib.TENSOR))

        return branch

    step = _step(residence, capacities)
    return jax.lax.switch(step, [*map(add, capacities), add(len(value_RZ))], value_RZ)


def shared_padding_M(residence: Residence, num_tokens: int) -> jax.Array:
    """Rows without a token that `share` sends from here to each device, int32 [M].

    With `shared_M` all that is sent. Where that is a sum, 2 T rows to each device whoever has the
    tokens, it is below 0 on a device of more tokens.
    """
    capacities = _capacities(num_tokens, residence.at_X.size)
    sent = jnp.array([*capacities, 2 * num_tokens], jnp.int32)[_step(residence, capacities)]
    return jnp.full_like(residence.count_M, sent - residence.count)


def _capacities(num_tokens: int, num_group: int) -> list[int]:
    return sorted({min(num_group, math.ceil(step * num_tokens)) for step in _LADDER})


def _step(residence: Residence, capacities: Sequence[int]) -> jax.Array:
    fullest = residence.count_M.max()
    if jax.lax.axis_size(mesh_lib.REPLICAS) > 1:
        fullest = jax.lax.pmax(fullest, mesh_lib.REPLICAS)
    return (fullest > jnp.array(capacities, jnp.int32)).sum(dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Leg:
    """Rows of items from the devices where they are to those where they go.

    Attributes:
      wire: how rows travel.
      item_S: the items sent from here, by destination, then in their order; arbitrary beyond.
      position_N: where the row of an item lies among those that arrived here (by source, then in
        the order of items); beyond all rows if it did not come here.
      pairs: rows from each device to each, those that stay included.
    """

    wire: Wire = dataclasses.field(metadata={"static": True})
    item_S: Leaf
    position_N: Leaf
    pairs: Pairs

    @classmethod
    def of(cls, source_N: jax.Array, target_N: jax.Array, wire: Wire, num_sent: int) -> "Leg":
        """Plans a leg; all devices know the same.

        Args:
          source_N, target_N: int32 devices; where one is -1, nothing is sent.
          num_sent: the most items that can be sent from one device.
        """
        size, me = jax.lax.axis_size(wire.axis), jax.lax.axis_index(wire.axis)
        device_1M = jnp.arange(size, dtype=jnp.int32)[None]
        real_N = (source_N >= 0) & (target_N >= 0)
        to_N = jnp.where(real_N & (source_N == me), target_N, size)
        from_N = jnp.where(real_N & (target_N == me), source_N, size)
        item_S = jnp.argsort(to_N, stable=True)[:num_sent].astype(jnp.int32)
        arrived_N = jnp.argsort(from_N, stable=True)
        position_N = jnp.zeros(arrived_N.shape, jnp.int32)
        position_N = position_N.at[arrived_N].set(jnp.arange(arrived_N.size, dtype=jnp.int32))

        def count() -> jax.Array:
            """[1, 1, M, M]; in float32, exact below 2^24 items: integers are slow on CPUs."""
            from_NM, to_NM = (
                (at_N[:, None] == device_1M).astype(jnp.float32) for at_N in (source_N, target_N)
            )
            return (from_NM.T @ to_NM).astype(jnp.int32)[None, None]

        (most_MM,) = wire.agreed(count, 1)
        return cls(
            wire=wire,
            item_S=item_S,
            position_N=jnp.where(from_N < size, position_N, position_N.size),
            pairs=Pairs(
                to_M=(to_N[:, None] == device_1M).sum(axis=0, dtype=jnp.int32),
                from_M=(from_N[:, None] == device_1M).sum(axis=0, dtype=jnp.int32),
                most_MM=most_MM,
                limit=num_sent,
            ),
        )

    def move(
        self,
        rows_of: Callable[[jax.Array], jax.Array],
        num_received: int,
        *,
        like_ZZ: jax.Array,
        tile: int,
    ) -> jax.Array:
        """The rows that arrive here.

        Args:
          rows_of: int32 [W] items -> their rows [W, Z], which are here.
          num_received: the most rows that can arrive.
          like_ZZ: any array with the dtype and the number of columns of the rows.
          tile: W.

        Returns:
          [num_received, Z], to be read at `position_N`.
        """
        item_R = jnp.pad(self.item_S, (0, tile))

        def compute(i):
            item_W = jax.lax.dynamic_slice_in_dim(item_R, i * tile, tile)
            return i * tile, rows_of(item_W)

        sent_RZ = jnp.zeros((item_R.size, like_ZZ.shape[1]), like_ZZ.dtype)
        sent_RZ = fill(compute, num_tiles(self.pairs.to_M.sum(), tile), sent_RZ)
        return self.wire.exchange(sent_RZ, self.pairs, num_received)

    def rows_M(self) -> jax.Array:
        """Rows on the wire from here to each device, int32 [M]."""
        return away(self.pairs.to_M, self.wire.axis)

    def padding_M(self) -> jax.Array:
        """Rows without a token from here to each device, int32 [M]."""
        return away(self.wire.padding_M(self.pairs), self.wire.axis)


def shared_M(residence: Residence, axes: mesh_lib.Axis) -> jax.Array:
    """Rows that `share` sends from here to each device, int32 [M]."""
    return away(jnp.full_like(residence.count_M, residence.count), axes)


def num_tiles(count: jax.Array, tile: int) -> jax.Array:
    """Tiles that hold `count` rows."""
    return -(-count // tile)
