"""Layers with copies above their cap: brought below it, valid, by one move where one is enough."""

import dataclasses
import itertools

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import cost, hops, hops_counts, solve, spare, topology, with_copies
from moe_jax.placement.limits import slots
from moe_jax.placement.limits.pins import Pins
from moe_jax.placement.limits.previous import Previous, holds_LEM, placement_of
from moe_jax.placement.limits.relieved import relieved
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.routing.trace import Trace
from tests.placement.test_limits_slots import CASES, at_random, noisy_trace

BUDGET = 4  # copies


def served(trace: Trace, nodes: int, devices: int) -> hops_counts.Layer:
    ways = hops.Ways(np.arange(devices), np.zeros((devices, devices)))
    where = topology.nodes_by_devices(nodes, devices).nodes
    return hops_counts.Layer(trace.expert_ids_TLK[:, 0], trace.num_experts, ways, where)


def largest(trace: Trace, nodes: int, held_EM: np.ndarray, speed_M: np.ndarray) -> float:
    """Counted token by token."""
    each = topology.nodes_by_devices(nodes, len(speed_M)).devices_per_node
    plan = placement_of(held_EM[None])
    load_LM = cost.computed_LM(trace.expert_ids_TLK, plan, "exchange", None, each)
    return float((load_LM[0] / speed_M).max())


def one_move(held_EM: np.ndarray):
    """Every layer that one copy less and one more on the same device make."""
    for device in range(held_EM.shape[1]):
        for leaving in np.flatnonzero(held_EM[:, device] & (held_EM.sum(axis=1) > 1)):
            for arriving in np.flatnonzero(~held_EM[:, device]):
                new_EM = held_EM.copy()
                new_EM[leaving, device], new_EM[arriving, device] = False, True
                yield new_EM


@pytest.mark.parametrize("seed", range(12))
def test_below_the_cap_by_few_moves(seed):
    rng, nodes = np.random.default_rng(seed), 1 + seed % 2
    trace = noisy_trace(seed, num_layers=1, top_k=1 + seed % 3)
    if seed % 4 == 1:  # an expert that nobody chooses, in whose place there is none
        ids_TLK = np.where(trace.expert_ids_TLK == 2, trace.no_expert, trace.expert_ids_TLK)
        trace = dataclasses.replace(trace, expert_ids_TLK=ids_TLK)
    speed_M = np.array([1.0, 1.0, 1.0, 0.7]) if seed % 3 == 0 else np.ones(4)
    held_EM = holds_LEM(at_random(seed + 50, 1, 8, 12, 4))[0]
    pin_EM = held_EM & (rng.random((8, 4)) < 0.2)
    layer = served(trace, nodes, 4)
    before = largest(trace, nodes, held_EM, speed_M)
    found = 0
    for cap in before * np.array([1.0, 0.97, 0.9, 0.8, 0.3]):
        new_EM = relieved(layer, held_EM, pin_EM, speed_M, cap)
        singles = [one for one in one_move(held_EM) if not (pin_EM & ~one).any()]
        single = any(largest(trace, nodes, one, speed_M) <= cap for one in singles)
        if new_EM is None:
            assert not single
            continue
        found += 1
        assert (new_EM.sum(axis=0) == 3).all()
        assert new_EM.any(axis=1).all()
        assert not (pin_EM & ~new_EM).any()
        assert largest(trace, nodes, new_EM, speed_M) <= cap * (1 + 1e-6)
        moves = int((new_EM & ~held_EM).sum())
        assert moves == 0 if cap == before else moves >= 1
        assert moves <= 1 or not single
    assert 1 <= found < 5  # no plan has less than the mean


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_plan_in_use_above_the_cap_is_brought_below_it(number):
    """By no more than the budget, whatever the dispatch; without time for any search, too."""
    objective, dispatch, nodes = CASES[number]
    trace, machine = noisy_trace(number, num_tokens=600), topology.nodes_by_devices(nodes, 4)
    problem = Problem(trace, machine, objective, dispatch, num_slots=12)
    old = at_random(number + 53, 2, 8, 12, 4)
    reached = float((spare.largest_L(problem, old) / problem.mean_L).max())
    previous = Previous(old, BUDGET)
    capped = dataclasses.replace(problem, load_cap=LoadCap(0.9 * reached), previous=previous)
    cap_L = with_copies.begin(capped).cap_L
    assert not with_copies.judged(capped, old, cap_L).fits
    assert previous.moved(spare.balanced(problem)) > BUDGET
    for limit in (0.0, 1.0):
        placement = solve.solve_problem(capped, 0, limit).placement
        assert with_copies.judged(capped, placement, cap_L).fits
        assert previous.moved(placement) <= BUDGET


@pytest.mark.parametrize("dispatch", ["exchange", "coherent"])
def test_a_budget_that_cannot_pay_for_the_cap_is_refused_with_one_that_can(dispatch):
    named = 0
    for seed, factor in itertools.product(range(8), (0.95, 0.85, 0.75)):
        problem = Problem(noisy_trace(seed), topology.flat(4), "rows", dispatch, num_slots=12)
        old = at_random(50 + seed, 2, 8, 12, 4)
        reached = float((spare.largest_L(problem, old) / problem.mean_L).max())
        problem = dataclasses.replace(problem, load_cap=LoadCap(factor * reached))
        with pytest.raises(Refused) as refused:  # also where no plan has so little
            solve.solve_problem(dataclasses.replace(problem, previous=Previous(old, 0)), 0, 0.0)
        if refused.value.field != "move_budget":
            continue
        named += 1
        needed = int(str(refused.value).split("Allow the bytes of ")[1].split()[0])
        assert needed >= 1
        enough = dataclasses.replace(problem, previous=Previous(old, needed))
        placement = solve.solve_problem(enough, 0, 0.0).placement
        assert with_copies.judged(enough, placement, with_copies.begin(enough).cap_L).fits
    assert named >= 5 if dispatch == "exchange" else not named  # loads follow the layer before


@pytest.mark.parametrize("dispatch", ["exchange", "coherent"])
def test_pins_and_a_cap_together(dispatch):
    """The even plan with pins mended in passes the cap; few changes bring it back."""
    trace, held_LEM = noisy_trace(3, num_tokens=600), np.zeros((2, 8, 4), bool)
    plain = Problem(trace, topology.flat(4), "rows", dispatch, num_slots=12)
    heavy_LE = np.argsort(-plain.load_LE, axis=1)
    held_LEM[[0, 1], heavy_LE[:, 0], 0] = True  # the heaviest two on one device
    held_LEM[[0, 1], heavy_LE[:, 1], 0] = True
    pinned = dataclasses.replace(plain, pins=Pins(held_LEM), load_cap=LoadCap(1.05, relative=True))
    cap_L = with_copies.begin(pinned).cap_L
    assert not with_copies.judged(pinned, slots.start(pinned, cap_L, 0), cap_L).fits
    placement = solve.solve_problem(pinned, 0, 0.0).placement
    assert with_copies.judged(pinned, placement, cap_L).fits
    assert not (held_LEM & ~holds_LEM(placement)).any()


def test_pins_that_no_plan_within_the_cap_keeps():
    """All slots are pinned, the heaviest three experts on one device."""
    trace, held_LEM = noisy_trace(3, num_tokens=600), np.zeros((2, 8, 4), bool)
    plain = Problem(trace, topology.flat(4), "rows", num_slots=12)
    for layer, expert_E in enumerate(np.argsort(-plain.load_LE, axis=1)):
        a, b, c, d, e = expert_E[3:]
        for device, experts in enumerate([expert_E[:3], [a, b, c], [a, d, e], [b, d, e]]):
            held_LEM[layer, experts, device] = True
    pinned = dataclasses.replace(plain, pins=Pins(held_LEM), load_cap=LoadCap(1.1, relative=True))
    with pytest.raises(Refused, match="with these pins") as refused:
        solve.solve_problem(pinned, 0, 1.0)
    assert "more load" in str(refused.value)
    assert "fewer pins" in str(refused.value)
    both = dataclasses.replace(pinned, previous=Previous(placement_of(held_LEM), 5))
    with pytest.raises(Refused, match="near to the plan in use and with these pins"):
        solve.solve_problem(both, 0, 1.0)
