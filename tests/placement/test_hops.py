"""The objective `hops`: costs token by token, optima and bounds by brute force, the command."""

import itertools
import json

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import baselines, cost, hops, move, relax, solve, topology
from moe_jax.placement.__main__ import main
from moe_jax.placement.baselines import registry
from moe_jax.placement.limits import pins
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.placement.topology import Topology
from moe_jax.placement.torus import Torus
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace

FAR = 1e12
LINE = Topology("line", 1, 3, torus=Torus((3,), (False,)))
UNEVEN = topology.uneven((2, 1))


def made(seed: int, **changes) -> Trace:
    sizes = {"num_tokens": 50, "num_layers": 3, "num_experts": 6, "top_k": 2, "num_classes": 4}
    return synthetic.realistic(**(sizes | changes), seed=seed, num_sequences=4)


def labels_of(experts: int, devices: int) -> list[np.ndarray]:
    equal = sorted(np.arange(experts) % devices)
    return [np.array(p) for p in sorted(set(itertools.permutations(equal)))]


def test_hops_of_machines():
    np.testing.assert_array_equal(UNEVEN.hops_MM, [[0, 1, 3], [1, 0, 3], [3, 3, 0]])
    np.testing.assert_array_equal(LINE.hops_MM, [[0, 1, 2], [1, 0, 1], [2, 1, 0]])


@pytest.mark.parametrize("machine", [LINE, UNEVEN], ids=lambda machine: machine.name)
@pytest.mark.parametrize("dispatcher", hops.DISPATCHERS)
def test_the_value_is_counted_token_by_token(machine, dispatcher):
    trace, hops_MM = made(1), machine.hops_MM
    device_LE = baselines.random(3, 6, 3, 2)
    total = 0.0
    for token in trace.expert_ids_TLK.tolist():
        for layer, chosen in enumerate(token):
            for e in chosen:
                m = device_LE[layer, e]
                if dispatcher == "uniform":
                    total += sum(hops_MM[h, m] + hops_MM[m, h] for h in range(3)) / 3
                else:  # 3 layers on 3 devices: layer l on device l
                    total += hops_MM[layer, m] + hops_MM[m, min(layer + 1, 2)]
    problem = Problem(trace, machine, "hops", dispatcher=dispatcher)
    assert problem.value(device_LE) == pytest.approx(total / 150, rel=1e-12)
    if dispatcher == "uniform":  # one row per assignment, each way: cost.py
        rows = cost.rows(
            trace.expert_ids_TLK, Placement.from_device_LE(device_LE, 3), "exchange", None, "exact"
        )
        both_ways = (rows.combine_LMM * (hops_MM + hops_MM.T)).sum() / 150
        assert problem.value(device_LE) == pytest.approx(both_ways, rel=1e-12)


@pytest.mark.parametrize("machine", [LINE, UNEVEN], ids=lambda machine: machine.name)
@pytest.mark.parametrize("dispatcher", hops.DISPATCHERS)
@pytest.mark.parametrize("cap", [None, LoadCap(1.15, relative=True)])
def test_optimum_and_bound_against_brute_force(machine, dispatcher, cap):
    for seed in range(4):
        trace = made(seed)
        problem = Problem(trace, machine, "hops", load_cap=cap, dispatcher=dispatcher)
        best = 0.0
        for layer in range(3):
            kept = [p for p in labels_of(6, 3) if problem.allowed(layer, p)]
            best += min(problem.layer_value(layer, p) for p in kept) / 3
        found = solve.solve_problem(problem, seed, 10.0)
        assert problem.all_allowed(found.placement.device_LE)
        assert found.report.objective == pytest.approx(best, rel=1e-9)
        assert best * (1 - 1e-3) <= found.report.bound <= best * (1 + 1e-12)
        assert relax.lower_bound(problem, FAR) <= best
        at_once = solve.solve_problem(problem, seed, 0.0)
        assert at_once.report.bound <= best * (1 + 1e-12)
        if cap is None:
            assert at_once.report.objective == pytest.approx(best, rel=1e-12)
            optimal_LE = hops.hops_optimal(problem.load_LE, machine.hops_MM, dispatcher)
            assert problem.value(optimal_LE) == pytest.approx(best, rel=1e-12)


def test_the_bound_of_the_program_is_safe():
    """The bound itself, not clipped to what was found."""
    rng = np.random.default_rng(3)
    for _ in range(10):
        load_LE = rng.integers(1, 60, size=(1, 6)).astype(float)
        task = hops.costs(load_LE, LINE.hops_MM, "uniform")
        cap_LM = np.full((1, 3), load_LE.sum() / 3 * 1.25)
        kept = [
            p
            for p in labels_of(6, 3)
            if (np.bincount(p, weights=load_LE[0]) <= cap_LM[0] * (1 + 1e-9)).all()
        ]
        if not kept:
            continue
        best = min(task.layer_value(0, p) for p in kept)
        found = hops.solved(task, load_LE, cap_LM, kept[0][None], FAR)
        assert found.bound <= best
        assert task.layer_value(0, found.device_LE[0]) == pytest.approx(best, rel=1e-6)
        assert found.bound >= best - 1


def test_the_hot_expert_is_where_all_ways_are_short():
    ids_TLK = np.array([[[0]]] * 50 + [[[1]], [[2]], [[3]], [[4]], [[5]]], np.uint8)
    trace = Trace(ids_TLK, 6, np.array([55]))
    found = solve.solve_problem(Problem(trace, LINE, "hops"), 0, 5.0)
    assert found.placement.device_LE[0, 0] == 1
    assert found.report.gap < 1e-6


def test_pins_hold_and_labels_stay_put():
    trace = made(2)
    pinned = pins.parse(["*:0:2"], 6, 3, trace.layer_ids)
    problem = Problem(trace, LINE, "hops", pins=pinned)
    found = solve.solve_problem(problem, 0, 3.0)
    assert (found.placement.device_LE[:, 0] == 2).all()
    best = sum(
        min(problem.layer_value(n, p) for p in labels_of(6, 3) if p[0] == 2) / 3 for n in range(3)
    )
    assert found.report.bound <= best
    assert found.report.objective <= best * 1.02
    before = Placement.contiguous(3, 6, 3)
    assert move.relabelled(problem, before, found.placement).digest == found.placement.digest


@pytest.mark.parametrize(
    "wrong", [{"dispatcher": "nobody"}, {"num_slots": 10}], ids=["dispatcher", "slots"]
)
def test_bad_wishes_are_refused(wrong):
    with pytest.raises(Refused):
        Problem(made(1), LINE, "hops", **wrong)


def test_the_command(tmp_path, capsys):
    trace_lib.save(made(4, num_experts=8), tmp_path / "trace.npz")
    words = ["solve", str(tmp_path / "trace.npz"), "--objective=hops", "--topology=v5e8"]
    words += [f"--out={tmp_path / 'plan.json'}", "--time-limit=5", "--dispatcher=blocks"]
    assert main([*words, f"--report={tmp_path / 'page.html'}"]) == 0
    assert "hops per token and layer" in capsys.readouterr().out
    assert "hops from tokens to experts" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["gap"] < 1e-6


def test_compare_has_the_topology_ilp_as_a_row(tmp_path, capsys):
    """Without a cap it is the optimum of the planning half; no row where all ways are equal."""
    trace_lib.save(made(4, num_experts=8), tmp_path / "trace.npz")
    words = ["compare", str(tmp_path / "trace.npz"), "--topology=v5e8", "--time-limit=1", "--json"]
    words += ["--methods=contiguous,hops", "--dispatcher=blocks"]
    assert main([*words, "--objective=hops"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)["methods"]}
    assert rows["hops"]["objective"] == pytest.approx(rows["planner"]["objective"], rel=1e-9)
    assert rows["hops"]["objective"] < rows["contiguous"]["objective"]
    assert main([*words, "--objective=rows"]) == 0  # a baseline of other objectives as well
    assert [row["key"] for row in json.loads(capsys.readouterr().out)["methods"]][1] == "hops"
    even = Problem(made(1), topology.flat(3), "rows")
    assert not registry.by_key("hops").applies(even)
    assert registry.by_key("hops").applies(Problem(made(1), topology.flat(3), "hops"))
