"""What checkpoints cost a run on this machine: verification at a start, saving on the way.

    python -m moe_jax.train.checkpoint_bench --config=configs/quickstart.py [--rounds=10]
        --config.model.d_ff=1024     makes its state 305 MB, in place of 41

1. Starts from one checkpoint, each in a process of its own (`one_start.py`), with and without
   comparing digests, in turns; `warm`: its files are in memory, `cold`: they have been dropped from
   there first (as on a machine that has not written them). `restore`: from the mesh to the state;
   `start`: the same and what comes before it, from the checks of the config on: text is read, and
   JAX is imported, while digests are computed already. Cost: what verification adds, in restores
   without it: the median over rounds of the difference within one round, and its quartiles. The
   rule that it is judged by: 15 %.
2. Steps alone, the call that begins to save, steps while the save is being written, in rounds.
   The rule that it is judged by: the call takes no longer than one step.

Nothing is kept. The first line says what this machine's load was: on cores that others use, hashing
has nowhere to hide.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

from moe_jax import auto, entry
from moe_jax import config as config_lib
from moe_jax.config import Config
from moe_jax.errors import Refused

ALONE = 4  # steps of a round with nothing being written
STARTS = [(warmth, verified) for warmth in ("warm", "cold") for verified in (False, True)]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of checkpoints, in seconds.

    Attributes:
      megabytes: of arrays; on_disk: of files.
      starts: by ("warm" | "cold", verified), two numbers a round: before the restore, and its own.
      calls: that begin to save, one a round.
      alone, beside: steps with nothing being written, and while something is.
    """

    megabytes: float
    on_disk: float
    starts: dict[tuple[str, bool], list[tuple[float, float]]]
    calls: list[float]
    alone: list[float]
    beside: list[float]

    @property
    def stall_in_steps(self) -> float:
        """The longest call that begins to save, in median steps."""
        return max(self.calls) / float(np.median(self.alone))


def measure(config: Config, rounds: int) -> Costs:
    """Trains a few steps of the config in a folder that is removed afterwards."""
    import jax

    from moe_jax import mesh as mesh_lib
    from moe_jax.train import inputs, resume
    from moe_jax.train import step as step_lib

    with tempfile.TemporaryDirectory(prefix="moe_jax-checkpoints-") as name, _muted():
        workdir = pathlib.Path(name)
        corpus, plan = inputs.prepare(config, workdir)
        mesh = mesh_lib.of_config(config.mesh)
        run, plan = resume.start_or_resume(config, mesh, workdir, corpus, plan)
        table = resume.put_table(mesh, plan)
        train_step = step_lib.build_step(config, mesh)

        def step() -> float:
            start = time.perf_counter()
            window_BS1 = mesh_lib.put_batch(mesh, next(run.batches))
            run.state, metrics = train_step(run.state, window_BS1, table)
            jax.block_until_ready((run.state, metrics))
            run.step += 1
            return time.perf_counter() - start

        calls: list[float] = []
        alone: list[float] = []
        beside: list[float] = []
        step(), step()  # compiles
        with resume.Checkpoints(config, workdir, run, plan) as checkpoints:
            for _ in range(rounds):
                alone += [step() for _ in range(ALONE)]
                start = time.perf_counter()
                checkpoints.save(run, None)
                calls.append(time.perf_counter() - start)
                folder = workdir / "checkpoints" / str(run.step)
                while not folder.exists() and not checkpoints.failed:
                    beside.append(step())
                checkpoints.wait()
        megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(run.state)) / 1e6
        del run, checkpoints

        file = workdir / "started.json"
        file.write_text(config_lib.to_json(config), "utf-8")
        starts: dict[tuple[str, bool], list[tuple[float, float]]] = {key: [] for key in STARTS}
        for number in range(rounds):
            print(f"starts, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for warmth, verified in STARTS if number % 2 else reversed(STARTS):
                if warmth == "cold":
                    _drop_from_memory(folder)
                words = [str(file), str(workdir), "verified" if verified else "not"]
                starts[warmth, verified].append(_start(words))
        on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    return Costs(megabytes, on_disk, starts, calls, alone, beside)


def _start(words: list[str]) -> tuple[float, float]:
    """Seconds before the restore and of it, in a process of its own."""
    command = [sys.executable, "-m", "moe_jax.train.one_start", *words]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(ended.stdout.splitlines()[-1])
    return said["before"], said["restore"]


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Without the lines that each start and save has."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _drop_from_memory(folder: pathlib.Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # what is not written yet is not dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def text(costs: Costs, config: Config) -> str:
    """Both tables, to read."""
    load, cores = os.getloadavg()[0], os.cpu_count()
    lines = [
        f"{config.name} on {config.mesh}: {costs.megabytes:.0f} MB of state, "
        f"{costs.on_disk:.0f} MB on disk; {cores} cores, load {load:.1f}",
        "",
        f"{'median, s':<16} {'read':>9} {'verified':>9} {'cost':>8} {'quartiles':>18}",
    ]
    for warmth in ("warm", "cold"):
        plain_R2, verified_R2 = (np.asarray(costs.starts[warmth, way]) for way in (False, True))
        for what, first in (("restore", 1), ("start", 0)):
            plain, verified = (each_R2[:, first:].sum(-1) for each_R2 in (plain_R2, verified_R2))
            share = (verified - plain) / plain_R2[:, 1]
            low, middle, high = np.quantile(share, (0.25, 0.5, 0.75))
            lines.append(
                f"{f'{warmth}: {what}':<16} {np.median(plain):9.3f} {np.median(verified):9.3f} "
                f"{middle:8.1%} {f'{low:.1%} .. {high:.1%}':>18}"
            )
    middle = float(np.median(costs.alone))
    beside = f"{np.median(costs.beside):.3f}" if costs.beside else "none ended before it was there"
    return "\n".join(
        [
            *lines,
            "",
            f"{'saving':<24} {'median, s':>10} {'longest, s':>11}",
            f"{'a step alone':<24} {middle:10.3f} {max(costs.alone):11.3f}",
            f"{'the call':<24} {np.median(costs.calls):10.3f} {max(costs.calls):11.3f}",
            f"a step beside a save: {beside}",
            f"the longest call takes {costs.stall_in_steps:.2f} of a median step",
        ]
    )


def main() -> None:
    """Prints both tables."""
    config: Any = config_lib.from_config_dict(entry.required("--config", CONFIG.value))
    if ROUNDS.value < 1:
        raise Refused("--rounds", ROUNDS.value, "must be at least 1", "use 10")
    from moe_jax import mesh as mesh_lib

    mesh_lib.initialize(config.platform, config.virtual_devices, "off")
    config_lib.check_devices(config, mesh_lib.num_devices())
    config = auto.resolve_unplanned(config, config_lib.check_trainable)[0]
    print(text(measure(config, ROUNDS.value), config))


if __name__ == "__main__":
    CONFIG = entry.define_config("As for train.py.")
    ROUNDS = flags.DEFINE_integer("rounds", 10, "Of each table.")
    entry.run(main, __doc__)
