"""`model.dispatch = "auto"`: what is chosen, by which figures, and that a run keeps it."""

import dataclasses
import functools
import json
from math import comb

import numpy as np
import pytest

from moe_jax import auto
from moe_jax import config as config_lib
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.infer.serving import supported
from moe_jax.model.dispatch import quantise
from moe_jax.placement import topology as topology_lib
from moe_jax.placement.plan import Placement
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace
from moe_jax.train import inputs
from tests import tiny

SLOW = {"bandwidth": 1e8, "latency": 1e-5}
FAST = {"bandwidth": 1e11, "latency": 1e-6}


def config(node=1, expert=8, top_k=2, combine="exact", **model) -> Config:
    model = {"dispatch": "auto", "combine": combine, "top_k": top_k, "num_experts": 32, **model}
    made = {f"model__{name}": value for name, value in model.items()}
    return tiny.config(mesh={"node": node, "expert": expert}, **made)


def chosen(sized: Config, check=config_lib.check_trainable) -> tuple[str, str]:
    devices = sized.mesh.expert_devices
    contiguous = Placement.contiguous(tiny.LAYERS, sized.model.num_experts, devices)
    resolved, note = auto.resolve(sized, contiguous, check)
    return resolved.model.dispatch, note


def machine(tmp_path, nodes, each, **fields) -> str:
    """A topology file."""
    path = tmp_path / "machine.json"
    sizes = {"name": "made", "num_nodes": nodes, "devices_per_node": each}
    path.write_text(json.dumps({**sizes, "fast": FAST, "slow": SLOW, **fields}))
    return str(path)


def test_one_device_is_local():
    assert chosen(config(expert=1))[0] == "local"


def test_a_named_dispatch_is_kept():
    assert chosen(tiny.config()) == ("exchange", "")


def test_slow_nodes_take_hierarchical(tmp_path):
    """Top 8 over 2 nodes of 4: a row crosses once for each remote node, not for each device."""
    far = dataclasses.replace(
        config(2, 4, top_k=8, combine="partial"), topology=machine(tmp_path, 2, 4)
    )
    dispatch, note = chosen(far)
    assert dispatch == "hierarchical"
    assert "hierarchical" in next(line for line in note.splitlines() if "<- chosen" in line)
    near = dataclasses.replace(far, topology=machine(tmp_path, 2, 4, slow=FAST))
    assert chosen(near)[0] == "exchange"  # one hop where two would follow each other


def test_one_node_has_nothing_hierarchical(tmp_path):
    """A machine of several nodes under a mesh that does not tell them apart."""
    sized = config(1, 8, top_k=8, combine="partial")
    dispatch, note = chosen(dataclasses.replace(sized, topology=machine(tmp_path, 2, 4)))
    assert dispatch != "hierarchical"
    assert "not hierarchical: the mesh has one node" in note


def test_a_gather_wins_on_a_ring_where_every_device_is_needed(tmp_path):
    """Top 16 of 32 on 8 devices: nearly all get every token; neighbours pass a gather on."""
    ring = {"torus": {"shape": [8], "wrap": [True]}}
    sized = config(top_k=16, combine="partial")
    assert chosen(dataclasses.replace(sized, topology=machine(tmp_path, 1, 8, **ring)))[0] == (
        "gathered"
    )
    few = config(top_k=1, combine="partial")
    assert chosen(dataclasses.replace(few, topology=machine(tmp_path, 1, 8, **ring)))[0] == (
        "exchange"
    )


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_rows_without_a_trace_are_those_of_uniform_choice(top_k):
    """Devices that hold one of K distinct experts of E, home left out: by counting subsets."""
    sized = config(top_k=top_k)
    contiguous = Placement.contiguous(tiny.LAYERS, 32, 8)
    ids_TLK, _ = auto._routing(sized, contiguous)
    option = auto.judge(
        *("exchange", ids_TLK, contiguous, topology_lib.flat(8)),
        work=auto.work_of(sized),
        combine=sized.model.combine,
        devices_per_node=8,
    )
    touched = 8 * (1 - comb(32 - 4, top_k) / comb(32, top_k))
    assert option.rows_out == pytest.approx(touched * 7 / 8, rel=0.02)
    assert option.rows_back == pytest.approx(top_k * 7 / 8, rel=0.02)
    assert option.slow == 0


def test_a_trace_changes_the_choice(tmp_path):
    """All experts of a token on one device: rows of exchange fall below those of a gather."""
    device_T1 = np.random.default_rng(0).integers(0, 8, (500, 1))
    ids_TK = device_T1 * 16 + np.arange(16)
    ids_TLK = np.repeat(ids_TK[:, None], tiny.LAYERS, axis=1).astype(np.uint8)
    path = tmp_path / "trace.npz"
    trace_lib.save(Trace(ids_TLK, 128, np.array([500], np.int32)), path)
    ring = machine(tmp_path, 1, 8, torus={"shape": [8], "wrap": [True]}, device_flops=1e18)
    sized = config(top_k=16, combine="partial", num_experts=128)
    sized = dataclasses.replace(sized, topology=ring)
    assert chosen(sized)[0] == "gathered"
    dispatch, note = chosen(dataclasses.replace(sized, trace=str(path)))
    assert dispatch == "exchange"
    assert "0.875" in note  # one device of eight, home left out


def test_coherent_only_answers():
    """Top 1, few keys and values, slow links: the token that stays moves once, not twice."""
    sized = config(top_k=1, combine="partial", d_model=512, num_kv_heads=1, d_head=2)
    assert chosen(sized, None)[0] == "coherent"
    for check, why in (
        (config_lib.check_trainable, "serves only"),
        (supported.check_dispatch, "is not served with requests that come and go"),
    ):
        dispatch, note = chosen(sized, check)
        assert dispatch == "exchange"
        assert f"not coherent: model.dispatch = 'coherent' {why}" in note


def test_a_model_that_no_dispatch_can_train_is_refused():
    for expert in (1, 8):
        with pytest.raises(Refused, match="router_weights = 'sparse_mixer': serves only"):
            chosen(config(expert=expert, router_weights="sparse_mixer"))


def test_a_run_keeps_its_dispatch(tmp_path):
    """Resumed where another would be chosen, it is the same run."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    sized = config(2, 4, top_k=8)
    first, note = inputs.choose_dispatch(sized, workdir)
    assert first.model.dispatch in ("exchange", "hierarchical")
    assert "<- chosen" in note
    other = {"exchange": "hierarchical", "hierarchical": "exchange"}[first.model.dispatch]
    kept = dataclasses.replace(first, model=dataclasses.replace(first.model, dispatch=other))
    (workdir / "config.json").write_text(config_lib.to_json(kept))
    again, note = inputs.choose_dispatch(sized, workdir)
    assert again.model.dispatch == other
    assert config_lib.digest(again) == config_lib.digest(kept)
    assert other in note


def test_a_machine_of_other_sizes_is_refused(tmp_path):
    for nodes, each in ((4, 2), (2, [3, 5]), (1, 8)):
        sized = dataclasses.replace(config(2, 4), topology=machine(tmp_path, nodes, each))
        with pytest.raises(Refused, match="experts are split over 2 x 4"):
            chosen(sized)
    with pytest.raises(Refused, match=r"topology = 'h100x16': has 2 x 8 devices.*1 x 8"):
        chosen(dataclasses.replace(config(), topology="h100x16"))


def test_a_trace_of_another_model_is_refused(tmp_path):
    path = tmp_path / "trace.npz"
    ids_TLK = np.tile(np.arange(2, dtype=np.uint8), (4, 3, 1))
    trace_lib.save(Trace(ids_TLK, 32, np.array([4], np.int32)), path)
    with pytest.raises(Refused, match="has 3 layers, 32 experts, top 2; the model has 2, 32, 2"):
        chosen(dataclasses.replace(config(), trace=str(path)))


def test_copies_are_taken_by_the_nodes_of_the_mesh():
    """A mesh of one node on a machine of two: only the links are of the machine."""
    placement = tiny.replicated_placement(3)
    ids_TLK = np.random.default_rng(0).integers(0, tiny.EXPERTS, (400, tiny.LAYERS, 2))

    def judged(machine, devices_per_node):
        how = {"work": auto.work_of(tiny.config()), "combine": "partial"}
        made = ("exchange", ids_TLK, placement, machine)
        return auto.judge(*made, **how, devices_per_node=devices_per_node)

    two, flat = topology_lib.nodes_by_devices(2, 4), topology_lib.nodes_by_devices(1, 4)
    here, as_two, as_one = judged(two, 4), judged(two, 2), judged(flat, 4)
    assert (here.rows_out, here.rows_back) == (as_one.rows_out, as_one.rows_back)
    assert here.slow > as_two.slow  # copies of the other node are taken, too


def test_shared_experts_are_part_of_a_layers_time():
    sized = tiny.config(mesh={"expert": 2, "tensor": 2}, model__d_ff_shared=48)
    work = auto.work_of(sized)
    assert (work.num_shared_experts, work.d_ff_shared, work.d_ff) == (1, 24, 12)
    assert not auto.work_of(tiny.config()).shared_flops


def test_what_attention_keeps_is_split_as_its_heads_are():
    mesh = {"expert": 2, "tensor": 2}
    assert auto.work_of(tiny.config(mesh=mesh)).kv_values == 2 * 1 * 4  # one of two heads
    latent = {"kv_rank": 6, "d_rope": 4, "d_value": 3}
    sized = tiny.config(mesh=mesh, model__latent=latent, model__num_kv_heads=4)
    assert auto.work_of(sized).kv_values == 6 + 4


def test_rows_are_as_wide_as_they_travel():
    """Sums that are reproducible go home in 32 bits, rows of 8 bits have a scale."""
    sized = functools.partial(tiny.config, model__dtype="bfloat16")
    assert auto.widths_of(sized()) == (1, 1)
    assert auto.widths_of(sized(model__combine="reproducible")) == (1, 2)
    assert auto.widths_of(tiny.config(model__combine="reproducible")) == (1, 1)
    eight = sized(model__wire_dtype="float8_e4m3fn")
    row_bytes = eight.model.d_model + quantise.SCALE_BYTES
    assert auto.widths_of(eight) == (row_bytes / 32, 1)  # d_model 16

    # no latency, no time to compute: seconds are bytes
    placement, flat = tiny.random_placement(0), topology_lib.flat(4)
    fast = dataclasses.replace(flat.fast, latency=0.0)
    machine = dataclasses.replace(flat, fast=fast, device_flops=1e30)
    ids_TLK = np.random.default_rng(0).integers(0, tiny.EXPERTS, (400, tiny.LAYERS, 2))
    made = ("exchange", ids_TLK, placement, machine)
    how = {"work": auto.work_of(sized()), "combine": "partial", "devices_per_node": 4}
    plain, wide = auto.judge(*made, **how), auto.judge(*made, **how, widths=(1.0, 2.0))
    thin = auto.judge(*made, **how, widths=(0.5, 0.5))
    assert plain.seconds < wide.seconds < 2 * plain.seconds
    assert thin.seconds == pytest.approx(plain.seconds / 2)
    assert wide.rows_back == plain.rows_back
