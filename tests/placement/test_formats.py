"""Files of other programs: round trips, hand-written files, refusals, mutations."""

import io
import json
import pickle
import struct

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import __main__ as command_line
from moe_jax.placement.formats import convert as convert_lib
from moe_jax.placement.formats import hints as hints_lib
from moe_jax.placement.formats import raw, safetensors
from moe_jax.placement.formats.counts import Counts
from moe_jax.placement.formats.hints import Hints
from moe_jax.placement.plan import Placement, Plan
from moe_jax.routing import affinity, synthetic
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace
from tests import torch_bytes as tb

# name -> file name, format: every way to write a plan
PLANS = {
    "own": "p.json",
    "sglang": "p.json",
    "vllm": "p.json",
    "tensorrt-llm": "p.yaml",
    "exflow": "p.csv",
    "sglang-jax": "p.npy",
}


def run(*words) -> int:
    return command_line.main([str(word) for word in words])


def plain(seed: int = 0) -> Plan:
    rng = np.random.default_rng(seed)
    device_LE = rng.permuted(np.tile(np.arange(8) % 4, (3, 1)), axis=1)
    return Plan(Placement.from_device_LE(device_LE, 4))


def replicated() -> Plan:
    slots_LP = np.array([[0, 1, 2, 3, 0, 2], [3, 2, 1, 1, 0, 3]])
    return Plan(Placement(slots_LP, 4, 2))


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz_bytes(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def safetensors_bytes(header: dict | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def written(tmp_path, name: str, content: str | bytes):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(tmp_path, name: str, content: str | bytes, hints: Hints | None = None, **options):
    path = written(tmp_path, name, content)
    return convert_lib.read(path, hints or Hints(), **options).value


# Round trips of plans.


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("make", [plain, replicated])
def test_ours_to_format_to_ours_is_the_identity(name, make, tmp_path):
    plan = make()
    if name == "exflow" and plan.placement.has_replicas:
        return
    path = tmp_path / PLANS[name]
    done = convert_lib.convert(written_plan(plan, tmp_path), path, name, Hints())
    assert done.written == name
    hints = Hints(plan.placement.num_devices, plan.placement.num_experts)
    convert_lib.convert(path, tmp_path / "again.json", None, hints)
    again = Plan.read(tmp_path / "again.json")
    assert again.placement == plan.placement
    assert again.digest == plan.digest
    assert again.layer_ids == plan.layer_ids


def written_plan(plan: Plan, tmp_path):
    plan.write(tmp_path / "ours.json")
    return tmp_path / "ours.json"


@pytest.mark.parametrize("numbers", [(3, 4, 7), (7, 3, 4)])
@pytest.mark.parametrize("name", PLANS)
def test_layer_numbers_survive_or_are_given_again(name, numbers, tmp_path):
    plan = Plan(plain().placement, numbers, {"name": "x"}, {"seconds": 1.0})
    path = tmp_path / PLANS[name]
    done = convert_lib.convert(written_plan(plan, tmp_path), path, name, Hints())
    assert ("topology and provenance are lost" in done.notes) == (name != "own")
    again = convert_lib.read(path, Hints(4, 8, numbers)).value
    assert (again.digest, again.layer_ids) == (plan.digest, numbers)


@pytest.mark.parametrize("name", ["v.json", "e.csv"])
def test_rows_without_numbers_are_written_in_the_models_order(name, tmp_path):
    """Whoever reads them counts layers: of layers 7, 3 and 4 the first row is layer 3's."""
    plan = Plan(plain().placement, (7, 3, 4))
    path, form = tmp_path / name, {"v.json": "vllm", "e.csv": "exflow"}[name]
    convert_lib.convert(written_plan(plan, tmp_path), path, form, Hints())
    found = convert_lib.read(path, Hints(4, 8)).value.placement
    np.testing.assert_array_equal(found.device_LE, plan.placement.device_LE[[1, 2, 0]])
    if name == "v.json":
        fields = json.loads(path.read_text())
        assert fields["expert_to_ep_rank"] == plan.placement.device_LE[[1, 2, 0]].tolist()


def test_columns_of_exflows_traces_are_written_in_the_models_order(tmp_path):
    ids = np.array([[[1], [0], [2]], [[2], [3], [0]]], np.uint8)
    trace_lib.save(Trace(ids, 4, np.array([2]), layer_ids=(7, 3, 4)), tmp_path / "t.npz")
    convert_lib.convert(tmp_path / "t.npz", tmp_path / "e.npy", "exflow", Hints())
    assert np.load(tmp_path / "e.npy").tolist() == [[0, 2, 1], [3, 0, 2]]
    hints = Hints(num_experts=4, layer_ids=(7, 3, 4))
    again = convert_lib.read(tmp_path / "e.npy", hints, wants_trace=True).value
    assert (again.expert_ids_TLK.tolist(), again.layer_ids) == (ids.tolist(), (7, 3, 4))


def test_rows_of_sglang_are_the_layers_of_the_model(tmp_path):
    plan = Plan(Placement(np.array([[1, 0, 1, 0]]), 2, 2), (2,))
    done = convert_lib.convert(written_plan(plan, tmp_path), tmp_path / "s.json", "sglang", Hints())
    fields = json.loads((tmp_path / "s.json").read_text())
    assert fields == {"physical_to_logical_map": [[0, 1, 0, 1], [0, 1, 0, 1], [1, 0, 1, 0]]}
    assert any("2 rows of layers" in note for note in done.notes)


@pytest.mark.parametrize("name", ["t.npz", "t.json"])
def test_rows_of_sglang_traces_are_not_endless(name, tmp_path):
    ids = np.zeros((4, 2, 1), np.uint8)
    trace = Trace(ids, 2, np.array([4]), layer_ids=(0, 2_000_000_000))
    trace_lib.save(trace, tmp_path / "in.npz")
    with pytest.raises(Refused, match=r"layer_ids = 2000000000: at most 4095"):
        convert_lib.convert(tmp_path / "in.npz", tmp_path / name, "sglang", Hints())
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]


def test_our_own_file_is_read_by_the_newest_sglang_as_it_is(tmp_path):
    """It asks for this key; it would prefer `logical_count`, which we never write beside it.

    Versions before it hand every key to a function: they need `--format=sglang`.
    """
    fields = json.loads(written_plan(plain(), tmp_path).read_text())
    assert "logical_count" not in fields
    np.testing.assert_array_equal(
        fields["physical_to_logical_map"], plain().placement.physical_to_logical_LP
    )


def test_exflow_cannot_hold_replicas(tmp_path):
    with pytest.raises(Refused, match="one device per expert"):
        convert_lib.convert(written_plan(replicated(), tmp_path), tmp_path / "e.csv", None, Hints())
    assert not (tmp_path / "e.csv").exists()


def test_exflow_loses_the_order_inside_a_device_and_says_so(tmp_path):
    plan = Plan(Placement(np.array([[1, 0, 2, 3]]), 4, 2))
    done = convert_lib.convert(written_plan(plan, tmp_path), tmp_path / "e.csv", None, Hints())
    assert "the order of the experts inside a device is lost" in done.notes
    again = convert_lib.read(tmp_path / "e.csv", Hints(num_experts=4)).value
    np.testing.assert_array_equal(again.placement.device_LE, plan.placement.device_LE)


# Hand-written files.


def test_sglang_file(tmp_path):
    plan = read(
        tmp_path,
        "s.json",
        '{"physical_to_logical_map": [[2, 0], [1, 2]]}'.replace("[1, 2]", "[0, 2]").replace(
            "2", "1"
        ),
        Hints(devices=2),
    )
    assert plan.placement.physical_to_logical_LP.tolist() == [[1, 0], [0, 1]]
    assert plan.placement.num_experts == 2


def test_vllm_file_with_ranks_only(tmp_path):
    hints = Hints(layer_ids=(4, 5))
    plan = read(tmp_path, "v.json", '{"expert_to_ep_rank": [1, 0, 0, 1]}', hints)
    assert plan.placement.physical_to_logical_LP.tolist() == [[1, 2, 0, 3]] * 2
    assert (plan.layer_ids, plan.placement.num_devices) == ((4, 5), 2)


def test_vllm_map_says_for_how_many_layers_one_list_of_ranks_holds(tmp_path):
    fields = {"physical_to_logical_map": [[0, 2, 1, 3]] * 2, "expert_to_ep_rank": [0, 1, 0, 1]}
    plan = read(tmp_path, "v.json", json.dumps(fields))
    assert plan.placement.device_LE.tolist() == [[0, 1, 0, 1]] * 2
    fields["num_moe_layers"] = 3
    with pytest.raises(Refused, match=r"num_moe_layers = 3: the map has 2"):
        read(tmp_path, "v.json", json.dumps(fields))


def test_vllm_text_with_one_list_of_ranks(tmp_path):
    plan = Plan(Placement.contiguous(2, 4, 2))
    convert_lib.convert(written_plan(plan, tmp_path), tmp_path / "v.json", "vllm", Hints())
    fields = json.loads((tmp_path / "v.json").read_text())
    assert fields["expert_to_ep_rank"] == [0, 0, 1, 1]
    assert fields["num_redundant_experts"] == 0


TENSORRT = """\
# as TensorRT-LLM's generator writes it
initial_global_assignments:
  4: [1, 0, 2, 1]
  3: [0, 1, 2, 0]

num_slots: 4  # P
layer_updates_per_iter: 0
"""


def test_tensorrt_file(tmp_path):
    plan = read(tmp_path, "t.yml", TENSORRT, Hints(devices=2))
    assert plan.layer_ids == (3, 4)
    assert plan.placement.physical_to_logical_LP.tolist() == [[0, 1, 2, 0], [1, 0, 2, 1]]
    assert plan.placement.num_experts == 3


def test_tensorrt_file_that_says_its_devices(tmp_path):
    text = TENSORRT + "ep_size: 2\n"
    assert read(tmp_path, "t.yml", text).placement.num_devices == 2
    with pytest.raises(Refused, match="the file says 2"):
        read(tmp_path, "t.yml", text, Hints(devices=4))


def test_exflow_plan_with_uneven_devices_is_refused(tmp_path):
    message = "Node, layer 0 = '3 experts on device 1': every device holds the same number"
    with pytest.raises(Refused, match=message):
        read(tmp_path, "a.csv", "Expert,Node\n0,0\n1,1\n2,1\n3,1\n", Hints(num_experts=4))


def test_exflow_plan(tmp_path):
    text = "Expert,Node\r\n0,1\r\n1,0\r\n3,0\r\n2,1\r\n"
    plan = read(tmp_path, "e.csv", text, Hints(num_experts=2))
    assert plan.placement.physical_to_logical_LP.tolist() == [[1, 0], [1, 0]]
    assert plan.placement.num_devices == 2


def test_sglang_jax_array(tmp_path):
    array = np.array([[1, 0, 2], [2, 1, 0]], np.int64)
    plan = read(tmp_path, "j.npy", npy_bytes(array), Hints(devices=3))
    assert plan.placement.physical_to_logical_LP.tolist() == array.tolist()
    convert_lib.convert(written_plan(plan, tmp_path), tmp_path / "k.npy", None, Hints())
    again = np.load(tmp_path / "k.npy", allow_pickle=False)
    assert again.dtype == np.int32


def topk_LTK() -> np.ndarray:
    """Three layers, the first dense; three tokens, the last one padding."""
    return np.array(
        [[[-1, -1]] * 3, [[3, 0], [1, 2], [-1, -1]], [[2, 1], [0, -1], [-1, -1]]], np.int32
    )


def check_sglang(trace: Trace) -> None:
    assert trace.expert_ids_TLK.tolist() == [[[3, 0], [2, 1]], [[1, 2], [0, 255]]]
    assert trace.layer_ids == (1, 2)
    assert trace.num_experts == 4


@pytest.mark.parametrize("name", ["d.npz", "d.npy", "d.json"])
def test_sglang_dump(name, tmp_path):
    content = {
        "d.npz": npz_bytes(topk_ids_of_layer=topk_LTK()),
        "d.npy": npy_bytes(topk_LTK()),
        "d.json": json.dumps({"topk_ids_of_layer": topk_LTK().tolist()}),
    }[name]
    hints = Hints()
    trace = read(tmp_path, name, content, hints)
    check_sglang(trace)
    assert trace.seq_len.tolist() == [2]
    notes = " ".join(hints.notes)
    for words in ("largest id + 1", "1 layers without", "1 tokens without", "one sequence"):
        assert words in notes
    assert "no weights: experts are taken to be in descending weight" in hints.notes


def test_sglang_records_are_sequences_and_slots_become_experts(tmp_path):
    record = {"topk_ids_of_layer": topk_LTK().tolist(), "forward_pass_id": 7}
    prefill = {**record, "extend_seq_lens": [1, 2]}
    empty = {"topk_ids_of_layer": [[], [], []]}
    dump = {
        "records": [prefill, empty, record],
        "last_physical_to_logical_map": [[0, 1, 2, 3, 4], [3, 2, 1, 0, 4], [4, 0, 1, 2, 3]],
    }
    hints = Hints()
    trace = read(tmp_path, "d.json", json.dumps(dump), hints)
    assert trace.seq_len.tolist() == [1, 1, 2]
    assert any("go on from pass to pass" in note for note in hints.notes)
    once = [[[0, 3], [1, 0]], [[2, 1], [4, 255]]]
    assert trace.expert_ids_TLK.tolist() == once * 2
    assert trace.num_experts == 5


def test_the_map_of_a_dump_says_how_many_experts_there_are(tmp_path):
    """The last ones were never chosen."""
    slots_LP = np.tile([5, 0, 1, 2, 3, 4, 6, 7, 5], (3, 1))
    path = tmp_path / "d.npz"
    np.savez(path, topk_ids_of_layer=topk_LTK(), last_physical_to_logical_map=slots_LP)
    hints = Hints()
    assert convert_lib.read(path, hints).value.num_experts == 8
    assert not any("largest id" in note for note in hints.notes)
    assert convert_lib.read(path, Hints(num_experts=8)).value.num_experts == 8
    for wrong in (6, 64):
        with pytest.raises(Refused, match=f"num_experts = {wrong}: the file says 8"):
            convert_lib.read(path, Hints(num_experts=wrong))


def test_dumps_of_all_ranks_are_one_trace_without_repeats(tmp_path):
    """Ranks 0 and 1 saw the same requests, rank 2 was idle, rank 3 had requests of its own."""

    def write(rank, ids_LTK):
        lens = tb.list_of(tb.number(ids_LTK.shape[1]))
        record = tb.dict_of(topk_ids_of_layer=tb.whole(ids_LTK, "0"), extend_seq_lens=lens)
        path = tmp_path / f"expert_distribution_recorder_17.5_{rank}.pt"
        path.write_bytes(tb.archive(record, np.ascontiguousarray(ids_LTK)))

    one_LTK = np.array([[[0, 3], [1, 2], [2, 0]]], "<i4")
    other_LTK = np.array([[[3, 1], [0, 1]]], "<i4")
    for rank, ids_LTK in enumerate((one_LTK, one_LTK, one_LTK[:, :0], other_LTK)):
        write(rank, ids_LTK)
    hints = Hints(num_experts=4)
    trace = convert_lib.read(tmp_path, hints).value
    assert trace.seq_len.tolist() == [3, 2]
    wanted = np.concatenate([one_LTK, other_LTK], axis=1)
    np.testing.assert_array_equal(trace.expert_ids_TLK.swapaxes(0, 1), wanted)
    assert any("repeat another one" in note for note in hints.notes)
    write(4, np.array([[[3, 1, 2]]], "<i4"))
    with pytest.raises(Refused, match=r"recorder_17.5_4.pt = .*as in expert_distribution_reco"):
        convert_lib.read(tmp_path, Hints(num_experts=4))


def test_identities_of_tokens_come_along_where_every_token_has_one(tmp_path):
    record = {"topk_ids_of_layer": topk_LTK().tolist()}
    named = {**record, "input_ids": [5, 70_000, 9], "extend_seq_lens": [1, 2]}
    hints = Hints()
    trace = read(tmp_path, "d.json", json.dumps({"records": [named, named]}), hints)
    assert trace.token_ids_T.tolist() == [5, 70_000] * 2  # the last one of a pass is padding
    assert any("can be read back" in note for note in hints.notes)
    npz = npz_bytes(topk_ids_of_layer=topk_LTK(), input_ids=np.array([5, 6, 7]))
    assert read(tmp_path, "d.npz", npz, Hints()).token_ids_T.tolist() == [5, 6]
    for fields in ({"records": [named, record]}, {**record, "input_ids": [1, 2, -3]}):
        hints = Hints()
        assert read(tmp_path, "d.json", json.dumps(fields), hints).token_ids_T is None
        assert any("input_ids are left out" in note for note in hints.notes)


def test_ascending_ids_are_called_out(tmp_path):
    hints = Hints()
    read(tmp_path, "d.npy", npy_bytes(np.array([[[0, 2], [1, 3]], [[0, 1], [2, 3]]])), hints)
    assert any("ascending id" in note for note in hints.notes)


def megatron_lines(**changes) -> str:
    lines = []
    for step in (1, 2):
        for rank in (0, 1):
            for layer in (2, 1):
                ids = [[layer, rank], [3, 0]][: 3 - step]
                record = {"step": step, "layer": layer, "rank": rank, "num_tokens": len(ids)}
                lines.append({**record, "topk": 2, "top_indices": ids, "block": "decoder"})
    lines[1] |= changes
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_megatron_trace(tmp_path):
    lines = megatron_lines().replace("[1, 1]", "[1, 2]")
    lines += json.dumps({"block": "mtp", "layer": 1}) + "\n"
    folder = tmp_path / "trace"
    folder.mkdir()
    half = len(lines.splitlines()) // 2
    for rank in (0, 1):
        part = lines.splitlines()[rank * half : (rank + 1) * half + rank]
        (folder / f"router_trace_rank{rank}.jsonl").write_text("\n".join(part))
    hints = Hints()
    for path in (folder, written(tmp_path, "one.jsonl", lines)):
        trace = convert_lib.read(path, hints).value
        assert trace.seq_len.tolist() == [2, 2, 1, 1]
        assert trace.layer_ids == (1, 2)
        assert trace.expert_ids_TLK[:, 0].tolist() == [
            [1, 0], [3, 0], [1, 2], [3, 0], [1, 0], [1, 2]
        ]  # fmt: skip
        assert trace.seq_name == (
            "step 1 rank 0",
            "step 1 rank 1",
            "step 2 rank 0",
            "step 2 rank 1",
        )
    assert any("multi-token prediction" in note for note in hints.notes)


def test_exflow_trace(tmp_path):
    array = np.array([[0, 1], [7, 2], [3, 3]])
    trace = read(tmp_path, "t.npy", npy_bytes(array), Hints(num_experts=8), wants_trace=True)
    assert trace.expert_ids_TLK[:, :, 0].tolist() == array.tolist()
    assert trace.seq_len.tolist() == [3]


# how to write a trace -> format, file name
TRACES = {
    "own": ("own", "again.npz"),
    "sglang": ("sglang", "again.npz"),
    "sglang, text": ("sglang", "again.json"),
    "megatron": ("megatron", "again.jsonl"),
    "exflow": ("exflow", "again.npy"),
}


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("experts", [8, 300])
@pytest.mark.parametrize("top_k", [1, 3])
def test_our_trace_to_format_to_ours_is_the_identity(name, experts, top_k, tmp_path):
    rng = np.random.default_rng(top_k)
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(40)]).reshape(20, 2, top_k)
    ids = ids.astype(np.uint8 if experts <= 255 else np.uint16)
    ids[3, 1, -1] = ids[7, 0, -1] = np.iinfo(ids.dtype).max
    one, layers = name == "exflow", (0, 1) if name == "exflow" else (3, 5)
    lens = np.array([20] if one else [5, 9, 6])
    trace = Trace(ids[:, :, :1] if one else ids, experts, lens, layer_ids=layers)
    trace_lib.save(trace, tmp_path / "t.npz")
    form, path = TRACES[name][0], tmp_path / TRACES[name][1]
    done = convert_lib.convert(tmp_path / "t.npz", path, form, Hints())
    assert done.written == form
    assert not any("lost" in note for note in done.notes)
    convert_lib.convert(path, tmp_path / "back.npz", None, Hints(num_experts=experts))
    again = trace_lib.load(tmp_path / "back.npz")
    np.testing.assert_array_equal(again.expert_ids_TLK, trace.expert_ids_TLK)
    assert again.expert_ids_TLK.dtype == trace.expert_ids_TLK.dtype
    np.testing.assert_array_equal(again.seq_len, trace.seq_len)
    assert (again.num_experts, again.layer_ids) == (experts, layers)


def test_what_a_form_of_traces_cannot_hold_is_said(tmp_path):
    ids = np.array([[[1, 0]], [[2, 1]]], np.uint8)
    more = {
        "expert_weights_TLK": np.full(ids.shape, 0.5, np.float16),
        "seq_name": ("a", "b"),
        "seq_home": np.array([0, 1]),
        "token_ids_T": np.array([7, 9]),
        "layer_ids": (4,),
    }
    trace_lib.save(Trace(ids, 4, np.array([1, 1]), **more), tmp_path / "t.npz")
    always = {"weights", "names of sequences", "homes of sequences"}
    lost = {
        "sglang": always,
        "sglang, text": always,
        "megatron": always | {"identities"},
        "exflow": always | {"identities", "borders of sequences", "numbers of layers"},
    }
    for name, words in lost.items():
        form, path = TRACES[name][0], tmp_path / TRACES[name][1]
        notes = convert_lib.convert(tmp_path / "t.npz", path, form, Hints()).notes
        assert {note.split(" are lost")[0] for note in notes if "are lost" in note} == words
        said = "to read it back, give --num-experts=4" in notes
        assert said == (not name.startswith("sglang")), name
        assert any("only the best of 2" in note for note in notes) == (name == "exflow")
    for name in ("again.npz", "again.json"):
        hints = Hints()
        back = convert_lib.read(tmp_path / name, hints).value
        assert back.num_experts == 4
        assert back.token_ids_T.tolist() == [7, 9]
        assert (back.layer_ids, back.seq_len.tolist()) == ((4,), [1, 1])
        assert not any("ids are taken as experts" in note for note in hints.notes)


def test_text_that_could_not_be_read_back_is_not_written(tmp_path, monkeypatch):
    trace_lib.save(Trace(np.zeros((9, 1, 1), np.uint8), 4, np.array([9])), tmp_path / "t.npz")
    convert_lib.convert(tmp_path / "t.npz", tmp_path / "o.json", "sglang", Hints())
    size = (tmp_path / "o.json").stat().st_size
    for most in (size, size - 1):
        monkeypatch.setattr(raw, "MAX_TEXT", most)
        (tmp_path / "o.json").unlink()
        if most == size:
            convert_lib.convert(tmp_path / "t.npz", tmp_path / "o.json", "sglang", Hints())
            convert_lib.read(tmp_path / "o.json", Hints())
    with pytest.raises(Refused, match="that are read back"):
        convert_lib.convert(tmp_path / "t.npz", tmp_path / "o.json", "sglang", Hints())
    assert not (tmp_path / "o.json").exists()


def test_counts_go_round_and_never_become_a_trace(tmp_path, capsys):
    count_SLE = np.zeros((2, 3, 4), np.int64)
    count_SLE[:, 1:] = np.arange(16).reshape(2, 2, 4)
    source = written(tmp_path, "c.npz", npz_bytes(logical_count=count_SLE))
    path = source
    for name in ("a.json", "b.safetensors", "c.json"):
        assert run("convert", path, tmp_path / name) == 0
        path = tmp_path / name
    again = convert_lib.read(path, Hints()).value
    assert isinstance(again, Counts)
    assert again.layer_ids == (1, 2)
    np.testing.assert_array_equal(again.count_SLE, count_SLE[:, 1:])
    capsys.readouterr()
    assert run("convert", source, tmp_path / "t.npz") == 1
    assert "do not say which experts a token chose together" in capsys.readouterr().err
    array = written(tmp_path, "logical_count.npy", npy_bytes(count_SLE[0]))
    np.testing.assert_array_equal(
        convert_lib.read(array, Hints()).value.count_SLE, count_SLE[:1, 1:]
    )


def test_counts_of_a_trace(tmp_path):
    trace = synthetic.realistic(num_tokens=60, num_layers=2, num_experts=8, top_k=2, seed=0)
    trace_lib.save(trace, tmp_path / "t.npz")
    assert run("convert", tmp_path / "t.npz", tmp_path / "c.safetensors") == 0
    tensors = safetensors.read(tmp_path / "c.safetensors")
    load_LE = affinity.load_LE(trace)
    assert sorted(tensors) == ["0_0", "0_1"]
    np.testing.assert_array_equal(tensors["0_1"], load_LE[1])
    hints = Hints()
    convert_lib.convert(tmp_path / "t.npz", tmp_path / "c.json", None, hints)
    assert "--format=sglang writes the experts of every token" in hints.notes
    assert isinstance(convert_lib.read(tmp_path / "c.json", Hints()).value, Counts)


def test_safetensors_by_hand(tmp_path):
    header = {
        "__metadata__": {"a": "b"},
        "5_3": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]},
        "5_4": {"dtype": "U8", "shape": [2], "data_offsets": [8, 10]},
    }
    counts = read(
        tmp_path, "c.safetensors", safetensors_bytes(header, struct.pack("<2i2B", 7, 8, 9, 1))
    )
    assert counts.count_SLE.tolist() == [[[7, 8], [9, 1]]]
    assert counts.layer_ids == (3, 4)


def test_counts_of_all_ranks_are_added_up(tmp_path):
    folder = tmp_path / "statistics"
    folder.mkdir()
    for rank in (0, 1, 10):
        one = {"3_1": np.array([rank, 1]), "4_1": np.array([1, rank])}
        safetensors.write(folder / f"rank{rank}.safetensors", one)
    safetensors.write(folder / "rank0_raw.safetensors", {"0_0": np.array([9])})
    counts = convert_lib.read(folder, Hints()).value
    assert counts.count_SLE.tolist() == [[[11, 3]], [[3, 11]]]
    safetensors.write(folder / "rank2.safetensors", {"3_1": np.array([1, 2, 3])})
    with pytest.raises(Refused, match=r"rank2.safetensors 3_1 .*others \(2,\)"):
        convert_lib.read(folder, Hints())


def test_steps_and_layers_of_counts_are_in_order(tmp_path):
    tensors = {f"{step}_{layer}": np.array([step, layer]) for step in (8, 5) for layer in (9, 1)}
    safetensors.write(tmp_path / "c.safetensors", tensors)
    counts = convert_lib.read(tmp_path / "c.safetensors", Hints()).value
    assert counts.layer_ids == (1, 9)
    assert counts.count_SLE.tolist() == [[[5, 1], [5, 9]], [[8, 1], [8, 9]]]


def test_arrays_of_old_programs_are_read(tmp_path):
    """Python 2 wrote long integers into headers: numpy reads them with a warning."""
    old = npy_bytes(np.array([[1, 0]], np.int32)).replace(b"(1, 2), ", b"(1L, 2L)")
    plan = read(tmp_path, "j.npy", old, Hints(devices=1))
    assert plan.placement.physical_to_logical_LP.tolist() == [[1, 0]]


# The command.


def test_command_prints_what_it_read_lost_and_wrote(tmp_path, capsys):
    source = written_plan(plain(), tmp_path)
    assert run("convert", source, tmp_path / "t.yaml") == 0
    text = capsys.readouterr().out
    assert "3 layers x 8 experts on 4 devices" in text
    assert "note: the number of devices is lost: 4" in text
    assert run("convert", tmp_path / "t.yaml", tmp_path / "b.json", "--devices=4", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["digest"] == plain().digest
    assert (answer["kind"], answer["in_format"], answer["out_format"]) == (
        "plan", "TensorRT-LLM", "own"
    )  # fmt: skip


def test_command_makes_a_trace_that_solve_reads(tmp_path, capsys):
    source = written(tmp_path, "d.npz", npz_bytes(topk_ids_of_layer=topk_LTK()))
    out = tmp_path / "t.npz"
    assert run("convert", source, out, "--num-experts=8", "--layer-ids=2") == 0
    assert f"Read {source}: SGLang trace: 2 tokens in 1 sequences" in capsys.readouterr().out
    trace = trace_lib.load(out)
    assert (trace.layer_ids, trace.num_experts) == ((2,), 8)
    assert run("convert", out, tmp_path / "again.npz") == 0
    assert f"Read {out}: own SGLang trace: 2 tokens" in capsys.readouterr().out
    assert run("evaluate", out, written_plan_for(trace, tmp_path)) == 0


def written_plan_for(trace: Trace, tmp_path):
    placement = Placement.contiguous(trace.num_layers, trace.num_experts, 2)
    return written_plan(Plan(placement, trace.layer_ids), tmp_path)


COMMANDS = {
    "no such file": (["none.json", "o.json"], "does not exist"),
    "unknown extension": (["p.json", "o.txt"], "a plan is written as"),
    "format of another extension": (["p.json", "o.json", "--format=exflow"], "own or sglang"),
    "plan as a trace": (["p.json", "o.npz"], "a plan is written as"),
    "trace as a plan": (["t.npz", "o.yaml"], "a trace is written as .npz"),
    "trace as counts of another format": (["t.npz", "o.json", "--format=vllm"], "format vllm"),
    "trace in vllm's form": (["t.npz", "o.npz", "--format=vllm"], "own or sglang"),
    "trace in sglang's form, as lines": (["t.npz", "o.jsonl", "--format=sglang"], "megatron"),
    "devices contradict": (["p.json", "o.json", "--devices=2"], "the file says 4"),
    "experts contradict": (["p.json", "o.json", "--num-experts=9"], "the file says 8"),
    "layers of our own": (["p.json", "o.json", "--layer-ids=3-5"], "number their layers"),
    "layers of our trace": (["t.npz", "o.npz", "--layer-ids=7"], "number their layers"),
    "devices of a trace": (["t.npz", "o.npz", "--devices=4"], "is only read for plans"),
    "stages of our trace": (
        ["t.npz", "o.npz", "--pipeline-stages=2"],
        "pipeline_stages = 2: is only read for Megatron-LM's traces, and this is our own trace. ",
    ),
    "layer base of a plan": (
        ["t.yaml", "o.json", "--devices=2", "--layer-base=0"],
        "layer_base = 0: is only read for Megatron-LM's traces, and this is TensorRT-LLM's plan. ",
    ),
    "layers unreadable": (["p.json", "o.json", "--layer-ids=3..5"], "ranges such as"),
    "layers falling": (["p.json", "o.json", "--layer-ids=5-3"], "rising"),
    "layers without end": (["p.json", "o.json", "--layer-ids=0-999999"], "at most 65536"),
    "layers twice": (["p.json", "o.json", "--layer-ids=1,1"], "distinct"),
    "layer that the file has not": (["t.yaml", "o.json", "--devices=2", "--layer-ids=5"], "3-4"),
    "devices missing": (["t.yaml", "o.json"], "Add --devices"),
    "devices zero": (["t.yaml", "o.json", "--devices=0"], "devices"),
    "devices do not divide": (["t.yaml", "o.json", "--devices=3"], "must divide"),
    "experts contradict a map": (["t.yaml", "o.json", "--num-experts=4"], "the file says 3"),
    "pickle": (["p.pkl", "o.npz"], "never read"),
    "pickle in the name of torch": (["p.pt", "o.npz"], "never read"),
    "folder without traces": (["empty", "o.npz"], "no router_trace_rank"),
    "output is a folder": (["p.json", "empty"], "is a folder"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_refuses_in_one_line_and_writes_nothing(name, tmp_path, capsys):
    plain().write(tmp_path / "p.json")
    trace_lib.save(Trace(np.zeros((2, 1, 1), np.uint8), 4, np.array([2])), tmp_path / "t.npz")
    written(tmp_path, "t.yaml", TENSORRT)
    written(tmp_path, "p.pt", pickle.dumps({}))
    written(tmp_path, "p.pkl", pickle.dumps({}))
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    (source, target, *options), message = COMMANDS[name]
    assert run("convert", tmp_path / source, tmp_path / target, *options) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_usage_error_exits_with_two():
    with pytest.raises(SystemExit) as stopped:
        run("convert", "a.json", "b.json", "--format=word")
    assert stopped.value.code == 2


# Bad files: name -> (file name, content, part of the message).

HUGE = {"descr": "<i8", "fortran_order": False, "shape": (2**40, 2**10)}


def huge_npy() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, HUGE)
    return buffer.getvalue() + b"\0" * 64


def sglang(rows) -> str:
    return json.dumps({"physical_to_logical_map": rows})


def tensor(**changes) -> dict:
    return {"0_1": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8], **changes}}


BAD = {
    "json: truncated": ("a.json", '{"physical_to_logical_map": [[0, 1', "not whole JSON"),
    "json: empty": ("a.json", "", "not whole JSON"),
    "json: a list": ("a.json", "[]", "JSON object"),
    "json: nothing known": ("a.json", '{"a": 1}', "is needed"),
    "json: bomb of lists": ("a.json", "[" * 100_000, "not whole JSON"),
    "json: bomb of objects": ("a.json", '{"a":' * 100_000, "not whole JSON"),
    "json: bomb inside the map": (
        "a.json", '{"physical_to_logical_map": ' + "[" * 800 + "]" * 800 + "}", "list"
    ),
    "json: huge number": ("a.json", sglang([[0, 10**30]]), r"map[0][1]"),
    "json: number of 10,000 digits": (
        "a.json", '{"physical_to_logical_map": [[' + "1" * 10_000 + "]]}", "not whole JSON"
    ),
    "json: NaN": ("a.json", '{"physical_to_logical_map": [[NaN]]}', "NaN"),
    "json: key twice": ("a.json", '{"records": [], "records": []}', "stands twice"),
    "json: not UTF-8": ("a.json", b'{"physical_to_logical_map": "\xff\xfe"}', "UTF-8"),
    "json: UTF-16": ("a.json", sglang([[0]]).encode("utf-16"), "UTF-8"),
    "json: map and counts": (
        "a.json", '{"physical_to_logical_map": [[0]], "logical_count": [[1]]}', "versions of SGLang"
    ),
    "sglang: flat": ("a.json", sglang([0, 1]), "map[0]"),
    "sglang: ragged": ("a.json", sglang([[0, 1], [0]]), "map[1]"),
    "sglang: no layers": ("a.json", sglang([]), "not empty"),
    "sglang: text": ("a.json", sglang([["0", "1"]]), "map[0][0]"),
    "sglang: negative": ("a.json", sglang([[0, -1]]), "-1"),
    "sglang: expert missing": ("a.json", sglang([[0, 1], [0, 0]]), "expert 1"),
    "sglang: id out of range": ("a.json", sglang([[0, 7]]), "needs a slot"),
    "vllm: experts contradict": (
        "a.json",
        '{"physical_to_logical_map": [[0, 1]], "ep_size": 2, "num_logical_experts": 3}',
        "the map has 2",
    ),
    "vllm: ranks contradict": (
        "a.json",
        '{"physical_to_logical_map": [[0, 1]], "ep_size": 2, "expert_to_ep_rank": [[1, 0]]}',
        "other ranks",
    ),
    "vllm: rank out of range": (
        "a.json", '{"expert_to_ep_rank": [[0, 2]], "ep_size": 2}', "0 to 1"
    ),
    "vllm: ranks uneven": (
        "a.json",
        '{"expert_to_ep_rank": [[0, 1, 1, 0], [0, 0, 0, 1]]}',
        "expert_to_ep_rank, layer 1 = '3 experts on device 0': every device holds the same number",
    ),
    "vllm: one list, layers unknown": ("a.json", '{"expert_to_ep_rank": [0, 1]}', "--layer-ids"),
    "vllm: ep_size a text": ("a.json", '{"ep_size": "2"}', "ep_size"),
    "vllm: a billion layers": (
        "a.json", '{"expert_to_ep_rank": [0, 1], "num_moe_layers": 2000000000}', "--layer-ids"
    ),
    "yaml: empty": ("a.yaml", "", "num_slots"),
    "yaml: no layers": ("a.yaml", "num_slots: 4\n", "no layer"),
    "yaml: duplicate layer": ("a.yaml", TENSORRT.replace("4:", "3:"), "stands twice"),
    "yaml: duplicate key": ("a.yaml", TENSORRT + "num_slots: 4\n", "stands twice"),
    "yaml: duplicate map": ("a.yaml", TENSORRT + "initial_global_assignments:\n", "line 8"),
    "yaml: unknown key": ("a.yaml", TENSORRT + "a: 1\n", "line 8"),
    "yaml: anchor": ("a.yaml", TENSORRT.replace("[1,", "&a [1,"), "line 3"),
    "yaml: block list": ("a.yaml", "initial_global_assignments:\n  3:\n  - 1\n", "one line"),
    "yaml: slots differ": ("a.yaml", TENSORRT.replace("num_slots: 4", "num_slots: 5"), "slots"),
    "yaml: empty list": ("a.yaml", TENSORRT.replace("1, 0, 2, 1", ""), "between commas"),
    "yaml: truncated": ("a.yaml", TENSORRT[:82], "line 3"),
    "yaml: tab": ("a.yaml", TENSORRT.replace("  4", "\t4"), "line 3"),
    "yaml: negative": ("a.yaml", TENSORRT.replace("[1,", "[-1,"), "line 3"),
    "yaml: id out of range": ("a.yaml", TENSORRT.replace("[1,", "[9,"), "needs a slot"),
    "yaml: digits of another script": ("a.yaml", TENSORRT.replace("[1,", "[١,"), "line 3"),
    "yaml: layer beyond reason": ("a.yaml", TENSORRT.replace("4:", "99999999:"), "line 3"),
    "csv: empty": ("a.csv", "", "Expert,Node"),
    "csv: header": ("a.csv", "expert,node\n0,0\n", "Expert,Node"),
    "csv: header only": ("a.csv", "Expert,Node\n", "no line"),
    "csv: duplicate": ("a.csv", "Expert,Node\n0,0\n0,1\n", "line 3"),
    "csv: missing": ("a.csv", "Expert,Node\n0,0\n2,1\n", "Expert = 1"),
    "csv: huge id": ("a.csv", "Expert,Node\n999999999,0\n", "Expert = 0"),
    "csv: negative": ("a.csv", "Expert,Node\n0,-1\n", "line 2"),
    "csv: three columns": ("a.csv", "Expert,Node\n0,0,0\n", "line 2"),
    "csv: experts unknown": ("a.csv", "Expert,Node\n0,0\n1,1\n", "--num-experts"),
    "npy: truncated": ("a.npy", npy_bytes(np.zeros((2, 2), np.int32))[:-3], "present"),
    "npy: header only": ("a.npy", npy_bytes(np.zeros((2, 2), np.int32))[:50], "not a whole .npy"),
    "npy: huge claim": ("a.npy", huge_npy(), "claimed"),
    "npy: header with a bracket too many": (
        "a.npy", npy_bytes(np.zeros((1, 2), np.int32)).replace(b"), }  ", b"), }})"), "whole .npy"
    ),
    "npy: pickled": ("a.npy", npy_bytes(np.array([{}, None], object)), "pickled"),
    "npy: rank one": ("a.npy", npy_bytes(np.zeros(4, np.int32)), "layers, slots"),
    "npy: rank four": ("a.npy", npy_bytes(np.zeros((1, 1, 1, 1), np.int32)), "layers, slots"),
    "npy: floats": ("a.npy", npy_bytes(np.zeros((2, 2))), "whole numbers"),
    "npy: beyond int32": ("a.npy", npy_bytes(np.full((1, 1), 2**40)), "32 bits"),
    "npy: empty": ("a.npy", npy_bytes(np.zeros((0, 2), np.int32)), "empty"),
    "npy: token with an expert twice": ("a.npy", npy_bytes(np.ones((1, 2, 2), int)), "once per"),
    "npy: ids below -1": ("a.npy", npy_bytes(np.array([[[-2], [3]]])), "0 to 3"),
    "npy: no token chose": ("a.npy", npy_bytes(np.full((1, 2, 1), -1)), "no token chose"),
    "npy: more experts than ids hold": ("a.npy", npy_bytes(np.full((1, 1, 1), 70_000)), "65535"),
    "npz: nothing known": ("a.npz", npz_bytes(a=np.zeros(3)), "expert_ids"),
    "npz: truncated": ("a.npz", npz_bytes(topk_ids_of_layer=topk_LTK())[:-20], "not a whole .npz"),
    "npz: wrong rank": ("a.npz", npz_bytes(topk_ids_of_layer=np.zeros((2, 2), int)), "tokens"),
    "npz: lengths": (
        "a.npz",
        npz_bytes(topk_ids_of_layer=topk_LTK(), extend_seq_lens=np.array([1, 1])),
        "3 in all",
    ),
    "npz: slots out of range": (
        "a.npz",
        npz_bytes(
            topk_ids_of_layer=topk_LTK(), last_physical_to_logical_map=np.zeros((3, 2), int)
        ),
        "3 layers of 2 slots",
    ),
    "npz: counts negative": ("a.npz", npz_bytes(logical_count=np.full((1, 1, 1), -1)), "negative"),
    "npz: counts all zero": ("a.npz", npz_bytes(logical_count=np.zeros((1, 1, 1), int)), "counted"),
    "dump: records empty": ("a.json", '{"records": []}', "forward passes"),
    "dump: records a number": ("a.json", '{"records": 3}', "forward passes"),
    "dump: counts only": ("a.json", '{"records": [{"global_physical_count": []}]}', "per_token"),
    "dump: no tokens": ("a.json", '{"records": [{"topk_ids_of_layer": [[]]}]}', "no token"),
    "dump: layers differ": (
        "a.json",
        '{"records": [{"topk_ids_of_layer": [[[0]]]}, {"topk_ids_of_layer": [[[0]], [[0]]]}]}',
        "first record",
    ),
    "jsonl: empty": ("a.jsonl", "", "no token"),
    "jsonl: truncated": ("a.jsonl", megatron_lines()[:-20], "a.jsonl:8"),
    "jsonl: not UTF-8": ("a.jsonl", b"\xff\xfe\n", "UTF-8"),
    "jsonl: missing layer": ("a.jsonl", megatron_lines(layer=3), "is missing"),
    "jsonl: duplicate layer": ("a.jsonl", megatron_lines(layer=2), "layer = 1: is missing"),
    "jsonl: tokens": ("a.jsonl", megatron_lines(num_tokens=3), "num_tokens"),
    "jsonl: topk": ("a.jsonl", megatron_lines(topk=3), "topk"),
    "jsonl: topk a text": ("a.jsonl", megatron_lines(topk="2"), "topk"),
    "jsonl: no rank": ("a.jsonl", megatron_lines(rank=None), "rank"),
    "jsonl: ids a text": ("a.jsonl", megatron_lines(top_indices="ids"), "top_indices"),
    "jsonl: other tokens": (
        "a.jsonl", megatron_lines(num_tokens=1, top_indices=[[0, 1]]), "same tokens"
    ),
    "safetensors: empty": ("a.safetensors", b"", "header length"),
    "safetensors: huge header": ("a.safetensors", safetensors_bytes({}, b"", 2**63), "header"),
    "safetensors: header beyond the file": (
        "a.safetensors", safetensors_bytes({}, b"", 100), "header length"
    ),
    "safetensors: no tensor": ("a.safetensors", safetensors_bytes({}, b""), "no tensor"),
    "safetensors: header not JSON": ("a.safetensors", safetensors_bytes(b"{{", b""), "JSON"),
    "safetensors: huge shape": (
        "a.safetensors", safetensors_bytes(tensor(shape=[2**40, 2**30]), bytes(8)), "data_offsets"
    ),
    "safetensors: huge and consistent": (
        "a.safetensors",
        safetensors_bytes(tensor(shape=[2**40], data_offsets=[0, 2**42]), bytes(8)),
        "present",
    ),
    "safetensors: truncated": ("a.safetensors", safetensors_bytes(tensor(), bytes(7)), "present"),
    "safetensors: hole": (
        "a.safetensors", safetensors_bytes(tensor(data_offsets=[4, 12]), bytes(12)), "ends at 0"
    ),
    "safetensors: negative": (
        "a.safetensors", safetensors_bytes(tensor(shape=[-2]), bytes(8)), "whole numbers"
    ),
    "safetensors: floats": (
        "a.safetensors", safetensors_bytes(tensor(dtype="F32"), bytes(8)), "I64"
    ),
    "safetensors: name": (
        "a.safetensors",
        safetensors_bytes({"weight": tensor()["0_1"]}, bytes(8)),
        "iteration_layer",
    ),
    "safetensors: an iteration misses a layer": (
        "a.safetensors",
        safetensors_bytes(
            {
                "0_1": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                "1_2": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]},
            },
            bytes(2),
        ),
        "misses a layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_refused_in_one_line(name, tmp_path):
    file_name, content, message = BAD[name]
    hints = Hints() if "vllm" in name or "csv" in name else Hints(devices=1)
    with pytest.raises(Refused) as refused:
        read(tmp_path, file_name, content, hints)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("depth", range(100, 1000, 50))
def test_deep_lists_are_refused_at_any_depth(depth, tmp_path):
    """Also where JSON still reads them, and printing them would be the error."""
    deep = "[" * depth + "]" * depth
    for text in (f'{{"records": {deep}}}', f'{{"ep_size": {deep}}}', deep):
        with pytest.raises(Refused):
            read(tmp_path, "a.json", text)


def test_layer_ids_are_parsed():
    assert hints_lib.parse_layer_ids("3-5,9") == (3, 4, 5, 9)
    assert hints_lib.shown_layers((3, 4, 5)) == "3-5"
    assert hints_lib.shown_layers((3, 5)) == "3,5"
