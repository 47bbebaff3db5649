"""The objective `hops` with copies: token by token, bounds by brute force, caps, pins, budgets."""

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest

from moe_jax.placement import cost, hops, hops_bound, hops_counts, solve, spare, topology
from moe_jax.placement.__main__ import main
from moe_jax.placement.limits import pins as pins_lib
from moe_jax.placement.limits.previous import Previous, holds_LEM, placement_of
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.placement.topology import Topology
from moe_jax.placement.torus import Torus
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace
from tests.placement import instances

LINE = Topology("line", 1, 3, torus=Torus((3,), (False,)))
RING = Topology("ring", 1, 5, torus=Torus((5,), (True,)))
MACHINES = [LINE, RING, topology.uneven((2, 1)), topology.nodes_by_devices(2, 4)]


def made(seed: int, experts: int, **changes) -> Trace:
    sizes = {"num_tokens": 60, "num_layers": 3, "top_k": 2, "num_classes": 4}
    return synthetic.realistic(**(sizes | changes), num_experts=experts, seed=seed, num_sequences=4)


def at_random(rng, layers: int, experts: int, devices: int, slots: int) -> Placement:
    """Slots of all devices alike, every expert somewhere."""
    rows = []
    while len(rows) < layers:
        held_EM = np.zeros((experts, devices), bool)
        for device in range(devices):
            held_EM[rng.permutation(experts)[: slots // devices], device] = True
        if held_EM.any(axis=1).all():
            rows.append(held_EM)
    return placement_of(np.stack(rows))


def slow(trace: Trace, placement: Placement, machine: Topology, dispatcher: str):
    """Hops per token and layer, and loads: one assignment after the other, for every home."""
    layers, devices, hops_MM = trace.num_layers, machine.num_devices, machine.hops_MM
    total, load_LM, seen = 0.0, np.zeros((layers, devices)), 0
    for layer in range(layers):
        map_P = placement.physical_to_logical_LP[layer].tolist()
        at, to = layer * devices // layers, min(layer + 1, layers - 1) * devices // layers
        routes = [(h, h) for h in range(devices)] if dispatcher == "uniform" else [(at, to)]
        for position, chosen in enumerate(trace.expert_ids_TLK[:, layer].tolist()):
            seen += 1
            for k, e in enumerate(chosen):
                copies = [p // placement.slots_per_device for p, x in enumerate(map_P) if x == e]
                for home, collector in routes:
                    node = [m for m in copies if machine.node_M[m] == machine.node_M[home]]
                    near = [home] if home in copies else node or copies
                    m = near[(position + k) % len(near)]
                    total += (hops_MM[home, m] + hops_MM[m, collector]) / len(routes)
                    load_LM[layer, m] += 1 / len(routes)
    return total / seen, load_LM


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("dispatcher", hops.DISPATCHERS)
def test_the_value_is_counted_token_by_token(machine, dispatcher):
    devices, rng = machine.num_devices, np.random.default_rng(5)
    trace = made(1, 2 * devices)
    for slots in (3 * devices, 5 * devices):
        plan = at_random(rng, 3, 2 * devices, devices, slots)
        problem = Problem(trace, machine, "hops", num_slots=slots, dispatcher=dispatcher)
        value, load_LM = slow(trace, plan, machine, dispatcher)
        assert problem.value_of(plan) == pytest.approx(value, rel=1e-12)
        np.testing.assert_allclose(problem.counted_hops(plan).load_LM, load_LM, rtol=1e-12)


def test_without_copies_it_is_what_it_was():
    trace, plan = made(2, 6), Placement.contiguous(3, 6, 3)
    for dispatcher in hops.DISPATCHERS:
        problem = Problem(trace, LINE, "hops", dispatcher=dispatcher)
        assert problem.counted_L(plan).mean() == pytest.approx(problem.value_of(plan), rel=1e-12)


def test_shares_are_counted_as_they_are():
    """Where one copy has every part of both rules' rows, the rule `stay` is known in a sentence."""
    slots = np.array([[0, 1, 2, 0, 1, 2]])  # devices (0, 1), (2, 0), (1, 2)
    share_LNP = np.zeros((1, 2, 6), np.uint8)
    share_LNP[:, :, [0, 1, 2]] = 64
    plan = Placement(slots.astype(np.int32), 3, 3, share_LNP)
    trace = Trace(np.array([[[0]], [[1]], [[2]]], np.uint8), 3, np.array([3]))
    problem = Problem(trace, LINE, "hops", num_slots=6)
    # the copy at home, else that of device 0, 0 and 1: by expert and home, one way
    ways = [[0, 0, 2], [0, 1, 0], [1, 0, 0]]
    assert problem.value_of(plan) == pytest.approx(2 * np.mean(ways), rel=1e-12)


def all_layers(experts: int, devices: int, slots: int) -> list[np.ndarray]:
    """bool [E, M]: every way to fill a layer."""
    each = list(itertools.combinations(range(experts), slots // devices))
    found = []
    for chosen in itertools.product(each, repeat=devices):
        held_EM = np.zeros((experts, devices), bool)
        for device, held in enumerate(chosen):
            held_EM[list(held), device] = True
        if held_EM.any(axis=1).all():
            found.append(held_EM)
    return found


@pytest.mark.parametrize("machine", [LINE, MACHINES[2]], ids=lambda machine: machine.name)
@pytest.mark.parametrize("dispatcher", hops.DISPATCHERS)
def test_plans_and_bounds_against_all_plans(machine, dispatcher):
    """Nearly 8,000 ways to fill a layer."""
    for seed in range(2):
        trace = made(seed, 6)
        problem = Problem(trace, machine, "hops", num_slots=9, dispatcher=dispatcher)
        sets = [one for one in itertools.product([False, True], repeat=3) if any(one)]
        every, best = np.stack(all_layers(6, 3, 9)), 0.0
        number_PE = (every @ np.array([4, 2, 1])).astype(int) - 1  # as in `sets`
        for layer, ways in enumerate(problem.hop_ways):
            counts = hops_counts.Layer(trace.expert_ids_TLK[:, layer], 6, ways, machine.nodes)
            hops_ES = np.stack([counts.priced(np.full(7, e), np.array(sets))[0] for e in range(6)])
            best += hops_ES[np.arange(6), number_PE].sum(axis=1).min() / problem.token_layers
        found = solve.solve_problem(problem, seed, 5.0)
        assert best * (1 - 1e-12) <= found.report.objective <= best * (1 + 1e-9)
        for deadline in (time.monotonic() + 60, 0.0):
            assert hops_bound.fewest_hops(problem, deadline) <= best
        assert hops_bound.fewest_hops(problem, time.monotonic() + 60) >= 0.9 * best


@pytest.mark.parametrize("seed", range(6))
def test_any_multipliers_prove(seed):
    """Of plans at random, whatever is put in."""
    rng, machine = np.random.default_rng(seed), MACHINES[seed % 4]
    devices = machine.num_devices
    dispatcher = hops.DISPATCHERS[seed % 2]
    trace, slots = made(seed, 2 * devices), (3 + seed % 2) * devices
    problem = Problem(trace, machine, "hops", num_slots=slots, dispatcher=dispatcher)
    plans = [at_random(rng, 3, 2 * devices, devices, slots) for _ in range(20)]
    least_L = np.min([problem.counted_hops(plan).hops_L for plan in plans], axis=0)
    for layer, ways in enumerate(problem.hop_ways):
        one = hops_bound._Layer(problem.load_LE[layer], ways, slots // devices)
        for _ in range(30):
            spread = rng.choice([0.3, 1.0, 30.0])
            r_EB = rng.normal(size=one.weight_EB.shape) * spread * (1 + one.weight_EB)
            u_E = rng.normal(size=len(one.load_E)) * spread * one.load_E.mean()
            for ball_EB in (r_EB, np.abs(r_EB)):
                assert one.base + one.proves(ball_EB, u_E) <= least_L[layer] * (1 + 1e-12)
        assert one.base + one.proves(*one.duals(10.0)) <= least_L[layer] * (1 + 1e-12)


@pytest.mark.parametrize("dispatcher", hops.DISPATCHERS)
def test_caps_pins_and_budgets_hold(dispatcher):
    trace, machine = made(3, 8, num_tokens=200), topology.nodes_by_devices(2, 4)
    free = Problem(trace, machine, "hops", num_slots=12, dispatcher=dispatcher)
    uncapped = solve.solve_problem(free, 0, 0.3)
    cap = LoadCap(1.1, relative=True)
    capped = dataclasses.replace(free, load_cap=cap)
    found = solve.solve_problem(capped, 0, 0.3)
    even = spare.largest_L(free, spare.balanced(free))
    cap_L = spare.caps(capped, even)
    assert (spare.largest_L(free, found.placement) <= cap_L * (1 + 1e-9)).all()
    assert uncapped.report.objective <= found.report.objective + 1e-12
    pins = pins_lib.parse(["*:0:1", "*:0:2", "1:5:3"], 8, 4, trace.layer_ids)
    held = solve.solve_problem(dataclasses.replace(free, pins=pins), 0, 0.3)
    assert not pins.broken(holds_LEM(held.placement))
    assert held.report.bound <= uncapped.report.objective <= held.report.objective + 1e-12
    rng, values = np.random.default_rng(0), []
    old = at_random(rng, 3, 8, 4, 12)
    for moves in (0, 40):
        near = dataclasses.replace(free, previous=Previous(old, moves))
        got = solve.solve_problem(near, 0, 1.0)
        assert near.previous.moved(got.placement) <= moves
        assert got.report.objective == pytest.approx(free.value_of(got.placement), rel=1e-12)
        values.append(got.report.objective)
    assert values[0] == pytest.approx(free.value_of(old), rel=1e-12)
    assert values[1] < values[0]


def test_more_copies_are_fewer_hops_and_all_copies_none():
    trace = made(4, 6)
    values = []
    for slots in (6, 9, 12, 18):
        problem = Problem(trace, LINE, "hops", num_slots=slots)
        placement, report = solve.solve_problem(problem, 0, 1.0)
        assert report.bound <= report.objective
        values.append(report.objective)
        assert placement.num_slots == slots
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0


def test_the_command(tmp_path, capsys):
    path, out = tmp_path / "t.npz", tmp_path / "p.json"
    trace_lib.save(made(1, 8, num_tokens=300), path)
    words = ["solve", str(path), "--topology=v5e8", "--slots=16", "--objective=hops"]
    assert main([*words, "--time-limit=1", f"--out={out}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["unit"] == "hops per token and layer"
    assert 0 < found["bound"] <= found["objective"]
    assert "nearest copy" in found["note"]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_loads_are_those_of_a_walk_for_each_home(machine):
    """To the last bit where the homes are a power of two, else within rounding."""
    devices, rng = machine.num_devices, np.random.default_rng(6)
    trace = instances.with_gaps(made(3, 2 * devices), rng)
    each = machine.devices_per_node
    for slots in (3 * devices, 4 * devices):
        plan = at_random(rng, 3, 2 * devices, devices, slots)
        layers = hops_counts.uniform(trace.expert_ids_TLK, trace.num_experts, machine.nodes)
        found = hops_counts.loads_LM(layers, plan)
        wanted = cost.computed_LM(trace.expert_ids_TLK, plan, "exchange", None, each)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
        if devices == 4:
            np.testing.assert_array_equal(found, wanted)
