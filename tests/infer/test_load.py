"""A run's model on the devices that are here."""

import numpy as np

from moe_jax.infer import load
from moe_jax.placement.plan import Plan
from tests import tiny


def test_answers_come_from_the_devices_of_the_experts_where_there_are_no_more():
    config = tiny.config(mesh={"data": 2, "fsdp": 2, "expert": 2})
    assert load.on_devices(config, 8) is config
    fewer = load.on_devices(config, 4)
    assert (fewer.mesh.data, fewer.mesh.fsdp, fewer.mesh.expert) == (1, 1, 2)
    assert load.on_devices(config, 1) is config  # refused by who looks at devices


def test_shares_of_copies_go_with_the_number_of_nodes(capsys):
    old = tiny.replicated_placement(0, devices=2, slots=16, stay_on_nodes=2)
    kept = load._here(Plan(old), tiny.config(mesh={"node": 2, "expert": 2})).placement
    assert kept.num_devices == 4
    np.testing.assert_array_equal(kept.share_LNP, old.share_LNP)
    assert not capsys.readouterr().err
    kept = load._here(Plan(old), tiny.config(mesh={"node": 1, "expert": 4})).placement
    assert kept.num_devices == 4
    assert kept.share_LNP is None
    assert "shares copies between 2 node(s), not 1" in capsys.readouterr().err
    kept = load._here(Plan(old), tiny.config(mesh={"node": 1, "expert": 2})).placement
    assert (kept.num_devices, kept.share_LNP) == (2, None)
    assert "shares copies between 2 node(s), not 1" in capsys.readouterr().err
