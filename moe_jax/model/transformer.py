"""A decoder-only MoE transformer: modules hold parameters, functions hold the math.

Layers are alike and stacked: every parameter of a block has "layer" in front, and the forward pass
is one `lax.scan`, so that compile time does not grow with depth.

Axes: B batch, S tokens at hand, C cached positions, D d_model, L layers, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.model import attention, latent, moe, parameter, shared, shuffled
from moe_jax.model import cache as cache_lib
from moe_jax.model import layers as layers_lib
from moe_jax.model.dispatch.table import Table, rule_position
from moe_jax.pytree import Leaf


def _attention(key: jax.Array, config: ModelConfig) -> attention.Attention | latent.LatentAttention:
    if config.latent.kv_rank:
        return latent.LatentAttention(key, config)
    return attention.Attention(
        key,
        d_model=config.d_model,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        d_head=config.d_head,
        qk_norm=config.qk_norm,
        bias=config.attention_bias,
        sinks=config.attention_sinks,
    )


def _norm_bias(config: ModelConfig) -> nnx.Param | None:
    return parameter.zeros(("embed",), (config.d_model,)) if config.norm == "layer" else None


class DenseBlock(nnx.Module):
    """Pre-norm attention, pre-norm feed-forward layer: a layer without experts."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        a, m = jax.random.split(key)
        self.attention_norm_D = parameter.ones(("embed",), (config.d_model,))
        self.attention = _attention(a, config)
        self.mlp_norm_D = parameter.ones(("embed",), (config.d_model,))
        self.mlp = shared.SharedExpert(
            m, d_model=config.d_model, d_ff=config.d_ff_dense, has_gate=False
        )


class Block(nnx.Module):
    """Pre-norm attention, pre-norm MoE."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        a, m = jax.random.split(key)
        self.attention_norm_D = parameter.ones(("embed",), (config.d_model,))
        self.attention_norm_bias_D = _norm_bias(config)
        self.attention = _attention(a, config)
        self.moe_norm_D = parameter.ones(("embed",), (config.d_model,))
        self.moe_norm_bias_D = _norm_bias(config)
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

    `dense_blocks`, the first layers of some models, are a stack before the other, or None; so is
    `blocks` in a model whose layers are all dense. Where both ends are tied, the embedding projects
    the output as well, and `output_DV` is None.
    """

    def __init__(self, key: jax.Array, config: ModelConfig):
        e, b, u = jax.random.split(key, 3)
        vocabulary, width = config.vocab_size, config.d_model
        self.embedding_VD = parameter.normal(e, ("vocab", "embed"), (vocabulary, width), width)
        dense, moe_layers = config.num_dense_layers, config.num_moe_layers
        d = jax.random.fold_in(key, 0)
        # Maps, not vmaps: the same bits, layer by layer, from a program that compiles in less time.
        self.dense_blocks = (
            jax.lax.map(lambda k: DenseBlock(k, config), jax.random.split(d, dense))
            if dense
            else None
        )
        self.blocks = (
            jax.lax.map(lambda k: Block(k, config), jax.random.split(b, moe_layers))
            if moe_layers
            else None
        )
        self.final_norm_D = parameter.ones(("embed",), (width,))
        self.final_norm_bias_D = _norm_bias(config)
        self.output_DV = (
            None
            if config.tied_output
            else parameter.normal(u, ("embed", "vocab"), (width, vocabulary), width)
        )
        self.output_bias_V = (
            parameter.zeros(("vocab",), (vocabulary,)) if config.output_bias else None
        )


LayerCache = attention.LayerCache | latent.LatentCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedCache:
    """The cache of a model with dense layers: one of each stack, so that none is cut or joined."""

    dense: LayerCache | None
    moe: LayerCache | None


Cache = LayerCache | StackedCache


def stacks_of(cache: Cache | None) -> StackedCache:
    """The cache by stacks, whatever the model has."""
    return cache if isinstance(cache, StackedCache) else StackedCache(None, cache)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Attributes:
    logits_BSV: float32.
    cache: of all layers (see README.md, Cache), or None.
    record: `LayerRecord` of all MoE layers, stacked: expert_LBSK, traffic [L, ...], losses [L];
      of a model without any, that of one layer that routes nothing.
    """

    logits_BSV: Leaf
    cache: Cache | None
    record: moe.LayerRecord


Forward = Callable[..., Output]


def build_forward(
    config: ModelConfig,
    mesh: Mesh,
    implementation: str | None = None,
    *,
    attention_batch: str = "batch",
    remat: bool = False,
    pre_activations: str = "recompute",
) -> Forward:
    """Chooses the parts of the model once.

    Args:
      implementation: of the grouped matmul; None = the config's, or by platform.
      attention_batch: logical axis of the batch in attention, "batch" or "replica".
      remat: the backward pass computes each layer again from its input.
      pre_activations: of experts, as in `grouped_matmul`.

    Returns:
      `forward(model, token_BS, table, *, position_BS=None, real_BS=None, cache=None, last_B=None)
      -> Output`; `table` is stacked over layers. Positions default to 0..S-1, all real. With
      `last_B` there are logits of that one index of each sequence only, [B, 1, V].
    """
    layers = layers_lib.Layers(config, mesh, implementation, attention_batch, pre_activations)
    attention_at = attention_in_stack(config, mesh, attention_batch)
    dense_window_L, window_L = windows_of_stacks(config)
    steps = None
    if config.dispatch == "shuffled":
        steps = shuffled.Steps(config, mesh, layers.moe_layer)

    def forward(
        model: Transformer,
        token_BS: Int[Array, "B S"],
        table: Table,
        *,
        position_BS: Int[Array, "B S"] | None = None,
        real_BS: Bool[Array, "B S"] | None = None,
        cache: Cache | None = None,
        last_B: Int[Array, "B"] | None = None,
    ) -> Output:
        if position_BS is None:
            position_BS = jnp.broadcast_to(jnp.arange(token_BS.shape[1])[None], token_BS.shape)
        if real_BS is None:
            real_BS = jnp.ones(token_BS.shape, bool)
        turn_BS = rule_position(position_BS)
        position_BS = of_texts(config, position_BS, real_BS)
        attend_in = attention_at(position_BS)

        def layer(carry, inputs):
            (x_BSD, whole), (block, number, table_of_layer, window) = carry, inputs
            x_BSD, kept, record = layers.moe(
                *(x_BSD, block, attend_in(whole, number, window), turn_BS, real_BS),
                table_of_layer,
                None if whole is None else experts_of(number),
            )
            return (x_BSD, kept and kept.whole), record

        again = functools.partial(jax.checkpoint, prevent_cse=False) if remat else lambda f: f
        x_BSD, embedding_VD = layers.embed(model, token_BS)
        of_stacks = stacks_of(cache)
        of_dense, of_moe = of_stacks.dense, of_stacks.moe
        if model.dense_blocks is not None:
            x_BSD, of_dense = through_dense(
                *(layers, attend_in, model.dense_blocks, dense_window_L, x_BSD, of_dense), again
            )
        if model.blocks is None:
            record = idle_record(config, token_BS.shape, table, mesh)
        elif steps is not None:
            of_layers = (model.blocks, table, of_moe, window_L)
            x_BSD, of_moe, record = shuffled.layers(
                *(steps, of_layers, x_BSD, position_BS, turn_BS, real_BS), again
            )
        else:
            experts_of = layers.experts_in_place(model.blocks)
            number_L = jnp.arange(config.num_moe_layers, dtype=jnp.int32)
            inputs = (model.blocks, number_L, table, window_L)
            (x_BSD, of_moe), record = jax.lax.scan(again(layer), (x_BSD, of_moe), inputs)
        cache = of_moe if of_dense is None else StackedCache(of_dense, of_moe)
        if last_B is not None:
            x_BSD = jnp.take_along_axis(x_BSD, last_B[:, None, None], axis=1)
        return Output(layers.logits(model, x_BSD, embedding_VD), cache, record)

    return forward


def of_texts(config: ModelConfig, position_BS: jax.Array, real_BS: jax.Array) -> jax.Array:
    """Positions as attention takes them: LongRoPE goes by the length of a text, which padding is
    no part of."""
    return jnp.where(real_BS, position_BS, 0) if config.rope.long_factor else position_BS


# (cache of a stack or None, number of a layer in it, its window) -> its attention
AttendIn = Callable[[Any, jax.Array, jax.Array | None], layers_lib.Attend]


def attention_in_stack(
    config: ModelConfig, mesh: Mesh, attention_batch: str
) -> Callable[[jax.Array], AttendIn]:
    """The attention of layers that are a stack, by the positions [B, S] of the tokens at hand."""
    setting: Any = attention.setting_of(config)
    attend: Any = attention.attend
    if config.latent.kv_rank:
        setting, attend = latent.setting_of(config), latent.attend
    write = cache_lib.writer(mesh, attention_batch)

    def at(position_BS):
        def attend_in(whole, number, window):
            in_stack = None if whole is None else cache_lib.InStack(whole, number, write)
            return lambda normed_BSD, weights: attend(
                normed_BSD, weights, position_BS, setting, in_stack, window
            )

        return attend_in

    return at


def windows_of_stacks(config: ModelConfig) -> tuple[np.ndarray | None, np.ndarray | None]:
    """int32 windows of the dense layers and of those with experts, as of `attention.windows`."""
    window_L = attention.windows(config)
    if window_L is None:
        return None, None
    return window_L[: config.num_dense_layers], window_L[config.num_dense_layers :]


def through_dense(
    layers: layers_lib.DenseLayers,
    attend_in: AttendIn,
    blocks: DenseBlock,
    window_L: np.ndarray | None,
    x_BSD: Float[Array, "B S D"],
    cache: LayerCache | None,
    again: Callable[[Any], Any] = lambda layer: layer,
) -> tuple[jax.Array, LayerCache | None]:
    """All layers without experts, by one `lax.scan`: rows, and the cache of their stack.

    Args:
      again: put around a layer: `jax.checkpoint`, or nothing.
    """

    def layer(carry, inputs):
        (x_BSD, whole), (block, number, window) = carry, inputs
        x_BSD, kept = layers.dense(x_BSD, block, attend_in(whole, number, window))
        return (x_BSD, kept and kept.whole), None

    number_L = jnp.arange(len(blocks.mlp_norm_D[...]), dtype=jnp.int32)
    carry, _ = jax.lax.scan(again(layer), (x_BSD, cache), (blocks, number_L, window_L))
    return carry


def idle_record(
    config: ModelConfig, shape: tuple[int, ...], table: Table, mesh: Mesh
) -> moe.LayerRecord:
    """What a model without MoE layers reports of tokens [B, S] in the place of their records."""
    num_slots = table.logical_to_physical_ER.shape[1]
    devices = mesh_lib.size(mesh, mesh_lib.EXPERT)
    return moe.idle_record((*shape, config.top_k), num_slots, devices)


def abstract_cache(
    config: ModelConfig, batch: int, capacity: int, mesh: Mesh, attention_batch: str = "batch"
) -> Cache:
    """For `capacity` positions of `batch` sequences in all layers; see README.md, Cache.

    Shapes, dtypes and shardings: `cache.empty` makes the arrays.

    Split over the batch as attention is (see `build_forward`) and over key/value heads; rows of
    latent attention over the batch alone. Where attention is split by heads (layers with experts in
    `shuffled`), see `shuffled.abstract_cache`.
    """

    def plain(num_layers: int) -> LayerCache:
        return _empty_layers(config, num_layers, (batch, capacity), mesh, attention_batch)

    def of_moe(num_layers: int) -> Any:
        if config.dispatch == "shuffled":
            return shuffled.abstract_cache(config, num_layers, batch, capacity, mesh)
        return plain(num_layers)

    if config.num_dense_layers:
        with_experts = of_moe(config.num_moe_layers) if config.num_moe_layers else None
        return StackedCache(plain(config.num_dense_layers), with_experts)
    return of_moe(config.num_layers)


def _empty_layers(
    config: ModelConfig, num_layers: int, size: tuple[int, int], mesh: Mesh, attention_batch: str
) -> LayerCache:
    shape: tuple[int, ...]
    dtype = jnp.dtype(config.dtype)
    if config.latent.kv_rank:
        shape = (num_layers, *size, config.latent.kv_rank + config.latent.d_rope)
        placed = mesh_lib.sharding(mesh, None, attention_batch, None, None)
        return latent.LatentCache(jax.ShapeDtypeStruct(shape, dtype, sharding=placed))
    placed = mesh_lib.sharding(mesh, None, attention_batch, None, "head", None)
    shape = (num_layers, *size, config.num_kv_heads, config.d_head)
    array = jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    return attention.LayerCache(array, array)


def identity_table(num_layers: int, num_experts: int) -> Table:
    """Physical = logical in every layer: the table of a model that was never placed."""
    slot_LE1 = np.broadcast_to(np.arange(num_experts, dtype=np.int32), (num_layers, num_experts))
    return Table(slot_LE1[:, :, None].copy(), np.ones((num_layers, num_experts), np.int32))


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Forward and backward FLOPs a token: 6 per active matmul weight, 6 S H Q for attention."""
    width, heads, ranks = config.d_model, config.num_heads, config.latent
    weights = 2 * width * (heads + config.num_kv_heads) * config.d_head
    d_query = d_value = config.d_head
    if ranks.kv_rank:
        d_query, d_value = config.d_head + ranks.d_rope, ranks.d_value
        weights = width * (ranks.kv_rank + ranks.d_rope + heads * d_value)
        weights += ranks.kv_rank * heads * (config.d_head + d_value)
        weights += width * ranks.query_rank + (ranks.query_rank or width) * heads * d_query
    # of all pairs half, as attention is causal: 6 S H times the mean of both widths
    of_attention = 6 * weights + 3 * seq_len * heads * (d_query + d_value)
    expert_weights = 3 * width * (config.d_ff * config.top_k + config.d_ff_shared)
    of_experts = 6 * (expert_weights + width * config.num_experts)
    of_dense = 6 * 3 * width * config.d_ff_dense
    return (
        config.num_layers * of_attention
        + config.num_moe_layers * of_experts
        + config.num_dense_layers * of_dense
        + 6 * width * config.vocab_size
    )


def num_active_parameters(config: ModelConfig) -> int:
    """Those that one token meets: all but the experts that it is not routed to."""
    idle = config.num_moe_layers * (config.num_experts - config.top_k)
    of_expert = 3 * config.d_model * config.d_ff
    if config.expert_bias:
        of_expert += 2 * config.d_ff + config.d_model
    return num_parameters(config) - idle * of_expert


def num_parameters(config: ModelConfig) -> int:
    """All parameters of the model."""
    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))
