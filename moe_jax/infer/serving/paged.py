"""Keys and values in blocks, and attention that reads them there; the bits of a row are its own.

On each shard (device that tokens are split over) the cache of a layer is N blocks of C positions.
A table gives, for every row of queries, the blocks of its request in the order of positions.

Promise (float32 on CPU, tested): what attention gives a token depends on the token's query and the
keys and values at its positions 0..p alone. Not on who else is in the batch, on how its prompt was
cut into chunks, on whether it ran alone or in a chunk, on how long the tables are. Why this needs a
formulation of its own: matrix libraries add up in another order when a matrix has another number of
rows or columns, and attention over a dense cache has as many columns as the cache has positions.
What does not change a row's bits is the number of rows, from `_LEAST_ROWS` on, against a matrix
that lies transposed in memory (../README.md). So there are two matmuls here, each against a block:

  scores  [X, Q] @ [C, Q]^T        mixed  [X, C] @ [Q, C]^T

X rows are the query heads of one key/value head times neighbouring tokens of one request: one token
that runs alone, or a chunk of a prompt. Four blocks are visited at a time, in order, with a running
maximum and sum (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135). One beyond
a row's last position changes nothing: it adds exact zeros and multiplies by an exact one. Sums over
positions are written out as a tree: the order of a reduction depends on the shape around it, too.

Axes: T tokens on this shard, A rows of the batch, J tokens in one, G key/value heads, R query heads
of one of them, H = G R, X = R J query rows, Q d_head, N blocks, C positions in a block, W blocks in
a table, L layers, B blocks visited at a time.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.pytree import Leaf

TILE = 64  # positions visited at a time
LEAST_BLOCK = 16  # positions; with fewer, bits depend on the number of rows
_LEAST_ROWS = 2  # query rows that keep their bits among others


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Keys and values of all layers: [L, shards N, G, C, Q], values with C and Q exchanged.

    Of latent attention the key is the row of model/latent.py, one for all heads, and the value is
    the beginning of the same row: there is no second array.
    """

    key_LNGCQ: Leaf
    value_LNGQC: Leaf | None


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
    front = (config.num_layers, shards * blocks, heads)
    placed = NamedSharding(mesh, spec(config))

    def zeros(*shape: int) -> Array:
        return jax.jit(lambda: jnp.zeros(shape, config.dtype), out_shardings=placed)()

    key_LNGCQ = zeros(*front, block_size, width)
    return Pages(key_LNGCQ, None if ranks.kv_rank else zeros(*front, width, block_size))


def write(
    pages: Pages,
    layer: Array,
    key_TGQ: Float[Array, "T G Q"],
    value_TGQ: Float[Array, "T G Q"] | None,
    block_T: Int[Array, "T"],
    offset_T: Int[Array, "T"],
) -> Pages:
    """The cache with these tokens; block N is nowhere. Inside `shard_map`.

    A value that is NaN or infinite is stored as 0. Blocks are used again and pad tables, and what
    another request left in one counts with a share of 0, times which only a finite number is 0.
    Keys may be anything: logits of positions that a row does not see are replaced. A latent key is
    a value, too.
    """

    def finite(x_TGQ):
        return jnp.where(jnp.isfinite(x_TGQ), x_TGQ, 0)

    if value_TGQ is None:
        key_TGQ = finite(key_TGQ)
    at, offset = {"mode": "drop"}, (layer, block_T, slice(None))
    key_LNGCQ = pages.key_LNGCQ.at[*offset, offset_T].set(key_TGQ, **at)
    value_LNGQC = pages.value_LNGQC
    if value_LNGQC is not None:
        value_LNGQC = value_LNGQC.at[*offset, :, offset_T].set(finite(value_TGQ), **at)
    return Pages(key_LNGCQ, value_LNGQC)


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
    block that a row of this shard needs.

    Args:
      window: positions that a token attends to, itself included; None or 0 = all.
      sink_H: see attention.py's `mix`: the running maximum and sum begin with it.
    """
    rows, per_row, num_heads, width = query_AJHQ.shape
    _, _, groups, block_size, _ = pages.key_LNGCQ.shape
    per_group = num_heads // groups
    at_a_time = TILE // block_size
    # Heads h = g * R + r; rows x are (r, j).
    query_AGXQ = query_AJHQ.reshape(rows, per_row, groups, per_group, width)
    query_AGXQ = query_AGXQ.transpose(0, 2, 3, 1, 4).reshape(rows, groups, -1, width)
    limit_AX = jnp.tile(position_AJ, (1, per_group))
    used = per_group * per_row
    num_rows = max(used, _LEAST_ROWS)
    missing = (0, num_rows - used)
    # Scaled here: scores that are scaled where they are multiplied are rounded otherwise in some
    # of the shapes (jax 0.12.0.1).
    scaled_AGXQ = query_AGXQ.astype(jnp.float32) * np.float32(1 / divisor)
    query_AGXQ = scaled_AGXQ.astype(query_AJHQ.dtype)
    query_AGXQ = jnp.pad(query_AGXQ, ((0, 0), (0, 0), missing, (0, 0)))
    limit_A11X1 = jnp.pad(limit_AX, ((0, 0), missing), constant_values=-1)[:, None, None, :, None]
    query_ABGXQ = jnp.repeat(query_AGXQ[:, None], at_a_time, axis=1)
    offset_1B11C = np.arange(TILE, dtype=np.int32).reshape(1, at_a_time, 1, 1, block_size)

    def step(state):
        first, most_AGX1, sum_AGX1, mixed_AGXQ = state
        block_AB = jax.lax.dynamic_slice_in_dim(table_AW, first, at_a_time, axis=1)
        key_ABGCQ = pages.key_LNGCQ[layer, block_AB]
        if pages.value_LNGQC is None:
            value_ABGQC = key_ABGCQ.swapaxes(3, 4)
        else:
            value_ABGQC = pages.value_LNGQC[layer, block_AB]
        # Both lie in memory as they are written here: no matmul is to read one the other way.
        key_ABGCQ, value_ABGQC = jax.lax.optimization_barrier((key_ABGCQ, value_ABGQC))
        logits_ABGXC = _dot("abgxq,abgcq->abgxc", query_ABGXQ, key_ABGCQ)
        back_AB1XC = limit_A11X1 - (first * block_size + offset_1B11C)
        seen_AB1XC = back_AB1XC >= 0
        if window is not None:
            seen_AB1XC &= (back_AB1XC < window) | (window == 0)
        logits_ABGXC = jnp.where(seen_AB1XC, logits_ABGXC, -jnp.inf)
        new_AGX1 = jnp.maximum(most_AGX1, logits_ABGXC.max(axis=(1, 4))[..., None])
        # A row that has seen nothing yet has no maximum; any number serves.
        base_AGX1 = jnp.where(new_AGX1 == -jnp.inf, 0.0, new_AGX1)
        share_ABGXC = jnp.exp(logits_ABGXC - base_AGX1[:, None])
        # In one loop with its subtraction an exponential that fills no vector has other bits than
        # one that does (jax 0.12.0.1, AVX-512).
        kept_AGX1 = jnp.exp(jax.lax.optimization_barrier(most_AGX1 - base_AGX1))
        mixed_ABGXQ = _dot("abgxc,abgqc->abgxq", share_ABGXC.astype(value_ABGQC.dtype), value_ABGQC)
        # Products that are rounded by themselves: the compiler may make one operation of a product
        # and an addition, and does so in some loops only.
        sum_AGX1, mixed_AGXQ = jax.lax.optimization_barrier(
            (sum_AGX1 * kept_AGX1, mixed_AGXQ * kept_AGX1)
        )
        sum_AGX1 += _sum(_sum(share_ABGXC, 4), 1)[:, 0]
        mixed_AGXQ += _sum(mixed_ABGXQ, 1)[:, 0]
        return first + at_a_time, new_AGX1, sum_AGX1, mixed_AGXQ

    varying = tuple(jax.typeof(query_AJHQ).manual_axis_type.varying)

    def filled(columns: int, value: float) -> Array:
        array = jnp.full((rows, groups, num_rows, columns), value, jnp.float32)
        return jax.lax.pcast(array, varying, to="varying") if varying else array

    most_AGX1, sum_AGX1 = filled(1, -jnp.inf), filled(1, 0.0)
    if sink_H is not None:
        sink_GX = jnp.repeat(sink_H.reshape(groups, per_group), per_row, axis=1)
        sink_GX = jnp.pad(sink_GX, ((0, 0), missing))
        most_AGX1 = jnp.maximum(most_AGX1, sink_GX[None, :, :, None].astype(jnp.float32))
        sum_AGX1 = sum_AGX1 + 1.0
    start = most_AGX1, sum_AGX1, filled(width, 0.0)
    last = position_AJ.max()
    first = last * 0  # of the same mesh axes as the positions
    _, _, sum_AGX1, mixed_AGXQ = jax.lax.while_loop(
        lambda state: state[0] * block_size <= last, step, (first, *start)
    )
    mixed_AGXQ = (mixed_AGXQ / jnp.where(sum_AGX1 > 0, sum_AGX1, 1.0))[:, :, :used]
    mixed_AJHQ = mixed_AGXQ.reshape(rows, groups, per_group, per_row, width)
    mixed_AJHQ = mixed_AJHQ.transpose(0, 3, 1, 2, 4).reshape(query_AJHQ.shape)
    return mixed_AJHQ.astype(query_AJHQ.dtype)


def _sum(x: Array, axis: int) -> Array:
    """Over an axis of 2^n numbers, which keeps a length of 1: halves are added, and so on."""
    while x.shape[axis] > 1:
        low, high = jnp.split(x, 2, axis)
        x = low + high
    return x


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def table_width(max_len: int, block_size: int) -> int:
    """W: blocks of the longest request, in whole tiles."""
    return -(-max_len // TILE) * (TILE // block_size)
