"""Our files against what the programs that read them require.

Each check mirrors a requirement of the reader named in its docstring, as its source states it
(read in 2026-11); the programs themselves are not installed here. PyYAML and the `csv` module are
independent readers of the text forms.
"""

import csv
import json
import pathlib

import numpy as np
import pytest

from moe_jax.placement.formats import convert as convert_lib
from moe_jax.placement.formats import torchfile
from moe_jax.placement.formats.hints import Hints
from moe_jax.placement.plan import Placement, Plan
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LAYERS = (3, 4, 6)  # of the model; 0, 1, 2 and 5 are dense


def plan(replicas: bool, devices: int = 4, experts: int = 8) -> Plan:
    rng = np.random.default_rng(0)
    device_LE = rng.permuted(np.tile(np.arange(experts) % devices, (3, 1)), axis=1)
    placement = Placement.from_device_LE(device_LE, devices)
    if replicas:  # one more slot on each device, for an expert of the next device
        slots_LMs = placement.physical_to_logical_LP.reshape(3, devices, -1)
        more_LM1 = np.roll(slots_LMs[:, :, :1], 1, axis=1)
        slots_LP = np.concatenate([slots_LMs, more_LM1], axis=2).reshape(3, -1)
        placement = Placement(slots_LP, experts, devices)
    return Plan(placement, LAYERS, {"name": "x"}, {"objective": 1.0})


def converted(made: Plan, folder, name: str, form: str | None):
    made.write(folder / "ours.json")
    convert_lib.convert(folder / "ours.json", folder / name, form, Hints())
    return folder / name


@pytest.mark.parametrize("replicas", [False, True])
def test_sglang(replicas, tmp_path):
    """`--init-expert-location` FILE.json (srt/eplb/expert_location.py).

    - `init_by_mapping(..., **data)`: the file has the one key `physical_to_logical_map`;
    - the map is one tensor: rectangular, whole numbers;
    - `_init_common`: slots divide evenly among the ranks;
    - `_compute_logical_to_all_physical_map`: ids index a list of num_logical_experts;
    - dispatch to a rank takes the first copy there, and `_fair_choices` divides by the number of
      copies: every expert has one, in every layer of the model up to the last planned.
    """
    made = plan(replicas)
    fields = json.loads(converted(made, tmp_path, "s.json", "sglang").read_text())
    assert list(fields) == ["physical_to_logical_map"]
    map_LP = np.array(fields["physical_to_logical_map"])
    assert map_LP.dtype == np.int64
    assert map_LP.shape == (max(LAYERS) + 1, made.placement.num_slots)
    assert map_LP.shape[1] % made.placement.num_devices == 0
    for row_P in map_LP:
        assert set(row_P.tolist()) == set(range(8))
    np.testing.assert_array_equal(map_LP[list(LAYERS)], made.placement.physical_to_logical_LP)


@pytest.mark.parametrize("replicas", [False, True])
def test_sglang_jax(replicas, tmp_path):
    """Its map is loaded with `numpy.load`, which unpickles nothing by default: 2 axes, int32."""
    made = plan(replicas)
    map_LP = np.load(converted(made, tmp_path, "m.npy", None))
    assert (map_LP.dtype, map_LP.shape) == (np.int32, (7, made.placement.num_slots))
    np.testing.assert_array_equal(map_LP[list(LAYERS)], made.placement.physical_to_logical_LP)


@pytest.mark.parametrize("replicas", [False, True])
def test_tensorrt_llm(replicas, tmp_path):
    """`MoeLoadBalancerConfig` (llmapi/llm_args.py), read by PyYAML.

    - a strict model: no other keys than the three;
    - `initial_global_assignments: Dict[int, List[int]]`, with every MoE layer (KeyError otherwise);
    - a layer's list is `num_slots` long, and set(list) == set(range(num_experts));
    - `num_local_slots` is num_slots // ep_size.
    """
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the file as TensorRT-LLM does")
    made = plan(replicas)
    fields = yaml.safe_load(converted(made, tmp_path, "t.yaml", None).read_text())
    assert set(fields) <= {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    assert fields["layer_updates_per_iter"] == 0
    assert tuple(fields["initial_global_assignments"]) == LAYERS
    assert fields["num_slots"] % made.placement.num_devices == 0
    for row in fields["initial_global_assignments"].values():
        assert isinstance(row, list)
        assert len(row) == fields["num_slots"]
        assert set(row) == set(range(8))
    assert list(fields["initial_global_assignments"].values()) == (
        made.placement.physical_to_logical_LP.tolist()
    )


def test_what_tensorrt_llms_generator_writes_is_read(tmp_path):
    """examples/ep_load_balancer: `yaml.dump(config, width=inf)` with lists in flow style."""
    yaml = pytest.importorskip("yaml", reason="PyYAML writes the file as TensorRT-LLM does")

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(
        list, lambda d, data: d.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
    )
    rows = {layer: np.random.default_rng(layer).permutation(64).tolist() for layer in LAYERS}
    config = {"num_slots": 64, "initial_global_assignments": rows, "layer_updates_per_iter": 2}
    (tmp_path / "t.yaml").write_text(yaml.dump(config, Dumper=Dumper, width=float("inf")))
    hints = Hints(devices=8)
    found = convert_lib.read(tmp_path / "t.yaml", hints).value
    assert found.layer_ids == LAYERS
    assert found.placement.physical_to_logical_LP.tolist() == list(rows.values())
    assert any("moves experts as it runs" in note for note in hints.notes)


@pytest.mark.parametrize("alike", [True, False])
def test_vllm(alike, tmp_path):
    """`expert_to_ep_rank` of --expert-placement-file (vllm#34297, vllm#34811: proposed).

    - a flat list as long as num_experts; ranks from 0 to ep_size - 1; every rank holds experts;
    - one list for all layers: a plan whose layers differ says so and writes one list per layer.
    """
    made = plan(False)
    if alike:
        rows = np.tile(made.placement.physical_to_logical_LP[:1], (3, 1))
        made = Plan(Placement(rows, 8, 4), LAYERS)
    made.write(tmp_path / "ours.json")
    hints = Hints()
    convert_lib.convert(tmp_path / "ours.json", tmp_path / "v.json", "vllm", hints)
    fields = json.loads((tmp_path / "v.json").read_text())
    ranks = fields["expert_to_ep_rank"]
    assert any("differs between layers" in note for note in hints.notes) != alike
    for layer, rank_E in enumerate([ranks] if alike else ranks):
        assert len(rank_E) == fields["num_logical_experts"] == 8
        assert set(rank_E) == set(range(fields["ep_size"]))
        assert rank_E == made.placement.device_LE[layer].tolist()
    slots_LP = np.array(fields["physical_to_logical_map"])
    assert slots_LP.shape == (fields["num_moe_layers"], fields["num_physical_experts"])


def test_vllm_with_replicas(tmp_path):
    """EPLB's `physical_to_logical_map`: num_redundant_experts slots beyond the experts."""
    made = plan(True)
    fields = json.loads(converted(made, tmp_path, "v.json", "vllm").read_text())
    assert fields["num_redundant_experts"] == 4
    assert fields["num_physical_experts"] % fields["ep_size"] == 0
    assert "expert_to_ep_rank" not in fields
    assert fields["physical_to_logical_map"] == made.placement.physical_to_logical_LP.tolist()


def test_exflow(tmp_path):
    """Its solver's CSV: header `Expert,Node`, one line per layer * E + expert, equal devices."""
    made = plan(False)
    with converted(made, tmp_path, "e.csv", None).open(newline="") as file:
        lines = list(csv.DictReader(file))
    device_LE = np.array([int(line["Node"]) for line in lines]).reshape(3, 8)
    assert [int(line["Expert"]) for line in lines] == list(range(24))
    np.testing.assert_array_equal(device_LE, made.placement.device_LE)
    for device_E in device_LE:
        assert np.bincount(device_E).tolist() == [2, 2, 2, 2]


def test_tensorrt_llm_statistics(tmp_path):
    """examples/ep_load_balancer `load_expert_statistic`.

    - keys are `iteration_layer` and split at the underscore; iterations are consecutive;
    - there are iterations x layers tensors, all of num_experts.
    """
    trace = synthetic.realistic(num_tokens=60, num_layers=3, num_experts=8, top_k=2, seed=0)
    trace_lib.save(trace, tmp_path / "t.npz")
    convert_lib.convert(tmp_path / "t.npz", tmp_path / "rank0.safetensors", None, Hints())
    data = (tmp_path / "rank0.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0  # the safetensors format aligns its data
    header = json.loads(data[8 : 8 + length])
    keys = [tuple(int(part) for part in key.split("_")) for key in header]
    steps, layers = {step for step, _ in keys}, {layer for _, layer in keys}
    assert max(steps) + 1 - min(steps) == len(steps)
    assert len(keys) == len(steps) * len(layers)
    at = 0
    for entry in header.values():
        assert (entry["dtype"], entry["shape"]) == ("I64", [8])
        assert entry["data_offsets"] == [at, at + 64]
        at += 64
    assert 8 + length + at == len(data)


@pytest.mark.parametrize("identities", [False, True])
def test_sglang_dump(identities, tmp_path):
    """What its recorder dumps per token (srt/eplb/expert_distribution.py), as JSON.

    - no keys but the recorder's, as tests/golden/make_sglang_dumps.py writes them;
    - ids are [layers of the model, tokens, experts per token], of slots, -1 where there is none;
    - lengths of a forward pass make up its tokens, and every token has an identity;
    - slots become experts through the row of their layer in the last map.
    """
    made = synthetic.realistic(
        num_tokens=60, num_layers=3, num_experts=8, top_k=2, seed=0, num_sequences=3
    )
    ids_TLK = made.expert_ids_TLK.copy()
    ids_TLK[5, 1, 1] = made.no_expert
    tokens_T = np.arange(60) if identities else None
    trace = trace_lib.Trace(ids_TLK, 8, made.seq_len, token_ids_T=tokens_T, layer_ids=LAYERS)
    trace_lib.save(trace, tmp_path / "t.npz")
    convert_lib.convert(tmp_path / "t.npz", tmp_path / "d.json", "sglang", Hints())
    fields = json.loads((tmp_path / "d.json").read_text())
    golden = torchfile.read(GOLDEN / "sglang_per_token.pt")
    assert set(fields) == set(golden)
    (record,) = fields["records"]
    assert set(record) <= set(golden["records"][0])
    ids_NTK = np.array(record["topk_ids_of_layer"])
    assert ids_NTK.shape == (max(LAYERS) + 1, 60, 2)
    assert sum(record["extend_seq_lens"]) == 60
    assert record.get("input_ids") == (list(range(60)) if identities else None)
    slots_NP = fields["last_physical_to_logical_map"]
    assert len(slots_NP) == len(ids_NTK)
    for layer, ids_TK in enumerate(ids_NTK.tolist()):
        for token, ids_K in enumerate(ids_TK):
            experts = [slots_NP[layer][slot] if slot >= 0 else 255 for slot in ids_K]
            planned = layer in LAYERS
            wanted = ids_TLK[token, LAYERS.index(layer)].tolist() if planned else [255, 255]
            assert experts == wanted


def test_sglang_counts(tmp_path):
    """`init_by_eplb(logical_count=...)`: [steps, layers, experts] or [layers, experts]."""
    trace = synthetic.realistic(num_tokens=60, num_layers=3, num_experts=8, top_k=2, seed=0)
    trace_lib.save(trace, tmp_path / "t.npz")
    convert_lib.convert(tmp_path / "t.npz", tmp_path / "c.json", None, Hints())
    fields = json.loads((tmp_path / "c.json").read_text())
    count_SLE = np.array(fields["logical_count"])
    assert (list(fields), count_SLE.shape) == (["logical_count"], (1, 3, 8))
    assert count_SLE.sum() == 60 * 3 * 2
