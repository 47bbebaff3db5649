"""Grouped-query attention with rotary positions and an optional key/value cache.

Axes: B batch, S tokens at hand, C cached positions, H query heads, G key/value heads, Q d_head.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_jax.model import parameter


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer (of all layers when stacked): [B, C, G, Q] each."""

    key_BCGQ: jax.Array
    value_BCGQ: jax.Array


class Attention(nnx.Module):
    """Projections: query [D, H, Q], key and value [D, G, Q], output [H, Q, D]."""

    def __init__(
        self, key: jax.Array, *, d_model: int, num_heads: int, num_kv_heads: int, d_head: int
    ):
        q, k, v, o = jax.random.split(key, 4)
        heads = ("embed", "head", "d_head")
        self.query_DHQ = parameter.normal(q, heads, (d_model, num_heads, d_head), d_model)
        self.key_DGQ = parameter.normal(k, heads, (d_model, num_kv_heads, d_head), d_model)
        self.value_DGQ = parameter.normal(v, heads, (d_model, num_kv_heads, d_head), d_model)
        self.output_HQD = parameter.normal(
            o, ("head", "d_head", "embed"), (num_heads, d_head, d_model), num_heads * d_head
        )


def rotate(
    x_BSHQ: Float[Array, "B S H Q"], position_BS: Int[Array, "B S"], theta: float
) -> Float[Array, "B S H Q"]:
    """Rotary embedding (RoFormer, arXiv 2104.09864): pairs (i, i + Q/2), angle pos theta^(-2i/Q)."""
    half = x_BSHQ.shape[-1] // 2
    frequency_F = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BSF = position_BS.astype(jnp.float32)[:, :, None] * frequency_F[None, None]
    cos, sin = jnp.cos(angle_BSF)[:, :, None], jnp.sin(angle_BSF)[:, :, None]
    first, second = jnp.split(x_BSHQ.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BSHQ.dtype)


def attend(
    x_BSD: Float[Array, "B S D"],
    weights: Attention,
    position_BS: Int[Array, "B S"],
    rope_theta: float,
    cache: LayerCache | None,
) -> tuple[Float[Array, "B S D"], LayerCache | None]:
    """Causal self-attention; with a cache, the new keys and values are stored at their positions.

    Without a cache, positions are 0..S-1 in every row. With one, either S = 1 (decoding, any
    position per row) or the positions are 0..S-1 (prefill into an empty cache).
    """
    dtype = x_BSD.dtype
    query_BSHQ = jnp.einsum("bsd,dhq->bshq", x_BSD, weights.query_DHQ[...].astype(dtype))
    key_BSGQ = jnp.einsum("bsd,dgq->bsgq", x_BSD, weights.key_DGQ[...].astype(dtype))
    value_BSGQ = jnp.einsum("bsd,dgq->bsgq", x_BSD, weights.value_DGQ[...].astype(dtype))
    query_BSHQ = rotate(query_BSHQ, position_BS, rope_theta)
    key_BSGQ = rotate(key_BSGQ, position_BS, rope_theta)
    if cache is None or x_BSD.shape[1] > 1:
        mixed_BSHQ = jax.nn.dot_product_attention(query_BSHQ, key_BSGQ, value_BSGQ, is_causal=True)
        cache = cache and LayerCache(
            _write_prefix(cache.key_BCGQ, key_BSGQ), _write_prefix(cache.value_BCGQ, value_BSGQ)
        )
    else:
        position_B = position_BS[:, 0]
        cache = LayerCache(
            _write_one(cache.key_BCGQ, key_BSGQ, position_B),
            _write_one(cache.value_BCGQ, value_BSGQ, position_B),
        )
        seen_BC = jnp.arange(cache.key_BCGQ.shape[1]) <= position_B[:, None]
        mixed_BSHQ = jax.nn.dot_product_attention(
            query_BSHQ, cache.key_BCGQ, cache.value_BCGQ, mask=seen_BC[:, None, None]
        )
    output_HQD = weights.output_HQD[...].astype(dtype)
    return jnp.einsum("bshq,hqd->bsd", mixed_BSHQ, output_HQD), cache


def _write_prefix(cached_BCGQ: jax.Array, new_BSGQ: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(cached_BCGQ, new_BSGQ, (0, 0, 0, 0))


def _write_one(cached_BCGQ: jax.Array, new_B1GQ: jax.Array, position_B: jax.Array) -> jax.Array:
    """A select, not a scatter: it stays on the device that holds the row."""
    here_BC = jnp.arange(cached_BCGQ.shape[1]) == position_B[:, None]
    return jnp.where(here_BC[:, :, None, None], new_B1GQ, cached_BCGQ)
