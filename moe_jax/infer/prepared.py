"""Experts as inference reads them: in the dtype they are computed with, on CPU transposed.

Weights do not change between two steps, so what every step would do to them is done once. Matmuls
of a few rows keep the bits of many only against transposed weights (kernels/README.md), and a
decoding step has a few rows per expert. Placements move experts as before: only the order of an
expert's own dimensions changes, and their names with it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.model import moe, parameter, transformer


def prepared(
    config: ModelConfig, mesh: Mesh, model: transformer.Transformer, *, use_up: bool = False
) -> transformer.Transformer:
    """The model for inference; the same arrays where nothing is to be done.

    Args:
      use_up: frees each of the model's matrices as soon as it is copied, so that both are in memory
        for one of the three at a time. The model cannot be used afterwards.
    """
    changed = jax.tree.map(lambda array: array, model)  # other modules, the same arrays
    if changed.blocks is None:
        return model
    weights, dtype = changed.blocks.moe, jnp.dtype(config.dtype)
    turned = _transposes(mesh) and not moe.is_transposed(weights)
    axes = moe.TRANSPOSED_AXES if turned or moe.is_transposed(weights) else moe.EXPERT_AXES
    same = True
    for name, names in zip(moe.MATRICES, axes, strict=False):
        array = getattr(weights, name)[...]
        if not turned and array.dtype == dtype:
            continue
        same = False
        placed = mesh_lib.sharding(mesh, "layer", *names)
        setattr(weights, name, nnx.Param(_changed(array, dtype, turned, placed), axes=names))
        if use_up:
            array.delete()
    return model if same else changed


def shapes(mesh: Mesh, abstract: transformer.Transformer) -> transformer.Transformer:
    """Those of an abstract model as `prepared` leaves them, for whoever makes the arrays."""
    abstract = jax.tree.map(lambda leaf: leaf, abstract)
    if abstract.blocks is None or not _transposes(mesh):
        return abstract
    weights = abstract.blocks.moe
    for name, names in zip(moe.MATRICES, moe.TRANSPOSED_AXES, strict=False):
        (leaf,) = jax.tree.leaves(getattr(weights, name))
        *front, rows, columns = leaf.shape
        leaf = jax.ShapeDtypeStruct((*front, columns, rows), leaf.dtype)
        setattr(weights, name, nnx.Param(leaf, axes=names))
    return abstract


def abstract(config: ModelConfig, mesh: Mesh) -> transformer.Transformer:
    """Shapes, dtypes and shardings of a prepared model with one copy of each expert, no array."""
    model = jax.eval_shape(lambda: transformer.Transformer(jax.random.key(0), config))
    model = shapes(mesh, model)
    if model.blocks is not None:
        weights, dtype = model.blocks.moe, jnp.dtype(config.dtype)
        for name in moe.MATRICES:
            param = getattr(weights, name)
            cast = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), param)
            setattr(weights, name, cast)
    return jax.tree.map(
        lambda leaf, names: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=mesh_lib.sharding(mesh, *names)
        ),
        model,
        parameter.logical_axes(model),
    )


def _transposes(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _changed(array_LPXY: jax.Array, dtype: Any, turned: bool, placed: Any) -> jax.Array:
    @functools.partial(jax.jit, out_shardings=placed)
    def change(array_LPXY):
        array_LPXY = array_LPXY.astype(dtype)
        return array_LPXY.swapaxes(2, 3) if turned else array_LPXY

    return jax.block_until_ready(change(array_LPXY))
