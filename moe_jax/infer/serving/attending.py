"""Attention of a step's tokens over the cache in blocks: grouped-query, or latent and absorbed.

The model's own functions project; what they make is written to the blocks, and read there by
paged.py. Latent attention is absorbed always: a chunk of a prompt then has the bits of tokens that
ran alone.

Axes: as in program.py and paged.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.infer.serving import paged
from moe_jax.infer.serving.packing import Layout
from moe_jax.model import attention, latent, parameter

_BATCH = mesh_lib.spec("batch")
_HEADS = mesh_lib.spec("batch", "head", None)
LEAST_TURNED = 4  # rows that keep their bits among others against a turned matrix


def build(config: ModelConfig, mesh: Mesh, layout: Layout) -> Callable[..., Any]:
    """`attend(normed_T1D, weights, where, pages, layer, fields, window) -> (mixed_T1D, pages)`.

    `where` are positions [T, 1], and the last ones of their texts or None (see `rope.rotate`).
    """
    is_latent = config.latent.kv_rank > 0
    setting: Any = latent.setting_of(config) if is_latent else attention.setting_of(config)
    whole = mesh_lib.size(mesh, mesh_lib.TENSOR) == 1 or config.qk_norm != "all"
    if not is_latent and whole and mesh.devices.flat[0].platform == "cpu":
        setting = dataclasses.replace(setting, folds=True)
    divisor = setting.divisor or math.sqrt(config.d_head)
    own = _BATCH if is_latent else _HEADS  # one row for all heads, or keys and values of each
    in_place, shards = paged.spec(config), mesh_lib.size(mesh, mesh_lib.BATCH)
    on_shard = jax.shard_map(
        functools.partial(_on_shard, layout=layout, divisor=divisor),
        mesh=mesh,
        in_specs=(
            *(_HEADS, own, own, in_place, PartitionSpec(), _BATCH),
            *(PartitionSpec(), mesh_lib.spec("head")),
        ),
        out_specs=(_HEADS, in_place),
    )

    def grouped(normed_T1D, weights, where, pages, layer, fields, window):
        at_T1, reached_T1 = where
        num_rows = normed_T1D.shape[0]
        if all(map(parameter.is_turned, attention.matrices(weights))):  # few rows keep their bits
            few = max(LEAST_TURNED, layout.num_tokens)
            normed_T1D, at_T1 = first_rows(normed_T1D, few), first_rows(at_T1, few)
            reached_T1 = None if reached_T1 is None else first_rows(reached_T1, few)
        heads = attention.project(normed_T1D, weights, at_T1, setting, reached_T1)
        sink_H = None if weights.sink_H is None else weights.sink_H[...]
        query_THQ, key_TGQ, value_TGQ = (rows_T1HQ[:, 0] for rows_T1HQ in heads)
        mixed_THQ, pages = on_shard(
            query_THQ, key_TGQ, value_TGQ, pages, layer, fields, window, sink_H
        )
        return filled_up(attention.project_out(mixed_THQ[:, None], weights), num_rows), pages

    def first_rows(value_T, few):
        """Of each shard."""
        by_shard = value_T.reshape(shards, -1, *value_T.shape[1:])
        return by_shard[:, :few].reshape(-1, *value_T.shape[1:])

    def filled_up(y_T1D, num_rows):
        by_shard = y_T1D.reshape(shards, -1, *y_T1D.shape[1:])
        missing = num_rows // shards - by_shard.shape[1]
        return jnp.pad(by_shard, ((0, 0), (0, missing), (0, 0), (0, 0))).reshape(
            num_rows, *y_T1D.shape[1:]
        )

    def absorbed(normed_T1D, weights, where, pages, layer, fields, window):
        at_T1, reached_T1 = where
        query_T1HX = latent.queries(normed_T1D, weights, at_T1, setting, reached_T1)
        query_THZ = latent.absorbed(query_T1HX, weights, setting)[:, 0]
        row_T1Z = latent.rows(normed_T1D, weights, at_T1, setting, reached_T1)
        found_THZ, pages = on_shard(query_THZ, row_T1Z, None, pages, layer, fields, window, None)
        found_T1HR = found_THZ[:, None, :, : config.latent.kv_rank]
        mixed_T1HW = latent.values(found_T1HR, weights, setting)
        return latent.project_out(mixed_T1HW, weights), pages

    return absorbed if is_latent else grouped


def _on_shard(
    query_THQ: jax.Array,
    key_TGQ: jax.Array,
    value_TGQ: jax.Array | None,
    pages: paged.Pages,
    layer: jax.Array,
    fields: dict[str, jax.Array],
    window: jax.Array | None,
    sink_H: jax.Array | None,
    *,
    layout: Layout,
    divisor: float,
) -> tuple[jax.Array, paged.Pages]:
    """Writes this shard's keys and values, then lets every token attend to its own text."""
    limits, count = layout.limits, layout.num_tokens
    position_F, table_RW, row_P = (fields[name][0] for name in ("position", "table", "row"))
    row_R = jnp.arange(layout.rows, dtype=jnp.int32)
    row_F = jnp.concatenate([row_R, jnp.repeat(row_P, limits.chunk)])
    at_F = jnp.maximum(position_F, 0)
    block_F = table_RW[row_F, at_F // limits.block_size]
    nowhere = pages.key_LNGCQ.shape[1]
    block_F = jnp.where(position_F >= 0, block_F, nowhere)
    new = (key_TGQ[:count], None if value_TGQ is None else value_TGQ[:count])
    pages = paged.write(pages, layer, *new, block_F, at_F % limits.block_size)

    def mixed(rows: slice, per_row: int, table_AW: jax.Array) -> jax.Array:
        query_AJHQ = query_THQ[rows].reshape(-1, per_row, *query_THQ.shape[1:])
        position_AJ = position_F[rows].reshape(-1, per_row)
        mixed_AJHQ = paged.mix(
            query_AJHQ, position_AJ, pages, layer, table_AW, divisor, window, sink_H
        )
        return mixed_AJHQ.reshape(-1, *query_THQ.shape[1:])

    mixed_THQ = mixed(slice(0, layout.rows), 1, table_RW)
    if layout.chunk_rows:
        of_chunks = mixed(slice(layout.rows, count), limits.chunk, table_RW[row_P])
        mixed_THQ = jnp.concatenate([mixed_THQ, of_chunks])
    missing = ((0, query_THQ.shape[0] - count), (0, 0), (0, 0))
    return jnp.pad(mixed_THQ, missing), pages
