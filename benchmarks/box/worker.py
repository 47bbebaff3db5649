"""One host of the box: a process that holds the model and does what it is told, in order.

Commands arrive as JSON lines on stdin, answers leave as JSON lines on stdout (what libraries print
there goes to stderr instead). Every host gets the same commands; most are collective. A way (a
dispatch and a combine mode) is compiled once: a plan is a table and permuted weights.

A measured step stands between two barriers. Counters are read before the first, when nothing is on
the wire, and after the second, when everything has arrived.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from benchmarks.box import counters, subject, ways
from moe_jax import checkpoint, permute
from moe_jax import mesh as mesh_lib
from moe_jax.config import Config, MeshConfig
from moe_jax.infer import load
from moe_jax.infer.engine import Engine, homes
from moe_jax.infer.prepared import prepared
from moe_jax.model import transformer
from moe_jax.placement.plan import Placement

ROWS = ("dispatch_MM", "combine_MM", "padding_MM")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a host is told when it is started.

    Attributes:
      run: work directory of the trained model.
      inputs: .npz with `prefill_BS` and `decode_BS`, int32 tokens.
      decode_start: tokens of each sequence of `decode_BS` that are in the cache before decoding.
      hosts, devices_per_host: the shape of the box.
      number: of this host.
      coordinator: address and port of host 0.
    """

    run: str
    inputs: str
    decode_start: int
    hosts: int
    devices_per_host: int
    number: int
    coordinator: str


class Worker:
    """The model under several plans, and the programs of several ways."""

    def __init__(self, settings: Settings):
        joined = f"{settings.coordinator},{settings.hosts},{settings.number}"
        mesh_lib.initialize("cpu", settings.devices_per_host, joined)
        self._config, source = spread(settings.run, settings.hosts, settings.devices_per_host)
        self._mesh = mesh_lib.of_config(self._config.mesh)
        self._stored = source.contents.plan.placement
        model = load.parameters(source, self._mesh)
        # Experts as inference reads them. Projections are turned by the engines of the ways that
        # want them so: shuffled and coherent attend in layers of their own.
        turns_none = dataclasses.replace(self._config.model, dispatch="shuffled")
        self._model = prepared(turns_none, self._mesh, model, use_up=True)
        self._placed: dict[str, tuple[transformer.Transformer, Any]] = {}
        self._engines: dict[str, Engine] = {}
        self._caches: dict[str, Any] = {}
        with np.load(settings.inputs, allow_pickle=False) as inputs:
            self._prefill_BS, self._decode_BS = inputs["prefill_BS"], inputs["decode_BS"]
        self._start = settings.decode_start

    def place(self, plan: str, slots: list[list[int]]) -> dict[str, Any]:
        """Keeps the model under a plan, given as [layers][slots]."""
        model = self._config.model
        placement = Placement(np.array(slots, np.int32), model.num_experts, self._mesh.size)
        moved = permute.apply(self._model, self._stored, placement)
        jax.block_until_ready(jax.tree.leaves(moved))
        self._placed[plan] = (moved, permute.table(placement))
        return {}

    def compile(self, way: str, plan: str) -> dict[str, Any]:
        """Makes the programs of a way and the cache that its decoding starts from."""
        model = ways.applied(self._config.model, way)
        config = dataclasses.replace(self._config, model=model)
        start = time.perf_counter()
        self._engines[way] = Engine(config, self._mesh, *self._placed[plan])
        self._cache(way, self._decode_BS[:, : self._start], self._decode_BS.shape[1])
        self.step(way, plan, "prefill", False)
        self.step(way, plan, "decode", False)
        return {"seconds": time.perf_counter() - start}

    def _cache(self, way: str, token_BS: np.ndarray, capacity: int) -> None:
        engine, batch = self._engines[way], token_BS.shape[0]
        empty = engine.empty_cache(batch, capacity)
        length_B = np.full(batch, token_BS.shape[1], np.int32)
        self._caches[way] = jax.block_until_ready(engine.prefill(token_BS, length_B, empty)[2])

    def step(self, way: str, plan: str, phase: str, rows: bool) -> dict[str, Any]:
        """Runs prefill, or all decode steps, of a way under a plan.

        Returns:
          seconds, bytes sent and received by this host's link; with `rows`, on host 0, the counted
          rows [layers][source][destination] (sums over decode steps).
        """
        engine = self._engines[way].placed(*self._placed[plan])
        run = self._run_prefill(engine) if phase == "prefill" else self._run_decode(engine, way)
        next(run)  # what is not measured
        before = counters.read()
        _barrier()
        started = time.perf_counter()
        records = next(run)
        seconds = time.perf_counter() - started
        _barrier()
        moved = counters.read() - before
        answer: dict[str, Any] = {"seconds": seconds, **dataclasses.asdict(moved)}
        if rows:
            for name in ROWS:
                each = [mesh_lib.fetch(getattr(record.traffic, name)) for record in records]
                answer[name] = np.sum(each, axis=0).tolist()
        return answer

    def _run_prefill(self, engine: Engine):
        batch, length = self._prefill_BS.shape
        cache = engine.empty_cache(batch, length)
        jax.block_until_ready(cache)
        yield
        length_B = np.full(batch, length, np.int32)
        logits, _, _, record = engine.prefill(self._prefill_BS, length_B, cache)
        yield jax.block_until_ready((logits, record)) and [record]

    def _run_decode(self, engine: Engine, way: str):
        """The text goes on as it was written, whatever the model would choose."""
        cache = jax.block_until_ready(jax.tree.map(jnp.copy, self._caches[way]))
        batch, length = self._decode_BS.shape
        yield
        records = []
        for position in range(self._start, length):
            at_B = np.full(batch, position, np.int32)
            logits, cache, record = engine.decode(self._decode_BS[:, position], at_B, cache)
            jax.block_until_ready(logits)  # as if the next token had to be chosen
            records.append(record)
        yield records

    def route(self, way: str, plan: str) -> dict[str, Any]:
        """The experts of all tokens of prefill, [layers][sequences][positions][k], and homes."""
        engine = self._engines[way].placed(*self._placed[plan])
        run = self._run_prefill(engine)
        next(run)
        expert_LBSK = mesh_lib.fetch(next(run)[0].expert_BSK)
        home_B = homes(len(self._prefill_BS), self._mesh)
        return {"expert_LBSK": expert_LBSK.tolist(), "home_B": home_B.tolist()}

    def calibrate(self, kib: int, times: int) -> dict[str, Any]:
        """Every device sends `kib` KiB to the next host, `times` times."""
        size = self._mesh.size
        pairs = to_the_next_host(jax.process_count(), size // jax.process_count())
        send = jax.jit(
            jax.shard_map(
                lambda x_N: jax.lax.ppermute(x_N, mesh_lib.EXPERT, pairs),
                mesh=self._mesh,
                in_specs=PartitionSpec(mesh_lib.EXPERT),
                out_specs=PartitionSpec(mesh_lib.EXPERT),
            )
        )
        x_N = mesh_lib.put_batch(self._mesh, np.ones(size * kib * 256, np.float32))
        x_N = send(x_N).block_until_ready()
        before = counters.read()
        _barrier()
        started = time.perf_counter()
        for _ in range(times):
            x_N = send(x_N).block_until_ready()
        seconds = time.perf_counter() - started
        _barrier()
        moved = counters.read() - before
        payload = kib * 1024 * times * size // jax.process_count()
        return {"seconds": seconds, "payload": payload, **dataclasses.asdict(moved)}


def spread(run: str, hosts: int, devices_per_host: int) -> tuple[Config, load.Source]:
    """The run's config on a mesh of hosts x devices, and its newest checkpoint as it is stored."""
    root = pathlib.Path(run)
    config = on_box(subject.config_of(run), hosts, devices_per_host)
    found = checkpoint.newest_good(root / "checkpoints", warn=print)
    assert found is not None, f"{run} has no checkpoint"
    folder, contents = found
    return config, load.Source(config, folder, contents, contents.plan)


def on_box(config: Config, hosts: int, devices_per_host: int) -> Config:
    """The config on a mesh of hosts x devices."""
    mesh = MeshConfig(node=hosts, expert=devices_per_host)
    # Batches of training have to suit its mesh; here only prompts are split over devices.
    data = dataclasses.replace(config.data, global_batch=mesh.token_devices)
    train = dataclasses.replace(config.train, eval_sequences=mesh.token_devices)
    return dataclasses.replace(config, mesh=mesh, virtual_devices=0, data=data, train=train)


def to_the_next_host(hosts: int, devices_per_host: int) -> list[tuple[int, int]]:
    """(source, destination) of every device; no two send to each other, if it can be."""
    pairs = []
    for device in range(hosts * devices_per_host):
        host, place = divmod(device, devices_per_host)
        place = (place + (host == hosts - 1)) % devices_per_host
        pairs.append((device, (host + 1) % hosts * devices_per_host + place))
    return pairs


def _barrier() -> None:
    multihost_utils.sync_global_devices("measured step")


def serve(settings: Settings, commands: TextIO, answers: TextIO) -> None:
    """Answers one JSON line per command until the input ends."""
    worker = Worker(settings)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in commands:
        command = json.loads(line)
        answer = getattr(worker, command.pop("do"))(**command)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    answers_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # gloo prints on stdout
    serve(Settings(**json.loads(sys.argv[1])), sys.stdin, answers_to)
