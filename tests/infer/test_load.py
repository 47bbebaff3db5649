"""A run's model on the devices that are here, or that are asked for."""

import dataclasses
import shutil

import numpy as np
import pytest

from moe_jax import checkpoint, permute
from moe_jax import config as config_lib
from moe_jax.errors import Refused
from moe_jax.infer import load
from moe_jax.infer.sampling import Sampling
from moe_jax.model.parameter import logical_axes
from moe_jax.placement.plan import Plan
from tests import tiny

PROMPTS = tiny.tokens(8, 8).tolist()


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


def save(workdir, config, placement):
    """A run whose newest step has the tiny model under a plan."""
    model = permute.apply(tiny.model(), tiny.contiguous(), placement)
    arrays = {f"model.{name}": array for name, array in checkpoint.flatten(model).items()}
    named = checkpoint.flatten(logical_axes(model))
    infos = checkpoint.describe(arrays, {f"model.{name}": axes for name, axes in named.items()})
    contents = checkpoint.Contents(3, infos, Plan(placement), {})
    checkpoint.save(workdir / "checkpoints", arrays, contents)
    (workdir / "config.json").write_text(config_lib.to_json(config))


def trained_on():
    """A run on data 2 x expert 4 with copies, which would make plans, too."""
    return tiny.config(replan={"every": 8}), tiny.replicated_placement(0)


def answer(source):
    engine = load.engine(source, tiny.mesh(source.config))
    return np.asarray(engine.generate(PROMPTS, 2, Sampling()).logits_BSV)


@pytest.mark.parametrize(
    ("devices", "dispatch"),
    [
        ("1", "local"),
        ("expert=2,tensor=2", None),
        ("node=2,expert=2", "hierarchical"),
        ("fsdp=2,expert=4", None),
        ("4", "shuffled"),
        ("8", "gathered"),
    ],
)
def test_a_run_answers_on_another_mesh(devices, dispatch, tmp_path):
    """Within rounding: bits are promised on one mesh, and differ with JAX 0.12 here."""
    save(tmp_path, *trained_on())
    elsewhere = load.find(str(tmp_path), None, dispatch, devices)
    found, wanted = answer(elsewhere), answer(load.find(str(tmp_path), None))
    assert elsewhere.config.mesh != tiny.config().mesh
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_the_mesh_that_is_asked_for():
    config, _ = trained_on()
    for devices, mesh in (
        ("8", "expert 8"),
        ("node=2,expert=2", "node 2 x expert 2"),
        ("data=3, expert=4", "data 3 x expert 4"),
        ("fsdp=2,tensor=2", "fsdp 2 x tensor 2"),
        ("data=1", "data 1"),
    ):
        served = config_lib.served(config, devices=devices)
        assert str(served.mesh) == mesh
        assert served.data.global_batch % served.mesh.token_devices == 0
        assert served.replan == config_lib.ReplanConfig()  # a plan every 8 steps, on one device
    assert config_lib.served(config).mesh == config.mesh
    for devices in (
        *("", "0", "-1", "8.0", "\u00b2", "expert", "expert=", "experts=8", "8,tensor=2", "=8"),
        *("expert=2,expert=2", "expert=2,", "9" * 5000),
    ):
        with pytest.raises(Refused, match=r"--devices = .*AXIS=NUMBER"):
            config_lib.served(config, devices=devices)
    with pytest.raises(Refused, match=r"mesh\.tensor = 3: must divide model.num_heads"):
        config_lib.served(config, devices="tensor=3")
    with pytest.raises(Refused, match=r"model\.num_experts = 8: must be divisible by"):
        config_lib.served(config, devices="3")
    with pytest.raises(Refused, match="keeps every expert on one device"):
        config_lib.served(config, "local", "2")
    assert config_lib.served(config, "local", "tensor=2").model.dispatch == "local"


def test_slots_that_the_devices_do_not_divide(tmp_path):
    """They could not be read; with copies that meet, experts are contiguous, and that is said."""
    config, _ = trained_on()
    save(tmp_path, config, tiny.replicated_placement(0, slots=12))
    with pytest.raises(Refused, match=r"over 8 devices, which do not divide the 12 slots"):
        load.find(str(tmp_path), None, devices="8")
    assert load.find(str(tmp_path), None, devices="2").plan.placement.num_devices == 2


def test_processes_compare_what_the_step_holds(tmp_path):
    """Not its number alone: hosts may have steps of two runs."""
    config, placement = trained_on()
    for name, plan in (("one", placement), ("same", placement), ("other", tiny.contiguous())):
        save(tmp_path / name, config, plan)
    one, same, other = (load.find(str(tmp_path / n), None) for n in ("one", "same", "other"))
    assert one.contents.step == same.contents.step == other.contents.step
    assert one.version != other.version
    shutil.rmtree(tmp_path / "same")
    shutil.copytree(tmp_path / "one", tmp_path / "same")
    assert one.version == load.find(str(tmp_path / "same"), None).version


def test_virtual_devices_are_those_that_are_asked_for(tmp_path):
    """As --hf makes them; a run has its own number."""
    save(tmp_path, *trained_on())
    assert load.find(str(tmp_path), None).virtual_devices == 0
    assert load.find(str(tmp_path), None, devices="expert=2,tensor=2").virtual_devices == 4
    config, placement = trained_on()
    save(tmp_path / "v", dataclasses.replace(config, virtual_devices=8), placement)
    assert load.find(str(tmp_path / "v"), None).virtual_devices == 8
    assert load.find(str(tmp_path / "v"), None, devices="2").virtual_devices == 2


def test_copies_that_meet(tmp_path, capsys):
    save(tmp_path, *trained_on())
    found = load.find(str(tmp_path), None, devices="data=2").plan.placement
    assert found == tiny.contiguous(1)
    assert "the step's plan is not for data 2: contiguous experts" in capsys.readouterr().err
