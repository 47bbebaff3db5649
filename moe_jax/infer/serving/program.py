"""One step of the engine as a program: tokens of many requests through the model, next tokens out.

All tokens of a step are rows of one [T, 1, D] array, split over the shards; padding is routed
nowhere and written nowhere. Everything but attention is a function of a row; on CPU a row keeps its
bits among 64 rows or more (kernels/README.md), so a shard has at least so many.

A few shapes are compiled (`packing.layouts`); a step runs in the first that it fits in.

Axes: T tokens of all shards (of one shard inside `shard_map`), F those that packing.py names, R
rows, P chunks, A rows of attention, J tokens in one, and those of paged.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.infer.prepared import NARROW
from moe_jax.infer.serving import attending, paged, rows
from moe_jax.infer.serving.packing import FLOATS, Layout
from moe_jax.model import layers as layers_lib
from moe_jax.model import parameter, short, transformer
from moe_jax.model.dispatch.table import Table, rule_position
from moe_jax.pytree import Leaf

# On a shard of a CPU, where fewer keep their bits against a turned matrix alone; and elsewhere, as
# many as the hardware's tiles.
_LEAST_ROWS, _LEAST_ELSEWHERE = 64, 8
_BATCH = mesh_lib.spec("batch")


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
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    least, normed = (_LEAST_ROWS, short.rows) if on_cpu else (_LEAST_ELSEWHERE, lambda width: 0)
    latent = config.latent
    widths = [width for width in (config.d_model, latent.kv_rank, latent.query_rank) if width]
    num_rows = max(least, layout.num_tokens, *map(normed, widths))
    dense_window_L, moe_window_L = transformer.windows_of_stacks(config)
    split = mesh_lib.sharding(mesh, "batch", None, None)
    place = functools.partial(jax.lax.with_sharding_constraint, shardings=split)
    layers = layers_lib.Layers(config, mesh)
    on_shards = functools.partial(jax.shard_map, mesh=mesh)
    attend = attending.build(config, mesh, layout)

    def pick(num_rows: int):
        picked = functools.partial(_pick, num_rows=max(num_rows, layout.rows))
        return on_shards(picked, in_specs=(_BATCH, _BATCH), out_specs=_BATCH)

    sample = on_shards(
        functools.partial(_sample, num_rows=layout.rows),
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
        reached_T1 = None
        if (long_from := layout.limits.long_from) is not None:
            reached_T1 = jnp.where(rows_of(fields["long"], 0) > 0, long_from, 0)

        def attend_over(pages, number, window):
            return lambda normed_T1D, weights: attend(
                normed_T1D, weights, (at_T1, reached_T1), pages, number, fields, window
            )

        def dense_layer(carry, inputs):
            (x_T1D, pages), (block, number, window) = carry, inputs
            return layers.dense(x_T1D, block, attend_over(pages, number, window)), None

        def layer(carry, inputs):
            (x_T1D, pages), (block, table_of_layer, number, window) = carry, inputs
            attend = attend_over(pages, number, window)
            x_T1D, pages, record = layers.moe(
                *(x_T1D, block, attend, turn_T1, real_T1, table_of_layer),
                of_layer(number - config.num_dense_layers),
            )
            return (x_T1D, pages), record

        x_T1D, embedding_VD = layers.embed(model, rows_of(fields["token"], 0))
        carry, dense = (x_T1D, state.pages), config.num_dense_layers
        number_L = jnp.arange(config.num_layers, dtype=jnp.int32)
        if model.dense_blocks is not None:
            of_dense = (model.dense_blocks, number_L[:dense], dense_window_L)
            carry, _ = jax.lax.scan(dense_layer, carry, of_dense)
        if model.blocks is None:
            records = transformer.idle_record(config, real_T1.shape, table, mesh)
        else:
            of_layer = layers.experts_in_place(model.blocks)
            inputs = (model.blocks, table, number_L[dense:], moe_window_L)
            carry, records = jax.lax.scan(layer, carry, inputs)
        x_T1D, pages = carry
        wide = min(embedding_VD.shape) >= NARROW
        # an embedding that makes the logits lies as a turned matrix does
        few = wide if model.output_DV is None else parameter.is_turned(model.output_DV)
        enough = min(least, attending.LEAST_TURNED if few else least)
        enough = max(enough, normed(config.d_model))
        x_R1D = place(pick(enough)(x_T1D, fields["sample"]))
        logits_RV = place(layers.logits(model, x_R1D, embedding_VD))[:, 0]
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


def _pick(x_T1D: jax.Array, sample_1R: jax.Array, *, num_rows: int) -> jax.Array:
    """The rows whose logits are wanted, filled up."""
    index_R = jnp.maximum(sample_1R[0], 0)
    return x_T1D[jnp.pad(index_R, (0, num_rows - index_R.shape[0]))]


def _sample(
    logits_XV: jax.Array, fields: dict[str, jax.Array], *, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    names = ("temperature", "top_p", "top_k", "seed", "choice", "draw", "logprobs")
    own = {name: fields[name][0] for name in names}
    for name in FLOATS:
        own[name] = jax.lax.bitcast_convert_type(own[name], jnp.float32)
    settings = rows.Settings(**{f"{name}_R": own[name] for name in names})
    logits_RV = logits_XV[:num_rows]
    return rows.report(logits_RV, rows.choose(logits_RV, settings), settings), logits_RV


def _record(recorded_XLK: jax.Array, expert_LT1K: jax.Array, record_1F: jax.Array) -> jax.Array:
    """The recorder's buffer with this step's tokens, where they have a place."""
    place_F = record_1F[0]
    expert_FLK = expert_LT1K[:, : place_F.shape[0], 0].swapaxes(0, 1).astype(recorded_XLK.dtype)
    place_F = jnp.where(place_F < 0, recorded_XLK.shape[0], place_F)
    return recorded_XLK.at[place_F].set(expert_FLK, mode="drop")
