"""Moves the experts of a live model between devices, a few layers at a time, and only those that
have to.

`permute.apply` says what a move means: a gather along the dimension named "expert". Compiled as it
stands, it would bring every expert of a layer to every device. Here an expert is a row (its
parameters and moments end to end, but for those that lie over other mesh axes, such as biases), and
rows travel as tokens do, over `Wire`: what crosses a link is what changes device, nothing else. The
program is compiled once for a model on a mesh; placements and layers are arguments. The arrays are
donated and written layer by layer, so that what is needed besides them is one layer's experts, sent
and received.

A model between two calls is whole: its table has the new rows of the layers that have moved, and
  the old ones of the others (`between`).

Axes: L layers, M devices, S slots of a device, N rows that a device sends, P = M S slots, X values
  of an expert.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from moe_jax import mesh as mesh_lib
from moe_jax import permute
from moe_jax.errors import Refused
from moe_jax.model import parameter
from moe_jax.model.dispatch import wire as wire_lib
from moe_jax.placement.plan import Placement


@dataclasses.dataclass(frozen=True, eq=False)
class Route:
    """Who sends what to whom, for a change of placement.

    Attributes:
      send_LMN: slots of device m (0..S-1) that it sends, those for device 0 first.
      count_LMM: [L, source, destination] rows; 0 from a device to itself.
      take_LMS: where device m finds the expert of each of its slots: below S in its own slots, from
        S on among what it has received.
    """

    send_LMN: Int[np.ndarray, "L M N"]
    count_LMM: Int[np.ndarray, "L M M"]
    take_LMS: Int[np.ndarray, "L M S"]

    @property
    def moved_L(self) -> np.ndarray:
        """int64 [L]: experts that cross from a device to another."""
        return self.count_LMM.sum(axis=(1, 2))


def route(old: Placement, new: Placement) -> Route:
    """The way from one placement to another of as many slots. Sources are those of `permute.apply`.

    Raises:
      Refused: placements of other sizes.
    """
    sizes = (old.num_slots, old.num_devices), (new.num_slots, new.num_devices)
    if sizes[0] != sizes[1]:
        raise Refused(
            "placement",
            "{} slots on {} devices".format(*sizes[1]),
            "a live model keeps its {} slots on {} devices".format(*sizes[0]),
            "use a plan of these sizes, or load the checkpoint under the other plan",
        )
    source_LP = permute.source_slots(old, new)
    layers, devices, each = len(source_LP), old.num_devices, old.slots_per_device
    count_LMM = np.zeros((layers, devices, devices), np.int32)
    take_LMS = np.zeros((layers, devices, each), np.int32)
    sent: list[list[list[int]]] = []
    for layer in range(layers):
        sent_M: list[list[int]] = [[] for _ in range(devices)]
        for destination in range(devices):
            received = each
            wanted_S = source_LP[layer, destination * each : (destination + 1) * each]
            source_S = wanted_S // each
            for source in range(devices):  # rows arrive by source
                for slot in np.flatnonzero(source_S == source):
                    if source == destination:
                        take_LMS[layer, destination, slot] = wanted_S[slot] % each
                        continue
                    take_LMS[layer, destination, slot] = received
                    received += 1
                    count_LMM[layer, source, destination] += 1
                    sent_M[source].append(int(wanted_S[slot] % each))
        sent.append(sent_M)
    # Without copies nobody sends more than its slots: one size, and one program is compiled. With
    # copies one device may have to serve many: few sizes.
    most = max(len(slots) for sent_M in sent for slots in sent_M)
    length = each if most <= each else 1 << (most - 1).bit_length()
    send_LMN = np.zeros((layers, devices, length), np.int32)
    for layer, sent_M in enumerate(sent):
        for source, slots_of in enumerate(sent_M):
            send_LMN[layer, source, : len(slots_of)] = slots_of
    return Route(send_LMN, count_LMM, take_LMS)


def between(old: Placement, new: Placement, moved: int) -> Placement:
    """Where experts are when the first so many layers have moved."""
    layer_L1 = np.arange(old.num_layers)[:, None] < moved
    slots_LP = np.where(layer_L1, new.physical_to_logical_LP, old.physical_to_logical_LP)
    shares_LNP = [placement.share_LNP for placement in (new, old)]
    share_LNP = None
    if any(share is not None for share in shares_LNP):  # of a layer without shares: zeros
        zeros_LNP = np.zeros_like(next(share for share in shares_LNP if share is not None))
        of_new, of_old = (zeros_LNP if share is None else share for share in shares_LNP)
        share_LNP = np.where(layer_L1[:, :, None], of_new, of_old)
    return Placement(slots_LP.astype(np.int32), old.num_experts, old.num_devices, share_LNP)


class Mover:
    """Moves the experts of everything shaped like one tree (a model, a training state)."""

    def __init__(self, mesh: Mesh, tree: Any):
        """Args: a `tree` of arrays or of their shapes, as they lie on `mesh`."""
        self._mesh = mesh
        axes = jax.tree.leaves(parameter.logical_axes(tree))
        leaves = jax.tree.leaves(tree)
        self._experts = [i for i, names in enumerate(axes) if "expert" in names]
        found = [leaves[i] for i in self._experts]
        specs = tuple(mesh_lib.spec(*axes[i]) for i in self._experts)
        self._shapes = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
            for leaf, spec in zip(found, specs, strict=True)
        ]
        self._programs: dict[tuple[int, ...], Any] = {}
        values = sum(leaf.size // math.prod(leaf.shape[:2]) * leaf.dtype.itemsize for leaf in found)
        self.expert_bytes = int(values)  # of one expert of one layer, everything that moves with it

    def prepare(self, way: Route) -> None:
        """Compiles what `way` needs; may be called in another thread while the model is in use."""
        if (shape := way.send_LMN.shape) not in self._programs:
            self._programs[shape] = self.lower(way).compile()

    def lower(self, way: Route) -> jax.stages.Lowered:
        """The program for routes of this size, for those who want to read it."""
        placed = NamedSharding(self._mesh, PartitionSpec())
        indices = [
            jax.ShapeDtypeStruct(np.shape(value), np.int32, sharding=placed)
            for value in (way.send_LMN, way.count_LMM, way.take_LMS, 0, 0)
        ]
        specs = tuple(shape.sharding.spec for shape in self._shapes)
        return _program(self._mesh, specs).lower(self._shapes, *indices)

    def __call__(self, tree: Any, way: Route, first: int = 0, last: int | None = None) -> Any:
        """The tree with layers `first` to `last` (not included; None = all) moved.

        The tree's experts are donated.
        """
        self.prepare(way)
        leaves, structure = jax.tree.flatten(tree)
        last = len(way.take_LMS) if last is None else last
        placed = [
            mesh_lib.put_replicated(self._mesh, np.asarray(value, np.int32))
            for value in (way.send_LMN, way.count_LMM, way.take_LMS, first, last)
        ]
        move = self._programs[way.send_LMN.shape]
        moved = move([leaves[i] for i in self._experts], *placed)
        for i, array in zip(self._experts, moved, strict=True):
            leaves[i] = array
        return jax.tree.unflatten(structure, leaves)


@functools.cache
def _program(mesh: Mesh, specs: Sequence[PartitionSpec]) -> Any:
    transport = wire_lib.transport_of(mesh)

    def on_device(arrays, send_LMN, count_LMM, take_LMS, first, last):
        # A row varies over all mesh axes that any of its parts varies over.
        kinds = [(a.dtype, jax.typeof(a).manual_axis_type.varying) for a in arrays]
        groups = [[i for i, of in enumerate(kinds) if of == kind] for kind in dict.fromkeys(kinds)]
        me = jax.lax.axis_index(mesh_lib.EXPERT)
        # near = 1: in turns within a process, too. Blocks could be as large as all experts there.
        wire = wire_lib.Wire(mesh_lib.EXPERT, transport, chunk=1, digits=2, near=1)

        def one_layer(layer, arrays):
            arrays = list(arrays)
            count_MM, take_S = count_LMM[layer], take_LMS[layer, me]
            for group in groups:
                parts = [arrays[i][layer] for i in group]
                rows_SX = jnp.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
                pairs = wire_lib.Pairs(count_MM[me], count_MM[:, me], count_MM, len(rows_SX))
                received_SX = wire.exchange(rows_SX[send_LMN[layer, me]], pairs, len(rows_SX))
                rows_SX = jnp.concatenate([rows_SX, received_SX])[take_S]
                ends = np.cumsum([part.size // len(part) for part in parts])[:-1].tolist()
                for i, part, new in zip(
                    group, parts, jnp.split(rows_SX, ends, axis=1), strict=True
                ):
                    arrays[i] = arrays[i].at[layer].set(new.reshape(part.shape))
            return tuple(arrays)

        return list(jax.lax.fori_loop(first, last, one_layer, tuple(arrays)))

    sharded = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(list(specs), *[PartitionSpec()] * 5),
        out_specs=list(specs),
    )
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    return jax.jit(sharded, donate_argnums=0, out_shardings=shardings)
