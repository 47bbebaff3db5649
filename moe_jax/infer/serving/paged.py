"""Keys and values in blocks, and attention that reads them there; the bits of a row are its own.

On each shard (device that tokens are split over) the cache of a layer is N blocks of C positions.
A table gives, for every row of queries, the blocks of its request in the order of positions.

Promise (float32 on CPU, tested): what attention gives a token depends on the token's query and the
keys and values at its positions 0..p alone. Not on who else is in the batch, on how its prompt was
cut into chunks, on whether it ran alone or in a chunk, on how long the tables are. Why this needs a
formulation of its own: matrix libraries add up in another order when a matrix has another number of
rows or columns, and attention over a dense cache has as many columns as the cache has positions. So
there is one shape of matmul here, whatever the batch is:

  [64 positions, Q] @ [Q, X columns]     the columns: query heads of one key/value head x tokens

A row holds X / heads neighbouring tokens of one request (a token that runs alone has a row to
itself, and the other columns are zeros). Tiles of 64 positions are visited in order with a running
maximum and sum (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135). A tile
beyond a row's last position changes nothing: it adds exact zeros and multiplies by an exact one.

Axes: T tokens on this shard, A rows, X columns, J tokens in a row, G key/value heads, R query heads
of one of them, H = G R, Q d_head, N blocks, C positions in a block, W blocks in a table, L layers,
Y = 64 positions of a tile.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.pytree import Leaf

TILE = 64  # positions
_COLUMNS = 16  # float32 lanes of the widest CPU registers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Keys and values of all layers: [L, shards N, G, C, Q] each.

    Of latent attention the key is the row of model/latent.py, one for all heads, and the value is
    the beginning of the same row: there is no second array.
    """

    key_LNGCQ: Leaf
    value_LNGCQ: Leaf | None


def spec(config: ModelConfig) -> PartitionSpec:
    """How the arrays of `Pages` are split."""
    head = None if config.latent.kv_rank else "head"
    return mesh_lib.spec(None, "batch", head, None, None)


def empty(config: ModelConfig, mesh: Mesh, blocks: int, block_size: int) -> Pages:
    """Zeros for `blocks` blocks on every shard."""
    shards, ranks = mesh_lib.size(mesh, mesh_lib.BATCH), config.latent
    heads, width = config.num_kv_heads, config.d_head
    if ranks.kv_rank:
        heads, width = 1, ranks.kv_rank + ranks.d_rope
    shape = (config.num_layers, shards * blocks, heads, block_size, width)
    placed = NamedSharding(mesh, spec(config))
    zeros = jax.jit(lambda: jnp.zeros(shape, config.dtype), out_shardings=placed)
    return Pages(zeros(), None if ranks.kv_rank else zeros())


def tokens_in_row(config: ModelConfig) -> int:
    """J: so many tokens of one request share a row of queries."""
    groups = 1 if config.latent.kv_rank else config.num_kv_heads
    return max(1, _COLUMNS // (config.num_heads // groups))


def write(
    pages: Pages,
    layer: Array,
    key_TGQ: Float[Array, "T G Q"],
    value_TGQ: Float[Array, "T G Q"] | None,
    block_T: Int[Array, "T"],
    offset_T: Int[Array, "T"],
) -> Pages:
    """The cache with these tokens; block N is nowhere. Inside `shard_map`."""

    def put(cached_LNGCQ: Any, new_TGQ: Array | None) -> Array | None:
        if new_TGQ is None:
            return None
        return cached_LNGCQ.at[layer, block_T, :, offset_T].set(new_TGQ, mode="drop")

    return Pages(put(pages.key_LNGCQ, key_TGQ), put(pages.value_LNGCQ, value_TGQ))


def mix(
    query_AJHQ: Float[Array, "A J H Q"],
    position_AJ: Int[Array, "A J"],
    pages: Pages,
    layer: Array,
    table_AW: Int[Array, "A W"],
    divisor: float,
    window: Int[Array, ""] | None = None,
    sink_H: Float[Array, "H"] | None = None,
) -> Float[Array, "A J H Q"]:
    """softmax(q k / divisor) v over positions 0..p; zeros where p is -1. Inside `shard_map`.

    Where there are no values, keys stand for them. Softmax in float32. The loop ends with the last
    tile that a row of this shard needs.

    Args:
      window: positions that a token attends to, itself included; None or 0 = all.
      sink_H: see attention.py's `mix`: the running maximum and sum begin with it.
    """
    rows, per_row, num_heads, width = query_AJHQ.shape
    _, _, groups, block_size, _ = pages.key_LNGCQ.shape
    per_group = num_heads // groups
    columns = per_group * per_row
    per_tile = TILE // block_size
    # Heads h = g * R + r; columns are (r, j).
    query_AGQX = query_AJHQ.reshape(rows, per_row, groups, per_group, width)
    query_AGQX = query_AGQX.transpose(0, 2, 4, 3, 1).reshape(rows, groups, width, columns)
    limit_A11X = jnp.tile(position_AJ, (1, per_group))[:, None, None, :]
    scale = np.float32(1 / divisor)

    def tile_of(cached_LNGCQ: Array, tile: Array) -> Array:
        block_AB = jax.lax.dynamic_slice_in_dim(table_AW, tile * per_tile, per_tile, axis=1)
        taken_ABGCQ = cached_LNGCQ[layer, block_AB]
        return taken_ABGCQ.swapaxes(1, 2).reshape(rows, groups, TILE, width)

    def step(state):
        tile, most_AG1X, sum_AG1X, mixed_AGQX = state
        key_AGYQ = tile_of(pages.key_LNGCQ, tile)
        value_AGYQ = key_AGYQ
        if pages.value_LNGCQ is not None:
            value_AGYQ = tile_of(pages.value_LNGCQ, tile)
        logits_AGYX = _dot("agyq,agqx->agyx", key_AGYQ, query_AGQX) * scale
        here_11Y1 = (tile * TILE + jnp.arange(TILE, dtype=jnp.int32))[None, None, :, None]
        back_A1YX = limit_A11X - here_11Y1
        seen_A1YX = back_A1YX >= 0
        if window is not None:
            seen_A1YX &= (back_A1YX < window) | (window == 0)
        logits_AGYX = jnp.where(seen_A1YX, logits_AGYX, -jnp.inf)
        new_AG1X = jnp.maximum(most_AG1X, logits_AGYX.max(axis=2, keepdims=True))
        # A column that has seen nothing yet has no maximum; any number serves.
        base_AG1X = jnp.where(new_AG1X == -jnp.inf, 0.0, new_AG1X)
        share_AGYX = jnp.exp(logits_AGYX - base_AG1X)
        kept_AG1X = jnp.exp(most_AG1X - base_AG1X)
        sum_AG1X = sum_AG1X * kept_AG1X + share_AGYX.sum(axis=2, keepdims=True)
        new_AGQX = _dot("agyq,agyx->agqx", value_AGYQ, share_AGYX.astype(value_AGYQ.dtype))
        return tile + 1, new_AG1X, sum_AG1X, mixed_AGQX * kept_AG1X + new_AGQX

    varying = tuple(jax.typeof(query_AJHQ).manual_axis_type.varying)

    def filled(shape: tuple[int, ...], value: float) -> Array:
        array = jnp.full(shape, value, jnp.float32)
        return jax.lax.pcast(array, varying, to="varying") if varying else array

    one = (rows, groups, 1, columns)
    most_AG1X, sum_AG1X = filled(one, -jnp.inf), filled(one, 0.0)
    if sink_H is not None:
        sink_GX = jnp.repeat(sink_H.reshape(groups, per_group), per_row, axis=1)
        most_AG1X = jnp.maximum(most_AG1X, sink_GX[None, :, None].astype(jnp.float32))
        sum_AG1X = sum_AG1X + 1.0
    start = most_AG1X, sum_AG1X, filled((rows, groups, width, columns), 0.0)
    last = position_AJ.max()
    tile = last * 0  # of the same mesh axes as the positions
    _, _, sum_AG1X, mixed_AGQX = jax.lax.while_loop(
        lambda state: state[0] * TILE <= last, step, (tile, *start)
    )
    mixed_AGQX = mixed_AGQX / jnp.where(sum_AG1X > 0, sum_AG1X, 1.0)
    mixed_AJHQ = mixed_AGQX.reshape(rows, groups, width, per_group, per_row)
    mixed_AJHQ = mixed_AJHQ.transpose(0, 4, 1, 3, 2).reshape(query_AJHQ.shape)
    return mixed_AJHQ.astype(query_AJHQ.dtype)


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def table_width(max_len: int, block_size: int) -> int:
    """W: blocks of the longest request, in whole tiles."""
    return -(-max_len // TILE) * (TILE // block_size)
