"""Devices: distributed initialisation, the mesh, and the one table logical axis -> mesh axis.

All axes are Auto: XLA places what we do not place, and `shard_map` takes inputs placed anywhere.
Tokens (`batch`) are split over both axes, so attention is data-parallel everywhere; experts are
split over `expert` and replicated over `data`.
"""

import contextlib
import ctypes
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.errors import Refused

DATA, EXPERT = AXES = ("data", "expert")

# Logical axes that are not listed are replicated.
RULES: dict[str, tuple[str, ...]] = {"batch": (DATA, EXPERT), "expert": (EXPERT,)}


def initialize(platform: str, virtual_devices: int, multi_process: str = "auto") -> None:
    """Chooses the platform and joins the other processes. Call once, before any device work.

    Args:
      platform: "cpu", "gpu", "tpu" or "" for what JAX finds.
      virtual_devices: above 0: that many virtual CPU devices in this process.
      multi_process: "off", "auto" (what Cloud TPU, Slurm or MPI say in the environment), or
        "HOST:PORT,NUM_PROCESSES,PROCESS_ID".
    """
    processes = parse_processes(multi_process)
    if platform == "cpu":
        _keep_freed_memory()
    if platform:
        jax.config.update("jax_platforms", "cuda" if platform == "gpu" else platform)
    if virtual_devices:
        try:
            jax.config.update("jax_num_cpu_devices", virtual_devices)
        except RuntimeError:  # the same number again is no error
            raise Refused(
                "virtual_devices",
                virtual_devices,
                f"this process has made its {jax.device_count()} devices already",
                f"start a new process, or set virtual_devices = {jax.device_count()}",
            ) from None
    if multi_process == "auto":
        jax.distributed.initialize()
    elif processes:
        if platform == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(*processes)


def _keep_freed_memory() -> None:
    """Asks glibc not to return freed memory to the system; elsewhere nothing happens.

    The CPU backend allocates and frees every large buffer in every step. By default their pages go
    back and come again zeroed, which is a good part of a small model's step.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # <malloc.h>
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 * 2**20)
        mallopt(mmap_max, 0)


def parse_processes(text: str) -> tuple[str, int, int] | None:
    """(address, processes, own number) of "HOST:PORT,NUM_PROCESSES,PROCESS_ID"; None for words."""
    if text in ("off", "auto"):
        return None
    address, _, numbers = text.partition(",")
    count, _, number = numbers.partition(",")
    whole = count.isdecimal() and number.isdecimal() and 0 <= int(number) < int(count)
    if not whole or not address.rpartition(":")[2].isdecimal():
        raise Refused(
            "--distributed",
            text,
            "must be 'off', 'auto' or 'HOST:PORT,NUM_PROCESSES,PROCESS_ID', the last from 0",
            "for two processes on this machine: localhost:12345,2,0 and localhost:12345,2,1",
        )
    return address, int(count), int(number)


def num_devices() -> int:
    """Devices of all processes."""
    try:
        return jax.device_count()
    except RuntimeError as error:  # a platform that was asked for is not there
        raise Refused(
            "platform",
            jax.config.values["jax_platforms"],
            " ".join(str(error).split()),
            "choose a platform that this machine has, or '' for what JAX finds",
        ) from None


def make(data: int, expert: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A `data x expert` mesh over the first data * expert devices, physical neighbours adjacent.

    Args:
      devices: of a topology that is compiled for but not there; None = those that are.
    """
    devices = list(jax.devices() if devices is None else devices)[: data * expert]
    # Axes of a torus may be split: 8 experts on a 4 x 4 x 4 one are a slice of two of its axes.
    placed = mesh_utils.create_device_mesh((data, expert), devices, allow_split_physical_axes=True)
    return Mesh(placed, (DATA, EXPERT), axis_types=(AxisType.Auto,) * 2)


def spec(*logical_axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry these logical axes.

    Raises:
      ValueError: if two dimensions would be split over one mesh axis.
    """
    entries = [RULES.get(axis) if axis else None for axis in logical_axes]
    used = [mesh_axis for entry in entries if entry for mesh_axis in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {logical_axes} claim one mesh axis twice: {used}")
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, *logical_axes: str | None) -> NamedSharding:
    """`spec` on a mesh."""
    return NamedSharding(mesh, spec(*logical_axes))


def put_batch(mesh: Mesh, batch: np.ndarray) -> jax.Array:
    """A host array that every process holds whole, as a global array split over its first axis."""
    placed = sharding(mesh, "batch", *[None] * (batch.ndim - 1))
    return jax.make_array_from_callback(batch.shape, placed, lambda index: batch[index])


def put_replicated(mesh: Mesh, value: np.ndarray) -> jax.Array:
    """A host array that every process holds whole, on every device."""
    return jax.make_array_from_callback(
        value.shape, NamedSharding(mesh, PartitionSpec()), lambda index: value[index]
    )
