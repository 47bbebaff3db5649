"""What attention keeps of the tokens before: arrays [B, C, ...], of one layer or within all.

A decoding step adds one position a sequence. In a loop over layers that hands each layer its slice
and stacks what comes back, it would copy the whole cache; `InStack` writes where it lies.

Axes: B sequences, S tokens at hand, C cached positions, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax import mesh as mesh_lib


class Kept:
    """Of one layer: a dataclass of arrays [B, C, ...], in the order in which new ones are given."""

    def with_prefix(self, *new_BS: jax.Array) -> Any:
        """With what belongs to the first S positions, [B, S, ...] each."""
        return type(self)(*map(_write_prefix, jax.tree.leaves(self), new_BS))

    def with_one(self, position_B: jax.Array, *new_B1: jax.Array) -> Any:
        """With one position a sequence, [B, 1, ...] each; nothing is written at position -1."""
        pairs = zip(jax.tree.leaves(self), new_B1, strict=True)
        return type(self)(*(_select_one(array, new, position_B) for array, new in pairs))

    def of_layer(self) -> Any:
        """Itself: what is attended to."""
        return self


Write = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class InStack:
    """Of one layer, within that of all: the methods of `Kept`.

    Attributes:
      whole: a `Kept` with arrays [L, B, C, ...].
      layer: int32 scalar.
      write: see `writer`.
    """

    whole: Any
    layer: jax.Array
    write: Write

    def with_prefix(self, *new_BS: jax.Array) -> "InStack":
        def written(array_LBC, new_BS):
            start = (self.layer, *(0,) * new_BS.ndim)
            return jax.lax.dynamic_update_slice(array_LBC, new_BS[None], start)

        return self._changed(written, new_BS)

    def with_one(self, position_B: jax.Array, *new_B1: jax.Array) -> "InStack":
        def written(array_LBC, new_B1):
            return self.write(array_LBC, new_B1, self.layer, position_B)

        return self._changed(written, new_B1)

    def of_layer(self) -> Any:
        return jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, self.layer, keepdims=False), self.whole
        )

    def _changed(self, change: Callable[..., jax.Array], new: tuple[jax.Array, ...]) -> "InStack":
        leaves, structure = jax.tree.flatten(self.whole)
        changed = [change(a, b) for a, b in zip(leaves, new, strict=True)]
        return dataclasses.replace(self, whole=jax.tree.unflatten(structure, changed))


def writer(mesh: Mesh, attention_batch: str) -> Write:
    """`write(array_LBC, new_B1, layer, position_B) -> array_LBC`, on the device that has the
    sequence: keys and values [L, B, C, G, Q] are split over heads, too.

    Args:
      attention_batch: logical axis of the batch in attention, "batch" or "replica".
    """

    def write(array_LBC, new_B1, layer, position_B):
        rest = ("head", None) if array_LBC.ndim == 5 else (None,) * (array_LBC.ndim - 3)
        of_new = (attention_batch, None, *rest)
        whole = mesh_lib.spec(None, *of_new)
        by_row = mesh_lib.spec(attention_batch)
        in_specs = (whole, mesh_lib.spec(*of_new), PartitionSpec(), by_row)
        local = jax.shard_map(_write_one, mesh=mesh, in_specs=in_specs, out_specs=whole)
        return local(array_LBC, new_B1, layer, position_B)

    return write


def empty(abstract: Any) -> Any:
    """Zeros of the shapes, dtypes and shardings of a cache."""
    return jax.tree.map(lambda leaf: _zeros(leaf.shape, leaf.dtype, leaf.sharding)(), abstract)


@functools.cache  # another function would be compiled anew, for each batch of prompts
def _zeros(
    shape: tuple[int, ...], dtype: jnp.dtype, placed: NamedSharding
) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=placed)


def _write_one(array_LBC, new_B1, layer, position_B):
    row_B = jnp.arange(array_LBC.shape[1])
    at_B = jnp.where(position_B < 0, array_LBC.shape[2], position_B)  # past the end: dropped
    new_B = new_B1[:, 0].astype(array_LBC.dtype)
    return array_LBC.at[layer, row_B, at_B].set(new_B, mode="drop", unique_indices=True)


def _write_prefix(cached_BC: jax.Array, new_BS: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(cached_BC, new_BS, (0,) * cached_BC.ndim)


def _select_one(cached_BC: jax.Array, new_B1: jax.Array, position_B: jax.Array) -> jax.Array:
    """A select, not a scatter: it stays on the device that holds the row."""
    here_BC = jnp.arange(cached_BC.shape[1])[None] == position_B[:, None]
    here_BC = jnp.expand_dims(here_BC, tuple(range(2, cached_BC.ndim)))
    return jnp.where(here_BC, new_B1, cached_BC)
