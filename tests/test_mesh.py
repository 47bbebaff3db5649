"""The mesh: who is where, and the one table of logical axes."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax import mesh as mesh_lib
from moe_jax.config import MESH_AXES, MeshConfig
from moe_jax.errors import Refused


def test_the_axes_of_the_config_are_those_of_the_mesh():
    assert mesh_lib.AXES == MESH_AXES
    config = MeshConfig(fsdp=2, node=2, tensor=2)
    mesh = mesh_lib.of_config(config)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "node": 2, "expert": 1, "tensor": 2}
    assert (mesh.size, config.num_devices, config.token_devices) == (8, 8, 4)
    assert mesh_lib.size(mesh, mesh_lib.BATCH) == config.token_devices
    assert mesh_lib.size(mesh, mesh_lib.EXPERT) == config.expert_devices == 2
    assert str(config) == "fsdp 2 x node 2 x tensor 2"


def test_slots_lie_node_by_node():
    """Slot p of a plan for 4 devices, 2 slots each, on 2 nodes of 2."""
    mesh = mesh_lib.make(2, 2, node=2)
    array = jax.device_put(np.arange(8), mesh_lib.sharding(mesh, "expert"))
    for shard in array.addressable_shards:
        (replica, node, device) = np.argwhere(mesh.devices[:, 0, :, :, 0] == shard.device)[0]
        assert replica in (0, 1)
        first = 2 * (node * 2 + device)
        np.testing.assert_array_equal(shard.data, [first, first + 1])


def test_parameters_are_gathered_over_fsdp_alone():
    mesh = mesh_lib.make(fsdp=2, tensor=2)
    names = ("layer", "embed", "head", "d_head")
    assert mesh_lib.spec(*names) == PartitionSpec(None, ("fsdp",), ("tensor",), None)
    split = mesh_lib.sharding(mesh, *names)
    array = jax.device_put(np.arange(16.0, dtype=np.float32).reshape(1, 4, 4, 1), split)
    step = jax.jit(
        lambda a: jax.value_and_grad(lambda b: (mesh_lib.gather(b, mesh, *names) ** 2).sum())(a)
    )
    whole = jax.jit(lambda a: mesh_lib.gather(a, mesh, *names))(array)
    assert whole.sharding.spec == PartitionSpec(None, None, "tensor")
    _, gradient = step(array)
    assert gradient.sharding.is_equivalent_to(split, 4)
    np.testing.assert_array_equal(gradient, 2 * array)


@pytest.mark.parametrize("names", [("batch", "expert"), ("batch", "embed"), ("head", "mlp")])
def test_two_dimensions_on_one_mesh_axis_are_refused(names):
    with pytest.raises(ValueError, match=f"{names[0]}.*{names[1]}.* claim one mesh axis twice"):
        mesh_lib.spec(*names)


@pytest.mark.parametrize(
    ("error", "rule"),
    [
        (ValueError("coordinator_address should be defined."), "no other processes are found"),
        (RuntimeError("Barrier timed out. # of tasks joined: 1/2"), "could not join the other"),
    ],
)
def test_a_cluster_that_is_not_joined_is_refused(error, rule, monkeypatch):
    def nothing():
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", nothing)
    with pytest.raises(Refused, match=rf"--distributed = 'auto': {rule}"):
        mesh_lib.initialize("cpu", 0, "auto")


def test_a_process_without_devices_is_refused():
    """Here all devices are process 0's; it is told that there are more processes."""
    mesh = mesh_lib.make(data=4)
    mesh_lib.check_every_process(mesh, "data 4", 1, 8)
    with pytest.raises(Refused, match=r"mesh = 'data 4': leaves 2 of 3 .*process 1, 2.* is 24"):
        mesh_lib.check_every_process(mesh, "data 4", 3, 24)
