"""Rows with copies: the bound against every plan, under the best copy rule there is."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from moe_jax.placement import copies_bound, solve, topology
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.routing.trace import Trace
from tests.placement import instances


def every_plan(experts: int, devices: int, slots: int) -> list[Placement]:
    """All plans of one layer."""
    sets = list(itertools.combinations(range(experts), slots // devices))
    return [
        Placement(np.concatenate(rows)[None], experts, devices)
        for rows in itertools.product(sets, repeat=devices)
        if len(set(itertools.chain(*rows))) == experts
    ]


def fewest(problem: Problem, plan: Placement) -> float:
    """Rows per token of the best copy rule: from every home, every choice of copies is tried."""
    devices, ids_TK = problem.num_devices, problem.trace.expert_ids_TLK[:, 0].astype(int).tolist()
    held_MS = plan.physical_to_logical_LP[0].reshape(devices, -1).tolist()
    on = [[m for m in range(devices) if e in held_MS[m]] for e in range(plan.num_experts)]
    nodes, weight_MM = problem.topology.nodes, problem.row_weight_MM
    total, real = 0.0, 0
    for token in ids_TK:
        chosen = [e for e in token if e < plan.num_experts]
        real += bool(chosen)
        for home in range(devices if chosen else 0):
            ways = []
            for used in itertools.product(*(on[e] for e in chosen)):
                if problem.dispatch == "exchange":
                    ways.append(float(len(set(used) - {home})))
                    continue
                entry = {int(nodes.relay(np.array(home), nodes.node_of(np.array(m)))) for m in used}
                slow = sum(weight_MM[home, m] for m in entry - {home})
                ways.append(slow + len(set(used) - entry - {home}))
            total += 2 * min(ways) / devices
    return total / real


def tiny(seed: int, experts: int, top_k: int, gaps: bool) -> Trace:
    trace = instances.tiny_trace(
        seed, num_tokens=14, num_layers=1, num_experts=experts, top_k=top_k, num_classes=3
    )
    return instances.with_gaps(trace, np.random.default_rng(seed)) if gaps else trace


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(
    ("machine", "experts", "slots", "dispatch"),
    [
        (topology.flat(2), 4, 6, "exchange"),
        (topology.flat(3), 3, 6, "exchange"),
        (topology.flat(3), 4, 6, "exchange"),
        (topology.flat(4), 4, 8, "exchange"),
        (topology.nodes_by_devices(2, 4), 4, 8, "hierarchical"),
        (topology.uneven((2, 1)), 3, 6, "hierarchical"),
    ],
)
def test_no_plan_under_any_copy_rule_has_fewer_rows(machine, experts, slots, dispatch, top_k, gaps):
    trace = tiny(top_k + slots, experts, top_k, gaps)
    problem = Problem(trace, machine, "rows", dispatch, num_slots=slots)
    plans = every_plan(experts, machine.num_devices, slots)
    if len(plans) > 30:
        plans = [plans[i] for i in np.random.default_rng(0).choice(len(plans), 30, replace=False)]
    least = min(fewest(problem, plan) for plan in plans) * (1 + 1e-12)
    counted = copies_bound.fewest_rows(problem)
    assert 0 <= counted <= copies_bound.fewest_rows(problem, math.inf) <= least


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("dispatch", ["exchange", "hierarchical", "coherent", "shuffled"])
@pytest.mark.parametrize(("nodes", "devices", "slots"), [(1, 2, 6), (2, 4, 8), (1, 4, 8)])
def test_no_plan_under_the_planners_rule_has_fewer_rows(nodes, devices, slots, dispatch, gaps):
    for top_k in (1, 2, 3):
        trace = tiny(top_k, 4, top_k, gaps)
        machine = topology.nodes_by_devices(nodes, devices)
        problem = Problem(trace, machine, "rows", dispatch, num_slots=slots)
        plans = every_plan(4, devices, slots)
        best = min(problem.value_of(plan) for plan in plans[:: max(len(plans) // 50, 1)])
        assert 0 <= copies_bound.fewest_rows(problem, math.inf) <= best * (1 + 1e-12)


def test_with_one_expert_per_token_it_is_reached():
    """A token stays if its expert is at home: the most used experts have the spare slots."""
    ids_TLK = np.repeat(np.arange(4), [50, 30, 15, 5]).astype(np.uint8)[:, None, None]
    trace = Trace(ids_TLK, 4, np.array([100]))
    problem = Problem(trace, topology.flat(4), "rows", num_slots=8)
    bound = copies_bound.fewest_rows(problem)
    assert bound == pytest.approx(2 * (1 - (4 * 50 + 2 * 30 + 15 + 5) / 400))
    best = fewest(problem, Placement(np.array([[0, 1, 0, 1, 0, 2, 0, 3]]), 4, 4))
    assert bound == pytest.approx(best, rel=1e-6)
    two = dataclasses.replace(
        problem, topology=topology.nodes_by_devices(2, 4), dispatch="hierarchical"
    )
    assert bound <= copies_bound.fewest_rows(two) * (1 + 1e-9)


def test_where_sets_are_spread_out_it_is_close():
    """Every pair of experts is as frequent as any other: no slots keep many together."""
    pairs = np.array(list(itertools.permutations(range(8), 2)), np.uint8)
    trace = Trace(pairs[:, None, :], 8, np.array([len(pairs)]))
    problem = Problem(trace, topology.flat(4), "rows", num_slots=12)
    report = solve.solve_problem(problem, 0, 5.0).report
    assert 0.75 * report.objective < report.bound <= report.objective
    assert "by a relaxation" in report.note


def test_more_slots_never_raise_it():
    trace = instances.tiny_trace(2, num_tokens=200, num_experts=8, top_k=3)
    for dispatch in ("exchange", "hierarchical", "coherent", "shuffled"):
        problem = Problem(trace, topology.nodes_by_devices(2, 4), "rows", dispatch, num_slots=12)
        found = [
            copies_bound.fewest_rows(dataclasses.replace(problem, num_slots=slots))
            for slots in (12, 16, 20, 32)
        ]
        assert found == sorted(found, reverse=True)
        assert found[-1] == pytest.approx(0.0, abs=1e-9)  # every expert on every device


@pytest.mark.parametrize("dispatch", ["exchange", "hierarchical", "coherent", "shuffled"])
def test_where_no_row_is_needed_nothing_is_proven(dispatch):
    """Not even what rounding leaves of differences."""
    for seed in range(3):
        trace = instances.tiny_trace(seed, top_k=3)
        problem = Problem(trace, topology.nodes_by_devices(2, 2), "rows", dispatch, num_slots=12)
        assert copies_bound.fewest_rows(problem) == 0
