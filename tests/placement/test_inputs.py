"""TRACE arguments of every command: any format, by content; counts where they are enough."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import __main__ as command_line
from moe_jax.placement import balance, replication
from moe_jax.placement.baselines import eplb
from moe_jax.placement.formats import safetensors
from moe_jax.placement.plan import Placement, Plan
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from tests import torch_bytes as tb

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def run(*words) -> int:
    return command_line.main([str(word) for word in words])


def ids_LTK() -> np.ndarray:
    trace = synthetic.realistic(num_tokens=120, num_layers=3, num_experts=8, top_k=2, seed=0)
    return np.ascontiguousarray(trace.expert_ids_TLK.transpose(1, 0, 2), np.int32)


LENS = [30, 20, 40, 30]


def dump(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The same trace in the format that the name says."""
    path, ids = folder / name, ids_LTK()
    if name == "t.npz":
        np.savez(path, topk_ids_of_layer=ids, extend_seq_lens=np.array(LENS))
    elif name == "t.json":
        fields = {"topk_ids_of_layer": ids.tolist(), "extend_seq_lens": LENS}
        path.write_text(json.dumps(fields))
    elif name == "t.pt":
        pickled = tb.dict_of(
            topk_ids_of_layer=tb.whole(ids, "0"), extend_seq_lens=tb.list_of(*map(tb.number, LENS))
        )
        path.write_bytes(tb.archive(pickled, ids))
    elif name == "megatron":
        path.mkdir()
        for rank, part in enumerate(np.split(ids, np.cumsum(LENS)[:-1], axis=1)):
            lines = [
                {
                    "step": 0,
                    "layer": layer,
                    "rank": rank,
                    "num_tokens": part.shape[1],
                    "top_indices": part[layer].tolist(),
                }
                for layer in range(3)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (path / f"router_trace_rank{rank}.jsonl").write_text(text)
    elif name == "own":
        trace = trace_lib.Trace(ids.transpose(1, 0, 2).astype(np.uint8), 8, np.array(LENS))
        trace_lib.save(trace, path)
    return path


AT_ONCE = ("contiguous", "round-robin", "EPLB-style packing")
FORMATS = ("t.npz", "t.json", "t.pt", "megatron", "own")


@pytest.mark.parametrize("name", FORMATS)
def test_every_command_reads_every_format(name, tmp_path, capsys):
    """The figures are those of our own file, whatever the format."""
    answers = []
    for number, source in enumerate((dump(tmp_path, name), dump(tmp_path, "own"))):
        out = tmp_path / f"p{number}.json"
        few = ("--devices=4", "--time-limit=0", "--json")
        found = []
        for words in (
            ("solve", source, *few, f"--out={out}"),
            ("evaluate", source, out, "--json"),
            ("compare", source, *few),
            ("verdict", source, *few),
            ("homes", source, "--devices=4", "--time-limit=1", "--json", f"--plan={out}"),
        ):
            assert run(*words) == 0, words
            answer = json.loads(capsys.readouterr().out)
            if words[0] == "compare":  # the others search, and the time limit cuts them anywhere
                answer["methods"] = [m for m in answer["methods"] if m["name"] in AT_ONCE]
                assert len(answer["methods"]) == len(AT_ONCE)
            found.append(answer)
        answers.append(found)
    compared = zip(*answers, strict=True)
    if name == "megatron":  # its sequences have names, which are one more rule for homes
        compared = list(compared)[:-1]
    for mine, ours in compared:
        assert without_names(mine) == without_names(ours)


def without_names(value):
    """An answer without times, paths and what names or models change (digests of traces)."""
    loose = ("seconds", "digest", "out", "plan", "history", "elapsed")
    if isinstance(value, dict):
        return {
            key: without_names(inner)
            for key, inner in value.items()
            if not any(word in key for word in loose) or isinstance(inner, (dict, list))
        }
    if isinstance(value, list):
        return [without_names(inner) for inner in value]
    return pytest.approx(value) if isinstance(value, float) else value


def test_what_was_inferred_is_said_on_stderr(tmp_path, capsys):
    assert run("solve", dump(tmp_path, "t.pt"), "--devices=4", "--time-limit=0", "--json",
               f"--out={tmp_path / 'p.json'}") == 0  # fmt: skip
    captured = capsys.readouterr()
    json.loads(captured.out)
    assert "note: num_experts 8 is the largest id + 1" in captured.err


def test_exflow_trace_and_plan_in_place_of_a_trace(tmp_path, capsys):
    np.save(tmp_path / "exflow.npy", ids_LTK()[:, :, 0].T)
    out = tmp_path / "p.json"
    assert run("solve", tmp_path / "exflow.npy", "--devices=4", "--time-limit=0",
               f"--out={out}") == 0  # fmt: skip
    assert "no half is held out" in capsys.readouterr().err
    assert run("solve", out, "--devices=4", f"--out={tmp_path / 'q.json'}") == 1
    assert "is a plan" in capsys.readouterr().err


# Counts.


def counts(seed: int = 0, steps: int = 6, layers: int = 3, experts: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 50, size=(steps, layers, experts)) ** 2


def counted(folder: pathlib.Path, name: str, count_SLE: np.ndarray) -> pathlib.Path:
    path = folder / name
    if name.endswith(".pt"):
        path.write_bytes(tb.archive(tb.dict_of(logical_count=tb.whole(count_SLE, "0")), count_SLE))
    elif name.endswith(".safetensors"):
        keys = np.ndindex(*count_SLE.shape[:2])
        safetensors.write(path, {f"{s}_{layer}": count_SLE[s, layer] for s, layer in keys})
    else:
        path.write_text(json.dumps({"logical_count": count_SLE.tolist()}))
    return path


@pytest.mark.parametrize("name", ["c.pt", "c.safetensors", "c.json"])
@pytest.mark.parametrize("slots", [8, 12])
def test_counts_are_enough_for_balance(name, slots, tmp_path, capsys):
    """Planned on half of the steps, judged on the others, counted here by loops."""
    count_SLE, out = counts(), tmp_path / "p.json"
    source = counted(tmp_path, name, count_SLE)
    words = ("solve", source, "--devices=4", "--objective=load", f"--out={out}", f"--slots={slots}")
    assert run(*words, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    order = np.random.default_rng(0).permutation(6)
    plan = Plan.read(out)
    slots_LP = plan.placement.physical_to_logical_LP
    for steps, said in (
        (order[:3], answer["objective"]),
        (order[3:], answer["held_out"]["load_max_over_mean"]["mean"]),
    ):
        over = []
        for layer, load_E in enumerate(count_SLE[steps].sum(axis=0)):
            copies_E = np.bincount(slots_LP[layer], minlength=8)
            load_M = [sum(load_E[e] / copies_E[e] for e in one) for one in
                      slots_LP[layer].reshape(4, -1)]  # fmt: skip
            over.append(max(load_M) / (sum(load_M) / 4))
        assert said == pytest.approx(np.mean(over))
    assert answer["bound"] <= answer["objective"] <= answer["methods"]["contiguous"]["worst"]
    assert plan.digest == answer["plan_digest"]
    assert run(*words) == 0
    text = capsys.readouterr().out
    assert "a random half of the 6 steps" in text
    assert "EPLB" in text


@pytest.mark.parametrize("seed", range(6))
def test_balance_equals_brute_force(seed):
    load_LE = np.random.default_rng(seed).lognormal(0, 1.2, (2, 6))
    best = []
    for load_E in load_LE:
        splits = itertools.combinations(range(6), 3)
        best.append(min(max(load_E[list(one)].sum(), load_E.sum() - load_E[list(one)].sum())
                        for one in splits) / (load_E.sum() / 2))  # fmt: skip
    found = balance.solve(load_LE, 2, time_limit=5)
    assert found.objective == pytest.approx(np.mean(best), rel=1e-6)
    assert found.bound <= np.mean(best)
    assert found.gap >= 0


@pytest.mark.parametrize("seed", range(4))
def test_replicas_are_as_even_as_eplbs_on_every_layer(seed):
    load_LE = np.random.default_rng(seed).lognormal(0, 1, (4, 16))
    found = balance.solve(load_LE, 4, 24).placement
    maps = eplb.rebalance_experts(load_LE, 24, 1, 1, 4)
    theirs = eplb.Published(maps.physical_to_logical_LR, 16, 4)
    for load_E, mine_P, their_P in zip(
        load_LE, found.physical_to_logical_LP, theirs.physical_to_logical_LP, strict=True
    ):
        mine, their = (
            replication.device_loads(load_E[None], row_P[None].astype(int), 4).max()
            for row_P in (mine_P, their_P)
        )
        assert mine <= their * (1 + 1e-9)


def test_slots_where_devices_do_not_divide_the_experts():
    load_LE = np.random.default_rng(0).lognormal(0, 1, (2, 60))
    assert balance.solve(load_LE, 8, 64).placement.num_slots == 64
    assert list(balance.others(load_LE, 8, 64)) == ["EPLB global"]
    with pytest.raises(Refused, match="must divide the 60"):
        balance.solve(load_LE, 8)


def test_layers_without_counts_in_the_half_planned_on():
    load_LE = np.array([[0, 0, 0, 0], [4, 1, 1, 4]])
    found = balance.solve(load_LE, 2, time_limit=0)
    assert (found.objective, found.bound) == pytest.approx((1.0, 1.0))
    assert balance.spread(load_LE, Placement.contiguous(2, 4, 2)).worst == pytest.approx(1.0)


def test_one_step_has_no_half_to_judge_on(tmp_path, capsys):
    source = counted(tmp_path, "c.json", counts(steps=1))
    words = ("solve", source, "--devices=4", "--objective=load", f"--out={tmp_path / 'p.json'}")
    assert run(*words, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["held_out"] is None
    assert "no held-out half" in answer["planned_on"]
    assert Plan.read(tmp_path / "p.json").placement.num_devices == 4


UNFIT = {
    "seconds": (["solve", "--devices=4", "--out=p.json"], "seconds have no value"),
    "exflow": (["solve", "--devices=4", "--out=p.json", "--objective=exflow"], "--objective=load"),
    "cap": (["solve", "--devices=4", "--out=p.json", "--objective=load", "--load-cap=1.1"], "cap"),
    "page": (["solve", "--devices=4", "--out=p.json", "--objective=load", "--report=a.html"],
             "have none"),
    "devices": (["solve", "--devices=3", "--out=p.json", "--objective=load"], "Use 2 or 4"),
    "slots": (["solve", "--devices=4", "--out=p.json", "--objective=load", "--slots=10"], "slots"),
    "time": (["solve", "--devices=4", "--out=p.json", "--objective=load", "--time-limit=-1"],
             "time_limit"),
    "split": (["solve", "--devices=4", "--out=p.json", "--objective=load", "--split=time"],
              "counts have steps"),
    "compare": (["compare", "--devices=4"], "compare needs to know which experts"),
    "verdict": (["verdict", "--devices=4"], "verdict needs"),
    "homes": (["homes", "--devices=4"], "homes needs"),
    "evaluate": (["evaluate"], "evaluate needs"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_what_counts_cannot_answer_is_refused_with_the_reason(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (command, *options), message = UNFIT[name]
    plans = ["plan.json"] if command == "evaluate" else []
    assert run(command, GOLDEN / "sglang_stat.pt", *plans, *options) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


OF_OTHERS = {
    "sglang.json": ("--format=sglang",),
    "vllm.json": ("--format=vllm",),
    "tensorrt-llm.yaml": (),
    "exflow.csv": (),
    "sglang-jax.npy": (),
}


def plan_beside(folder: pathlib.Path, name: str, layer_ids=()) -> tuple[pathlib.Path, pathlib.Path]:
    """A plan in our own file and in another program's."""
    rng = np.random.default_rng(3)
    device_LE = np.stack([rng.permutation(8) // 2 for _ in range(3)])
    own = folder / "own.json"
    Plan(Placement.from_device_LE(device_LE, 4), layer_ids).write(own)
    assert run("convert", own, folder / name, *OF_OTHERS[name]) == 0
    return own, folder / name


@pytest.mark.parametrize("name", OF_OTHERS)
def test_every_command_takes_plans_of_every_format(name, tmp_path, capsys):
    trace = dump(tmp_path, "own")
    few = ("--devices=4", "--time-limit=0", "--json")
    capsys.readouterr()
    answers = []
    for plan in plan_beside(tmp_path, name):
        capsys.readouterr()
        found = []
        for words in (
            ("evaluate", trace, plan, "--devices=4", "--json"),
            ("solve", trace, *few, f"--previous={plan}", f"--out={tmp_path / 'new.json'}"),
            ("verdict", trace, *few, f"--before={plan}"),
            ("homes", trace, "--devices=4", "--time-limit=1", "--json", f"--plan={plan}"),
        ):
            assert run(*words) == 0, words
            found.append(without_names(json.loads(capsys.readouterr().out)))
        answers.append(found)
    assert answers[0] == answers[1]


COPIES = {  # slots of a layer by devices; three do not divide the experts
    4: [0, 4, 2, 1, 5, 3, 2, 6, 4, 3, 7, 5],
    3: [0, 1, 2, 3, 4, 5, 6, 7, 0],
}


@pytest.mark.parametrize("devices", COPIES)
@pytest.mark.parametrize("name", [name for name in OF_OTHERS if name != "exflow.csv"])
def test_plans_with_copies_are_taken_as_well(name, devices, tmp_path, capsys):
    """ExFlow's file has none. vLLM's says how many devices there are."""
    trace, own = dump(tmp_path, "own"), tmp_path / "own.json"
    Plan(Placement(np.tile(COPIES[devices], (3, 1)), 8, devices)).write(own)
    assert run("convert", own, tmp_path / name, *OF_OTHERS[name]) == 0
    said = () if name == "vllm.json" else (f"--devices={devices}",)
    answers = []
    for plan in (own, tmp_path / name):
        capsys.readouterr()
        assert run("evaluate", trace, plan, *said, "--json") == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert without_names(answers[0]) == without_names(answers[1])
    (judged,) = answers[0]["plans"]
    for dispatch, figure in judged["figures"]["rows"].items():  # counted in two places
        rows = judged["wires"][dispatch]["rows"]["inside"]
        assert rows == pytest.approx(figure["value"], rel=1e-12), dispatch


@pytest.mark.parametrize("name", ["sglang.json", "sglang-jax.npy", "tensorrt-llm.yaml"])
def test_rows_of_a_plan_that_numbers_its_layers_are_the_traces_layers(name, tmp_path, capsys):
    """Files that number layers have rows of dense layers, too; the trace has layers 2, 3 and 5."""
    ids, layers = ids_LTK().transpose(1, 0, 2).astype(np.uint8), (2, 3, 5)
    trace = tmp_path / "t.npz"
    trace_lib.save(trace_lib.Trace(ids, 8, np.array(LENS), layer_ids=layers), trace)
    rows = []
    for plan in plan_beside(tmp_path, name, layers):
        capsys.readouterr()
        assert run("evaluate", trace, plan, "--devices=4", "--json") == 0
        rows.append(without_names(json.loads(capsys.readouterr().out)))
    assert rows[0] == rows[1]


def test_plans_that_cannot_be_meant_are_refused(tmp_path, capsys):
    trace = dump(tmp_path, "own")
    _, sglang = plan_beside(tmp_path, "sglang.json")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"physical_to_logical_map": [list(range(16))] * 3}))
    few = tmp_path / "few.json"
    few.write_text(json.dumps({"physical_to_logical_map": [list(range(8))] * 2}))
    for words, said in (
        ((sglang,), "devices = None: SGLang files do not say how many there are. Add --devices=8"),
        ((sglang, "--devices=3"), "must divide the 8 expert slots of a layer"),
        ((other, "--devices=4"), "num_experts = 8: the file says 16"),
        ((few, "--devices=4"), "the file has layers 0-1"),
        ((trace, "--devices=4"), "is a trace. Give a plan"),
        ((tmp_path / "none.json",), "plan = "),
    ):
        capsys.readouterr()
        assert run("evaluate", trace, *words) == 1, words
        assert said in capsys.readouterr().err, words
