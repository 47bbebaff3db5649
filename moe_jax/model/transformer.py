"""A decoder-only MoE transformer: modules hold parameters, functions hold the math.

Layers are alike and stacked: every parameter of a block has "layer" in front, and the forward pass
is one `lax.scan`, so that compile time does not grow with depth.

Axes: B batch, S tokens at hand, C cached positions, D d_model, L layers, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.model import attention, moe, parameter, router, shuffled
from moe_jax.model.dispatch.table import Table, rule_position
from moe_jax.pytree import Leaf


class Block(nnx.Module):
    """Pre-norm attention, pre-norm MoE."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        a, m = jax.random.split(key)
        self.attention_norm_D = parameter.ones(("embed",), (config.d_model,))
        self.attention = attention.Attention(
            a,
            d_model=config.d_model,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            d_head=config.d_head,
            qk_norm=config.qk_norm,
            bias=config.attention_bias,
            sinks=config.attention_sinks,
        )
        self.moe_norm_D = parameter.ones(("embed",), (config.d_model,))
        self.moe = moe.MoE(
            m,
            d_model=config.d_model,
            d_ff=config.d_ff,
            num_experts=config.num_experts,
            d_ff_shared=config.d_ff_shared,
            shared_gate=config.shared_gate,
            correction=config.router_correction,
            router_bias=config.router_bias,
            expert_bias=config.expert_bias,
        )


class Transformer(nnx.Module):
    """Embedding [V, D], stacked blocks, final norm, output projection [D, V].

    Where they are tied, the embedding projects the output as well, and `output_DV` is None.
    """

    def __init__(self, key: jax.Array, config: ModelConfig):
        e, b, u = jax.random.split(key, 3)
        vocabulary, width = config.vocab_size, config.d_model
        self.embedding_VD = parameter.normal(e, ("vocab", "embed"), (vocabulary, width), width)
        self.blocks = jax.vmap(lambda k: Block(k, config))(jax.random.split(b, config.num_layers))
        self.final_norm_D = parameter.ones(("embed",), (width,))
        self.output_DV = (
            None
            if config.tied_output
            else parameter.normal(u, ("embed", "vocab"), (width, vocabulary), width)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Attributes:
    logits_BSV: float32.
    cache: keys and values of all layers, stacked, or None.
    record: `LayerRecord` of all layers, stacked: expert_LBSK, traffic [L, ...], losses [L].
    """

    logits_BSV: Leaf
    cache: attention.LayerCache | None
    record: moe.LayerRecord


Forward = Callable[..., Output]


def rms_norm(x_BSD: Float[Array, "B S D"], scale_D: Float[Array, "D"], eps: float):
    """x / rms(x) * scale, computed in float32 (arXiv 1910.07467)."""
    x32_BSD = x_BSD.astype(jnp.float32)
    inverse_BS1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BSD), axis=-1, keepdims=True) + eps)
    return (x32_BSD * inverse_BS1 * scale_D[None, None]).astype(x_BSD.dtype)


def logits(x_BSD: Float[Array, "B S D"], embedding_VD: jax.Array, output_DV: jax.Array | None):
    """float32 [B, S, V] of normed rows, by the output projection or, where it is None, the
    embedding."""
    if output_DV is None:
        logits_BSV = jnp.einsum("bsd,vd->bsv", x_BSD, embedding_VD)
    else:
        logits_BSV = jnp.einsum("bsd,dv->bsv", x_BSD, output_DV)
    return logits_BSV.astype(jnp.float32)


def build_forward(
    config: ModelConfig,
    mesh: Mesh,
    implementation: str | None = None,
    *,
    attention_batch: str = "batch",
    remat: bool = False,
) -> Forward:
    """Chooses the parts of the model once.

    Args:
      implementation: of the grouped matmul; None = by platform.
      attention_batch: logical axis of the batch in attention, "batch" or "replica".
      remat: the backward pass computes each layer again from its input.

    Returns:
      `forward(model, token_BS, table, *, position_BS=None, real_BS=None, cache=None) -> Output`;
      `table` is stacked over layers. Positions default to 0..S-1, all real.
    """
    moe_layer = moe.build(
        mesh,
        dispatch=config.dispatch,
        combine=config.combine,
        capacity_factor=config.capacity_factor,
        overlap_degree=config.overlap_degree,
        wire_dtype=config.wire_dtype,
        scheme=router.scheme_of(config),
        activation=config.activation,
        implementation=implementation,
    )
    eps, dtype = config.norm_eps, jnp.dtype(config.dtype)
    setting, window_L = attention.setting_of(config), attention.windows(config)
    split = mesh_lib.sharding(mesh, "batch", None, None)
    norm = functools.partial(rms_norm, eps=eps)
    steps = shuffled.Steps(mesh, moe_layer, norm, config.num_kv_heads, setting, config.top_k)
    attention_split = mesh_lib.sharding(mesh, attention_batch, None, None)
    place = jax.lax.with_sharding_constraint

    whole = functools.partial(parameter.gathered, mesh=mesh)

    def forward(
        model: Transformer,
        token_BS: Int[Array, "B S"],
        table: Table,
        *,
        position_BS: Int[Array, "B S"] | None = None,
        real_BS: Bool[Array, "B S"] | None = None,
        cache: attention.LayerCache | None = None,
    ) -> Output:
        if position_BS is None:
            position_BS = jnp.broadcast_to(jnp.arange(token_BS.shape[1])[None], token_BS.shape)
        if real_BS is None:
            real_BS = jnp.ones(token_BS.shape, bool)
        turn_BS = rule_position(position_BS)

        def layer(x_BSD, inputs):
            block, table_of_layer, cache_of_layer, window = inputs
            with jax.named_scope("attention"):
                normed_BSD = rms_norm(x_BSD, whole(block.attention_norm_D)[...], eps)
                mixed_BSD, cache_of_layer = attention.attend(
                    place(normed_BSD, attention_split),
                    whole(block.attention, dtype=dtype),
                    position_BS,
                    setting,
                    cache_of_layer,
                    window,
                )
            x_BSD = place(x_BSD + place(mixed_BSD, split), split)
            normed_BSD = rms_norm(x_BSD, whole(block.moe_norm_D)[...], eps)
            y_BSD, record = moe_layer(normed_BSD, block.moe, turn_BS, real_BS, table_of_layer)
            return x_BSD + y_BSD, (cache_of_layer, record)

        body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        inputs = (model.blocks, table, cache, window_L)
        embedding_VD = whole(model.embedding_VD, dtype=dtype)[...]
        x_BSD = place(embedding_VD[token_BS], split)
        if config.dispatch == "shuffled":
            x_BSD, cache, record = shuffled.layers(
                steps, inputs, x_BSD, position_BS, turn_BS, real_BS
            )
        else:
            x_BSD, (cache, record) = jax.lax.scan(body, x_BSD, inputs)
        x_BSD = rms_norm(x_BSD, whole(model.final_norm_D)[...], eps)
        output_DV = None if model.output_DV is None else whole(model.output_DV, dtype=dtype)[...]
        return Output(logits(x_BSD, embedding_VD, output_DV), cache, record)

    return forward


def empty_cache(
    config: ModelConfig, batch: int, capacity: int, mesh: Mesh, attention_batch: str = "batch"
) -> attention.LayerCache:
    """Zeros for `capacity` positions of `batch` sequences in all layers.

    Split over the batch as attention is (see `build_forward`) and over key/value heads. Where
    attention is split by heads (`shuffled`), each device has its heads of all sequences.
    """
    num_kv_heads = config.num_kv_heads
    placed = mesh_lib.sharding(mesh, None, attention_batch, None, "head", None)
    if config.dispatch == "shuffled":
        num_kv_heads = max(num_kv_heads, mesh_lib.size(mesh, mesh_lib.EXPERT))
        placed = NamedSharding(mesh, PartitionSpec(None, *shuffled.CACHE))
    shape = (config.num_layers, batch, capacity, num_kv_heads, config.d_head)
    zeros = jax.jit(lambda: jnp.zeros(shape, config.dtype), out_shardings=placed)
    return attention.LayerCache(zeros(), zeros())


def identity_table(num_layers: int, num_experts: int) -> Table:
    """Physical = logical in every layer: the table of a model that was never placed."""
    slot_LE1 = np.broadcast_to(np.arange(num_experts, dtype=np.int32), (num_layers, num_experts))
    return Table(slot_LE1[:, :, None].copy(), np.ones((num_layers, num_experts), np.int32))


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Forward and backward FLOPs a token: 6 per active matmul weight, 6 S H Q for attention."""
    heads = config.num_heads + config.num_kv_heads
    attention_weights = 2 * config.d_model * heads * config.d_head
    expert_weights = 3 * config.d_model * (config.d_ff * config.top_k + config.d_ff_shared)
    router = config.d_model * config.num_experts
    per_layer = 6 * (attention_weights + expert_weights + router)
    per_layer += 6 * seq_len * config.num_heads * config.d_head  # causal: half of all pairs
    return config.num_layers * per_layer + 6 * config.d_model * config.vocab_size


def num_active_parameters(config: ModelConfig) -> int:
    """Those that one token meets: all but the experts that it is not routed to."""
    idle = config.num_layers * (config.num_experts - config.top_k)
    of_expert = 3 * config.d_model * config.d_ff
    if config.expert_bias:
        of_expert += 2 * config.d_ff + config.d_model
    return num_parameters(config) - idle * of_expert


def num_parameters(config: ModelConfig) -> int:
    """All parameters of the model."""
    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))
