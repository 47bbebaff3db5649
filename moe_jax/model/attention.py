"""Grouped-query attention with rotary positions and an optional key/value cache.

Projections may have biases, queries and keys a norm, and heads a sink: a parameter that is None is
not there. A layer may have a window, the number of positions that a token attends to.

Axes: B batch, S tokens at hand, C cached positions, H query heads, G key/value heads, Q d_head,
Z of a norm: [Q] for each head, or [H, Q] for all heads together.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.model import cache as cache_lib
from moe_jax.model import parameter, short
from moe_jax.model import rope as rope_lib
from moe_jax.pytree import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache(cache_lib.Kept):
    """Keys and values of one layer (of all layers when stacked): [B, C, G, Q] each."""

    key_BCGQ: Leaf
    value_BCGQ: Leaf


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is fixed when the model is built.

    Attributes:
      rope: how queries and keys are turned by their positions.
      norm_eps: of the norm of queries and keys.
      heads_over: mesh axes that heads are split over by `shard_map`; () = all are here.
      divisor: of `mix`; None = sqrt(Q).
      folds: the norm sums in an order that does not depend on the number of rows (short.py).
    """

    rope: rope_lib.Rope
    norm_eps: float = 1e-6
    heads_over: tuple[str, ...] = ()
    divisor: float | None = None
    folds: bool = False


class Attention(nnx.Module):
    """Projections: query [D, H, Q], key and value [D, G, Q], output [H, Q, D]; `Heads` has all.

    Args:
      qk_norm: "" = none, "head": a scale [Q] each, "all": scales [H, Q] and [G, Q].
      bias: "" = none, "qkv", or "qkvo": of the output, too.
      sinks: a logit for each head, see `mix`.
    """

    def __init__(
        self,
        key: jax.Array,
        *,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        d_head: int,
        qk_norm: str = "",
        bias: str = "",
        sinks: bool = False,
    ):
        q, k, v, o = jax.random.split(key, 4)
        heads = ("embed", "head", "d_head")
        self.query_DHQ = parameter.normal(q, heads, (d_model, num_heads, d_head), d_model)
        self.key_DGQ = parameter.normal(k, heads, (d_model, num_kv_heads, d_head), d_model)
        self.value_DGQ = parameter.normal(v, heads, (d_model, num_kv_heads, d_head), d_model)
        self.output_HQD = parameter.normal(
            o, ("head", "d_head", "embed"), (num_heads, d_head, d_model), num_heads * d_head
        )

        def norm(heads: int) -> nnx.Param | None:
            if not qk_norm:
                return None
            if qk_norm == "head":
                return parameter.ones(("d_head",), (d_head,))
            return parameter.ones(("head", "d_head"), (heads, d_head))

        def zeros(heads: int) -> nnx.Param | None:
            return parameter.zeros(("head", "d_head"), (heads, d_head)) if bias else None

        self.query_norm_Z, self.key_norm_Z = norm(num_heads), norm(num_kv_heads)
        self.query_bias_HQ = zeros(num_heads)
        self.key_bias_GQ, self.value_bias_GQ = zeros(num_kv_heads), zeros(num_kv_heads)
        self.output_bias_D = parameter.zeros(("embed",), (d_model,)) if bias == "qkvo" else None
        self.sink_H = parameter.zeros(("head",), (num_heads,)) if sinks else None


@dataclasses.dataclass(frozen=True)
class Heads:
    """Projections as plain arrays, none of them turned: of an `Attention`, or of some heads."""

    query_DHQ: jax.Array
    key_DGQ: jax.Array
    value_DGQ: jax.Array
    output_HQD: jax.Array
    query_norm_Z: jax.Array | None = None
    key_norm_Z: jax.Array | None = None
    query_bias_HQ: jax.Array | None = None
    key_bias_GQ: jax.Array | None = None
    value_bias_GQ: jax.Array | None = None
    output_bias_D: jax.Array | None = None
    sink_H: jax.Array | None = None


def matrices(weights: Attention) -> tuple[nnx.Param, ...]:
    """Its projections."""
    return weights.query_DHQ, weights.key_DGQ, weights.value_DGQ, weights.output_HQD


def norm_heads(x_BSHQ: Float[Array, "B S H Q"], scale_Z: Any, setting: Setting) -> jax.Array:
    """x / rms(x) * scale in float32, for each head or over all heads, as the scale has axes.

    Queries and keys as of Henry et al. (arXiv 2010.04245), with an RMS norm. None: x itself.
    """
    if scale_Z is None:
        return x_BSHQ
    scale_Z = scale_Z[...].astype(jnp.float32)
    x32_BSHQ = x_BSHQ.astype(jnp.float32)
    normed_axes = tuple(range(-scale_Z.ndim, 0))
    square_BSHQ = jnp.square(x32_BSHQ)
    if setting.folds:
        flat_BSHY = square_BSHQ.reshape(*square_BSHQ.shape[: normed_axes[0]], -1)
        mean_BSZ = jnp.expand_dims(short.total(flat_BSHY) / scale_Z.size, normed_axes[1:])
    else:
        mean_BSZ = jnp.mean(square_BSHQ, axis=normed_axes, keepdims=True)
    if scale_Z.ndim == 2 and setting.heads_over:  # as many heads on each device
        mean_BSZ = jax.lax.pmean(mean_BSZ, setting.heads_over)
    scale_BSHQ = scale_Z.reshape((1,) * (4 - scale_Z.ndim) + scale_Z.shape)
    return (x32_BSHQ * jax.lax.rsqrt(mean_BSZ + setting.norm_eps) * scale_BSHQ).astype(x_BSHQ.dtype)


def attend(
    x_BSD: Float[Array, "B S D"],
    weights: Attention | Heads,
    position_BS: Int[Array, "B S"],
    setting: Setting,
    cache: LayerCache | cache_lib.InStack | None,
    window: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B S D"], LayerCache | cache_lib.InStack | None]:
    """Causal self-attention; with a cache, the new keys and values are stored at their positions.

    Without a cache, positions are 0..S-1 in every row. With one, either S = 1 (decoding, any
    position per row) or the positions are 0..S-1 (prefill into an empty cache). The cache holds
    all positions, those beyond the window too.

    Args:
      window: of this layer, see `seen`.
    """
    query_BSHQ, key_BSGQ, value_BSGQ = project(x_BSD, weights, position_BS, setting)
    if cache is None or x_BSD.shape[1] > 1:
        position_S = jnp.arange(x_BSD.shape[1], dtype=jnp.int32)
        seen_1SC = seen(position_S[None], len(position_S), window)
        mixed_BSHQ = mix(
            query_BSHQ, key_BSGQ, value_BSGQ, seen_1SC, weights.sink_H, setting.divisor
        )
        cache = cache and cache.with_prefix(key_BSGQ, value_BSGQ)
    else:
        cache = cache.with_one(position_BS[:, 0], key_BSGQ, value_BSGQ)
        kept = cache.of_layer()
        seen_B1C = seen(position_BS, kept.key_BCGQ.shape[1], window)
        cached = kept.key_BCGQ, kept.value_BCGQ
        mixed_BSHQ = mix(query_BSHQ, *cached, seen_B1C, weights.sink_H, setting.divisor)
    return project_out(mixed_BSHQ, weights), cache


def project(
    x_BSD: Float[Array, "B S D"],
    weights: Attention | Heads,
    position_BS: Int[Array, "B S"],
    setting: Setting,
    reached_BS: Int[Array, "B S"] | None = None,
) -> tuple[Float[Array, "B S H Q"], Float[Array, "B S G Q"], Float[Array, "B S G Q"]]:
    """Queries, keys and values; queries and keys are normed and turned by their positions.

    Args:
      reached_BS: see `rope.rotate`.
    """
    query_BSHQ = _heads(x_BSD, weights.query_DHQ, weights.query_bias_HQ)
    key_BSGQ = _heads(x_BSD, weights.key_DGQ, weights.key_bias_GQ)
    value_BSGQ = _heads(x_BSD, weights.value_DGQ, weights.value_bias_GQ)
    query_BSHQ = norm_heads(query_BSHQ, weights.query_norm_Z, setting)
    key_BSGQ = norm_heads(key_BSGQ, weights.key_norm_Z, setting)
    turned = (position_BS, setting.rope, reached_BS)
    query_BSHQ = rope_lib.rotate(query_BSHQ, *turned)
    return query_BSHQ, rope_lib.rotate(key_BSGQ, *turned), value_BSGQ


def windows(config: ModelConfig) -> np.ndarray | None:
    """int32 [L]: the window of each layer, 0 = none; None: no layer has one."""
    if not any(config.windows):
        return None
    return np.resize(np.array(config.windows, np.int32), config.num_layers)


def seen(
    position_BS: Int[Array, "B S"], num_positions: int, window: Int[Array, ""] | None = None
) -> Bool[Array, "B S C"]:
    """Which of the first C positions a token attends to: itself and those before it.

    Args:
      window: how many of them at most; None or 0 = all (Longformer, arXiv 2004.05150, figure 2b,
        to one side).
    """
    back_BSC = position_BS[:, :, None] - jnp.arange(num_positions)[None, None]
    seen_BSC = back_BSC >= 0
    if window is None:
        return seen_BSC
    return seen_BSC & ((back_BSC < window) | (window == 0))


def setting_of(config: ModelConfig) -> Setting:
    """That of a model's attention, all heads together."""
    return Setting(
        rope_lib.of_config(config.rope, config.rope_theta, config.d_head),
        config.norm_eps,
        divisor=1 / config.attention_scale if config.attention_scale else None,
    )


def _heads(x_BSD: jax.Array, weight_DHQ: Any, bias_HQ: Any) -> jax.Array:
    """[B, S, H, Q]"""
    dtype = x_BSD.dtype
    weight = weight_DHQ[...].astype(dtype)
    if parameter.is_turned(weight_DHQ):
        y_BSHQ = _turned(x_BSD, weight.reshape(-1, weight.shape[-1]))
        y_BSHQ = y_BSHQ.reshape(*x_BSD.shape[:2], *weight.shape[:2])
    else:
        y_BSHQ = jnp.einsum("bsd,dhq->bshq", x_BSD, weight)
    return y_BSHQ if bias_HQ is None else y_BSHQ + bias_HQ[...].astype(dtype)[None, None]


def _turned(x_BSX: jax.Array, weight_YX: jax.Array) -> jax.Array:
    """x @ weight^T as one product of two matrices: others are turned back, in each step."""
    rows_NX = x_BSX.reshape(-1, x_BSX.shape[-1])
    y_NY = jax.lax.dot_general(rows_NX, weight_YX, (((1,), (1,)), ((), ())))
    return y_NY.reshape(*x_BSX.shape[:2], -1)


def project_out(
    mixed_BSHQ: Float[Array, "B S H Q"], weights: Attention | Heads
) -> Float[Array, "B S D"]:
    """What the heads found, as one row a token."""
    output_HQD = weights.output_HQD[...].astype(mixed_BSHQ.dtype)
    if parameter.is_turned(weights.output_HQD):
        mixed_BSX = mixed_BSHQ.reshape(*mixed_BSHQ.shape[:2], -1)
        y_BSD = _turned(mixed_BSX, output_HQD.reshape(len(output_HQD), -1))
    else:
        y_BSD = jnp.einsum("bshq,hqd->bsd", mixed_BSHQ, output_HQD)
    if weights.output_bias_D is None:
        return y_BSD
    return y_BSD + weights.output_bias_D[...].astype(y_BSD.dtype)[None, None]


def mix(
    query_BSHQ: Float[Array, "B S H Q"],
    key_BCGQ: Float[Array, "B C G Q"],
    value_BCGW: Float[Array, "B C G W"],
    seen_BSC: Bool[Array, "#B S C"],
    sink_H: Any = None,
    divisor: float | None = None,
) -> Float[Array, "B S H W"]:
    """softmax(q k / divisor) v over the positions seen; softmax in float32.

    Values may have another width W than keys; the divisor is sqrt(Q) where none is given.

    The queries of all heads that share a key/value head stand in one matrix, so that there is one
    plain matmul per (sequence, key/value head).

    Args:
      sink_H: a logit more for each head, of a position whose value is 0 (gpt-oss, arXiv 2508.10925;
        a learned one of Xiao et al., arXiv 2309.17453); None = none.
    """
    batch, length, num_heads, width = query_BSHQ.shape
    groups = key_BCGQ.shape[2]
    per_group = num_heads // groups
    # Heads h = g * per_group + r; the rows of one matrix are (r, s).
    rows_BGXQ = query_BSHQ.reshape(batch, length, groups, per_group, width)
    rows_BGXQ = rows_BGXQ.transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, width)
    key_BGCQ, value_BGCW = key_BCGQ.swapaxes(1, 2), value_BCGW.swapaxes(1, 2)
    logits_BGXC = jnp.einsum("bgxq,bgcq->bgxc", rows_BGXQ, key_BGCQ).astype(jnp.float32)
    seen_B1XC = jnp.tile(seen_BSC, (1, per_group, 1))[:, None]
    logits_BGXC = jnp.where(seen_B1XC, logits_BGXC / (divisor or math.sqrt(width)), -jnp.inf)
    if sink_H is None:
        share_BGXC = jax.nn.softmax(logits_BGXC, axis=-1)
    else:
        sink_GX = jnp.repeat(sink_H[...].reshape(groups, per_group), length, axis=1)
        share_BGXC = _softmax_beside(logits_BGXC, sink_GX[None, :, :, None])
    share_BGXC = share_BGXC.astype(query_BSHQ.dtype)
    mixed_BGXW = jnp.einsum("bgxc,bgcw->bgxw", share_BGXC, value_BGCW)
    mixed_BGRSW = mixed_BGXW.reshape(batch, groups, per_group, length, -1)
    return mixed_BGRSW.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, -1)


def _softmax_beside(logits_BGXC: jax.Array, other_1GX1: jax.Array) -> jax.Array:
    """softmax over C and one more logit, without that one's share: rows sum to less than 1."""
    other_1GX1 = other_1GX1.astype(jnp.float32)
    top_BGX1 = jnp.maximum(logits_BGXC.max(axis=-1, keepdims=True), other_1GX1)
    top_BGX1 = jax.lax.stop_gradient(top_BGX1)
    power_BGXC = jnp.exp(logits_BGXC - top_BGX1)
    return power_BGXC / (power_BGXC.sum(axis=-1, keepdims=True) + jnp.exp(other_1GX1 - top_BGX1))
