"""What holds for every plan: valid, between bound and greedy, under its cap, the same per seed.

The first FEW of the random instances (instances.py) in the default run, all of them with

    python -m pytest -m slow tests/placement/test_properties.py
"""

import pytest

from moe_jax.placement import cost, solve, topology
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.routing import synthetic
from tests.placement import instances

SOLVED: dict[int, tuple[Problem, solve.Solution]] = {}


def solved(number: int) -> tuple[Problem, solve.Solution]:
    if number not in SOLVED:
        problem = instances.instance(number)
        SOLVED[number] = problem, solve.solve_problem(problem, number, time_limit=60)
    return SOLVED[number]


def numbers():
    """The instances of a test: the rest of them slow."""
    return [
        *range(instances.FEW),
        *(pytest.param(n, marks=pytest.mark.slow) for n in range(instances.FEW, instances.ALL)),
    ]


def check_valid(problem: Problem, placement: Placement) -> None:
    slots_LP = placement.physical_to_logical_LP.tolist()
    experts, devices = problem.trace.num_experts, problem.num_devices
    each = (problem.num_slots or experts) // devices
    assert len(slots_LP) == problem.trace.num_layers
    for row in slots_LP:
        assert set(row) == set(range(experts))
        assert len(row) == each * devices
        for device in range(devices):
            here = row[device * each : (device + 1) * each]
            assert len(set(here)) == each


def check_cap(problem: Problem, placement: Placement) -> None:
    cap = problem.load_cap
    if cap is None:
        return
    load_LM = cost.computed_LM(
        problem.trace.expert_ids_TLK,
        placement,
        problem.dispatch,
        None,
        problem.topology.devices_per_node,
    )
    if not cap.relative:
        assert (load_LM.max(axis=1) <= cap.factor * load_LM.mean(axis=1) * (1 + 1e-9)).all()
    elif not placement.has_replicas:
        reached_L = instances.reachable_L(problem)
        assert (load_LM.max(axis=1) <= cap.factor * reached_L * (1 + 1e-9)).all()


@pytest.mark.parametrize("number", numbers())
def test_every_plan(number):
    """Valid, valued as counted, above its bound, at most greedy, under its cap."""
    problem, (placement, report) = solved(number)
    check_valid(problem, placement)
    assert report.objective == pytest.approx(instances.counted(problem, placement), rel=1e-9)
    assert 0 <= report.bound <= report.objective <= report.greedy * (1 + 1e-12)
    assert report.finished
    check_cap(problem, placement)
    if not problem.has_replicas:
        for device_LE in instances.draws(problem, 20, seed=number):
            value = problem.value(device_LE)
            assert report.bound <= value
            drawn = Placement.from_device_LE(device_LE, problem.num_devices)
            assert value == pytest.approx(instances.counted(problem, drawn), rel=1e-9)


@pytest.mark.parametrize(
    "number",
    [*range(0, instances.FEW, 6), *(n for n in numbers() if not isinstance(n, int))],
)
def test_a_seed_gives_one_plan(number):
    """The search ends by itself, so the plan does not depend on the machine's speed.

    The bound may: its relaxation improves for a share of the time.
    """
    _, first = solved(number)
    again = solve.solve_problem(instances.instance(number), number, time_limit=60)
    assert again.placement.digest == first.placement.digest
    assert again.report.objective == first.report.objective


@pytest.mark.parametrize("objective", ["seconds", "rows", "load"])
@pytest.mark.parametrize("dispatch", ["exchange", "hierarchical", "coherent"])
def test_one_layer(objective, dispatch):
    """A chain of one layer has no transitions, whatever the dispatch."""
    trace = synthetic.realistic(num_tokens=90, num_layers=1, num_experts=8, top_k=3, seed=0)
    problem = Problem(trace, topology.nodes_by_devices(2, 4), objective, dispatch)
    placement, report = solve.solve_problem(problem, 0, time_limit=20)
    assert report.objective == pytest.approx(instances.counted(problem, placement), rel=1e-9)
    assert report.bound <= report.objective <= report.greedy
