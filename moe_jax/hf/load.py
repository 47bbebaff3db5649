"""Tensors of a checkpoint -> parameters on the mesh, each device reading its own part only.

A parameter is made by `jax.make_array_from_callback`: for each device the callback fills the
slice that the device holds, piece by piece (pieces.py). Under a placement the expert of a slot is
read into it, so nothing is permuted afterwards and no device reads another's experts.

Axes: L layers, P physical experts (slots).
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax import checkpoint, metrics
from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.hf import pieces
from moe_jax.hf.folder import Tensors
from moe_jax.hf.layout import Layout, abstract
from moe_jax.model import moe, transformer
from moe_jax.model.parameter import logical_axes, with_slots
from moe_jax.placement.plan import Placement


@dataclasses.dataclass(frozen=True)
class Reader:
    """Fills arrays from a checkpoint.

    Attributes:
      layout: where every piece is.
      tensors: the files.
      placement: which expert belongs into which slot.
      transposed: parameters whose last two dimensions the model has the other way round.
    """

    layout: Layout
    tensors: Tensors
    placement: Placement
    transposed: frozenset[str] = frozenset()

    def read(
        self,
        parameter: str,
        axes: tuple[str, ...],
        shape: tuple[int, ...],
        index: tuple[slice, ...],
        dtype: np.dtype,
    ) -> np.ndarray:
        """A slice of a parameter as the model has it.

        Args:
          parameter: its path in the model.
          axes: its logical axes: "layer" and "expert" in front where it has them.
          shape: of the whole.
          index: the slice, as JAX gives it.
          dtype: of the result.

        Raises:
          Refused: a weight that is NaN or infinite, naming file and tensor.
        """
        ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
        out = _empty([len(numbers) for numbers in ranges], dtype)
        stacked = [name for name in axes if name in ("layer", "expert")]
        inner = tuple(index[len(stacked) :])

        def copies() -> Iterator[Callable[[], None]]:
            for place in np.ndindex(*out.shape[: len(stacked)]):
                number = [ranges[axis][i] for axis, i in enumerate(place)]
                layer = number[0] if stacked else None
                expert = None
                if "expert" in stacked:
                    expert = int(self.placement.physical_to_logical_LP[layer, number[1]])
                piece = self.layout.piece(self.tensors, (parameter, layer, expert))
                is_turned = parameter in self.transposed
                target = out[place].T if is_turned else out[place]
                yield from piece.copies(target, inner[::-1] if is_turned else inner)

        pieces.run(copies())
        return out


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """As `np.empty`, at a multiple of 64 bytes: what JAX on the CPU takes without a copy."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def parameters(
    config: ModelConfig,
    layout: Layout,
    tensors: Tensors,
    placement: Placement,
    mesh: Mesh,
    *,
    made: Mapping[str, Callable[[tuple[int, ...]], np.ndarray]] | None = None,
    shapes: transformer.Transformer | None = None,
    say: Callable[[str], Any] = metrics.progress,
) -> transformer.Transformer:
    """The model of a checkpoint under a placement.

    Weights of matrix products are kept in the dtype of activations, norms, biases and the router
    in float32: as they are computed with.

    Args:
      layout: from `layout.find`.
      made: float32 values by shape of the parameters that no tensor holds (`Family.made`).
      shapes: the abstract model to fill, whose experts may be transposed (see moe.py).
      say: called with a line of progress after every parameter.

    Raises:
      Refused: see `Reader.read`.
    """
    shapes = with_slots(shapes or abstract(config), placement.num_slots)
    named, axes = checkpoint.flatten(shapes), checkpoint.flatten(logical_axes(shapes))
    transposed: frozenset[str] = frozenset()
    if shapes.blocks is not None and moe.is_transposed(shapes.blocks.moe):
        transposed = frozenset(f"blocks.moe.{name}" for name in moe.MATRICES)
    reader = Reader(layout, tensors, placement, transposed)
    total, done, start = sum(leaf.size for leaf in named.values()), 0, time.perf_counter()
    arrays = {}
    for number, (name, leaf) in enumerate(named.items()):
        if made and name in made:
            values = made[name](leaf.shape)
            arrays[name] = _put(values, mesh_lib.sharding(mesh, *axes[name]))
        else:
            arrays[name] = _parameter(
                reader, name, axes[name], leaf.shape, _dtype(config, axes[name]), mesh
            )
        done += leaf.size
        seconds = time.perf_counter() - start
        left = seconds * (total - done) / done
        say(
            f"reading {tensors.folder.name}: {number + 1}/{len(named)} parameters, "
            f"{100 * done / total:.0f} %, ETA {metrics.clock(left)}"
        )
    return checkpoint.unflatten(shapes, arrays)


def _put(values: np.ndarray, placed: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(values.shape, placed, lambda index: values[index])


def _dtype(config: ModelConfig, axes: tuple[str, ...]) -> np.dtype:
    """Of a parameter by its logical axes: what is multiplied with rows is of rows' dtype."""
    inner = [name for name in axes if name not in ("layer", "expert")]
    of_heads = inner == ["head", "d_head"]  # a bias or a norm, though it has two axes
    is_matrix = len(inner) > 1 and not of_heads and "router" not in inner
    return np.dtype(config.dtype if is_matrix else "float32")


def _parameter(
    reader: Reader,
    name: str,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: np.dtype,
    mesh: Mesh,
) -> jax.Array:
    """One parameter; devices that hold the same slice share what is read."""
    made: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def fill(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        key = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        if key not in made:
            made[key] = reader.read(name, axes, shape, index, dtype)
        return made[key]

    return jax.make_array_from_callback(shape, mesh_lib.sharding(mesh, *axes), fill, dtype=dtype)
