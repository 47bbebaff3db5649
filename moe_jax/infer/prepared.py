"""Weights as inference reads them: in the dtype they are computed with, on CPU transposed.

Weights do not change between two steps, so what every step would do to them is done once. Matmuls
of a few rows keep the bits of many only against transposed weights (kernels/README.md), and a
decoding step has a few rows per expert, and few in all. Placements move experts as before: only the
order of an expert's own dimensions changes, and their names with it. The projections of attention
and of the logits are turned alike, if at least `NARROW` wide, and say so (`parameter.is_turned`).
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.model import moe, parameter, transformer

NARROW = 16  # below, XLA's library for CPUs does not pack a transposed matrix (kernels/README.md)


def prepared(
    config: ModelConfig, mesh: Mesh, model: transformer.Transformer, *, use_up: bool = False
) -> transformer.Transformer:
    """The model for inference; the same arrays where nothing is to be done.

    Args:
      use_up: frees each of the model's matrices as soon as it is copied, so that both are in memory
        for one of them at a time. The model cannot be used afterwards.
    """
    changed = jax.tree.map(lambda array: array, model)  # other modules, the same arrays
    make = functools.partial(_changed, mesh=mesh, dtype=jnp.dtype(config.dtype), use_up=use_up)
    same = True
    if changed.blocks is not None:
        weights = changed.blocks.moe
        turned = _transposes(mesh) and not moe.is_transposed(weights)
        of_experts = (
            moe.TRANSPOSED_AXES if turned or moe.is_transposed(weights) else moe.EXPERT_AXES
        )
        for name, names in zip(moe.MATRICES, of_experts, strict=False):
            array = getattr(weights, name)[...]
            if turned or array.dtype != jnp.dtype(config.dtype):
                last = array.ndim - 1
                order = (*range(last - 1), last, last - 1) if turned else tuple(range(last + 1))
                setattr(weights, name, make(array, order, axes=names))
                same = False
    for parent, name in _projections(config, changed) if _transposes(mesh) else ():
        param, order = getattr(parent, name), _TURNED[name]
        names, front = param.get_metadata()["axes"], param.ndim - len(order)
        shape = param.shape[front:]
        width = shape[names.index("embed")]  # one side of all of them
        if parameter.is_turned(param) or min(width, math.prod(shape) // width) < NARROW:
            continue
        whole = (*range(front), *(front + axis for axis in order))
        axes = tuple(names[axis] for axis in order)
        setattr(parent, name, make(param[...], whole, axes=axes, turned=True))
        same = False
    return model if same else changed


# The order of a layer's dimensions that has what is summed over last.
_ATTENTION = {
    **dict.fromkeys(("query_DHQ", "key_DGQ", "value_DGQ"), (1, 2, 0)),
    "output_HQD": (2, 0, 1),
}
_TURNED = {**_ATTENTION, "output_DV": (1, 0)}


def _projections(
    config: ModelConfig, model: transformer.Transformer
) -> Iterator[tuple[nnx.Module, str]]:
    """(module, name) of the matrices around attention, and of the logits', that may be turned."""
    if config.dispatch in ("shuffled", "coherent"):  # with layers of their own
        return
    for block in (model.dense_blocks, model.blocks):
        if block is not None and not config.latent.kv_rank:
            for name in _ATTENTION:
                yield block.attention, name
    if model.output_DV is not None:
        yield model, "output_DV"


def shapes(mesh: Mesh, abstract: transformer.Transformer) -> transformer.Transformer:
    """An abstract model, its experts as `prepared` leaves them, for whoever makes the arrays."""
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


def _changed(
    array: jax.Array,
    order: tuple[int, ...],
    *,
    axes: tuple[str, ...],
    mesh: Mesh,
    dtype: Any,
    use_up: bool,
    **metadata: Any,
) -> nnx.Param:
    """The parameter with its dimensions in another order; `axes` name the last ones after that."""
    names = ("layer",) * (array.ndim - len(axes)) + axes

    @functools.partial(jax.jit, out_shardings=mesh_lib.sharding(mesh, *names))
    def change(array):
        return array.astype(dtype).transpose(order)

    param = nnx.Param(jax.block_until_ready(change(array)), axes=axes, **metadata)
    if use_up:
        array.delete()
    return param
