"""Compiling for one chip of a TPU slice that is not there."""

import os

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax import tpu
from moe_jax.kernels.tpu import chips


def prepare() -> None:
    """Once in a process, before `sharding` loads the compiler."""
    os.environ.update(tpu.ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")


def sharding(chip: str) -> NamedSharding:
    """Everything on one chip of the kind."""
    topology = chips.CHIPS[chip].topology
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("one",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec())
