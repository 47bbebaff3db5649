"""Pinned experts: kept by every plan, best under them on tiny cases, refused where impossible."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import __main__ as command_line
from moe_jax.placement import baselines, solve, topology
from moe_jax.placement import move as move_lib
from moe_jax.placement.limits import pins as pins_lib
from moe_jax.placement.limits import search as limits_search
from moe_jax.placement.limits.pins import Pins
from moe_jax.placement.limits.previous import Previous, holds_LEM
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.routing import trace as trace_lib
from tests.placement import instances

pytestmark = pytest.mark.usefixtures("loose_bound")


def at_random(seed: int, layers: int, experts: int, devices: int) -> Pins:
    """A few pins of some plan, so that they can be kept."""
    rng = np.random.default_rng(seed)
    device_LE = baselines.random(layers, experts, devices, seed + 100)
    pinned_LE = rng.random((layers, experts)) < 0.35
    pinned_LE[0, 0] = True
    return Pins(pinned_LE[:, :, None] & (device_LE[:, :, None] == np.arange(devices)))


def best(problem: Problem) -> float:
    """By trying all plans."""
    experts, devices = problem.trace.num_experts, problem.num_devices
    equal = sorted(np.arange(experts) % devices)
    labels = [np.array(p) for p in sorted(set(itertools.permutations(equal)))]
    layers = range(problem.trace.num_layers)
    allowed = [[row_E for row_E in labels if problem.allowed(n, row_E)] for n in layers]
    return min(problem.value(np.stack(rows)) for rows in itertools.product(*allowed))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("objective", ["rows", "seconds", "load", "exflow"])
def test_pinned_plans_equal_brute_force(objective, seed):
    cap = LoadCap(1.4, relative=True) if seed == 3 else None
    pins = at_random(seed, 2, 6, 3)
    problem = Problem(
        instances.tiny_trace(seed), topology.flat(3), objective, load_cap=cap, pins=pins
    )
    placement, report = solve.solve_problem(problem, 0, time_limit=3)
    assert problem.all_allowed(placement.device_LE)
    assert report.objective == pytest.approx(best(problem), rel=1e-12)
    assert report.bound <= report.objective


CASES = [
    ("rows", "hierarchical", 2),
    ("seconds", "exchange", 2),
    ("seconds", "coherent", 1),
    ("rows", "coherent", 1),
    ("exflow", "exchange", 2),
    ("seconds", "gathered", 1),
    ("moetuner", "exchange", 1),
]


@pytest.mark.parametrize("seed", range(7))
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_pins_are_kept_whatever_is_minimised(seed, limit):
    objective, dispatch, nodes = CASES[seed]
    trace = instances.tiny_trace(seed, num_experts=12, num_layers=3)
    machine = topology.nodes_by_devices(nodes, 4)
    pins = at_random(seed, 3, 12, 4)
    problem = Problem(trace, machine, objective, dispatch, pins=pins)
    placement, report = solve.solve_problem(problem, seed, limit)
    rows, experts, devices = np.nonzero(pins.held_LEM)
    assert (placement.device_LE[rows, experts] == devices).all()
    assert report.objective == pytest.approx(problem.value(placement.device_LE), rel=1e-12)


@pytest.mark.parametrize("seed", range(7))
def test_pins_that_the_free_plan_keeps_cost_nothing(seed):
    objective, dispatch, nodes = CASES[seed]
    trace = instances.tiny_trace(seed, num_experts=12, num_layers=3)
    problem = Problem(trace, topology.nodes_by_devices(nodes, 4), objective, dispatch)
    free_LE = solve.constructed(problem).astype(np.int64)
    some_LE1 = np.random.default_rng(seed).random((3, 12, 1)) < 0.3
    pins = Pins(some_LE1 & (free_LE[:, :, None] == np.arange(4)))
    pinned = dataclasses.replace(problem, pins=pins)
    steps = limits_search.search(pinned, limits_search.start(pinned), free_LE, np.inf)
    offers = [step.device_LE for step in steps if pinned.all_allowed(step.device_LE)]
    assert min(map(problem.value, offers)) <= problem.value(free_LE) * (1 + 1e-12)


def test_pins_and_a_budget_together():
    problem = Problem(instances.tiny_trace(2), topology.flat(3), "rows", pins=at_random(2, 2, 6, 3))
    old_LE = baselines.random(2, 6, 3, 9)
    pin_LE = problem.pins.device_LE
    assert ((pin_LE >= 0) & (pin_LE != old_LE)).any()
    for moves in (0, 2, 4, 5, 6, 12):
        old = Previous(Placement.from_device_LE(old_LE, 3), moves)
        one = dataclasses.replace(problem, previous=old)
        equal = sorted(np.arange(6) % 3)
        labels = [np.array(p) for p in sorted(set(itertools.permutations(equal)))]
        plans = map(np.stack, itertools.product(labels, repeat=2))
        allowed = [device_LE for device_LE in plans if one.all_allowed(device_LE)]
        if not allowed:
            with pytest.raises(Refused, match="alone move"):
                solve.solve_problem(one, 0, time_limit=0)
            continue
        placement, report = solve.solve_problem(one, 0, time_limit=1)
        assert one.all_allowed(placement.device_LE)
        assert report.objective == pytest.approx(min(map(problem.value, allowed)), rel=1e-12)


def test_pins_that_the_load_cap_forbids_are_refused_with_the_layer():
    trace = instances.tiny_trace(0)
    problem = Problem(trace, topology.flat(3), "rows", load_cap=LoadCap(1.0, relative=True))
    hot = np.argsort(-problem.load_LE[1])[:2]
    held_LEM = np.zeros((2, 6, 3), bool)
    held_LEM[1, hot, 0] = True  # the two hottest together
    with pytest.raises(Refused, match="cannot be kept in layer 1"):
        solve.solve_problem(dataclasses.replace(problem, pins=Pins(held_LEM)), 0, time_limit=1)


def test_pins_are_read_from_triples_and_files(tmp_path):
    file = tmp_path / "pins.txt"
    file.write_text("# the shared ones\n7:0:1  # hot\n\n*:2:0\n", encoding="utf-8")
    pins = pins_lib.parse(["3:1:2", str(file)], experts=4, devices=3, layer_ids=(3, 7))
    assert np.argwhere(pins.held_LEM).tolist() == [[0, 1, 2], [0, 2, 0], [1, 0, 1], [1, 2, 0]]
    assert pins.device_LE.tolist() == [[-1, 2, 0, -1], [1, -1, 0, -1]]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("3:4:0", "experts go from 0 to 3"),
        ("3:0:3", "devices go from 0 to 2"),
        ("4:0:0", "layers 3 to 7"),
        ("3:0", "neither a triple nor a file"),
        ("a:0:0", "LAYER:EXPERT:DEVICE"),
        ("3:-1:0", "LAYER:EXPERT:DEVICE"),
        ("3:*:0", "LAYER:EXPERT:DEVICE"),
        ("3:\u0663:0", "LAYER:EXPERT:DEVICE"),
        ("3:9999999999:0", "LAYER:EXPERT:DEVICE"),
    ],
)
def test_bad_pins_are_refused(word, message):
    with pytest.raises(Refused, match=message) as error:
        pins_lib.parse([word], experts=4, devices=3, layer_ids=(3, 7))
    assert word in str(error.value) or repr(word) in str(error.value)


def test_a_bad_line_of_a_file_is_named(tmp_path):
    file = tmp_path / "pins.txt"
    file.write_text("3:0:0\n3:0:9\n", encoding="utf-8")
    with pytest.raises(Refused, match="line 2"):
        pins_lib.parse([str(file)], experts=4, devices=3, layer_ids=(3, 7))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="not a text file"):
        pins_lib.parse([str(file)], experts=4, devices=3, layer_ids=(3, 7))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("0:1:0", "0:1:1"), "lives on one device"),
        (("*:0:2", "1:1:2", "1:2:2"), "2 slots, 3 experts are pinned to it"),
    ],
)
def test_pins_that_no_plan_keeps_are_refused(words, message):
    trace = instances.tiny_trace(0)
    pins = pins_lib.parse(words, 6, 3, trace.layer_ids)
    with pytest.raises(Refused, match=message):
        Problem(trace, topology.flat(3), "rows", pins=pins)


def test_the_command_keeps_pins_and_refuses_in_one_line(tmp_path, capsys):
    path, out = tmp_path / "t.npz", tmp_path / "p.json"
    trace_lib.save(instances.tiny_trace(0, num_tokens=600), path)
    words = ["solve", str(path), "--devices=3", f"--out={out}", "--time-limit=1"]
    assert command_line.main([*words, "--pin=*:4:0", "--pin=1:5:0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["move"] is None
    device_LE = Plan.read(out).placement.device_LE
    assert device_LE[:, 4].tolist() == [0, 0]
    assert device_LE[1, 5] == 0
    out.unlink()
    assert command_line.main([*words, "--pin=*:4:9"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()


def _trace_file(tmp_path, **sizes):
    path = tmp_path / "t.npz"
    trace_lib.save(instances.tiny_trace(0, num_tokens=600, **sizes), path)
    return str(path)


def test_verdict_judges_a_plan_that_keeps_the_pins(tmp_path, capsys):
    out = tmp_path / "p.json"
    words = ["verdict", _trace_file(tmp_path), "--devices=3", "--time-limit=0.5", f"--out={out}"]
    assert command_line.main([*words, "--pin=*:4:0", "--pin=1:5:0"]) == 0
    # contiguous has experts 4 and 5 on device 2
    assert "3 pins, of every plan that is made; contiguous breaks 3 of them." in (
        capsys.readouterr().out
    )
    plan = Plan.read(out)
    assert plan.provenance["pins"] == 3
    assert (plan.placement.device_LE[:, 4] == 0).all()
    assert plan.placement.device_LE[1, 5] == 0


def test_compare_keeps_pins_and_counts_those_that_baselines_break(tmp_path, capsys):
    words = ["compare", _trace_file(tmp_path), "--devices=3", "--time-limit=0.5"]
    words += ["--methods=contiguous,greedy", "--pin=*:4:0", "--pin=1:5:0"]
    assert command_line.main([*words, "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert {one["key"]: one["broken_pins"] for one in methods} == {
        "contiguous": 3,
        "greedy": 0,
        "planner": 0,
    }
    assert command_line.main(words) == 0
    assert "contiguous (3 off pin)" in capsys.readouterr().out


def test_every_combination_keeps_pins_and_refuses_devices_that_a_machine_lacks(
    tmp_path, capsys, monkeypatch
):
    seen, solved = [], solve.solve_problem

    def watched(problem, *args):
        found = solved(problem, *args)
        if problem.pins is not None:  # the search inside begins without any
            seen.append(problem.pins.broken(holds_LEM(found.placement)))
        return found

    monkeypatch.setattr(solve, "solve_problem", watched)
    trace = _trace_file(tmp_path, num_experts=12)
    words = ["compare", trace, "--every", "--time-limit=0.1", "--dispatches=exchange"]
    words += ["--caps=none,1.3x", "--pin=0:7:3"]
    assert command_line.main([*words, "--machines=flat4,2x2"]) == 0
    assert set(seen) == {0}
    assert len(seen) >= 4  # more, where the best baseline needs more slots
    seen.clear()
    assert command_line.main([*words, "--machines=flat4,flat3"]) == 1
    assert "devices go from 0 to 2" in capsys.readouterr().err
    assert not seen


@pytest.mark.parametrize("seed", range(6))
def test_new_device_numbers_keep_pins(seed):
    """Even where all of the plan in use is elsewhere, on one node and on two."""
    machine = topology.nodes_by_devices(1 + seed % 2, 4)
    pins, dispatch = at_random(seed, 3, 12, 4), ("exchange", "coherent")[seed // 2 % 2]
    trace = instances.tiny_trace(seed, num_experts=12, num_layers=3)
    problem = Problem(trace, machine, "rows", dispatch, pins=pins)
    after = solve.solve_problem(problem, seed, 0.2).placement
    free = dataclasses.replace(problem, pins=None)
    for draw in range(4):
        before = Placement.from_device_LE(baselines.random(3, 12, 4, draw), 4)
        assert not pins.broken(holds_LEM(move_lib.relabelled(problem, before, after)))
        moves = [holds_LEM(before), holds_LEM(move_lib.relabelled(free, before, after))]
        assert (moves[1] & ~moves[0]).sum() <= (holds_LEM(after) & ~moves[0]).sum()
