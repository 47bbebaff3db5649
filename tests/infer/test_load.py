"""A run's model on the devices that are here."""

import numpy as np

from moe_jax import checkpoint
from moe_jax import config as config_lib
from moe_jax.infer import load
from moe_jax.placement.plan import Plan
from tests import tiny


def test_a_step_is_read_whatever_its_plan_calls_its_layers(tmp_path, monkeypatch):
    """Its arrays lie so: `--placement` was not always compared with the model's layers."""
    (tmp_path / "config.json").write_text(config_lib.to_json(tiny.config()))
    plan = Plan(tiny.random_placement(1), (7, 8))
    contents = checkpoint.Contents(0, {}, plan, {})
    monkeypatch.setattr(checkpoint, "newest_good", lambda *_, **__: (tmp_path, contents))
    assert load.find(str(tmp_path), None).plan == Plan(plan.placement, (0, 1))


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
