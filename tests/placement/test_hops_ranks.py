"""Hops of every set of devices by ranks, and what prices of slots prove: against brute force."""

import itertools
import math

import numpy as np
import pytest

from moe_jax.placement import hops, hops_bound, hops_counts, hops_ranks, hops_sets, topology
from moe_jax.placement.problem import Problem
from moe_jax.placement.topology import Topology
from moe_jax.placement.torus import Torus
from tests.placement import instances

LINE = Topology("line", 1, 3, torus=Torus((3,), (False,)))
RING = Topology("ring", 1, 5, torus=Torus((5,), (True,)))


def made(machine: Topology, dispatcher: str, experts: int, slots: int) -> Problem:
    trace = instances.tiny_trace(
        slots, num_tokens=50, num_layers=2, num_experts=experts, top_k=2, num_classes=3
    )
    trace = instances.with_gaps(trace, np.random.default_rng(slots))
    return Problem(trace, machine, "hops", num_slots=slots, dispatcher=dispatcher)


@pytest.mark.parametrize("machine", [LINE, RING, topology.flat(4)], ids=lambda one: one.name)
@pytest.mark.parametrize("dispatcher", hops.DISPATCHERS)
def test_every_set_costs_what_is_counted(machine, dispatcher):
    devices = machine.num_devices
    problem = made(machine, dispatcher, devices, 2 * devices)
    for layer, ways in enumerate(problem.hop_ways):
        ids_TK, nodes = problem.trace.expert_ids_TLK[:, layer], machine.nodes
        counts = hops_counts.Layer(ids_TK, devices, ways, nodes)
        sets = hops_ranks.Machine(ways)
        assert sorted(map(tuple, sets.holds_SM.tolist())) == sorted(
            way for way in itertools.product([False, True], repeat=devices) if any(way)
        )
        found_ES = sets.hops_ES(counts)
        for e in range(devices):
            hops_S, _ = counts.priced(np.full(len(sets.holds_SM), e), sets.holds_SM)
            np.testing.assert_allclose(found_ES[e], hops_S, rtol=1e-12, atol=1e-9)


def least(problem: Problem, layer: int) -> float:
    """Of all plans of a layer."""
    devices, experts = problem.num_devices, problem.trace.num_experts
    each = problem.num_slots // devices
    ids_TK, ways = problem.trace.expert_ids_TLK[:, layer], problem.hop_ways[layer]
    counts = hops_counts.Layer(ids_TK, experts, ways, problem.topology.nodes)
    held = list(itertools.combinations(range(experts), each))
    best = math.inf
    for plan in itertools.product(held, repeat=devices):
        holds_EM = np.stack([np.isin(np.arange(experts), one) for one in plan], axis=1)
        if holds_EM.any(axis=1).all():
            best = min(best, float(counts.priced(np.arange(experts), holds_EM)[0].sum()))
    return best


@pytest.mark.parametrize("dispatcher", hops.DISPATCHERS)
@pytest.mark.parametrize(
    ("machine", "experts", "slots"), [(LINE, 3, 6), (LINE, 6, 9), (topology.flat(4), 4, 8)]
)
def test_no_plan_has_fewer_hops(machine, experts, slots, dispatcher, monkeypatch):
    problem = made(machine, dispatcher, experts, slots)
    found_L = hops_ranks.fewest_L(problem, math.inf)
    best_L = np.array([least(problem, layer) for layer in range(2)])
    assert (found_L <= best_L + 1e-9).all()
    if dispatcher == "uniform":  # elsewhere whole plans may need more than any prices prove
        assert (found_L >= 0.85 * best_L).all()
    monkeypatch.setattr(hops_sets, "MOST", 0)  # so that ranks are asked
    bound = hops_bound.fewest_hops(problem, math.inf)
    assert 0.999 * found_L.sum() <= bound * problem.token_layers <= best_L.sum() + 1e-9
    # whatever the prices are
    rng = np.random.default_rng(0)
    machine_sets = hops_ranks.Machine(problem.hop_ways[0])
    ids_TK = problem.trace.expert_ids_TLK[:, 0]
    counts = hops_counts.Layer(ids_TK, experts, problem.hop_ways[0], machine.nodes)
    hops_ES = machine_sets.hops_ES(counts)
    for _ in range(20):
        prices = hops_ranks.Prices(slots // machine.num_devices)
        prices.best_M = rng.normal(size=machine.num_devices) * hops_ES.mean()
        prices.improve(machine_sets, hops_ES, 1, math.inf)
        assert prices.best <= best_L[0] + 1e-9


def test_who_is_known():
    problem = made(topology.nodes_by_devices(2, 4), "uniform", 4, 8)
    assert not hops_ranks.knows(problem)
    assert hops_ranks.knows(made(RING, "uniform", 5, 10))
    assert (hops_ranks.fewest_L(made(RING, "uniform", 5, 10), 0.0) == 0).all()
