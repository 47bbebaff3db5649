"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3, arXiv 2412.19437).

Keys and values of all heads are made from one short row a position, the latent; beside it stands
one small key, the same for all heads, that is turned by the position:

    [latent | turned] = x down      latent is normed, `turned` turned
    key_h   = [latent expand_h[:Q] | turned]         value_h = latent expand_h[Q:]
    query_h = [Q values | N values turned], from x, or from a compressed and normed row of x

Prefill and training expand keys and values. Decoding keeps rows alone: `expand` is multiplied into
the query instead of the keys, and into what the heads found instead of the values, so a position
costs R + N numbers and nothing is expanded.

Axes: B batch, S tokens at hand, C cached positions, D d_model, H heads, U rank of queries, R rank
of keys and values, Q values of a head without positions, N those that are turned, W values of a
head's value; X = Q + N, Y = Q + W, Z = R + N.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.model import attention, parameter
from moe_jax.model import cache as cache_lib
from moe_jax.model import rope as rope_lib
from moe_jax.pytree import Leaf

NORM_EPS = 1e-6  # of both latent norms, whatever that of other norms is


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache(cache_lib.Kept):
    """Rows of one layer (of all when stacked): [B, C, Z], latents normed and keys turned."""

    row_BCZ: Leaf


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is fixed when the model is built.

    Attributes:
      rope: how queries and keys are turned by their positions.
      d_head: Q.
      divisor: of the softmax's logits.
    """

    rope: rope_lib.Rope
    d_head: int
    divisor: float


def setting_of(config: ModelConfig) -> Setting:
    """That of a model."""
    width = config.d_head + config.latent.d_rope
    rope = rope_lib.of_config(config.rope, config.rope_theta, config.latent.d_rope)
    return Setting(rope, config.d_head, width**0.5 / rope_lib.logit_scale(config.rope))


class LatentAttention(nnx.Module):
    """Queries from x, [D, H, X], or by way of [D, U], a norm [U] and [U, H, X]; `latent_down_DZ`,
    a norm [R], `expand_RHY`, output [H, W, D].
    """

    def __init__(self, key: jax.Array, config: ModelConfig):
        q, c, e, o = jax.random.split(key, 4)
        width, heads, latent = config.d_model, config.num_heads, config.latent
        rank, query_rank = latent.kv_rank, latent.query_rank
        d_query, d_expanded = config.d_head + latent.d_rope, config.d_head + latent.d_value
        from_rank, of_head = ("rank", "head", "d_head"), ("embed", "head", "d_head")
        if query_rank:
            u = jax.random.fold_in(q, 0)
            down, up = (width, query_rank), (query_rank, heads, d_query)
            self.query_DHX: nnx.Param | None = None
            self.query_down_DU: nnx.Param | None = parameter.normal(
                u, ("embed", "latent"), down, width
            )
            self.query_norm_U: nnx.Param | None = parameter.ones(("latent",), (query_rank,))
            self.query_up_UHX: nnx.Param | None = parameter.normal(q, from_rank, up, query_rank)
        else:
            self.query_DHX = parameter.normal(q, of_head, (width, heads, d_query), width)
            self.query_down_DU = self.query_norm_U = self.query_up_UHX = None
        self.latent_down_DZ = parameter.normal(
            c, ("embed", "latent"), (width, rank + latent.d_rope), width
        )
        self.latent_norm_R = parameter.ones(("latent",), (rank,))
        self.expand_RHY = parameter.normal(e, from_rank, (rank, heads, d_expanded), rank)
        out = (heads, latent.d_value, width)
        self.output_HWD = parameter.normal(
            o, ("head", "d_head", "embed"), out, heads * latent.d_value
        )


@dataclasses.dataclass(frozen=True)
class Heads:
    """Projections as plain arrays: of a `LatentAttention`, or of some of its heads."""

    latent_down_DZ: jax.Array
    latent_norm_R: jax.Array
    expand_RHY: jax.Array
    output_HWD: jax.Array
    query_DHX: jax.Array | None = None
    query_down_DU: jax.Array | None = None
    query_norm_U: jax.Array | None = None
    query_up_UHX: jax.Array | None = None


def attend(
    x_BSD: Float[Array, "B S D"],
    weights: LatentAttention | Heads,
    position_BS: Int[Array, "B S"],
    setting: Setting,
    cache: LatentCache | cache_lib.InStack | None,
    window: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "B S D"], LatentCache | cache_lib.InStack | None]:
    """As `attention.attend`, with the same rules for positions and caches."""
    query_BSHX = queries(x_BSD, weights, position_BS, setting)
    row_BSZ = rows(x_BSD, weights, position_BS, setting)
    if cache is None or x_BSD.shape[1] > 1:
        position_S = jnp.arange(x_BSD.shape[1], dtype=jnp.int32)
        seen_1SC = attention.seen(position_S[None], len(position_S), window)
        mixed_BSHW = mix_expanded(query_BSHX, row_BSZ, weights, setting, seen_1SC)
        cache = cache and cache.with_prefix(row_BSZ)
    else:
        cache = cache.with_one(position_BS[:, 0], row_BSZ)
        row_BCZ = cache.of_layer().row_BCZ
        seen_B1C = attention.seen(position_BS, row_BCZ.shape[1], window)
        mixed_BSHW = mix_absorbed(query_BSHX, row_BCZ, weights, setting, seen_B1C)
    return project_out(mixed_BSHW, weights), cache


def queries(
    x_BSD: Float[Array, "B S D"],
    weights: LatentAttention | Heads,
    position_BS: Int[Array, "B S"],
    setting: Setting,
    reached_BS: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S H X"]:
    """The last N values of each head are turned (`reached_BS`: see `rope.rotate`)."""
    dtype = x_BSD.dtype
    if weights.query_DHX is not None:
        query_BSHX = jnp.einsum("bsd,dhx->bshx", x_BSD, weights.query_DHX[...].astype(dtype))
    else:
        assert weights.query_down_DU is not None
        assert weights.query_up_UHX is not None
        down_DU = weights.query_down_DU[...].astype(dtype)
        short_BSU = _norm(jnp.einsum("bsd,du->bsu", x_BSD, down_DU), weights.query_norm_U)
        up_UHX = weights.query_up_UHX[...].astype(dtype)
        query_BSHX = jnp.einsum("bsu,uhx->bshx", short_BSU, up_UHX)
    still_BSHQ, turned_BSHN = jnp.split(query_BSHX, [setting.d_head], axis=-1)
    turned_BSHN = rope_lib.rotate(turned_BSHN, position_BS, setting.rope, reached_BS)
    return jnp.concatenate([still_BSHQ, turned_BSHN], axis=-1)


def rows(
    x_BSD: Float[Array, "B S D"],
    weights: LatentAttention | Heads,
    position_BS: Int[Array, "B S"],
    setting: Setting,
    reached_BS: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S Z"]:
    """What is kept of each token: its latent, normed, and its key that is turned."""
    down_DZ = weights.latent_down_DZ[...].astype(x_BSD.dtype)
    row_BSZ = jnp.einsum("bsd,dz->bsz", x_BSD, down_DZ)
    rank = weights.latent_norm_R.shape[0]
    latent_BSR = _norm(row_BSZ[..., :rank], weights.latent_norm_R)
    turned_BS1N = row_BSZ[:, :, None, rank:]
    turned_BS1N = rope_lib.rotate(turned_BS1N, position_BS, setting.rope, reached_BS)
    return jnp.concatenate([latent_BSR, turned_BS1N[:, :, 0]], axis=-1)


def mix_expanded(
    query_BSHX: Float[Array, "B S H X"],
    row_BCZ: Float[Array, "B C Z"],
    weights: LatentAttention | Heads,
    setting: Setting,
    seen_BSC: Bool[Array, "#B S C"],
) -> Float[Array, "B S H W"]:
    """Attention over keys and values that are made from the rows."""
    expand_RHY = weights.expand_RHY[...].astype(row_BCZ.dtype)
    rank, num_heads, _ = expand_RHY.shape
    expanded_BCHY = jnp.einsum("bcr,rhy->bchy", row_BCZ[..., :rank], expand_RHY)
    key_BCHQ, value_BCHW = jnp.split(expanded_BCHY, [setting.d_head], axis=-1)
    turned_BC1N = row_BCZ[:, :, None, rank:]
    turned_BCHN = jnp.broadcast_to(
        turned_BC1N, (*key_BCHQ.shape[:2], num_heads, turned_BC1N.shape[-1])
    )
    key_BCHX = jnp.concatenate([key_BCHQ, turned_BCHN], axis=-1)
    return attention.mix(query_BSHX, key_BCHX, value_BCHW, seen_BSC, divisor=setting.divisor)


def mix_absorbed(
    query_BSHX: Float[Array, "B S H X"],
    row_BCZ: Float[Array, "B C Z"],
    weights: LatentAttention | Heads,
    setting: Setting,
    seen_BSC: Bool[Array, "#B S C"],
) -> Float[Array, "B S H W"]:
    """The same over the rows as they are: one key of Z values and one value of R for all heads."""
    rank = weights.expand_RHY.shape[0]
    query_BSHZ = absorbed(query_BSHX, weights, setting)
    row_BC1Z = row_BCZ[:, :, None]
    found_BSHR = attention.mix(
        query_BSHZ, row_BC1Z, row_BC1Z[..., :rank], seen_BSC, divisor=setting.divisor
    )
    return values(found_BSHR, weights, setting)


def absorbed(
    query_BSHX: Float[Array, "B S H X"], weights: LatentAttention | Heads, setting: Setting
) -> Float[Array, "B S H Z"]:
    """Queries that meet rows as they are."""
    to_key_RHQ = weights.expand_RHY[...].astype(query_BSHX.dtype)[..., : setting.d_head]
    still_BSHQ, turned_BSHN = jnp.split(query_BSHX, [setting.d_head], axis=-1)
    latent_BSHR = jnp.einsum("bshq,rhq->bshr", still_BSHQ, to_key_RHQ)
    return jnp.concatenate([latent_BSHR, turned_BSHN], axis=-1)


def values(
    found_BSHR: Float[Array, "B S H R"], weights: LatentAttention | Heads, setting: Setting
) -> Float[Array, "B S H W"]:
    """The values of what heads found among latents."""
    to_value_RHW = weights.expand_RHY[...].astype(found_BSHR.dtype)[..., setting.d_head :]
    return jnp.einsum("bshr,rhw->bshw", found_BSHR, to_value_RHW)


def project_out(
    mixed_BSHW: Float[Array, "B S H W"], weights: LatentAttention | Heads
) -> Float[Array, "B S D"]:
    """What the heads found, as one row a token."""
    output_HWD = weights.output_HWD[...].astype(mixed_BSHW.dtype)
    return jnp.einsum("bshw,hwd->bsd", mixed_BSHW, output_HWD)


def _norm(x_BSR: jax.Array, scale_R: nnx.Param | jax.Array | None) -> jax.Array:
    """x / rms(x) * scale in float32."""
    assert scale_R is not None
    x32_BSR = x_BSR.astype(jnp.float32)
    mean_BS1 = jnp.mean(jnp.square(x32_BSR), axis=-1, keepdims=True)
    scale_11R = scale_R[...].astype(jnp.float32)[None, None]
    return (x32_BSR * jax.lax.rsqrt(mean_BS1 + NORM_EPS) * scale_11R).astype(x_BSR.dtype)
