"""A model on the devices: its compiled steps, its cache, counters and experts.

Every process of a server has a runner, made alike, and all of them do the same operations in the
same order: the first because its engine calls them, the others because they are told (`follow`).
What an operation takes is known on the host, and what it gives is the same in every process.

Axes: L layers, M devices that hold experts, P slots of experts, X places of the recorder.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax import mesh as mesh_lib
from moe_jax import migrate, permute
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.infer.prepared import prepared
from moe_jax.infer.serving import broadcast, packing, paged, program, supported
from moe_jax.infer.serving.scheduler import Limits
from moe_jax.model import transformer
from moe_jax.model.dispatch.table import Table
from moe_jax.placement import copies as copies_lib
from moe_jax.placement.plan import Placement

_MESSAGE_WORDS = 1 << 10  # of a message besides a step's array: names and shapes


class Runner:
    """Attributes:
    config, limits, places: as it was made.
    layouts: of the compiled steps, the cheapest first.
    broadcast: to the other processes that run this model.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        model: transformer.Transformer,
        table: Table,
        limits: Limits,
        places: int = 0,
    ):
        """Args:
        config: of the model and its mesh.
        model: its parameters, on the mesh. The runner may use them up (see `move`).
        table: where its experts are, stacked over layers.
        limits: sizes, see sizes.py.
        places: tokens a shard whose routing is recorded; 0 = none.

        Raises:
          Refused: see `supported.check`.
        """
        supported.check(config, mesh, limits)
        self.config, self.limits, self.places, self._mesh = config, limits, places, mesh
        model = prepared(config.model, mesh, model)
        blocks = model.blocks
        self._slots = 1 if blocks is None else blocks.moe.gate_PDF[...].shape[1]
        self._leaves, self._structure = jax.tree.flatten(model)
        self._table = jax.tree.map(lambda t: mesh_lib.put_replicated(mesh, t), table)
        self._packed_sharding = mesh_lib.sharding(mesh, "batch", None)
        self._state = self._empty_state()
        width = paged.table_width(limits.max_len, limits.block_size)
        self.layouts = packing.layouts(limits, width)
        self._programs = [self._compiled(layout) for layout in self.layouts]
        self._background = concurrent.futures.ThreadPoolExecutor(1, "compiling")
        self._preparing: concurrent.futures.Future[None] | None = None
        most = limits.shards * max(layout.num_words for layout in self.layouts)
        self.broadcast = broadcast.Broadcast(most + _MESSAGE_WORDS)

    def _empty_state(self) -> program.State:
        limits, model, mesh = self.limits, self.config.model, self._mesh
        recorded = None
        if self.places:
            shape = (limits.shards * self.places, model.num_moe_layers, model.top_k)
            dtype = np.uint8 if model.num_experts < 255 else np.uint16
            placed = mesh_lib.sharding(mesh, "batch", None, None)
            recorded = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=placed)()
        pages = paged.empty(model, mesh, limits.blocks, limits.block_size)
        return program.State(pages, self._zero_counters(), recorded)

    def _zero_counters(self) -> program.Counters:
        layers, devices = self.config.model.num_plan_layers, self.config.mesh.expert_devices
        pairs = np.zeros((layers, devices, devices), np.int32)
        put = mesh_lib.put_replicated
        zeros = np.zeros((layers, self._slots), np.int32)
        return program.Counters(
            put(self._mesh, pairs), put(self._mesh, pairs.copy()), put(self._mesh, zeros)
        )

    def _compiled(self, layout: packing.Layout) -> Any:
        structure = self._structure
        step = program.build(self.config.model, self._mesh, layout)

        def of_leaves(leaves, table, state, packed):
            return step(jax.tree.unflatten(structure, leaves), table, state, packed)

        def shaped(array: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)

        packed = jax.ShapeDtypeStruct(
            (self.limits.shards, layout.num_words), np.int32, sharding=self._packed_sharding
        )
        shapes = jax.tree.map(shaped, (self._leaves, self._table, self._state))
        rows = mesh_lib.sharding(self._mesh, "batch", None)
        # The first process reads the rows of all shards.
        out = mesh_lib.sharding(self._mesh) if self._mesh.is_multi_process else rows
        state_sharding = jax.tree.map(lambda array: array.sharding, self._state)
        jitted = jax.jit(of_leaves, donate_argnums=2, out_shardings=(state_sharding, out, rows))
        return jitted.lower(*shapes, packed).compile()

    # --- operations -----------------------------------------------------------------------

    def put(self, number: int, packed: np.ndarray) -> jax.Array:
        """What a step reads, on the devices; `run` comes next.

        Args:
          number: of the step's layout.
          packed: int32 [shards, words], see packing.py.
        """
        self.broadcast.tell("run", number, packed)
        return mesh_lib.put_batch(self._mesh, packed)

    def run(self, number: int, put: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step: `out` and `logits_RV` of program.py. It is on its way when this returns.

        Of several processes each has all of `out`, and the logits of its own shards alone.
        """
        state, out, logits = self._programs[number](self._leaves, self._table, self._state, put)
        self._state = state
        return out, logits

    def take_counters(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64: dispatch_LMM, combine_LMM and computed_LP since they were last taken."""
        self.broadcast.tell("take_counters")
        counters, self._state = self._state.counters, dataclasses.replace(
            self._state, counters=self._zero_counters()
        )  # fmt: skip
        rows = counters.dispatch_LMM, counters.combine_LMM, counters.computed_LP
        dispatch_LMM, combine_LMM, computed_LP = (np.asarray(x).astype(np.int64) for x in rows)
        return dispatch_LMM, combine_LMM, computed_LP

    def recorded(self) -> np.ndarray:
        """uint8 or uint16 [X, L, K]: experts of the recorded tokens, of all shards.

        What has no token is undefined.
        """
        self.broadcast.tell("recorded")
        assert self._state.recorded_XLK is not None
        return mesh_lib.fetch(self._state.recorded_XLK)

    def prepare(self, way: migrate.Route) -> None:
        """Begins, in a thread, to compile what a route needs; steps go on."""
        self.broadcast.tell("prepare", way.send_LMN, way.count_LMM, way.take_LMS)
        self._preparing = self._background.submit(self.mover.prepare, way)

    def prepared(self, wait: bool = False) -> bool:
        """Whether what was begun last is compiled, in every process.

        Args:
          wait: until it is.
        """
        self.broadcast.tell("prepared", wait)
        preparing = self._preparing
        assert preparing is not None
        done = wait or preparing.done()
        if done:
            preparing.result()
        return not mesh_lib.in_any_process(not done)

    def move(self, way: migrate.Route, first: int, last: int, placement: Placement) -> None:
        """Moves the experts of MoE layers `first` to `last` (not included); done when this returns.

        Args:
          way: from the placement that was in use to the one that is to be.
          placement: where all experts are afterwards (`migrate.between`).

        Raises:
          Refused: see `table_of`.
        """
        table = self.table_of(placement)
        slots_LP, share_LNP = placement.physical_to_logical_LP, placement.share_LNP
        shares = () if share_LNP is None else (share_LNP,)
        sizes = placement.num_experts, placement.num_devices
        arrays = way.send_LMN, way.count_LMM, way.take_LMS
        self.broadcast.tell("move", *arrays, first, last, *sizes, slots_LP, *shares)
        model = jax.tree.unflatten(self._structure, self._leaves)
        self._leaves = jax.tree.leaves(jax.block_until_ready(self.mover(model, way, first, last)))
        self._table = jax.tree.map(lambda t: mesh_lib.put_replicated(self._mesh, t), table)

    def follow(self) -> None:
        """Does what the first process does, until that one ends; for the others."""
        while True:
            name, arrays = self.broadcast.hear()
            if name == broadcast.END:
                return
            _HEARD[name](self, *arrays)

    # --- where its experts are ------------------------------------------------------------

    @functools.cached_property
    def mover(self) -> migrate.Mover:
        """Of this model's experts; its program is compiled when it is first prepared."""
        return migrate.Mover(self._mesh, jax.tree.unflatten(self._structure, self._leaves))

    def table_of(self, placement: Placement) -> Table:
        """The placement as the compiled steps take it.

        Raises:
          Refused: more copies of one expert than they have room for, shares of copies where they
            know of none, or shares for another number of nodes.
        """
        table, mine = permute.table(placement), self._table
        copies, room = (t.logical_to_physical_ER.shape[-1] for t in (table, mine))
        ends_LXER = table.share_end_XER
        if copies > room or (ends_LXER is not None and mine.share_end_XER is None):
            shares = "" if ends_LXER is None else ", taken by shares"
            raise Refused(
                "placement",
                f"up to {copies} copies of an expert{shares}",
                f"the steps of this engine were compiled for {room}"
                + ("" if mine.share_end_XER is None else ", taken by shares"),
                "start the server with this plan",
            )
        copies_lib.check_nodes(placement, self.config.mesh.node)
        missing = ((0, 0), (0, 0), (0, room - copies))
        slot_LER = np.pad(table.logical_to_physical_ER, missing, constant_values=-1)
        if ends_LXER is not None:  # nothing is added behind the last copy
            ends_LXER = np.pad(ends_LXER, ((0, 0), *missing), mode="edge")
        elif mine.share_end_XER is not None:  # zeros: copies are taken by the other rule
            ends_LXER = np.zeros(mine.share_end_XER.shape, np.int32)
        return Table(slot_LER, table.num_replicas_E, ends_LXER)


def _run(runner: Runner, number: np.ndarray, packed: np.ndarray) -> None:
    runner.run(int(number), runner.put(int(number), packed))


def _move(runner: Runner, *arrays: np.ndarray) -> None:
    route, (first, last, num_experts, num_devices) = arrays[:3], map(int, arrays[3:7])
    slots_LP, *shares = arrays[7:]
    placement = Placement(slots_LP, num_experts, num_devices, *shares)
    runner.move(migrate.Route(*route), first, last, placement)


_HEARD: dict[str, Callable[..., Any]] = {
    "run": _run,
    "take_counters": Runner.take_counters,
    "recorded": Runner.recorded,
    "prepare": lambda runner, *arrays: runner.prepare(migrate.Route(*arrays)),
    "prepared": lambda runner, wait: runner.prepared(bool(wait)),
    "move": _move,
}
