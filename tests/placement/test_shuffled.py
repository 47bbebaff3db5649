"""The planner for shuffled dispatch: objective, bound, search and command line."""

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest

from moe_jax.placement import __main__ as command_line
from moe_jax.placement import (
    baselines,
    coherent,
    coherent_seconds,
    cost,
    relax,
    row_homes,
    shuffled,
    solve,
    topology,
)
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.limits import pins as pins_lib
from moe_jax.placement.limits.previous import Previous, holds_LEM
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.placement.seconds import Work
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace
from tests import slow_homes
from tests.placement import instances

NEVER = float("inf")


def traced(seed, layers=3, experts=8, top_k=2, tokens=240, gaps=False) -> Trace:
    sizes = {"num_layers": layers, "num_experts": experts, "top_k": top_k, "num_sequences": 6}
    trace = synthetic.realistic(num_tokens=tokens, seed=seed, **sizes)
    return instances.with_gaps(trace, np.random.default_rng(seed)) if gaps else trace


def problem(seed, devices=4, cap=None, objective="rows", step=50, **sizes) -> Problem:
    load_cap = LoadCap.parse(cap) if cap else None
    machine, work = topology.flat(devices), Work(batch_tokens=step)
    return Problem(traced(seed, **sizes), machine, objective, "shuffled", work, load_cap)


def some_labels(some: Problem, seed: int) -> np.ndarray:
    sizes = (some.trace.num_layers, some.trace.num_experts, some.num_devices)
    return baselines.random(*sizes, seed=seed)


def by_loops(some: Problem, device_LE: np.ndarray) -> float:
    """Rows per token and layer, both ways."""
    trace, experts, rows, token_layers = some.trace, some.trace.num_experts, 0, 0
    ids_LTK = np.minimum(trace.expert_ids_TLK, experts).transpose(1, 0, 2)
    device_LTK = [np.append(row_E, -1)[ids] for row_E, ids in zip(device_LE, ids_LTK, strict=True)]
    home_LT = slow_homes.of_layers(device_LTK, some.num_devices, some.work.batch_tokens)
    for device_TK, home_T in zip(device_LTK, home_LT, strict=True):
        for devices, home in zip(device_TK.tolist(), home_T, strict=True):
            rows += 2 * len(set(devices) - {-1, home})
            token_layers += set(devices) != {-1}
    return rows / token_layers


def bound(some: Problem) -> float:
    """As it is proven; a report's is never above its own plan."""
    return relax.lower_bound(some, time.monotonic() + 1.0, steps=60)


@pytest.mark.parametrize(("tokens", "step"), [(400, 90), (6000, 4)])
def test_homes_of_many_steps_are_those_of_each(tokens, step):
    """Also where places and scores are too many for 16 bits."""
    rng = np.random.default_rng(step)
    device_TK = rng.choice(8, p=[0.5, *[0.5 / 7] * 7], size=(tokens, 3))
    device_TK[rng.random(device_TK.shape) < 0.2] = -1
    _, wanted_T = slow_homes.of_layers([device_TK, device_TK], 8, step)
    np.testing.assert_array_equal(row_homes.balanced(device_TK, 8, step), wanted_T)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize(("devices", "top_k", "layers"), [(4, 2, 3), (8, 3, 2), (2, 1, 1)])
def test_the_objective_and_the_model_count_the_rows_of_every_token(devices, top_k, layers, gaps):
    some = problem(0, devices, top_k=top_k, layers=layers, gaps=gaps)
    model = shuffled.Model.of(some)
    for seed in range(4):
        device_LE = some_labels(some, seed)
        rows = by_loops(some, device_LE)
        assert some.value(device_LE) == pytest.approx(rows)
        assert some.value_of(Placement.from_device_LE(device_LE, devices)) == pytest.approx(rows)
        assert model.total(device_LE) / some.token_layers == pytest.approx(rows)


def test_seconds_are_those_of_the_rows_and_of_two_gathers():
    some = problem(1, objective="seconds", step=120)
    device_LE = some_labels(some, 0)
    placement = Placement.from_device_LE(device_LE, 4)
    machine, work = some.topology, some.work
    fast = machine.fast
    # every device gets 3 x 30 rows before a layer, and sends as many after it
    gather = 90 * work.row_bytes / fast.bandwidth + fast.latency
    assert seconds_lib.attention_seconds(machine, work, "shuffled") == pytest.approx(2 * gather)
    rows, load_LM = some_rows(some, placement), some.computed_LM(placement)
    plain = seconds_lib.seconds(rows, load_LM, machine, work, "exchange", 240).total_L
    assert some.values_L(device_LE) == pytest.approx(plain + 2 * gather)


def some_rows(some: Problem, placement: Placement):
    step_tokens = some.work.batch_tokens
    return cost.rows(some.trace.expert_ids_TLK, placement, "shuffled", step_tokens=step_tokens)


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_chain_takes_tokens_to_be_where_their_best_expert_was(top_k):
    some = problem(2, top_k=top_k)
    (chain,) = coherent.chains_of(some, (np.inf,))
    device_LE = some_labels(some, 1)
    rows = 0.0
    for token in some.trace.expert_ids_TLK.tolist():
        home = None
        for layer, experts in enumerate(token):
            places = [int(device_LE[layer, e]) for e in experts]
            touched = set(places)
            rows += 2 * len(touched - {home}) - (len(touched) / 2 if home is None else 0)
            home = places[0]
    assert -chain.value(device_LE) == pytest.approx(rows)


@pytest.mark.parametrize("cap", [None, "1.3x"])
def test_swaps_on_true_rows_lose_none_and_keep_the_cap(cap):
    some = problem(3, cap=cap, tokens=400, layers=4)
    start_LE = some.balanced_LE
    *_, end_LE = coherent_seconds.descended(shuffled.Model.of(some), start_LE, NEVER)
    assert some.value(end_LE) < some.value(start_LE)
    assert some.all_allowed(end_LE)


@pytest.mark.parametrize(
    ("objective", "cap"),
    [
        ("rows", "1.1x"),
        pytest.param("rows", None, marks=pytest.mark.slow),
        pytest.param("seconds", "1.1x", marks=pytest.mark.slow),
        pytest.param("seconds", None, marks=pytest.mark.slow),
    ],
)
def test_tiny_cases_against_every_plan(objective, cap, monkeypatch):
    """2 devices, 4 experts, 3 layers: swaps and shakes end at the best plan, or the next to it."""
    monkeypatch.setattr(coherent_seconds, "SHAKES", 12)
    halves, better = instances.partitions(4, 2), []
    for seed in range(3):
        sizes = {"experts": 4, "top_k": 1 + seed % 2, "tokens": 90, "gaps": seed == 2}
        some = problem(seed, 2, cap, objective, 30, **sizes)
        each = [np.stack(rows) for rows in itertools.product(halves, repeat=3)]
        values = np.sort([some.value(one_LE) for one_LE in each if some.all_allowed(one_LE)])
        report = solve.solve_problem(some, 0, 0.2).report
        assert bound(some) <= values[0] * (1 + 1e-12)
        assert np.isclose(report.objective, values, rtol=1e-9).any()
        model, rng = shuffled.Model.of(some), np.random.default_rng(0)
        *_, end_LE = coherent_seconds.descended(model, some.balanced_LE, NEVER)
        *_, end_LE = end_LE, *coherent_seconds.shaken(model, end_LE, rng, NEVER)
        better.append(int((values < some.value(end_LE) * (1 - 1e-9)).sum()))
    assert sorted(better) in ([0, 0, 0], [0, 0, 1])


@pytest.mark.parametrize("objective", ["rows", "seconds"])
def test_bounds_hold_for_every_plan(objective):
    for seed in range(3):
        some = problem(seed, objective=objective, gaps=seed == 1)
        report = solve.solve_problem(some, 0, 0.3).report
        values = [some.value(some_labels(some, draw)) for draw in range(20)]
        assert 0 < report.bound <= report.objective <= min(values)
        assert bound(some) <= report.objective


def test_limits_are_kept():
    some = problem(4, tokens=120)
    old = Placement.from_device_LE(some_labels(some, 0), 4)
    pins = pins_lib.parse(["0:1:2", "*:3:0"], 8, 4, some.trace.layer_ids)
    found = solve.solve(
        some.trace, some.topology, objective="rows", dispatch="shuffled", pins=pins, time_limit=1.0
    )
    assert found.placement.device_LE[0, 1] == 2
    assert (found.placement.device_LE[:, 3] == 0).all()
    near = solve.solve(
        some.trace,
        some.topology,
        objective="rows",
        dispatch="shuffled",
        previous=Previous(old, 4),
        time_limit=1.0,
    )
    assert (near.placement.device_LE != old.device_LE).sum() <= 4
    assert near.report.objective <= problem_value(some, old)


def problem_value(some: Problem, placement: Placement) -> float:
    return Problem(some.trace, some.topology, "rows", "shuffled").value_of(placement)


@pytest.mark.parametrize("objective", ["rows", "seconds"])
def test_copies_are_planned(objective):
    some = dataclasses.replace(problem(5), objective=objective)
    alone = solve.solve_problem(some, 0, 2.0).report
    with_copies = dataclasses.replace(some, num_slots=12)
    placement, report = solve.solve_problem(with_copies, 0, 2.0)
    assert placement.num_slots == 12
    assert report.objective == pytest.approx(some.value_of(placement), rel=1e-12)
    assert 0 < report.bound <= report.objective < alone.objective


def test_copies_keep_a_budget_and_pins():
    some = dataclasses.replace(problem(7), num_slots=12)
    in_use = solve.solve_problem(some, 0, 0.5).placement
    other = dataclasses.replace(some, trace=traced(8))  # the text has changed
    pins = pins_lib.parse(["*:0:1"], 8, 4, some.trace.layer_ids)
    pinned = solve.solve_problem(dataclasses.replace(other, pins=pins), 0, 1.0)
    assert not pins.broken(holds_LEM(pinned.placement))
    near = solve.solve_problem(dataclasses.replace(other, previous=Previous(in_use, 4)), 0, 1.0)
    assert (holds_LEM(near.placement) & ~holds_LEM(in_use)).sum() <= 4
    assert near.report.bound <= near.report.objective <= other.value_of(in_use)
    assert near.report.objective == pytest.approx(other.value_of(near.placement), rel=1e-12)


@pytest.fixture
def trace_path(tmp_path):
    trace_lib.save(traced(6, tokens=300), tmp_path / "t.npz")
    return tmp_path / "t.npz"


def told(capsys, *words) -> dict:
    assert command_line.main([str(word) for word in words]) == 0
    return json.loads(capsys.readouterr().out)


def test_commands(trace_path, tmp_path, capsys):
    out, page = tmp_path / "p.json", tmp_path / "p.html"
    options = ("--devices=4", "--dispatch=shuffled", "--time-limit=0.3", "--json")
    answer = told(
        capsys,
        "solve",
        trace_path,
        *options,
        "--objective=rows",
        f"--out={out}",
        f"--report={page}",
    )
    assert Plan.read(out).provenance["dispatch"] == "shuffled"
    assert 0 < answer["bound"] <= answer["objective"]
    assert answer["held_out"]["rows"]["shuffled"]["value"] > 0
    compared = told(capsys, "compare", trace_path, *options, "--objective=rows")["methods"]
    planned = {one["key"]: one["objective"] for one in compared}
    assert planned["planner"] < planned["contiguous"]
    for one in compared:
        assert one["held_out_objective"] == pytest.approx(
            one["held_out"]["rows"]["shuffled"]["value"]
        )
    assert told(capsys, "verdict", trace_path, *options)["dispatch"] == "shuffled"
    judged = told(capsys, "evaluate", trace_path, out, "--json")["plans"][0]
    assert judged["seconds_per_layer"]["shuffled"] > judged["seconds_per_layer"]["exchange"]
    refused = ["homes", str(trace_path), "--devices=4", "--dispatch=shuffled"]
    assert command_line.main(refused) == 1
    assert "every layer chooses homes anew" in capsys.readouterr().err
