"""What a run says: JSON lines that read back bit-equal, TensorBoard, one line a log interval."""

import json
import math
import os
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax import board, files


class Writer:
    """`metrics.jsonl` and `tensorboard/` in a work directory.

    Line one is a header; then one object per step. Floats are written so that they read back
    bit-equal; a value that is not finite is written as null. A disk that takes no more is said
    once, and the lines wait in memory until it does: whether a run can go on is not decided here.
    """

    def __init__(self, workdir: pathlib.Path, header: dict[str, Any], first_step: int):
        """Opens for appending; drops steps from `first_step` on (of a run that was cut)."""
        self._path = workdir / "metrics.jsonl"
        kept = [json.dumps({"header": True, **header})]
        kept += [json.dumps(row) for row in read(self._path)[1] if row["step"] < first_step]
        with files.atomic_write(self._path, "w") as file:
            file.write("\n".join(kept) + "\n")
        self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        self._unwritten = b""
        self._told = False
        self._board = board.Board(workdir / "tensorboard", first_step, warn=fail)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line and one TensorBoard point per value."""
        finite = {key: v if math.isfinite(v) else None for key, v in values.items()}
        self._unwritten += json.dumps({"step": step, **finite}).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._handle, self._unwritten) :]
        except OSError as error:
            if not self._told:
                fail(f"{self._path}: {error}; its lines wait in memory from step {step} on")
            self._told = True
        self._board.write(step, values)

    def close(self) -> None:
        if self._unwritten:
            fail(f"{self._path}: {self._unwritten.count(bytes([10]))} lines could not be written")
        os.close(self._handle)
        self._board.close()


class NoWriter:
    """What the processes other than the first write."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read(path: str | os.PathLike) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows of a metrics.jsonl, without a last line that a kill cut off.

    Lines before it that are no rows are left out, too, and named on stderr.
    """
    header: dict[str, Any] = {}
    rows = []
    path = pathlib.Path(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None:
            if line.strip() and number < len(lines):  # the last one has no line end
                fail(f"{path}: line {number} is no row of metrics, and is left out")
        elif row.get("header"):
            header = row
        else:
            rows.append(row)
    return header, rows


def _row(line: bytes) -> dict[str, Any] | None:
    """The header, or an object with a step."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    good = isinstance(row, dict) and (row.get("header") or type(row.get("step")) is int)
    return row if good else None


class Progress:
    """Rate and time left, measured over the steps since the first finished one (compilation)."""

    def __init__(self, first_step: int, last_step: int):
        self._last_step = last_step
        self._start: tuple[int, float] | None = None
        self._previous = (first_step, time.perf_counter())

    def update(self, step: int) -> tuple[float, float]:
        """(steps per second since the last update, seconds left)."""
        now = time.perf_counter()
        steps, seconds = step - self._previous[0], now - self._previous[1]
        self._previous = (step, now)
        if self._start is None:
            self._start = (step, now)
            return steps / seconds, (self._last_step - step) * seconds / max(steps, 1)
        rate = (step - self._start[0]) / max(now - self._start[1], 1e-9)
        return steps / max(seconds, 1e-9), (self._last_step - step) / max(rate, 1e-9)


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds + 0.5), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(*parts: object) -> None:
    """A line on stdout, from the first process alone."""
    if jax.process_index() == 0:
        print(*parts, flush=True)


def measured_matmul_rate(mesh: Mesh, size: int = 1024, dtype: str = "float32") -> float:
    """FLOP/s of dense size^3 matmuls, one on every device of the mesh at once (best of 5).

    The yardstick of the FLOP utilisation: virtual devices share the machine's cores, so only all
    of them together say what the machine can do.
    """
    devices = mesh.size
    placed = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    side = size if jax.default_backend() == "cpu" else 4 * size
    make = jax.jit(lambda: jnp.ones((devices, side, side), dtype), out_shardings=placed)
    matrices = make()
    multiply = jax.jit(lambda a: a @ a, out_shardings=placed)
    multiply(matrices).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        multiply(matrices).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return devices * 2 * side**3 / min(seconds)


def load_imbalance(computed_LP: np.ndarray, num_devices: int) -> float:
    """Largest over mean rows per device, averaged over layers; 1 in a layer without rows."""
    per_device_LM = computed_LP.reshape(computed_LP.shape[0], num_devices, -1).sum(-1)
    full_L, mean_L = per_device_LM.max(1), per_device_LM.mean(1)
    return float(np.where(mean_L > 0, full_L / np.where(mean_L > 0, mean_L, 1), 1.0).mean())


def fail(message: object) -> None:
    """A line on stderr, from the first process alone."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)


def progress(message: str) -> None:
    """A progress line on stderr: rewritten in place on a terminal, else one line each."""
    if jax.process_index() == 0:
        terminal = sys.stderr.isatty()
        print(f"\r{message}\x1b[K" if terminal else message, end="" if terminal else "\n",
              file=sys.stderr, flush=True)  # fmt: skip
