"""A run's model on the devices that are here."""

from moe_jax.infer import load
from tests import tiny


def test_answers_come_from_the_devices_of_the_experts_where_there_are_no_more():
    config = tiny.config(mesh={"data": 2, "fsdp": 2, "expert": 2})
    assert load.on_devices(config, 8) is config
    fewer = load.on_devices(config, 4)
    assert (fewer.mesh.data, fewer.mesh.fsdp, fewer.mesh.expert) == (1, 1, 2)
    assert load.on_devices(config, 1) is config  # refused by who looks at devices
