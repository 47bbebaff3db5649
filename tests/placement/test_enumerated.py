"""The optimum of all placements: against brute force, on every kind of machine; in `solve`."""

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest

from moe_jax.placement import enumerated, topology
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.placement.solve import solve, solve_problem
from moe_jax.placement.topology import FAST, SLOW, Topology
from moe_jax.routing import synthetic
from moe_jax.routing.trace import Trace
from tests.placement import instances

pytestmark = pytest.mark.usefixtures("all_placements")
FAR = 3600.0
MACHINES = {
    "flat": topology.nodes_by_devices(1, 4),
    "two nodes": topology.nodes_by_devices(2, 4),
    "nodes of 1 and 3": Topology("uneven", 2, (1, 3), FAST, SLOW),
    "two speeds": Topology("speeds", 2, 2, FAST, SLOW, device_flops=(2e14, 2e14, 4e14, 2e14)),
}


def found(problem, seconds=FAR):
    return enumerated.solved(problem, seconds, time.monotonic() + FAR)


def brute_force(problem):
    """The least value of all placements of all layers that are allowed, one by one."""
    experts, devices = problem.trace.num_experts, problem.num_devices
    equal = np.repeat(np.arange(devices), experts // devices)
    rows = sorted(set(itertools.permutations(equal.tolist())))
    chosen = itertools.product(rows, repeat=problem.trace.num_layers)
    every = (np.array(one) for one in chosen)
    return min(problem.value(one) for one in every if problem.all_allowed(one))


def trace(experts=8, layers=3, tokens=200, top_k=2, seed=0):
    sizes = {"num_tokens": tokens, "num_layers": layers, "num_experts": experts, "top_k": top_k}
    return synthetic.realistic(**sizes, seed=seed, num_classes=5, num_sequences=8)


@pytest.mark.parametrize("number", range(instances.FEW))
def test_the_least_of_all(number):
    """Random instances, without their replicas; `moetuner` on each of them, too."""
    given = dataclasses.replace(instances.instance(number), num_slots=None)
    for problem in (given, dataclasses.replace(given, objective="moetuner")):
        tokens_wait = (given.trace.expert_ids_TLK[:, :, 0] == given.trace.no_expert).any()
        best = found(problem)
        if problem.dispatch == "coherent" and tokens_wait and not problem.separable:
            assert (best is None) == (problem.objective in ("rows", "seconds"))
        if best is None:
            continue
        assert problem.all_allowed(best.device)
        assert problem.value(best.device) == pytest.approx(best.bound, rel=1e-9)
        count = math.factorial(problem.trace.num_experts)
        count //= math.factorial(problem.slots) ** problem.num_devices
        if count**problem.trace.num_layers <= 10_000:
            assert best.bound == pytest.approx(brute_force(problem), rel=1e-9)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("objective", "dispatch"),
    [
        *(("seconds", "exchange"), ("seconds", "hierarchical"), ("seconds", "coherent")),
        *(("rows", "hierarchical"), ("rows", "coherent")),
        *(("exflow", "exchange"), ("load", "exchange")),
    ],
)  # fmt: skip
def test_machines(machine, objective, dispatch):
    """Against brute force on 4 devices, where a swap of two experts is a swap of devices."""
    layers = 3 if objective in ("exflow", "load") else 2  # the others take their time
    problem = Problem(trace(experts=4, layers=layers), MACHINES[machine], objective, dispatch)
    best = found(problem)
    assert best.bound == pytest.approx(brute_force(problem), rel=1e-9)
    assert problem.value(best.device) == pytest.approx(best.bound, rel=1e-9)


@pytest.mark.parametrize("objective", ["rows", "seconds"])
def test_long_chains_of_coherent_dispatch(objective):
    """Two devices against brute force; four: no other placement of any layer is better."""
    of_two = topology.nodes_by_devices(1, 2)
    problem = Problem(trace(experts=4, layers=4), of_two, objective, "coherent")
    assert found(problem).bound == pytest.approx(brute_force(problem), rel=1e-9)

    problem = Problem(trace(experts=4, layers=5), MACHINES["two speeds"], objective, "coherent")
    best = found(problem)
    assert problem.value(best.device) == pytest.approx(best.bound, rel=1e-9)
    for layer, other_E in itertools.product(range(5), itertools.permutations(range(4))):
        other_LE = best.device.copy()
        other_LE[layer] = other_E
        assert problem.value(other_LE) >= best.bound * (1 - 1e-9)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("objective", ["rows", "seconds"])
def test_layers_of_coherent_dispatch(machine, objective):
    """Of random plans, by themselves and after the one before; one expert is asked for most."""
    ids_TLK = trace(layers=3, tokens=300).expert_ids_TLK.copy()
    taken_T = (ids_TLK != 5).all(axis=(1, 2)) & (np.arange(300) % 2 == 0)
    ids_TLK[taken_T, 1, 1] = 5
    hot = Trace(ids_TLK, 8, np.array([300]))
    problem, rng = Problem(hot, MACHINES[machine], objective, "coherent"), np.random.default_rng(0)
    for _ in range(20):
        device_LE = np.stack([rng.permutation(np.repeat(np.arange(4), 2)) for _ in range(3)])
        costs = enumerated.costs_of(problem)  # pairs are counted once, for one set of placements
        own_L = [costs.own(layer, device_LE[layer][None])[0] for layer in range(3)]
        pairs = zip(range(1, 3), device_LE[:-1], device_LE[1:], strict=True)
        pair_l = [costs.pair(layer, before_E, own_E[None])[0] for layer, before_E, own_E in pairs]
        total_L = np.add(own_L, [0.0, *pair_l])
        np.testing.assert_allclose(total_L, problem.values_L(device_LE), rtol=1e-9)


def test_renumberings_change_nothing():
    sizes = {"flat": 24, "two nodes": 8, "nodes of 1 and 3": 6, "two speeds": 2}
    rng = np.random.default_rng(0)
    for name, machine in MACHINES.items():
        problem = Problem(trace(), machine, "seconds", "coherent")
        number_GM = enumerated.renumberings(problem)
        assert len(number_GM) == sizes[name]
        device_LE = np.stack([rng.permutation(np.repeat(np.arange(4), 2)) for _ in range(3)])
        value = problem.value(device_LE)
        for number_M in number_GM:
            assert problem.value(number_M[device_LE]) == pytest.approx(value, rel=1e-12)


def test_states():
    """All placements once, each reached from the one that stands for its orbit."""
    problem = Problem(trace(), MACHINES["two nodes"])
    states = enumerated.states_of(8, 4, enumerated.renumberings(problem))
    assert len(np.unique(states.device_SE, axis=0)) == len(states.device_SE) == 2520
    assert len(states.firsts) == 2520 // 8
    before_SE = states.device_SE[states.firsts[states.orbit_S]]
    made_SE = np.take_along_axis(states.number_SM, before_SE.astype(int), axis=1)
    assert np.array_equal(made_SE, states.device_SE)
    assert [states.find(states.device_SE[s]) for s in (0, 7, 2519)] == [0, 7, 2519]


@pytest.mark.parametrize("devices", [2, 8])
def test_few_and_many_devices(devices):
    """Of 8 experts: 35 placements up to numbers on 2 devices, one on 8."""
    problem = Problem(trace(layers=4), topology.nodes_by_devices(1, devices), "seconds", "coherent")
    best = found(problem)
    assert problem.value(best.device) == pytest.approx(best.bound, rel=1e-9)
    rng = np.random.default_rng(1)
    equal = np.repeat(np.arange(devices), 8 // devices)
    for _ in range(300):
        other = np.stack([rng.permutation(equal) for _ in range(4)])
        assert problem.value(other) >= best.bound * (1 - 1e-9)


@pytest.mark.parametrize(
    ("objective", "dispatch", "cap"),
    [
        *(("load", "exchange", None), ("seconds", "exchange", None), ("seconds", "coherent", None)),
        *(("rows", "coherent", "1.1x"), ("exflow", "exchange", "1.1x")),
        ("moetuner", "exchange", None),
    ],
)  # fmt: skip
def test_solve_proves_small_cases(objective, dispatch, cap):
    load_cap = LoadCap.parse(cap) if cap else None
    machine = MACHINES["two nodes"]
    sizes = {"objective": objective, "dispatch": dispatch, "load_cap": load_cap}
    report = solve(trace(layers=2), machine, **sizes, time_limit=5.0).report
    assert report.bound <= report.objective <= report.bound * (1 + 1e-6)
    assert report.finished


def test_what_is_not_looked_at():
    """Too many placements, too little time, homes that are balanced, tokens that wait."""
    machine = MACHINES["flat"]
    assert found(Problem(trace(experts=16), machine)) is None
    assert found(Problem(trace(), machine, "seconds", "coherent"), 1e-3) is None
    assert found(Problem(trace(), machine, "seconds", "shuffled")) is None
    assert found(Problem(trace(), machine, "hops")) is None
    gaps = instances.with_gaps(trace(), np.random.default_rng(0))
    assert found(Problem(gaps, machine, "rows", "coherent")) is None
    assert found(Problem(gaps, machine, "rows", "exchange")) is not None
    assert enumerated.solved(Problem(trace(), machine, "exflow"), FAR, time.monotonic()) is None


def test_even_loads_are_asked_for_after_it_too():
    problem = Problem(trace(tokens=2000), MACHINES["flat"], "seconds", steady=0.05)
    plain = solve_problem(dataclasses.replace(problem, steady=0.0), 0, 5.0)
    steady = solve_problem(problem, 0, 5.0)
    assert steady.report.objective >= plain.report.objective
    assert steady.report.bound <= plain.report.objective
