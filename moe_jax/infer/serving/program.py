"""One step of the engine as a program: tokens of many requests through the model, next tokens out.

All tokens of a step are rows of one [T, 1, D] array, split over the shards; padding is routed
nowhere and written nowhere. Everything but attention is a function of a row; on CPU a row keeps its
bits among 64 rows or more (kernels/README.md), so a shard has at least so many.

Two shapes are compiled, with chunks of prompts and without.

Axes: T tokens of all shards (of one shard inside `shard_map`), F those that packing.py names, R
seats, P chunk rows, A rows of attention, J tokens in one, and those of paged.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.infer.serving import paged, rows
from moe_jax.infer.serving.packing import FLOATS, Layout
from moe_jax.model import attention, moe, parameter, router, transformer
from moe_jax.model.dispatch.table import Table, rule_position
from moe_jax.pytree import Leaf

_LEAST_ROWS = {"cpu": 64}  # on a shard; elsewhere as many as the hardware's tiles
_BATCH = mesh_lib.spec("batch")
_HEADS = mesh_lib.spec("batch", "head", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counters:
    """Added up over steps since they were last read; int32, see `Traffic`."""

    dispatch_LMM: Leaf
    combine_LMM: Leaf
    computed_LP: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step uses up and gives back, on the devices.

    Attributes:
      pages: keys and values.
      counters: rows moved and computed.
      recorded_XLK: experts of recorded tokens, uint8 or uint16, X places on all shards; or None.
    """

    pages: paged.Pages
    counters: Counters
    recorded_XLK: Leaf | None


Program = Callable[..., tuple[State, jax.Array, jax.Array]]


def build(config: ModelConfig, mesh: Mesh, layout: Layout) -> Program:
    """`step(model, table, state, packed) -> (state, out, logits_RV)`.

    `out` is int32 [shards R, OUT_WORDS], see packing.py; `logits_RV` float32 of the same rows.
    """
    moe_layer = moe.build(
        mesh,
        dispatch=config.dispatch,
        combine=config.combine,
        overlap_degree=config.overlap_degree,
        wire_dtype=config.wire_dtype,
        scheme=router.scheme_of(config),
        activation=config.activation,
    )
    limits = layout.limits
    least = _LEAST_ROWS.get(mesh.devices.flat[0].platform, 8)
    num_rows = max(least, layout.num_tokens)
    eps, dtype = config.norm_eps, jnp.dtype(config.dtype)
    setting, window_L = attention.setting_of(config), attention.windows(config)
    split = mesh_lib.sharding(mesh, "batch", None, None)
    place = functools.partial(jax.lax.with_sharding_constraint, shardings=split)
    whole = functools.partial(parameter.gathered, mesh=mesh)
    on_shards = functools.partial(jax.shard_map, mesh=mesh)
    attend = on_shards(
        functools.partial(_attend, layout=layout, per_row=paged.tokens_in_row(config)),
        in_specs=(
            *(_HEADS, _HEADS, _HEADS, paged.SPEC, PartitionSpec(), _BATCH),
            *(PartitionSpec(), mesh_lib.spec("head")),
        ),
        out_specs=(_HEADS, paged.SPEC),
    )
    pick = on_shards(
        functools.partial(_pick, num_rows=max(least, limits.seats)),
        in_specs=(_BATCH, _BATCH),
        out_specs=_BATCH,
    )
    sample = on_shards(
        functools.partial(_sample, seats=limits.seats),
        in_specs=(_BATCH, _BATCH),
        out_specs=(_BATCH, _BATCH),
    )
    record = on_shards(_record, in_specs=(_BATCH, mesh_lib.spec(None, "batch"), _BATCH),
                       out_specs=_BATCH)  # fmt: skip

    def rows_of(field_SF: jax.Array, filler: int) -> jax.Array:
        """[T, 1], filled up on every shard."""
        missing = ((0, 0), (0, num_rows - layout.num_tokens))
        return jnp.pad(field_SF, missing, constant_values=filler).reshape(-1, 1)

    def step(model: transformer.Transformer, table: Table, state: State, packed: jax.Array):
        fields = layout.unpack(packed)
        position_T1 = rows_of(fields["position"], -1)
        real_T1 = position_T1 >= 0
        at_T1 = jnp.maximum(position_T1, 0)
        turn_T1 = rule_position(at_T1)

        def layer(carry, inputs):
            x_T1D, pages = carry
            block, table_of_layer, number, window = inputs
            with jax.named_scope("attention"):
                normed_T1D = transformer.rms_norm(x_T1D, whole(block.attention_norm_D)[...], eps)
                weights = whole(block.attention, dtype=dtype)
                heads = attention.project(place(normed_T1D), weights, at_T1, setting)
                sink_H = None if weights.sink_H is None else weights.sink_H[...]
                own = (rows[:, 0] for rows in heads)
                mixed_THQ, pages = attend(*own, pages, number, fields, window, sink_H)
                x_T1D = place(x_T1D + place(attention.project_out(mixed_THQ[:, None], weights)))
            normed_T1D = transformer.rms_norm(x_T1D, whole(block.moe_norm_D)[...], eps)
            y_T1D, record = moe_layer(normed_T1D, block.moe, turn_T1, real_T1, table_of_layer)
            return (x_T1D + y_T1D, pages), record

        embedding_VD = whole(model.embedding_VD, dtype=dtype)[...]
        x_T1D = place(embedding_VD[rows_of(fields["token"], 0)])
        layers = jnp.arange(config.num_layers, dtype=jnp.int32)
        inputs = (model.blocks, table, layers, window_L)
        (x_T1D, pages), records = jax.lax.scan(layer, (x_T1D, state.pages), inputs)
        x_R1D = place(pick(x_T1D, fields["sample"]))
        x_R1D = transformer.rms_norm(x_R1D, whole(model.final_norm_D)[...], eps)
        output_DV = None if model.output_DV is None else whole(model.output_DV, dtype=dtype)[...]
        logits_RV = place(transformer.logits(x_R1D, embedding_VD, output_DV))[:, 0]
        out, logits_RV = sample(logits_RV, fields)
        recorded_XLK = state.recorded_XLK
        if recorded_XLK is not None:
            recorded_XLK = record(recorded_XLK, records.expert_BSK, fields["record"])
        return State(pages, _added(state.counters, records.traffic), recorded_XLK), out, logits_RV

    return step


def _added(counters: Counters, traffic: Any) -> Counters:
    return Counters(
        counters.dispatch_LMM + traffic.dispatch_MM,
        counters.combine_LMM + traffic.combine_MM,
        counters.computed_LP + traffic.computed_P,
    )


def _attend(
    query_THQ: jax.Array,
    key_TGQ: jax.Array,
    value_TGQ: jax.Array,
    pages: paged.Pages,
    layer: jax.Array,
    fields: dict[str, jax.Array],
    window: jax.Array | None,
    sink_H: jax.Array | None,
    *,
    layout: Layout,
    per_row: int,
) -> tuple[jax.Array, paged.Pages]:
    """Writes this shard's keys and values, then lets every token attend to its own text."""
    limits, count = layout.limits, layout.num_tokens
    position_F, table_RW, seat_P = (fields[name][0] for name in ("position", "table", "seat"))
    seat_R = jnp.arange(limits.seats, dtype=jnp.int32)
    seat_F = jnp.concatenate([seat_R, jnp.repeat(seat_P, limits.chunk)])
    at_F = jnp.maximum(position_F, 0)
    block_F = table_RW[seat_F, at_F // limits.block_size]
    nowhere = pages.key_LNGCQ.shape[1]
    block_F = jnp.where(position_F >= 0, block_F, nowhere)
    new = (key_TGQ[:count], value_TGQ[:count])
    pages = paged.write(pages, layer, *new, block_F, at_F % limits.block_size)

    alone, chunks = query_THQ[: limits.seats], query_THQ[limits.seats : count]
    rest = ((0, 0), (0, per_row - 1))
    query_AJHQ = jnp.pad(alone[:, None], (*rest, (0, 0), (0, 0)))
    position_AJ = jnp.pad(position_F[: limits.seats, None], rest, constant_values=-1)
    table_AW = table_RW
    if layout.chunk_rows:
        query_AJHQ = jnp.concatenate([query_AJHQ, chunks.reshape(-1, per_row, *chunks.shape[1:])])
        chunk_AJ = position_F[limits.seats :].reshape(-1, per_row)
        position_AJ = jnp.concatenate([position_AJ, chunk_AJ])
        rows_of_chunk = limits.chunk // per_row
        table_AW = jnp.concatenate([table_RW, table_RW[jnp.repeat(seat_P, rows_of_chunk)]])
    mixed_AJHQ = paged.mix(query_AJHQ, position_AJ, pages, layer, table_AW, window, sink_H)
    mixed_THQ = mixed_AJHQ[: limits.seats, 0]
    if layout.chunk_rows:
        of_chunks = mixed_AJHQ[limits.seats :].reshape(-1, *query_THQ.shape[1:])
        mixed_THQ = jnp.concatenate([mixed_THQ, of_chunks])
    missing = ((0, query_THQ.shape[0] - count), (0, 0), (0, 0))
    return jnp.pad(mixed_THQ, missing), pages


def _pick(x_T1D: jax.Array, sample_1R: jax.Array, *, num_rows: int) -> jax.Array:
    """The rows whose logits are wanted, filled up."""
    index_R = jnp.maximum(sample_1R[0], 0)
    return x_T1D[jnp.pad(index_R, (0, num_rows - index_R.shape[0]))]


def _sample(
    logits_XV: jax.Array, fields: dict[str, jax.Array], *, seats: int
) -> tuple[jax.Array, jax.Array]:
    names = ("temperature", "top_p", "top_k", "seed", "choice", "draw", "logprobs")
    own = {name: fields[name][0] for name in names}
    for name in FLOATS:
        own[name] = jax.lax.bitcast_convert_type(own[name], jnp.float32)
    settings = rows.Settings(**{f"{name}_R": own[name] for name in names})
    logits_RV = logits_XV[:seats]
    return rows.report(logits_RV, rows.choose(logits_RV, settings), settings), logits_RV


def _record(recorded_XLK: jax.Array, expert_LT1K: jax.Array, record_1F: jax.Array) -> jax.Array:
    """The recorder's buffer with this step's tokens, where they have a place."""
    place_F = record_1F[0]
    expert_FLK = expert_LT1K[:, : place_F.shape[0], 0].swapaxes(0, 1).astype(recorded_XLK.dtype)
    place_F = jnp.where(place_F < 0, recorded_XLK.shape[0], place_F)
    return recorded_XLK.at[place_F].set(expert_FLK, mode="drop")
