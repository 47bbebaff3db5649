"""python -m moe_jax.infer.rate DIR: how fast a published model is read, beside its bare files.

    --rounds=3     of each
    --training     experts as training holds them; otherwise as inference does (prepared.py)

In turn, so that both meet the same machine: the files from end to end, then the model, on one
device. Once cold (the system is asked to forget the files first; below a virtual machine another
cache may still know them), once warm. Exit codes: 0 done, 1 refused, 2 usage,
130 interrupted.
"""

import argparse
import functools
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable

import jax

from moe_jax import errors, metrics
from moe_jax import mesh as mesh_lib
from moe_jax.errors import Refused
from moe_jax.hf import config_json, layout, load
from moe_jax.hf import folder as folder_lib
from moe_jax.infer import prepared
from moe_jax.placement.plan import Placement

_AT_ONCE = 2**23  # bytes


def compare(folder: str | os.PathLike, rounds: int, *, training: bool) -> None:
    """Prints bytes/s of both and their ratio, by round and the medians.

    Raises:
      Refused: a folder that is not a published model, or no rounds.
    """
    if rounds < 1:
        raise Refused("--rounds", rounds, "must be at least 1", "use 3")
    read_model = functools.partial(read, folder, training=training)
    read_model()  # compiles nothing, but memory and devices are at hand then
    tensors = folder_lib.tensors(folder)
    paths, size = {file.path for file in tensors.file_of.values()}, tensors.num_bytes
    can_forget = hasattr(os, "posix_fadvise")
    for name, forgets in ((("cold", True),) if can_forget else ()) + (("warm", False),):
        disk, ours = [], []
        for number in range(rounds):
            disk.append(size / _seconds(lambda: _sequentially(paths), paths, forgets))
            ours.append(size / _seconds(read_model, paths, forgets))
            metrics.say(f"{name} {number + 1}/{rounds}: {_told(disk[-1], ours[-1])}")
        metrics.say(
            f"{name}, medians of {size:,} bytes: {_told(*map(statistics.median, (disk, ours)))}"
        )


def _told(disk: float, ours: float) -> str:
    return f"read {disk / 1e6:,.0f} MB/s, import {ours / 1e6:,.0f} MB/s, ratio {ours / disk:.2f}"


def read(folder: str | os.PathLike, *, training: bool) -> object:
    """The model's parameters on one device, from its headers on."""
    published = config_json.read(folder)
    model, mesh = published.config.model, mesh_lib.of_config(published.config.mesh)
    tensors = folder_lib.tensors(folder)
    found = layout.find(published.family, model, tensors)
    shapes = layout.abstract(model)
    return jax.block_until_ready(
        load.parameters(
            *(model, found, tensors),
            Placement.contiguous(model.num_plan_layers, model.num_experts, 1),
            mesh,
            shapes=shapes if training else prepared.shapes(mesh, shapes),
            say=lambda line: None,
        )
    )


def _seconds(run: Callable[[], object], paths: Iterable[pathlib.Path], forgets: bool) -> float:
    for path in paths if forgets else ():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _sequentially(paths: Iterable[pathlib.Path]) -> None:
    room = bytearray(_AT_ONCE)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="moe_jax.infer.rate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--training", action="store_true")
    given = parser.parse_args(argv)
    return errors.exit_code(lambda: compare(**vars(given)))


if __name__ == "__main__":
    sys.exit(main())
