"""The optimum of all placements: against brute force, on every kind of machine; in `solve`."""

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest

from moe_jax.placement import baselines, enumerated, topology
from moe_jax.placement.limits import whole
from moe_jax.placement.limits.pins import Pins
from moe_jax.placement.limits.previous import Previous
from moe_jax.placement.plan import Placement
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


def everything(problem):
    """All plans that keep pins and caps, one by one."""
    experts, devices = problem.trace.num_experts, problem.num_devices
    equal = np.repeat(np.arange(devices), experts // devices)
    rows = [np.array(one) for one in sorted(set(itertools.permutations(equal.tolist())))]
    layers = range(problem.trace.num_layers)
    allowed = [[row_E for row_E in rows if problem.allowed(layer, row_E)] for layer in layers]
    return map(np.stack, itertools.product(*allowed))


def brute_force(problem):
    """The least value of them."""
    return min(map(problem.value, everything(problem)))


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


# Pins, and a plan in use

KINDS = [
    *itertools.product(["seconds", "rows"], ["exchange", "hierarchical", "coherent"]),
    *(("exflow", "exchange"), ("load", "exchange"), ("moetuner", "exchange")),
]


def pins(seed, layers, experts, devices, pinned=(0,)):
    """Of one plan at random, in some of the layers: one or two experts of each."""
    rng = np.random.default_rng(seed)
    device_LE = baselines.random(layers, experts, devices, seed)
    held_LEM = np.zeros((layers, experts, devices), bool)
    for layer in pinned:
        for expert in rng.permutation(experts)[: 1 + seed % 2]:
            held_LEM[layer, expert, device_LE[layer, expert]] = True
    return Pins(held_LEM)


def small(number, objective, dispatch):
    """A problem all plans of which can be tried: 2 devices and 3 layers, or 4 and 2."""
    machine = [topology.flat(2), *MACHINES.values()][number % (1 + len(MACHINES))]
    if objective == "moetuner" and isinstance(machine.device_flops, tuple):
        machine = topology.nodes_by_devices(2, 2)
    layers = 3 if machine.num_devices == 2 else 2
    given = trace(experts=4, layers=layers, tokens=60, seed=number)
    cap = LoadCap(1.5, relative=True) if number % 3 == 2 else None
    return Problem(given, machine, objective, dispatch, load_cap=cap)


def in_use(problem, seed, moves):
    trace, devices = problem.trace, problem.num_devices
    old_LE = baselines.random(trace.num_layers, trace.num_experts, devices, seed)
    previous = Previous(Placement.from_device_LE(old_LE, devices), moves)
    return dataclasses.replace(problem, previous=previous)


def moved(problem, device_LE):
    return int((device_LE != problem.previous.placement.device_LE).sum())


@pytest.mark.parametrize(("objective", "dispatch"), KINDS)
@pytest.mark.parametrize("number", range(10))
def test_pins(objective, dispatch, number):
    """In one layer, in the last and in all, against brute force, on every machine."""
    free = small(number, objective, dispatch)
    layers = free.trace.num_layers
    where = [(0,), (layers - 1,), range(layers)][number % 3]
    pinned = pins(number, layers, 4, free.num_devices, where)
    problem = dataclasses.replace(free, load_cap=None, pins=pinned)
    best = found(problem)
    assert problem.all_allowed(best.device)
    assert best.bound == pytest.approx(brute_force(problem), rel=1e-9)
    assert problem.value(best.device) == pytest.approx(best.bound, rel=1e-9)


@pytest.mark.parametrize("name", MACHINES)
def test_renumberings_keep_pins(name):
    """All that do: no other one keeps what every device of a pin holds."""
    problem = Problem(trace(), MACHINES[name], "seconds", "coherent")
    free_GM = enumerated.renumberings(problem)
    for seed in range(4):
        pinned = pins(seed, 3, 8, 4, range(seed))
        kept = [
            m_M for m_M in free_GM if np.array_equal(pinned.held_LEM[:, :, m_M], pinned.held_LEM)
        ]
        number_GM = enumerated.renumberings(dataclasses.replace(problem, pins=pinned))
        assert np.array_equal(number_GM, np.array(kept))


def test_pins_that_no_plan_within_the_cap_keeps():
    held_LEM = np.zeros((2, 4, 2), bool)
    cap = LoadCap(1.0, relative=True)
    problem = Problem(trace(experts=4, layers=2), topology.flat(2), "rows", load_cap=cap)
    held_LEM[0, np.argsort(problem.load_LE[0])[2:], 0] = True  # the two hottest together
    pinned = dataclasses.replace(problem, pins=Pins(held_LEM))
    assert found(problem) is not None
    assert not list(everything(pinned))
    assert found(pinned) is None
    assert whole.solved(in_use(pinned, 0, 8), FAR, time.monotonic() + FAR) is None


@pytest.mark.parametrize(("objective", "dispatch"), KINDS)
@pytest.mark.parametrize("number", range(6))
def test_every_budget(objective, dispatch, number):
    """Against brute force; on every second one pins as well."""
    problem = small(number, objective, dispatch)
    layers = problem.trace.num_layers
    if number % 2:
        pinned = pins(number, layers, 4, problem.num_devices, range(layers))
        problem = dataclasses.replace(problem, pins=pinned, load_cap=None)
    used = in_use(problem, number, 0)
    plans = [
        (moved(used, device_LE), problem.value(device_LE)) for device_LE in everything(problem)
    ]
    for moves in range(4 * layers + 1):
        budget = in_use(problem, number, moves)
        best = whole.solved(budget, FAR, time.monotonic() + FAR)
        within = [value for count, value in plans if count <= moves]
        if not within:
            assert best is None
            continue
        assert best.complete
        assert best.bound == pytest.approx(min(within), rel=1e-9)
        assert budget.all_allowed(best.device_LE)
        assert problem.value(best.device_LE) == pytest.approx(best.bound, rel=1e-9)
        as_good = [count for count, value in plans if value <= best.bound * (1 + 1e-9)]
        assert moved(used, best.device_LE) == min(as_good)
        for count, value in enumerate(best.value_B):
            least = min((v for c, v in plans if c <= count), default=np.inf)
            assert value == pytest.approx(least, rel=1e-9)


def test_only_the_budget_fits():
    """Values then go as far as it does; in less time there is nothing."""
    problem = in_use(Problem(trace(experts=6), topology.flat(3), "exflow"), 0, 5)
    far = time.monotonic() + FAR
    every = whole.solved(problem, FAR, far)
    assert every.complete
    assert len(every.value_B) == 3 * 6 + 1
    seconds = np.geomspace(1e-5, 1, 60)
    some = next(one for s in seconds if (one := whole.solved(problem, float(s), far)) is not None)
    assert not some.complete
    assert len(some.value_B) == 5 + 1
    np.testing.assert_allclose(some.value_B, every.value_B[:6], rtol=1e-12)
    assert np.array_equal(some.device_LE, every.device_LE)
    assert whole.solved(problem, 1e-5, far) is None
    assert whole.solved(problem, FAR, time.monotonic()) is None
    apart = dataclasses.replace(problem, objective="load")
    assert whole.solved(apart, FAR, time.monotonic()) is None
    assert whole.solved(dataclasses.replace(apart, objective="hops"), FAR, far) is None


@pytest.mark.parametrize(("objective", "dispatch"), [("exflow", "exchange"), ("rows", "coherent")])
def test_solve_proves_what_pins_and_budgets_leave(objective, dispatch):
    free = Problem(trace(layers=2), MACHINES["two nodes"], objective, dispatch)
    pinned = dataclasses.replace(free, pins=pins(1, 2, 8, 4))
    for problem in (pinned, in_use(free, 3, 4), in_use(pinned, 3, 6)):
        placement, report = solve_problem(problem, 0, 60.0)
        assert report.finished
        assert problem.all_allowed(placement.device_LE)
        assert report.bound <= report.objective <= report.bound * (1 + 1e-6)
        assert problem.value(placement.device_LE) == pytest.approx(report.objective, rel=1e-12)
        if problem.previous is not None:
            moves, values = zip(*report.tradeoff, strict=True)
            assert (np.diff(values) < 0).all()
            assert min(v for m, v in report.tradeoff if m <= problem.previous.moves) == (
                pytest.approx(report.objective, rel=1e-9)
            )
            assert moves[-1] > problem.previous.moves  # others are known as well


def test_budgets_beyond_the_one_that_fits_are_searched_for(monkeypatch):
    """The plan is proven, the table goes on with what was found."""
    problem = in_use(Problem(trace(experts=6), topology.flat(3), "exflow"), 0, 5)
    every = whole.solved(problem, FAR, time.monotonic() + FAR)
    some = every._replace(value_B=every.value_B[:6], complete=False)
    monkeypatch.setattr(whole, "solved", lambda *_: some)
    report = solve_problem(problem, 0, 10.0).report
    assert report.objective == pytest.approx(every.bound, rel=1e-9)
    assert report.bound >= every.bound * (1 - 1e-6)
    for moves, value in report.tradeoff:
        assert value >= every.value_B[moves] * (1 - 1e-9)
        assert moves > 5 or value == pytest.approx(every.value_B[moves], rel=1e-9)
    assert report.tradeoff[-1][0] > 5
    assert (np.diff([value for _, value in report.tradeoff]) < 0).all()
    lower = some._replace(value_B=some.value_B / 2)  # what is found later is never better
    monkeypatch.setattr(whole, "solved", lambda *_: lower)
    assert solve_problem(problem, 0, 10.0).report.tradeoff[-1][0] <= 5
