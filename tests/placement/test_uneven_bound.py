"""Contacts with nodes of different sizes: the bound against every placement, by brute force."""

import itertools
import math

import numpy as np
import pytest

from moe_jax.placement import relax, topology, uneven_bound
from moe_jax.placement.contact_bound import TokenSets
from moe_jax.placement.problem import Problem
from tests.placement import instances


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(uneven_bound, "STEPS", 120)


def every_node_E(size_N: np.ndarray) -> list[np.ndarray]:
    """The node of every expert, in all ways that fill the nodes."""
    nodes = np.repeat(np.arange(len(size_N)), size_N)
    return [np.array(way) for way in sorted(set(itertools.permutations(nodes.tolist())))]


def least(sets: TokenSets, ways: list[np.ndarray], weight_N: np.ndarray) -> float:
    """Weighted contacts, set by set, of the best placement."""
    experts = len(ways[0])
    return min(
        sum(
            weight * sum(weight_N[n] for n in set(node_E[node_K[node_K < experts]].tolist()))
            for node_K, weight in zip(sets.node_QK, sets.weight_Q, strict=True)
        )
        for node_E in ways
    )


def sets_of(seed: int, layers: int = 2) -> list[TokenSets]:
    trace = instances.tiny_trace(
        seed, num_tokens=30, num_layers=layers, num_experts=6, top_k=3, num_classes=2
    )
    trace = instances.with_gaps(trace, np.random.default_rng(seed))
    problem = Problem(trace, topology.flat(2), "rows")
    return [TokenSets(one.expert_QK, one.count_Q) for one in problem.sets]


@pytest.mark.parametrize("sizes", [(4, 2), (2, 3, 1), (1, 4, 1)])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 3.0, 2.0), (2.0, 0.0, 1.0)])
def test_no_placement_has_fewer(sizes, weights):
    size_N, weight_N = np.array(sizes), np.array(weights[: len(sizes)])
    sets, ways = sets_of(len(sizes)), every_node_E(size_N)
    bound_L = uneven_bound.fewest_L(sets, 6, size_N, weight_N, math.inf)
    for bound, one in zip(bound_L, sets, strict=True):
        best = least(one, ways, weight_N)
        assert bound <= best + 1e-9
        assert bound > 0.6 * best


@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_multipliers_are(seed):
    rng = np.random.default_rng(seed)
    size_N, weight_N = np.array([3, 2, 1]), np.array([1.0, 2.0, 3.0])
    sets, ways = sets_of(seed), every_node_E(size_N)
    size_B, number_B = np.array([1, 2, 3]), np.ones(3, int)
    run = uneven_bound._Relaxation(2, 6, size_B, number_B)
    uneven_bound._Choices(sets, run, weight_N[::-1])(run)
    for _ in range(5):
        run._scaled[:] = rng.normal(size=run._scaled.shape)
        found_L = -run.bound_A()
        assert all(f <= least(one, ways, weight_N) for f, one in zip(found_L, sets, strict=True))


def test_groups_that_fit_are_found():
    """Tokens choose among the first four experts or the last two: a node each."""
    node_QK = np.array([*itertools.combinations(range(4), 2), (4, 5)])
    sets = [TokenSets(node_QK, np.full(len(node_QK), 10.0))]
    found_L = uneven_bound.fewest_L(sets, 6, np.array([4, 2]), np.ones(2), math.inf)
    assert found_L[0] == pytest.approx(70.0, rel=1e-2)
    assert found_L[0] <= 70.0
    assert uneven_bound.fewest_L(sets, 6, np.array([4, 2]), np.ones(2), 0.0)[0] == 0.0


@pytest.mark.parametrize("objective", ["rows", "seconds"])
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2, 3)])
def test_it_raises_what_hierarchical_dispatch_needs_at_least(sizes, objective):
    trace = instances.tiny_trace(1, num_tokens=60, num_layers=1, num_experts=6, top_k=2)
    problem = Problem(trace, topology.uneven(sizes), objective, "hierarchical")
    each = 6 // problem.num_devices
    devices = np.repeat(np.arange(problem.num_devices), each)
    best = min(
        problem.value(np.array(way)[None]) for way in set(itertools.permutations(devices.tolist()))
    )
    before, after = (relax.lower_bound(problem, end) for end in (0.0, math.inf))
    assert 0 < before <= after <= best
