"""The command line: what it prints, what it writes, what it refuses, and that it needs no JAX."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from moe_jax.placement import __main__ as command_line
from moe_jax.placement import cost, evaluate, evidence, method_costs, topology
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import Problem
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*words) -> int:
    return command_line.main([str(word) for word in words])


@pytest.fixture
def named_path(tmp_path) -> pathlib.Path:
    """12 sequences of 50 tokens: the first half of group a, then b and c in turn; b is of its own.

    Group b asks for expert 7 alone, which nobody else does.
    """
    trace = synthetic.realistic(
        num_tokens=600, num_layers=3, num_experts=7, top_k=2, seed=0, num_sequences=12
    )
    names = tuple([f"a/{n}" for n in range(6)] + [f"{'bc'[n % 2]}/{n}" for n in range(6)])
    ids = trace.expert_ids_TLK.copy()
    group_T = np.repeat([name[0] for name in names], trace.seq_len)
    ids[group_T == "b"] = np.array([7, trace.no_expert], ids.dtype)
    trace_lib.save(Trace(ids, 8, trace.seq_len, seq_name=names), tmp_path / "n.npz")
    return tmp_path / "n.npz"


@pytest.mark.parametrize(
    ("split", "planned", "judged", "said"),
    [
        ("sequence", 6, 6, "a random half of the sequences: 6,"),
        ("time", 6, 6, "the first half of the sequences: 6,"),
        ("name:a", 6, 6, "all but a of the sequences: 6,"),
        ("name:b", 9, 3, "all but b of the sequences: 9,"),
    ],
)
def test_what_is_planned_on_and_what_judges(split, planned, judged, said, named_path, capsys):
    out, trace = named_path.parent / "p.json", trace_lib.load(named_path)
    words = [named_path, "--devices=4", f"--split={split}", "--time-limit=1", "--objective=load"]
    assert run("solve", *words, f"--out={out}", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["planned_on"].startswith(said)
    assert Plan.read(out).provenance["planned_on"] == answer["planned_on"]
    group_S = np.array([name[0] for name in trace.seq_name])
    parts = {"time": np.arange(12) < 6, "name:a": group_S != "a", "name:b": group_S != "b"}
    if split in parts:
        halves = [trace.select(np.flatnonzero(part)) for part in (parts[split], ~parts[split])]
        assert answer["objective"] == pytest.approx(
            Problem(halves[0], topology.flat(4), "load").value_of(Plan.read(out).placement)
        )
        judge = Problem(halves[1], topology.flat(4), "load")
        held_out = answer["held_out"]["load_max_over_mean"]["mean"]["value"]
        assert held_out == pytest.approx(judge.value_of(Plan.read(out).placement))
    assert run("compare", *words, "--methods=lpt", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["planned_on"].startswith(said)
    assert answer["held_out_sequences"] == judged
    assert run("compare", *words, "--methods=lpt") == 0
    assert f"Planned on {said}" in capsys.readouterr().out
    assert planned + judged == 12


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("name:d", "groups of the names are a, b, c"),
        ("name", "Use sequence, time or name:GROUP"),
        ("time:a", "Use sequence, time or name:GROUP"),
        ("half", "Use sequence, time or name:GROUP"),
    ],
)
def test_splits_that_are_none_are_refused(split, message, named_path, capsys):
    out = named_path.parent / "p.json"
    words = [named_path, "--devices=4", f"--split={split}"]
    for command in (["solve", *words, f"--out={out}"], ["compare", *words]):
        assert run(*command) == 1
        assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("words", ["--nodes=2", "--node-sizes=3,5"])
def test_a_topology_has_nodes_of_its_own(words, trace_path, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert run("solve", trace_path, "--topology=cpu8", words, f"--out={out}") == 1
    assert "topology cpu8 has 1 nodes of its own" in capsys.readouterr().err
    assert not out.exists()


def test_homes_refuse_a_plan_above_the_cap(trace_path, tmp_path, capsys):
    """A plan that is given is not planned again: it is not made to keep what it breaks."""
    trace = trace_lib.load(trace_path)
    load_LE = np.stack(
        [
            np.bincount(ids.ravel(), minlength=trace.num_experts)
            for ids in trace.expert_ids_TLK.swapaxes(0, 1)
        ]
    )
    hot_LP = np.argsort(-load_LE, axis=1)
    plan = tmp_path / "hot.json"
    Plan(Placement(hot_LP, trace.num_experts, 4), trace.layer_ids).write(plan)
    words = ("homes", trace_path, "--devices=4", f"--plan={plan}")
    assert run(*words, "--load-cap=1.01x") == 1
    assert "computes more than --load-cap allows" in capsys.readouterr().err
    assert run(*words) == 0


def test_a_split_by_names_needs_names(trace_path, tmp_path, capsys):
    words = ["solve", trace_path, "--devices=4", "--split=name:a", f"--out={tmp_path / 'p.json'}"]
    assert run(*words) == 1
    assert "needs the names of the sequences" in capsys.readouterr().err


def test_solve_writes_a_plan_and_prints_one_object(trace_path, tmp_path, capsys):
    out = tmp_path / "plans" / "p.json"
    assert run("solve", trace_path, "--devices=4", f"--out={out}", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["bound"] <= answer["objective"]
    gap = (answer["objective"] - answer["bound"]) / answer["objective"]
    assert answer["gap"] == pytest.approx(gap)
    assert answer["seconds"] > 0
    held_out = answer["held_out"]
    assert set(held_out["rows"]) == {"exchange", "hierarchical", "coherent", "shuffled", "gathered"}
    for figure in (
        *held_out["rows"].values(),
        held_out["top1"],
        held_out["distinct_devices"],
        held_out["load_max_over_mean"]["mean"],
        held_out["load_max_over_mean"]["worst"],
    ):
        assert figure["low"] <= figure["high"]
    plan = Plan.read(out)
    assert plan.digest == answer["plan_digest"]
    assert plan.provenance["trace_digest"] == trace_lib.load(trace_path).digest
    assert plan.topology["devices_per_node"] == 4


def test_solve_says_where_its_figures_come_from(trace_path, tmp_path, capsys):
    options = ("--nodes=2", "--dispatch=hierarchical", "--load-cap=1.3x", "--time-limit=2")
    assert run("solve", trace_path, "--devices=4", f"--out={tmp_path / 'p.json'}", *options) == 0
    text = capsys.readouterr().out
    assert "Planned on a random half of the sequences: 6" in text
    assert "Judged on the other 6 sequences" in text
    assert "proven bound" in text


def test_solve_for_transitions_says_what_stays_and_what_can(trace_path, tmp_path, capsys):
    out = tmp_path / "p.json"
    options = ("--devices=4", "--objective=exflow", "--time-limit=1", f"--out={out}")
    assert run("solve", trace_path, *options, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    half = trace_lib.split(trace_lib.load(trace_path), 0).plan_half
    device_LE = Plan.read(out).placement.device_LE
    best_TL = half.expert_ids_TLK[:, :, 0].astype(int)
    on_TL = np.take_along_axis(device_LE.T, best_TL, axis=0)
    stays = answer["stays"]
    assert stays["share"] == pytest.approx((on_TL[:, 1:] == on_TL[:, :-1]).mean())
    assert stays["share"] <= stays["most"] <= 1
    assert stays["gap"] == pytest.approx(1 - stays["share"] / stays["most"])
    assert run("solve", trace_path, *options) == 0
    assert "of the transitions; no plan keeps more than" in capsys.readouterr().out


def test_a_split_that_is_none_is_refused_for_one_sequence_too(trace_path, tmp_path, capsys):
    trace_lib.save(trace_lib.load(trace_path).select(np.array([0])), trace_path)
    words = ("solve", trace_path, "--devices=4", "--time-limit=0", f"--out={tmp_path / 'p.json'}")
    for split, message in (("name:g1", "needs the names"), ("half", "split = 'half': not known")):
        assert run(*words, f"--split={split}") == 1
        assert message in capsys.readouterr().err
    assert run(*words, "--split=time") == 0


def test_solve_with_one_sequence_says_that_nothing_is_held_out(trace_path, tmp_path, capsys):
    one = trace_lib.load(trace_path).select(np.array([0]))
    trace_lib.save(one, trace_path)
    assert run("solve", trace_path, "--devices=4", f"--out={tmp_path / 'p.json'}", "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["held_out"] is None
    assert "no held-out half" in captured.err
    assert run("compare", trace_path, "--devices=4") == 1


def test_compare_prints_every_method(trace_path, tmp_path, capsys):
    words = ("compare", trace_path, "--devices=4", "--time-limit=2", "--objective=rows")
    assert run(*words, "--json", f"--out-plans={tmp_path / 'plans'}") == 0
    answer = json.loads(capsys.readouterr().out)
    names = [method["name"] for method in answer["methods"]]
    assert names == [
        "contiguous",
        "round-robin",
        "zigzag",
        "random (mean of 10)",
        "EPLB-style packing",
        "SmartMoE greedy",
        "co-occurrence packing",
        "topology-cost swaps",
        "Occult-style groups",
        "GRACE-style groups",
        "ExFlow",
        "MoETuner",
        "MoETuner, free sizes",
        "greedy",
        "greedy + ILP",
    ]
    planned = {method["name"]: method["objective"] for method in answer["methods"]}
    assert planned["greedy + ILP"] <= planned["greedy"] <= planned["random (mean of 10)"]
    assert answer["methods"][-1]["bound"] <= planned["greedy + ILP"]
    valid = [method for method in answer["methods"] if method["valid_plan"]]
    written = sorted((tmp_path / "plans").glob("*.json"))
    assert len(written) == len(valid)
    digests = {Plan.read(path).digest for path in written}
    assert digests == {method["plan_digest"] for method in valid}
    assert run(*words) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in names)
    assert "gap" in text


def test_compare_makes_the_methods_that_are_asked_for(trace_path, capsys):
    words = ("compare", trace_path, "--devices=4", "--time-limit=0.5")
    assert run(*words, "--json", "--methods=lpt, contiguous") == 0
    answer = json.loads(capsys.readouterr().out)
    assert [method["key"] for method in answer["methods"]] == ["contiguous", "lpt", "planner"]
    assert run(*words, "--methods=best") == 1
    assert "methods = 'best'" in capsys.readouterr().err


def test_compare_draws_uneven_groups(tmp_path, capsys):
    """One expert of each layer has most of the tokens: it has a device to itself."""
    ids = np.random.default_rng(0).integers(0, 8, (800, 3, 1), np.uint8)
    ids[::2] = 3
    trace_lib.save(Trace(ids, 8, np.full(8, 100)), tmp_path / "t.npz")
    words = (tmp_path / "t.npz", "--devices=4", "--methods=moetuner-free", "--time-limit=1")
    assert run("compare", *words, f"--report={tmp_path / 'p.html'}") == 0
    assert "slots of a layer that uneven groups leave empty" in capsys.readouterr().out
    assert "MoETuner" in (tmp_path / "p.html").read_text()


def test_every_takes_speeds_and_dispatchers(trace_path, capsys):
    words = ("compare", trace_path, "--every", "--machines=flat4", "--caps=none", "--time-limit=0")
    hops = ("--objective=hops", "--dispatches=exchange")
    seconds = ("--objective=seconds", "--dispatches=exchange")
    answers = []
    for more in (
        *((*hops, f"--dispatcher={name}") for name in ("uniform", "blocks")),
        *((*seconds, f"--device-flops={flops}") for flops in ("1e9", "1e15")),
    ):
        assert run(*words, *more, "--json") == 0
        (line,) = json.loads(capsys.readouterr().out)["lines"]
        answers.append(line["held_out"])
    assert answers[0] != answers[1]
    assert answers[2] != answers[3]


@pytest.mark.parametrize("word", ["--topology=h100x8", "--nodes=2", "--node-sizes=2,2"])
def test_every_refuses_a_machine_beside_its_own(word, trace_path, capsys):
    quick = ("--machines=flat4", "--caps=none", "--dispatches=exchange", "--time-limit=0")
    assert run("compare", trace_path, "--every", *quick, word) == 1
    assert "--machines" in capsys.readouterr().err


def test_compare_counts_time_evenness_and_moves(trace_path, capsys):
    """Against the plans and the held-out half, counted here once more."""
    words = ("compare", trace_path, "--devices=4", "--time-limit=0.5", "--nodes=2")
    words = (*words, "--methods=contiguous,round-robin,grace", "--dispatch=hierarchical", "--json")
    assert run(*words) == 0
    methods = {one["key"]: one for one in json.loads(capsys.readouterr().out)["methods"]}
    half = trace_lib.split(trace_lib.load(trace_path), 0).judge_half
    problem = Problem(half, topology.nodes_by_devices(2, 4), "seconds", "hierarchical")
    device_LE = np.tile(np.arange(8) // 2, (3, 1))
    load_LM = np.zeros((3, 4))
    for ids_LK in half.expert_ids_TLK:
        for layer, ids_K in enumerate(ids_LK):
            np.add.at(load_LM[layer], device_LE[layer, ids_K], 1)
    one = methods["contiguous"]
    seconds_L = problem.values_L(device_LE)
    for name, figure_L, worst in (
        ("seconds_per_layer", seconds_L, max),
        ("balancedness", load_LM.mean(axis=1) / load_LM.max(axis=1), min),
        ("imbalance_ratio", load_LM.max(axis=1) / load_LM.mean(axis=1) - 1, max),
        ("load_cv", load_LM.std(axis=1) / load_LM.mean(axis=1), max),
    ):
        assert one[name]["mean"] == pytest.approx(figure_L.mean(), rel=1e-12)
        assert one[name]["worst"] == pytest.approx(worst(figure_L), rel=1e-12)
    assert one["move"] == {"experts": 0.0, "bytes": 0.0}
    # {0,4} {1,5} | {2,6} {3,7} against {0,1} {2,3} | {4,5} {6,7}: one expert a node can stay
    assert methods["round-robin"]["move"]["experts"] == 3 * 6
    assert methods["round-robin"]["move"]["bytes"] == 18 * problem.work.expert_bytes
    uneven = methods["grace"]
    assert uneven["empty_slots"] == uneven["slots"] - 8
    assert not uneven["valid_plan"]


@pytest.mark.parametrize("dispatch", ["exchange", "shuffled"])
@pytest.mark.parametrize("pins", [[], ["--pin=*:3:2", "--pin=0:1:0"]])
def test_a_plan_file_of_compare_is_what_its_line_says(pins, dispatch, trace_path, tmp_path, capsys):
    """Held-out figures, pins and moves, counted here on the files once more."""
    words = ("compare", trace_path, "--devices=4", "--node-sizes=1,3", "--time-limit=0", *pins)
    words = (*words, f"--dispatch={dispatch}", "--methods=contiguous,zigzag,occult,greedy")
    assert run(*words, f"--out-plans={tmp_path / 'plans'}", "--json") == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    placements = [Plan.read(path).placement for path in (tmp_path / "plans").glob("*.json")]
    written = {placement.digest: placement for placement in placements}
    half = trace_lib.split(trace_lib.load(trace_path), 0).judge_half
    like = Problem(half, topology.uneven((1, 3)))
    for method in methods:
        device_LE = (placement := written[method["plan_digest"]]).device_LE
        assert method["move"]["experts"] == (device_LE != np.arange(8) // 2).sum()
        if pins:
            off = (device_LE[:, 3] != 2).sum() + (device_LE[0, 1] != 0)
            assert method["broken_pins"] == off
        found = evidence.judge(
            half,
            placement,
            like.topology,
            step_tokens=like.work.batch_tokens,
            dispatch=dispatch,
        )
        assert method["held_out"] == found.to_json()
    assert methods[0]["move"]["experts"] == 0  # contiguous, whatever is pinned


def test_numbers_that_move_least_change_no_other_figure(trace_path):
    trace, machine = trace_lib.load(trace_path), topology.uneven((1, 3))
    groups_E = np.array([0, 3, 1, 2]).repeat(2)  # device 1 alone relays for node 0
    placement = Placement.from_device_LE(np.tile(groups_E, (3, 1)), 4)
    again = method_costs.numbered(Problem(trace, machine), placement)
    assert (method_costs.arrivals(placement), method_costs.arrivals(again)) == (18, 12)
    found = [
        evidence.judge(trace, one, machine, step_tokens=64, dispatch="exchange").to_json()
        for one in (placement, again)
    ]
    for one in found:  # numbers decide between homes of equal worth
        del one["rows"]["shuffled"], one["rows_worst"]["shuffled"]
    assert found[0] == found[1]


@pytest.mark.parametrize("nodes", [1, 2])
def test_compare_prints_the_intervals_and_worst_layers_of_the_object(nodes, trace_path, capsys):
    """Both outputs of one command, cell by cell; what lies between is the interval's wider side."""
    words = ("compare", trace_path, "--devices=4", f"--nodes={nodes}", "--methods=contiguous,lpt")
    words = (*words, "--dispatch=coherent", "--time-limit=0")
    assert run(*words, "--json") == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert run(*words) == 0
    tables = capsys.readouterr().out.split("\n\n")
    (rows,) = [one.splitlines() for one in tables if one.startswith("held out: rows")]
    (places,) = [one.splitlines() for one in tables if one.startswith("devices, transitions")]
    for at, method in enumerate(methods, start=1):
        found = method["held_out"]
        by_dispatch = [
            found["rows"][name] for name in ("exchange", "hierarchical", "coherent", "shuffled")
        ]
        check_cells(rows[at], [*by_dispatch, found["rows_worst"]["coherent"]])
        loads = found["load_max_over_mean"]
        figures = [found["distinct_devices"], found["distinct_devices_worst"]]
        figures += [found["distinct_nodes"]] if nodes > 1 else []
        figures += [found["top1"], found["all_pairs"], loads["mean"], loads["worst"]]
        check_cells(places[at], figures)
    assert ("nodes" in places[0].split()) == (nodes > 1)


def check_cells(line: str, figures: list[dict[str, float]]) -> None:
    cells = re.findall(r"([\d.]+) ±([\d.]+)", line)
    assert len(cells) == len(figures)
    for (value, side), figure in zip(cells, figures, strict=True):
        sides = abs(figure["value"] - figure["low"]), abs(figure["high"] - figure["value"])
        assert float(value) == pytest.approx(figure["value"], abs=0.00051)
        assert float(side) == pytest.approx(max(sides), abs=0.00051)


def test_evaluate_counts_with_recorded_homes(trace_path, tmp_path, capsys):
    placement = Placement.contiguous(3, 8, 4)
    Plan(placement).write(tmp_path / "p.json")
    assert run("evaluate", trace_path, tmp_path / "p.json", "--json") == 0
    answer = json.loads(capsys.readouterr().out)["plans"][0]
    trace = trace_lib.load(trace_path)
    rows = cost.rows(trace.expert_ids_TLK, placement, "exchange", trace.home_T, "exact")
    assert answer["recorded_homes"]["exchange"]["exact"] == {
        "out": int(rows.dispatch_LMM.sum()),
        "back": int(rows.combine_LMM.sum()),
    }
    assert run("evaluate", trace_path, tmp_path / "p.json", tmp_path / "p.json") == 0
    assert "homes in the trace" in capsys.readouterr().out


@pytest.mark.parametrize("layer_ids", [(3, 4, 5), (0, 2, 1)])
@pytest.mark.parametrize(
    "words", [("evaluate", "T", "P"), ("verdict", "T", "--before=P"), ("homes", "T", "--plan=P")]
)
def test_a_plan_of_other_layers_is_refused(words, layer_ids, trace_path, tmp_path, capsys):
    plan = tmp_path / "p.json"
    Plan(Placement.contiguous(3, 8, 4), layer_ids).write(plan)
    given = [word.replace("P", str(plan)).replace("T", str(trace_path)) for word in words]
    assert run(*given, *(["--devices=4"] if words[0] == "verdict" else [])) == 1
    error = capsys.readouterr().err
    assert error.startswith("refused: trace layers = '0 to 2': ")
    assert ("3 to 5" if layer_ids == (3, 4, 5) else "0, 2, 1") in error


def test_speeds_do_not_change_the_machine_of_a_plan(trace_path, tmp_path, capsys):
    machine = topology.nodes_by_devices(2, 4)
    plan = Plan(Placement.contiguous(3, 8, 4), topology=machine.to_json())
    plan.write(tmp_path / "p.json")
    words = ("evaluate", trace_path, tmp_path / "p.json", "--json")
    answers = []
    for more in ((), (f"--device-flops={machine.device_flops!r}",), ("--device-flops=1e9",)):
        assert run(*words, *more) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1] != answers[2]
    first, last = answers[0]["plans"][0], answers[2]["plans"][0]
    assert first["topology"] == last["topology"] == machine.name
    assert first["figures"]["rows"] == last["figures"]["rows"]


def test_nodes_that_are_given_are_taken_and_checked(trace_path, tmp_path, capsys):
    """One node, too, whatever machine the plan was made for."""
    machine = topology.nodes_by_devices(2, 4).to_json()
    Plan(Placement.contiguous(3, 8, 4), topology=machine).write(tmp_path / "p.json")
    words = ("evaluate", trace_path, tmp_path / "p.json", "--json")
    answers = []
    for more in ((), ("--nodes=2",), ("--nodes=1",), ("--devices=4",)):
        assert run(*words, *more) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1] != answers[2] == answers[3]
    for wrong in ("--nodes=0", "--nodes=-3", "--devices=0"):
        for command in (words, ("homes", trace_path, f"--plan={tmp_path / 'p.json'}")):
            assert run(*command, wrong) == 1, wrong
            field, value = wrong[2:].split("=")
            assert capsys.readouterr().err.startswith(f"refused: {field} = {value}: ")


def test_evaluate_says_which_machines_it_judges_for(trace_path, tmp_path, capsys):
    machine = dataclasses.replace(topology.nodes_by_devices(2, 4), name="a\x1b[1mb")
    Plan(Placement.contiguous(3, 8, 4), topology=machine.to_json()).write(tmp_path / "own.json")
    for name in ("flat.json", "again.json"):  # of no machine
        Plan(Placement.contiguous(3, 8, 4)).write(tmp_path / name)
    words = ("evaluate", trace_path, *(tmp_path / f"{n}.json" for n in ("own", "flat", "again")))
    heads = {
        (): [
            "Judged in every dispatch, own.json on a\\x1b[1mb: 4 devices, 2 nodes",
            "Judged in every dispatch, flat.json, again.json on flat4: 4 devices, 1 node",
        ],
        ("--nodes=2",): ["Judged in every dispatch on 2x2: 4 devices, 2 nodes"],
    }
    for more, lines in heads.items():
        assert run(*words, *more) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[1 : 2 + len(lines)] == [*lines, ""]
        assert run(*words, *more, "--json") == 0
        plans = json.loads(capsys.readouterr().out)["plans"]
        assert [one["devices"] for one in plans] == [4, 4, 4]
        assert [one["nodes"] for one in plans] == ([2, 2, 2] if more else [2, 1, 1])


def test_one_node_where_a_machine_has_two_is_refused(trace_path, tmp_path, capsys):
    for machine in ("--node-sizes=2,2", "--topology=box2x4"):
        words = ("solve", trace_path, f"--out={tmp_path / 'p.json'}", machine, "--nodes=1")
        assert run(*words) == 1, machine
        assert capsys.readouterr().err.startswith("refused: nodes = 1: ")


def test_names_from_a_trace_are_printed_as_text(trace_path, tmp_path, capsys):
    trace = trace_lib.load(trace_path)
    trace_lib.save(dataclasses.replace(trace, model="a\x1b[1m\ud800\nb"), tmp_path / "n.npz")
    Plan(Placement.contiguous(3, 8, 4)).write(tmp_path / "p.json")
    assert run("evaluate", tmp_path / "n.npz", tmp_path / "p.json") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("a\\x1b[1m\\ud800\\nb trace: 600 tokens")


def test_homes_of_another_mesh_are_left_out(trace_path):
    placement = Placement.contiguous(3, 8, 2)
    trace = trace_lib.load(trace_path)
    assert evaluate.recorded_rows(trace, placement, topology.flat(2)) is None


REFUSED = {
    "devices do not divide": (["--devices=3"], "Use 2 or 4"),
    "more devices than experts": (["--devices=16"], "num_devices"),
    "no devices": ([], "--devices=8"),
    "devices 0": (["--devices=0"], "devices"),
    "nodes do not divide": (["--devices=4", "--nodes=3"], "nodes"),
    "topology unknown": (["--topology=moon"], "h100x8"),
    "topology contradicts": (["--topology=h100x8", "--devices=4"], "has 8 devices"),
    "cap below one": (["--devices=4", "--load-cap=0.5"], "load_cap"),
    "cap a word": (["--devices=4", "--load-cap=low"], "load_cap"),
    "cap out of reach": (["--devices=4", "--load-cap=1.0"], "was not balanced better"),
    "time negative": (["--devices=4", "--time-limit=-1"], "time_limit"),
    "rows of gathered": (["--devices=4", "--objective=rows", "--dispatch=gathered"], "gathered"),
    "d_model 0": (["--devices=4", "--d-model=0"], "d_model"),
    "num_experts contradicts": (["--devices=4", "--num-experts=16"], "the trace says 8"),
    "seed negative": (["--devices=4", "--seed=-1"], "seed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_solve_refuses_in_one_line_and_writes_nothing(name, trace_path, tmp_path, capsys):
    words, message = REFUSED[name]
    assert run("solve", trace_path, f"--out={tmp_path / 'p.json'}", *words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [trace_path]


def test_refuses_bad_files(trace_path, tmp_path, capsys):
    (tmp_path / "bad.npz").write_bytes(trace_path.read_bytes()[:100])
    Plan(Placement.contiguous(2, 8, 4)).write(tmp_path / "other.json")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "file").write_text("")
    out = f"--out={tmp_path / 'p.json'}"
    for words in (
        ("solve", tmp_path / "bad.npz", "--devices=4", out),
        ("solve", tmp_path / "none.npz", "--devices=4", out),
        ("solve", trace_path, "--devices=4", f"--out={tmp_path}"),
        ("solve", trace_path, "--devices=4", f"--out={tmp_path / 'file' / 'p.json'}"),
        ("evaluate", trace_path, tmp_path / "other.json"),
        ("evaluate", trace_path, tmp_path / "bad.json"),
        ("evaluate", trace_path, tmp_path / "none.json"),
    ):
        assert run(*words) == 1, words
        assert capsys.readouterr().err.startswith("refused: ")
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("words", [[], ["plan"], ["solve"], ["solve", "t.npz", "--objective=x"]])
def test_usage_errors_exit_with_two(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_planning_needs_three_packages(trace_path, tmp_path):
    """As docs/your-model.md installs it: every other dependency is not there, JAX among them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    names = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    modules = {"orbax-checkpoint": "orbax", "ml-collections": "ml_collections", "absl-py": "absl"}
    away = sorted({modules.get(name, name) for name in names - {"numpy", "scipy", "jaxtyping"}})
    assert {"jax", "flax", "orbax", "matplotlib"} <= set(away)
    plan, page = tmp_path / "p.json", tmp_path / "p.html"
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({[*away, 'jaxlib']})); "
        "from moe_jax.placement import __main__ as m; "
        f"code = m.main(['solve', {str(trace_path)!r}, '--devices=4', '--time-limit=1', "
        f"'--out={plan}', '--report={page}']); "
        f"sys.exit(code or (m.main(['apply', {str(plan)!r}, 'a', 'b']) != 1))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused = "refused: apply = 'jax': moves arrays"
    assert done.stderr.splitlines()[-1].startswith(refused), done.stderr
