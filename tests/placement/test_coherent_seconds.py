"""Seconds of coherent dispatch after swaps, against counts token by token; starts; every line."""

import itertools
import json
import re
import time

import numpy as np
import pytest

from moe_jax.placement import __main__ as command_line
from moe_jax.placement import baselines, coherent_seconds, every, solve, starts, topology
from moe_jax.placement.baselines import registry
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.placement.seconds import Work
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace

SLOW = Work(d_model=8192, d_ff=256)  # where the wire counts as much as the devices


def made(seed: int, nodes: int = 1, devices: int = 4, cap: str | None = None, **changes) -> Problem:
    sizes = {"num_tokens": 200, "num_layers": 4, "num_experts": 8, "top_k": 3, "num_classes": 6}
    trace = synthetic.realistic(**(sizes | changes), seed=seed, num_sequences=8)
    machine = topology.nodes_by_devices(nodes, devices)
    limit = None if cap is None else LoadCap.parse(cap)
    return Problem(trace, machine, "seconds", "coherent", SLOW, limit)


@pytest.mark.parametrize(("nodes", "top_k"), [(1, 3), (2, 3), (2, 1), (4, 2)])
@pytest.mark.parametrize("layer", range(4))
def test_every_swap_is_counted_exactly(nodes, top_k, layer):
    """The difference of whole problems, token by token, for all swaps of a layer."""
    problem = made(1, nodes, top_k=top_k)
    device_LE = baselines.random(4, 8, 4, 3)
    one, own_E = coherent_seconds.model(problem), device_LE[layer]
    e_P, f_P = np.nonzero(np.triu(own_E[:, None] != own_E[None, :]))
    value_P = one.swaps(device_LE, layer, e_P, f_P) - one.value(device_LE, layer)
    before = problem.values_L(device_LE).sum()
    for e, f, value in zip(e_P, f_P, value_P, strict=True):
        other_LE = device_LE.copy()
        other_LE[layer, [e, f]] = device_LE[layer, [f, e]]
        more = problem.values_L(other_LE).sum() - before
        assert value == pytest.approx(more, rel=1e-9, abs=1e-15)
        assert one.value(other_LE, layer) - one.value(device_LE, layer) == pytest.approx(
            more, rel=1e-9, abs=1e-15
        )


def test_swaps_that_break_a_cap_count_as_infinite():
    problem = made(1, cap="1.02x")
    device_LE = problem.balanced_LE.astype(np.int64)
    e_P, f_P = np.nonzero(np.triu(device_LE[1][:, None] != device_LE[1][None, :]))
    value_P = coherent_seconds.model(problem).swaps(device_LE, 1, e_P, f_P)
    allowed = []
    for e, f in zip(e_P, f_P, strict=True):
        other_LE = device_LE.copy()
        other_LE[1, [e, f]] = device_LE[1, [f, e]]
        allowed.append(problem.all_allowed(other_LE))
    assert not all(allowed)
    np.testing.assert_array_equal(np.isfinite(value_P), allowed)


def test_swaps_in_several_chunks_and_totals(monkeypatch):
    problem = made(2, 2)
    device_LE = baselines.random(4, 8, 4, 0)
    one = coherent_seconds.model(problem)
    e_P, f_P = np.nonzero(np.triu(device_LE[1][:, None] != device_LE[1][None, :]))
    whole_P = one.swaps(device_LE, 1, e_P, f_P)
    monkeypatch.setattr(coherent_seconds, "ENTRIES", 16 * 5)
    np.testing.assert_array_equal(one.swaps(device_LE, 1, e_P, f_P), whole_P)
    other_LE = baselines.random(4, 8, 4, 1)
    difference = problem.values_L(other_LE).sum() - problem.values_L(device_LE).sum()
    assert one.total(other_LE) - one.total(device_LE) == pytest.approx(difference, rel=1e-9)


@pytest.mark.parametrize("cap", [None, "1.05x"])
@pytest.mark.parametrize("seed", range(3))
def test_descent_ends_where_no_swap_helps(seed, cap):
    problem = made(seed, 1, cap=cap)
    one, start_LE = coherent_seconds.model(problem), problem.balanced_LE
    *_, found_LE = coherent_seconds.descended(one, start_LE, time.monotonic() + 60)
    value = problem.value(found_LE)
    assert value <= problem.value(start_LE)
    assert cap is not None or value < problem.value(start_LE)
    assert problem.all_allowed(found_LE)
    for layer in range(4):
        for e, f in itertools.combinations(range(8), 2):
            other_LE = found_LE.copy()
            other_LE[layer, [e, f]] = found_LE[layer, [f, e]]
            if problem.all_allowed(other_LE):
                assert problem.value(other_LE) >= value * (1 - 1e-6)


def test_tokens_without_an_expert_are_no_obstacle():
    trace = made(0).trace
    ids_TLK = trace.expert_ids_TLK.copy()
    ids_TLK[::5, 1, 2] = trace.no_expert
    ids_TLK[::7, 2] = trace.no_expert
    problem = Problem(
        Trace(ids_TLK, 8, trace.seq_len), topology.flat(4), "seconds", "coherent", SLOW
    )
    placement, report = solve.solve_problem(problem, 0, 3)
    assert report.bound <= report.objective == problem.value(placement.device_LE) <= report.greedy


@pytest.mark.parametrize("dispatch", ["exchange", "hierarchical", "coherent", "gathered"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_solve_is_no_worse_than_any_cheap_baseline(dispatch, nodes):
    problem = made(3, nodes, num_experts=16, num_tokens=800)
    problem = Problem(problem.trace, problem.topology, "seconds", dispatch, SLOW)
    report = solve.solve_problem(problem, 0, 2).report
    for device_LE in starts.plans(problem):
        assert report.objective <= problem.value(device_LE)


def test_starts_take_the_best_of_every_layer():
    problem = made(1, num_tokens=400)
    problem = Problem(problem.trace, problem.topology, "seconds", "exchange", SLOW)
    several = [baselines.random(4, 8, 4, seed) for seed in range(5)]
    best_L = np.min([problem.values_L(one_LE) for one_LE in several], axis=0)
    merged_LE = starts.merged(problem, several)
    np.testing.assert_array_equal(problem.values_L(merged_LE), best_L)


@pytest.mark.parametrize("cap", [None, "1.02x"])
def test_starts_keep_the_cap_and_their_groups(cap):
    problem = made(4, num_experts=16, num_tokens=800, cap=cap)
    for device_LE in [*starts.plans(problem), *starts.offered(problem, problem.balanced_LE)]:
        assert problem.all_allowed(device_LE)
    for plan_LE, aligned_LE in zip(
        starts.plans(problem), starts.offered(problem, problem.balanced_LE), strict=True
    ):
        for one_E, other_E in zip(plan_LE, aligned_LE, strict=True):
            assert len(set(zip(one_E, other_E, strict=True))) == 4


def test_every_combination_has_its_line(tmp_path, capsys):
    trace = made(0, num_tokens=400).trace
    trace_lib.save(trace, tmp_path / "t.npz")
    words = [
        "compare",
        str(tmp_path / "t.npz"),
        "--every",
        "--time-limit=0.1",
        "--machines=flat4,2x2",
    ]
    words += ["--caps=none,1.2x", "--dispatches=exchange,coherent"]
    assert command_line.main([*words, "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    combinations = [(one["machine"], one["dispatch"], one["cap"]) for one in lines]
    assert combinations == list(
        itertools.product(("flat4", "2x2"), ("exchange", "coherent"), ("none", "1.2x"))
    )
    halves = trace_lib.split(trace_lib.load(tmp_path / "t.npz"), 0)
    for one in lines:
        machine = every.machine(one["machine"])
        for half, side in (("plan_half", "planned"), ("judge_half", "held_out")):
            plan = Problem(halves.plan_half, machine)
            judge = Problem(getattr(halves, half), machine, "seconds", one["dispatch"])
            quick = [b for b in registry.chosen(None, plan) if not b.slow and b.key != "random"]
            best = min(judge.value_of(b.make(plan, 0, 0.0).placement) for b in quick)
            assert one[side]["theirs"] <= best * (1 + 1e-12)
            if one[side]["best"] in [b.key for b in quick]:
                assert one[side]["theirs"] == pytest.approx(best, rel=1e-12)
            assert one[side]["ratio"] == pytest.approx(one[side]["ours"] / one[side]["theirs"])
            assert one[side]["theirs"] <= one[side]["theirs_equal"]
            assert one[side]["best_equal"] not in ("grace", "moetuner-free")  # uneven here
    assert command_line.main(words) == 0
    said = capsys.readouterr().out
    assert "in 8 combinations:" in said
    counts = re.findall(r"better in (\d), the same in (\d), worse in (\d)", said)
    assert len(counts) == 6
    assert all(sum(map(int, of)) == 8 for of in counts)


def test_how_often_the_planner_is_better():
    """Of all, of those with equal devices, with as many slots; rounding makes no difference."""

    def line(ours, theirs, theirs_equal):
        side = every.Side("grace", theirs, ours, "lpt", theirs_equal, 12, ours / 3)
        return every.Line("exchange", "flat4", "none", side, side, 0.123)

    said = every.text([line(1.0, 0.5, 2.0), line(1.0, 1 + 1e-12, 1 + 1e-12), line(1.0, 2.0, 2.0)])
    assert "12.3" in said.splitlines()[1].split()  # the gap, percent
    assert "  any, planning half: better in 1, the same in 1, worse in 1" in said
    assert "  with equal devices, held out: better in 2, the same in 1, worse in 0" in said
    assert "  any, at as many slots, held out: better in 3, the same in 0, worse in 0" in said


def test_a_baseline_with_unequal_devices_is_met_with_as_many_slots():
    """Two experts are half of all rows: alone on their devices, beside crowded ones."""
    ids = np.stack([np.arange(600) % 2, 2 + np.arange(600) % 6], axis=1).astype(np.uint8)[:, None]
    trace = Trace(ids, 8, np.full(12, 50))
    like = Problem(trace, topology.flat(1), "seconds")
    halves = trace_lib.split(trace, 0)
    args = (halves, like, [topology.flat(4)], ["none"], ["gathered"], 0, 1.0)
    (line,) = every.lines(*args)
    side = line.planned
    assert side.best == "moetuner-free"
    assert side.slots > 8  # of its fullest device, four times
    assert side.ours > side.theirs >= side.ours_slots * (1 - 1e-9)  # both are even
    assert side.ratio_slots == pytest.approx(side.ours_slots / side.theirs)
    equal = next(every.lines(*args[:2], [topology.flat(8)], *args[3:]))
    assert (equal.planned.slots, equal.planned.ours_slots) == (8, equal.planned.ours)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--machines=flat3"], "Use 2 or 4"),
        (["--machines=9x"], "no preset"),
        (["--caps=0.5"], "load_cap"),
        (["--dispatches=post"], "dispatches"),
        (["--methods=lpt"], "Leave out --methods"),
    ],
)
def test_bad_combinations_are_refused(options, message, tmp_path, capsys):
    trace_lib.save(made(0).trace, tmp_path / "t.npz")
    assert command_line.main(["compare", str(tmp_path / "t.npz"), "--every", *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
