"""Norms, embedding, residuals and logits: what every forward pass does around its attention.

A part that a model does not have is a parameter that is None, or a number that changes nothing.

Axes: B batch, S tokens at hand, T = B S, D d_model, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.model import moe, parameter, router, shared
from moe_jax.model.dispatch.table import Table


def rms_norm(x_BSD: Float[Array, "B S D"], scale_D: Float[Array, "D"], eps: float):
    """x / rms(x) * scale, computed in float32 (arXiv 1910.07467)."""
    x32_BSD = x_BSD.astype(jnp.float32)
    inverse_BS1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BSD), axis=-1, keepdims=True) + eps)
    return (x32_BSD * inverse_BS1 * scale_D[None, None]).astype(x_BSD.dtype)


def layer_norm(
    x_BSD: Float[Array, "B S D"],
    scale_D: Float[Array, "D"],
    bias_D: Float[Array, "D"],
    eps: float,
):
    """(x - mean) / deviation * scale + bias, computed in float32 (arXiv 1607.06450)."""
    x32_BSD = x_BSD.astype(jnp.float32)
    x32_BSD = x32_BSD - jnp.mean(x32_BSD, axis=-1, keepdims=True)
    inverse_BS1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BSD), axis=-1, keepdims=True) + eps)
    y_BSD = x32_BSD * inverse_BS1 * scale_D[None, None] + bias_D[None, None]
    return y_BSD.astype(x_BSD.dtype)


def norm(x_BSD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, eps: float) -> jax.Array:
    """The norm that a model has: a layer norm where there is a bias, else an RMS norm."""
    if bias_D is None:
        return rms_norm(x_BSD, scale_D, eps)
    return layer_norm(x_BSD, scale_D, bias_D, eps)


def times(scale: float, x_BSD: jax.Array) -> jax.Array:
    """A multiplier of the model; 1 is no operation."""
    return x_BSD if scale == 1 else scale * x_BSD


def logits(
    x_BSD: Float[Array, "B S D"],
    embedding_VD: jax.Array,
    output_DV: jax.Array | None,
    bias_V: jax.Array | None = None,
    divisor: float = 1.0,
):
    """float32 [B, S, V] of normed rows, by the output projection or, where it is None, the
    embedding."""
    if output_DV is None:
        logits_BSV = jnp.einsum("bsd,vd->bsv", x_BSD, embedding_VD)
    else:
        logits_BSV = jnp.einsum("bsd,dv->bsv", x_BSD, output_DV)
    logits_BSV = logits_BSV.astype(jnp.float32)
    if bias_V is not None:
        logits_BSV += bias_V[None, None]
    return logits_BSV if divisor == 1 else logits_BSV / divisor


# (normed rows, attention weights as they are computed with) -> (what attention adds, what it keeps)
Attend = Callable[[jax.Array, Any], tuple[jax.Array, Any]]
# number of a layer -> its experts where they lie in the stack of all; None: as the block has them
InPlace = Callable[[jax.Array], moe.Experts | None]


class DenseLayers:
    """Embedding, layers without experts and logits, for every forward pass; chosen once.

    Args:
      attention_batch: logical axis of the batch in attention, "batch" or "replica".
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, attention_batch: str = "batch"):
        self._mesh, self._config, self._dtype = mesh, config, jnp.dtype(config.dtype)
        self._split = mesh_lib.sharding(mesh, "batch", None, None)
        self._attention_split = mesh_lib.sharding(mesh, attention_batch, None, None)
        self._whole = functools.partial(parameter.gathered, mesh=mesh)

    def embed(self, model: Any, token_BS: Int[Array, "B S"]) -> tuple[jax.Array, jax.Array]:
        """Rows of the embedding, [B, S, D], and the embedding as it is computed with, [V, D]."""
        embedding_VD = self._whole(model.embedding_VD, dtype=self._dtype)[...]
        x_BSD = self._place(times(self._config.embedding_scale, embedding_VD[token_BS]))
        return x_BSD, embedding_VD

    def dense(self, x_BSD: jax.Array, block: Any, attend: Attend) -> tuple[jax.Array, Any]:
        """A layer without experts: (rows, what attention keeps)."""
        x_BSD, kept = self._attended(x_BSD, block, attend)
        with jax.named_scope("dense"):
            normed_TD = self._normed(x_BSD, block.mlp_norm_D).reshape(-1, x_BSD.shape[-1])
            y_TD = shared.compute(normed_TD, self._whole(block.mlp, dtype=self._dtype))
        return self._place(self._added(x_BSD, y_TD.reshape(x_BSD.shape))), kept

    def logits(self, model: Any, x_BSD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
        """float32 [B, S, V] of rows that are not normed yet."""
        x_BSD = self._normed(x_BSD, model.final_norm_D, model.final_norm_bias_D)
        output_DV = parameter.value(self._whole(model.output_DV, dtype=self._dtype))
        if parameter.is_turned(model.output_DV):  # as an embedding lies
            embedding_VD, output_DV = output_DV, None
        bias_V = None
        if model.output_bias_V is not None:
            bias_V = self._whole(model.output_bias_V)[...]
        return logits(x_BSD, embedding_VD, output_DV, bias_V, self._config.logits_divisor)

    def _attended(
        self, x_BSD: jax.Array, block: Any, attend: Attend, bias_D: Any = None
    ) -> tuple[jax.Array, Any]:
        with jax.named_scope("attention"):
            normed_BSD = self._normed(x_BSD, block.attention_norm_D, bias_D)
            normed_BSD = jax.lax.with_sharding_constraint(normed_BSD, self._attention_split)
            mixed_BSD, kept = attend(normed_BSD, self._whole(block.attention, dtype=self._dtype))
        return self._place(self._added(x_BSD, self._place(mixed_BSD))), kept

    def _normed(self, x_BSD: jax.Array, scale_D: Any, bias_D: Any = None) -> jax.Array:
        whole_bias_D = None if bias_D is None else self._whole(bias_D)[...]
        return norm(x_BSD, self._whole(scale_D)[...], whole_bias_D, self._config.norm_eps)

    def _added(self, x_BSD: jax.Array, y_BSD: jax.Array) -> jax.Array:
        return x_BSD + times(self._config.residual_scale, y_BSD)

    def _place(self, x_BSD: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x_BSD, self._split)


class Layers(DenseLayers):
    """With layers that have experts, in every dispatch but the coherent one, which has its own.

    Args:
      implementation: of the grouped matmul; None = the config's, or by platform.
      attention_batch: as of DenseLayers.
      pre_activations: of experts, as in `grouped_matmul`.

    Attributes:
      moe_layer: see moe.py.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        implementation: str | None = None,
        attention_batch: str = "batch",
        pre_activations: str = "recompute",
    ):
        super().__init__(config, mesh, attention_batch)
        self.moe_layer = moe.build(
            mesh,
            dispatch=config.dispatch,
            combine=config.combine,
            capacity_factor=config.capacity_factor,
            overlap_degree=config.overlap_degree,
            wire_dtype=config.wire_dtype,
            scheme=router.scheme_of(config),
            activation=config.activation,
            implementation=implementation or config.kernels or None,
            pre_activations=pre_activations,
        )

    def moe(
        self,
        x_BSD: jax.Array,
        block: Any,
        attend: Attend,
        turn_BS: jax.Array,
        real_BS: jax.Array,
        table: Table,
        experts: Any = None,
    ) -> tuple[jax.Array, Any, moe.LayerRecord]:
        """A layer with experts, by default those of the block (or see `InPlace`).

        Returns:
          (rows, what attention keeps, record)
        """
        x_BSD, kept = self._attended(x_BSD, block, attend, block.attention_norm_bias_D)
        normed_BSD = self._normed(x_BSD, block.moe_norm_D, block.moe_norm_bias_D)
        y_BSD, record = self.moe_layer(normed_BSD, block.moe, turn_BS, real_BS, table, experts)
        return self._added(x_BSD, y_BSD), kept, record

    def experts_in_place(self, blocks: Any) -> InPlace:
        """For loops over layers without gradients."""
        stack = moe.experts_in_place(blocks.moe, self._mesh, self._dtype)
        if stack is None:
            return lambda number: None
        return lambda number: dataclasses.replace(stack, layer=number)
