"""Devices: distributed initialisation, the mesh, and the one table logical axis -> mesh axis.

Five axes, always all there (most of size 1), so that no code asks which exist:

  data    tokens; parameters are replicated
  fsdp    tokens; parameters and optimizer state are split too, and gathered layer by layer
  node    expert parallelism over the slow tier ...
  expert  ... and over the fast one. Experts are split over both together: device m of a plan is
          node * (devices a node) + expert, as plans count. Collectives among the holders of one
          set of experts take the tuple `EXPERT`; a scheme with a step per tier takes its parts.
  tensor  heads of attention, columns of an expert, vocabulary; tokens are not split

All axes are Auto: XLA places what we do not place, and `shard_map` takes inputs placed anywhere.
"""

import contextlib
import ctypes
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax import processes as processes_lib
from moe_jax.config import MeshConfig
from moe_jax.errors import Refused

DATA, FSDP, NODE, DEVICE, TENSOR = AXES = ("data", "fsdp", "node", "expert", "tensor")
EXPERT = (NODE, DEVICE)  # node by node
REPLICAS = (DATA, FSDP)  # of the devices that share one set of experts
BATCH = (*REPLICAS, *EXPERT)  # one token is on one device of these

Axis = str | tuple[str, ...]  # what a collective runs over

# Logical axes that are not listed are replicated. "replica" is the batch where attention is
# replicated over the holders of experts.
RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH,
    "replica": REPLICAS,
    "expert": EXPERT,
    "embed": (FSDP,),
    "rank": (FSDP,),  # of a matrix in two factors, where it stands in the place of "embed"
    "head": (TENSOR,),
    "mlp": (TENSOR,),
    "vocab": (TENSOR,),
}
_GATHERED = ("embed", "rank")


def initialize(platform: str, virtual_devices: int, multi_process: str = "auto") -> None:
    """Chooses the platform and joins the other processes. Call once, before any device work.

    Args:
      platform: "cpu", "gpu", "tpu" or "" for what JAX finds.
      virtual_devices: above 0: that many virtual CPU devices in this process.
      multi_process: "off", "auto" (what Cloud TPU, Slurm or MPI say in the environment), or
        "HOST:PORT,NUM_PROCESSES,PROCESS_ID".
    """
    processes = processes_lib.parse(multi_process)
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
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise Refused(
                "--distributed",
                "auto",
                f"no other processes are found ({' '.join(str(error).split())})",
                "start it by what the cluster has (srun, mpirun, a TPU pod), or say "
                "HOST:PORT,NUM_PROCESSES,PROCESS_ID",
            ) from None
        except RuntimeError as error:
            rule = f"could not join the other processes ({' '.join(str(error).split())})"
            fix = "see that the same command runs on every host"
            raise Refused("--distributed", "auto", rule, fix) from None
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


def in_any_process(flag: bool) -> bool:
    """Whether it is True in one of them at least; every process calls this."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def fetch(array: jax.Array) -> np.ndarray:
    """A global array on every host; every process calls this."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def first_other(digest: bytes) -> int | None:
    """The first process whose digest is not that of process 0; every process calls this."""
    if jax.process_count() == 1:
        return None
    all_NX = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    others = np.flatnonzero((all_NX != all_NX[0]).any(axis=1))
    return int(others[0]) if len(others) else None


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


def make(
    data: int = 1,
    expert: int = 1,
    devices: Sequence[jax.Device] | None = None,
    *,
    fsdp: int = 1,
    node: int = 1,
    tensor: int = 1,
) -> Mesh:
    """A mesh over the first devices, as many as it needs, physical neighbours adjacent.

    Args:
      expert: devices a node over which experts are split; all of them where `node` is 1.
      devices: of a topology that is compiled for but not there; None = those that are.
    """
    shape = (data, fsdp, node, expert, tensor)
    devices = list(jax.devices() if devices is None else devices)[: math.prod(shape)]
    # Axes of a torus may be split: 8 experts on a 4 x 4 x 4 one are a slice of two of its axes.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def of_config(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a config; `devices` as for `make`.

    Raises:
      Refused: a process has no device of it: it would wait for the others, or they for it.
    """
    mesh = make(
        *(config.data, config.expert, devices),
        fsdp=config.fsdp,
        node=config.node,
        tensor=config.tensor,
    )
    if devices is None:
        check_every_process(mesh, str(config), jax.process_count(), jax.device_count())
    return mesh


def check_every_process(mesh: Mesh, name: str, num_processes: int, num_devices: int) -> None:
    """Refuses a mesh, called so, in which one of the processes has no device."""
    idle = sorted(set(range(num_processes)) - {d.process_index for d in mesh.devices.flat})
    if idle:
        raise Refused(
            "mesh",
            name,
            f"leaves {len(idle)} of {num_processes} processes without a device "
            f"(process {', '.join(map(str, idle[:8]))}{', ...' if len(idle) > 8 else ''})",
            f"choose axes whose product is {num_devices}, or start fewer processes",
        )


def size(mesh: Mesh, axis: Axis) -> int:
    """Devices along one axis, or along several together."""
    return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis))


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


def gather(array: jax.Array, mesh: Mesh, *logical_axes: str | None) -> jax.Array:
    """A parameter as a layer computes with it: whole over `fsdp`, split as before otherwise."""
    whole = sharding(mesh, *(None if axis in _GATHERED else axis for axis in logical_axes))
    return _gather(whole, sharding(mesh, *logical_axes), array)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(whole: NamedSharding, split: NamedSharding, array: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(array, whole)


def _gather_fwd(whole, split, array):
    return _gather(whole, split, array), None


def _gather_bwd(whole, split, _, gradient):
    # Asked for in parts, it is a reduce-scatter; in the sharding of the forward, an all-reduce.
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def added_once(value: jax.Array, axes: Axis) -> jax.Array:
    """For `shard_map`: the value on the first device of these axes and zeros on the others, as a
    term that is no part of anybody's share takes part in a sum over them."""
    return jnp.where(jax.lax.axis_index(axes) == 0, value, 0)


def gather_inside(array: jax.Array, *logical_axes: str | None) -> jax.Array:
    """`gather` inside `shard_map`; the gradient is a reduce-scatter by construction."""
    if jax.lax.axis_size(FSDP) == 1:  # XLA for CPU copies what it gathers from one device: twice
        return array
    for axis, name in enumerate(logical_axes):
        if name in _GATHERED:
            array = jax.lax.all_gather(array, FSDP, axis=axis, tiled=True)
    return array


def attention_batch(config: MeshConfig) -> str:
    """The logical axis of the batch in attention."""
    return {"split": "batch", "replicated": "replica"}[config.attention]


def put_batch(mesh: Mesh, batch: np.ndarray) -> jax.Array:
    """A host array that every process holds whole, as a global array split over its first axis."""
    placed = sharding(mesh, "batch", *[None] * (batch.ndim - 1))
    return jax.make_array_from_callback(batch.shape, placed, lambda index: batch[index])


def put_replicated(mesh: Mesh, value: np.ndarray) -> jax.Array:
    """A host array that every process holds whole, on every device."""
    return jax.make_array_from_callback(
        value.shape, NamedSharding(mesh, PartitionSpec()), lambda index: value[index]
    )
