"""Plans with replicas from a plan in use: valid stops, the budget in copies, pins, the command."""

import dataclasses
import functools
import itertools
import json

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import __main__ as command_line
from moe_jax.placement import replication, solve, topology, with_copies
from moe_jax.placement.limits import pins as pins_lib
from moe_jax.placement.limits import slots
from moe_jax.placement.limits.pins import Pins
from moe_jax.placement.limits.previous import Previous, holds_LEM
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace
from tests.placement import instances

EVERYTHING = 10**6
CASES = [
    ("rows", "exchange", 1),
    ("seconds", "exchange", 2),
    ("seconds", "hierarchical", 2),
    ("load", "exchange", 1),
    ("seconds", "gathered", 1),
    ("rows", "coherent", 1),
    ("exflow", "exchange", 2),
]


def noisy_trace(seed: int, **changes) -> Trace:
    sizes = {"num_tokens": 300, "num_layers": 2, "num_experts": 8, "top_k": 2, "num_classes": 6}
    return synthetic.realistic(**(sizes | changes), seed=seed, num_sequences=6)


def at_random(seed: int, layers: int, experts: int, num_slots: int, devices: int) -> Placement:
    """A valid plan: balanced for loads that mean nothing."""
    load_LE = np.random.default_rng(seed).lognormal(0, 1, (layers, experts))
    return replication.balanced_slots(load_LE, num_slots, devices)


def case(seed: int, moves: int, cap: LoadCap | None = None) -> Problem:
    objective, dispatch, nodes = CASES[seed % len(CASES)]
    machine = topology.nodes_by_devices(nodes, 4)
    trace = noisy_trace(seed)
    problem = Problem(trace, machine, objective, dispatch, load_cap=cap, num_slots=12)
    old = at_random(seed + 50, 2, 8, 12, 4)
    return dataclasses.replace(problem, previous=Previous(old, moves))


def free_plan(problem: Problem) -> Placement:
    return solve.solve_problem(problem.unrestricted, 0, time_limit=1).placement


def best_offer(problem: Problem, free: Placement) -> Placement:
    """The best plan that the search offers; the start is one."""
    cap_L = with_copies.begin(problem).cap_L
    judge = functools.partial(with_copies.judged, problem, cap_L=cap_L)
    first = judge(slots.start(problem, cap_L, 0))
    found = slots.search(problem, first, free, cap_L, np.inf, judge)
    offers = [first.placement, *(one.placement for one in found)]
    return min(offers, key=problem.value_of)


@pytest.mark.parametrize("seed", range(30))
def test_every_stop_of_a_path_is_a_layer_nearer_to_its_end(seed):
    held_EM, end_EM = (holds_LEM(at_random(s, 1, 8, 12, 4))[0] for s in (seed, seed + 1000))
    before, rng = held_EM, np.random.default_rng(seed)
    for stop_EM in slots.path(held_EM, end_EM, lambda stops: len(stops) - 1, rng):
        assert (stop_EM.sum(axis=0) == 3).all()
        assert stop_EM.any(axis=1).all()
        assert not (stop_EM & ~held_EM & ~end_EM).any()  # nothing that neither end has
        assert (stop_EM & end_EM).sum() > (before & end_EM).sum()
        before = stop_EM
    assert np.array_equal(before, end_EM)


@pytest.mark.parametrize("seed", range(40))
def test_pins_are_mended_into_valid_layers(seed):
    rng = np.random.default_rng(seed)
    held_EM, other_EM = (holds_LEM(at_random(s, 1, 8, 12, 4))[0] for s in (seed, seed + 1000))
    pin_EM = other_EM & (rng.random((8, 4)) < rng.choice([0.2, 0.6, 1.0]))
    mended_EM = slots.pinned(held_EM, pin_EM)
    assert (mended_EM & pin_EM).sum() == pin_EM.sum()
    assert (mended_EM.sum(axis=0) == 3).all()
    assert mended_EM.any(axis=1).all()


@pytest.mark.parametrize("seed", range(7))
def test_a_budget_of_copies_is_kept_and_more_of_it_is_never_worse(seed):
    free, values = free_plan(case(seed, 0)), []
    for moves in (0, 2, 5, EVERYTHING):
        problem = case(seed, moves)
        plan = best_offer(problem, free)
        new_LEM, old_LEM = holds_LEM(plan), holds_LEM(problem.previous.placement)
        assert (new_LEM & ~old_LEM).sum() <= moves
        values.append(problem.value_of(plan))
    stays = with_copies.judged(problem, problem.previous.placement, np.full(2, np.inf)).placement
    assert values[0] == problem.value_of(stays)  # for `exflow` with the best shares for its slots
    if problem.objective == "exflow":
        assert values[0] <= problem.value_of(problem.previous.placement)
    else:
        assert values[0] == problem.value_of(problem.previous.placement)
    assert values[-1] <= problem.value_of(free)
    assert max(values) == values[0]
    if case(seed, 0).separable:  # else options are chosen by what stands in for the objective
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("seed", range(3))
def test_no_plan_is_better_than_the_best_of_all(seed):
    """4 experts in 6 slots of 2 devices: 14 layers are all there are."""
    trace = noisy_trace(seed, num_experts=4, num_layers=2)
    problem = Problem(trace, topology.flat(2), "rows", num_slots=6)
    old = at_random(seed, 2, 4, 6, 2)
    sides = list(itertools.combinations(range(4), 3))
    rows = [[*a, *b] for a, b in itertools.product(sides, sides) if len({*a, *b}) == 4]
    plans = [Placement(np.array(two), 4, 2) for two in itertools.product(rows, rows)]
    value = {plan: problem.value_of(plan) for plan in plans}
    free = free_plan(problem)
    for moves in (0, 1, 2, 3, EVERYTHING):
        previous = Previous(old, moves)
        found = problem.value_of(best_offer(dataclasses.replace(problem, previous=previous), free))
        best = min(v for plan, v in value.items() if previous.moved(plan) <= moves)
        assert found >= best * (1 - 1e-12)
        if moves == 0:
            assert found == pytest.approx(best, rel=1e-12)
    assert found <= problem.value_of(free)


@pytest.mark.parametrize("seed", instances.rest_slow([0, 2, 5, 6, 1, 3, 4], 4))
def test_the_solver_keeps_budget_and_pins_with_replicas(seed):
    pins = pins_lib.parse(["*:0:1", "0:3:2", "0:3:0"], 8, 4, range(2))
    problem = dataclasses.replace(case(seed, 9), pins=pins)
    for limit in (0.0, 1.0):
        placement, report = solve.solve_problem(problem, 0, limit)
        assert not (pins.held_LEM & ~holds_LEM(placement)).any()
        assert problem.previous.moved(placement) <= 9
        assert report.objective == pytest.approx(problem.value_of(placement), rel=1e-12)
        assert report.bound <= report.objective <= report.greedy
    alone = dataclasses.replace(problem, previous=None)
    placement = solve.solve_problem(alone, 0, 1.0).placement
    assert not (pins.held_LEM & ~holds_LEM(placement)).any()


def test_no_budget_gives_the_plan_in_use_slot_by_slot():
    problem = case(0, 0)
    row_P = problem.previous.placement.physical_to_logical_LP
    turned = Placement(row_P.reshape(2, 4, 3)[:, :, ::-1].reshape(2, 12), 8, 4)
    again = dataclasses.replace(problem, previous=Previous(turned, 0))
    assert solve.solve_problem(again, 0, 1.0).placement == turned


def test_slots_that_are_added_have_to_be_paid_for():
    problem = Problem(noisy_trace(0), topology.flat(4), "rows", num_slots=12)
    old = Placement.contiguous(2, 8, 4)
    with pytest.raises(Refused, match="bring 8 copies"):
        solve.solve_problem(dataclasses.replace(problem, previous=Previous(old, 7)), 0, 1.0)
    enough = dataclasses.replace(problem, previous=Previous(old, 8))
    placement = solve.solve_problem(enough, 0, 1.0).placement
    assert placement.num_slots == 12
    assert not (holds_LEM(old) & ~holds_LEM(placement)).any()  # nothing else moved


def test_a_cap_holds_or_the_budget_is_refused():
    cap = LoadCap(1.1, relative=True)
    problem = case(0, EVERYTHING, cap)
    cap_L = with_copies.begin(problem).cap_L
    assert not with_copies.judged(problem, problem.previous.placement, cap_L).fits
    placement = solve.solve_problem(problem, 0, 2.0).placement
    assert with_copies.judged(problem, placement, cap_L).fits
    with pytest.raises(Refused, match="3 copies appear"):
        solve.solve_problem(case(0, 0, cap), 0, 0.0)


def test_pins_that_leave_no_room_for_the_others_are_refused():
    held_LEM = np.zeros((2, 8, 4), bool)
    held_LEM[1, :2, :] = True  # 8 of 12 slots, and six experts for the other four
    with pytest.raises(Refused, match="6 experts that are not pinned have 4 slots"):
        Problem(noisy_trace(0), topology.flat(4), "rows", num_slots=12, pins=Pins(held_LEM))


def test_a_plan_with_other_slots_is_refused():
    old = at_random(0, 2, 8, 16, 4)
    for num_slots in (None, 12):
        with pytest.raises(Refused, match="--slots=16"):
            Problem(
                noisy_trace(0), topology.flat(4), num_slots=num_slots, previous=Previous(old, 0)
            )


def test_the_command_with_slots(tmp_path, capsys):
    path, old, out = (tmp_path / name for name in ("t.npz", "old.json", "new.json"))
    trace_lib.save(noisy_trace(0, num_tokens=600), path)
    Plan(at_random(5, 2, 8, 12, 4)).write(old)
    words = ["solve", str(path), "--devices=4", "--slots=12", f"--previous={old}", f"--out={out}"]
    words += ["--objective=rows", "--time-limit=1", "--move-budget=4000", "--expert-bytes=1000"]
    assert command_line.main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    before, after = Plan.read(old).placement, Plan.read(out).placement
    arrived = int((holds_LEM(after) & ~holds_LEM(before)).sum())
    assert answer["move"]["experts"] == arrived <= 4
    assert answer["move"]["bytes"] == 1000 * arrived
    assert command_line.main(words) == 0
    assert "From old.json:" in capsys.readouterr().out
