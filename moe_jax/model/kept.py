"""Attention in parts, as coherent dispatch takes it: what a token keeps travels, as one row.

Two kinds with the same methods: keys and values of grouped-query attention, side by side, and the
rows of latent attention. Latent rows are attended to as they are, in prefill too: keys and values
of a sequence would be expanded again on each device that has some of its tokens.

Where heads are split over `tensor`, a device has its part of them: keys and values are split, too,
latent rows are not.

Axes: B sequences, S tokens at hand, C cached positions, D d_model, H query heads, G key/value
heads, Q d_head, X values of a query, Z values of a row. Of heads that are split those here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.model import attention, latent, parameter
from moe_jax.model.attention import LayerCache
from moe_jax.model.latent import LatentCache


class GroupedQuery:
    """Keys and values.

    Attributes:
      cache_spec: how arrays [L, B, C, ...] of all layers are split.
      query_shape: of one token's query.
      width: Z.
    """

    cache_spec = PartitionSpec(None, mesh_lib.REPLICAS, None, mesh_lib.TENSOR)

    def __init__(self, config: ModelConfig, parts: int = 1):
        """`parts`: that heads are in, of which one is here."""
        self._setting = attention.setting_of(config)
        self._heads = config.num_kv_heads // parts, config.d_head
        self.query_shape = (config.num_heads // parts, config.d_head)
        self.width = config.kv_values // parts

    def cache_shapes(self, size: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
        """Of arrays [B, C, ...] of one layer."""
        shape = (*size, *self._heads)
        return shape, shape

    def cache(self, *arrays: Any) -> LayerCache:
        """Of arrays in the order of `cache_shapes`."""
        return LayerCache(*arrays)

    def project(self, x_BSD, weights, position_BS, reached_BS) -> tuple[jax.Array, jax.Array]:
        """Queries [B, S, H, Q] and rows [B, S, Z]; arguments as of `attention.project`."""
        query_BSHQ, *key_value = attention.project(
            x_BSD, weights, position_BS, self._setting, reached_BS
        )
        flat = [part.reshape(*part.shape[:2], -1) for part in key_value]
        return query_BSHQ, jnp.concatenate(flat, axis=-1)

    def arrays(self, row_BSZ: jax.Array) -> tuple[jax.Array, ...]:
        """Rows as the cache holds them."""
        parts = jnp.split(row_BSZ, 2, axis=-1)
        return tuple(part.reshape(*row_BSZ.shape[:2], *self._heads) for part in parts)

    def attend(self, query_BSHQ, kept: LayerCache, weights, seen_BSC) -> jax.Array:
        """What the heads here add to each token, [B, S, D]."""
        params = parameter.present(weights, attention.Heads)
        heads = attention.Heads(**{name: param[...] for name, param in params.items()})
        if heads.output_bias_D is not None:
            once_D = mesh_lib.added_once(heads.output_bias_D, mesh_lib.TENSOR)
            heads = dataclasses.replace(heads, output_bias_D=once_D)
        mixed_BSHQ = attention.mix(
            *(query_BSHQ, kept.key_BCGQ, kept.value_BCGQ, seen_BSC),
            *(heads.sink_H, self._setting.divisor),
        )
        return attention.project_out(mixed_BSHQ, heads)


class Latent:
    """Rows of latent attention; attributes and methods as of `GroupedQuery`."""

    cache_spec = PartitionSpec(None, mesh_lib.REPLICAS)

    def __init__(self, config: ModelConfig, parts: int = 1):
        self._setting = latent.setting_of(config)
        self.query_shape = (config.num_heads // parts, config.d_head + config.latent.d_rope)
        self.width = config.kv_values

    def cache_shapes(self, size: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
        return ((*size, self.width),)

    def cache(self, *arrays: Any) -> LatentCache:
        return LatentCache(*arrays)

    def project(self, x_BSD, weights, position_BS, reached_BS) -> tuple[jax.Array, jax.Array]:
        turned = (position_BS, self._setting, reached_BS)
        return latent.queries(x_BSD, weights, *turned), latent.rows(x_BSD, weights, *turned)

    def arrays(self, row_BSZ: jax.Array) -> tuple[jax.Array, ...]:
        return (row_BSZ,)

    def attend(self, query_BSHX, kept: LatentCache, weights, seen_BSC) -> jax.Array:
        setting = self._setting
        mixed_BSHW = latent.mix_absorbed(query_BSHX, kept.row_BCZ, weights, setting, seen_BSC)
        return latent.project_out(mixed_BSHW, weights)


def of_config(config: ModelConfig, parts: int = 1) -> GroupedQuery | Latent:
    """The kind that a model has; of `parts` of its heads one."""
    return (Latent if config.latent.kv_rank else GroupedQuery)(config, parts)
