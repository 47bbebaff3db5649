"""Parameters with names for their dimensions: what sharding, permutation and checkpoints read.

`axes` names the dimensions of one layer's array ("expert" is the physical expert). Layers are
stacked by `jax.vmap` over the constructor of a block, so an array with one dimension more than
names has "layer" in front.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moe_jax import mesh as mesh_lib


def normal(key: jax.Array, axes: tuple[str, ...], shape: tuple[int, ...], fan_in: int) -> nnx.Param:
    """Float32 normal values with variance 1 / fan_in."""
    return nnx.Param(jax.random.normal(key, shape, jnp.float32) / math.sqrt(fan_in), axes=axes)


def ones(axes: tuple[str, ...], shape: tuple[int, ...]) -> nnx.Param:
    """Float32 ones: the scale of a norm."""
    return nnx.Param(jnp.ones(shape, jnp.float32), axes=axes)


def zeros(axes: tuple[str, ...], shape: tuple[int, ...]) -> nnx.Param:
    """Float32 zeros: a bias."""
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)


def present(module: nnx.Module, kind: type) -> dict[str, nnx.Param]:
    """The parameters of a module that are there, by the names of a dataclass's fields."""
    named = {field.name: getattr(module, field.name) for field in dataclasses.fields(kind)}
    return {name: param for name, param in named.items() if param is not None}


def value(param: nnx.Param | None) -> Any:
    """Its array; None where there is no such parameter."""
    return None if param is None else param[...]


def is_turned(param: Any) -> bool:
    """Whether what a product with this matrix sums over lies last: see infer/prepared.py."""
    return isinstance(param, nnx.Variable) and param.get_metadata().get("turned", False)


def gathered(params: Any, mesh: Mesh, dtype: Any = None) -> Any:
    """Parameters as a layer computes with them: gathered over `fsdp`, after the cast.

    Args:
      dtype: to cast to; None = as they are.
    """
    return jax.tree.map(
        lambda a, names: mesh_lib.gather(a.astype(dtype or a.dtype), mesh, *names),
        params,
        logical_axes(params),
    )


def gathered_inside(params: Any) -> Any:
    """Parameters as a layer inside `shard_map` computes with them: gathered over `fsdp`."""
    return jax.tree.map(
        lambda a, names: mesh_lib.gather_inside(a, *names), params, logical_axes(params)
    )


def _is_param(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def logical_axes(tree: Any) -> Any:
    """The same tree with each parameter's value replaced by the names of its dimensions.

    Works on a model, on anything with a model's parameters inside (optimizer state), abstract or
    not; leaves that are no parameters (counters) get ().
    """

    def of(node):
        if not _is_param(node):
            return Axes()
        names = tuple(node.get_metadata()["axes"])
        missing = node.ndim - len(names)
        return node.replace(Axes(("layer",) * missing + names))

    return jax.tree.map(of, tree, is_leaf=_is_param)


class Axes(tuple):
    """Names of the dimensions of one array, a leaf of a pytree (a plain tuple would be a node)."""


def with_slots(shapes: Any, num_slots: int) -> Any:
    """The tree of abstract arrays with `num_slots` physical experts in every layer."""

    def sized(leaf, names):
        shape = [num_slots if name == "expert" else leaf.shape[i] for i, name in enumerate(names)]
        return leaf.update(shape=tuple(shape)) if "expert" in names else leaf

    leaves, structure = jax.tree.flatten(shapes)
    axes = jax.tree.leaves(logical_axes(shapes))
    return jax.tree.unflatten(structure, map(sized, leaves, axes))
