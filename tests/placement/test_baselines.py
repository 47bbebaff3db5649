"""Baselines: hand-checked examples, slow versions beside them, brute force on tiny cases."""

import itertools

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import baselines, chain, cost, evidence, ilp, move, topology, uneven
from moe_jax.placement.baselines import (
    affinity_groups,
    exflow,
    grace,
    packing,
    registry,
    topology_cost,
)
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.routing.trace import Trace
from tests.placement import instances


def symmetric(rng, experts: int) -> np.ndarray:
    pairs_EE = np.triu(rng.integers(0, 100, (experts, experts)), 1)
    return (pairs_EE + pairs_EE.T).astype(float)


def test_zigzag_deals_forth_and_back():
    load_LE = np.array([[1.0, 2, 3, 4, 5, 6, 7, 8, 9], [9.0, 8, 7, 6, 5, 4, 3, 2, 1]])
    assert baselines.zigzag(load_LE, 3).tolist() == [
        [2, 1, 0, 0, 1, 2, 2, 1, 0],
        [0, 1, 2, 2, 1, 0, 0, 1, 2],
    ]


@pytest.mark.parametrize("seed", range(5))
def test_lpt_and_smartmoe_against_slow_versions(seed):
    rng = np.random.default_rng(seed)
    load_LE = rng.integers(1, 6, (6, 12)).astype(float)  # many ties
    before_LE = baselines.random(6, 12, 4, seed)
    lpt_LE = baselines.lpt(load_LE, 4)
    smart_LE = packing.smartmoe(load_LE, before_LE, 4)
    for layer, load_E in enumerate(load_LE):
        for prefer_home, got_E in ((False, lpt_LE[layer]), (True, smart_LE[layer])):
            groups: list[list[int]] = [[] for _ in range(4)]
            for e in sorted(range(12), key=lambda e: (-load_E[e], e)):
                free = [m for m in range(4) if len(groups[m]) < 3]
                lightest = min(sum(load_E[groups[m]]) for m in free)
                best = [m for m in free if sum(load_E[groups[m]]) == lightest]
                home = before_LE[layer, e]
                groups[home if prefer_home and home in best else best[0]].append(e)
            want_E = np.array([next(m for m in range(4) if e in groups[m]) for e in range(12)])
            fullest = [np.bincount(d, weights=load_E).max() for d in (before_LE[layer], want_E)]
            if prefer_home and fullest[1] >= fullest[0]:
                want_E = before_LE[layer]
            np.testing.assert_array_equal(got_E, want_E)


def test_smartmoe_leaves_a_layer_that_cannot_gain():
    before_LE = np.array([[1, 0, 0, 1]])
    assert packing.smartmoe(np.array([[4.0, 3, 2, 1]]), before_LE, 2).tolist() == [[1, 0, 0, 1]]
    assert packing.smartmoe(np.array([[4.0, 2, 3, 1]]), np.array([[1, 0, 1, 0]]), 2).tolist() == [
        [1, 0, 0, 1]
    ]


def test_cooccurrence_by_hand():
    """Mean 24, so 19.2 of load and three of four slots are for co-occurrence.

    Device 0: the heaviest, 0; most used with it, 6; most used with both, 7: three slots, though 4
    would fit. Device 1: 1, then 2; 3 would make 24. The rest by load: 3 to device 0 (13 < 17).
    """
    load_LE = np.array([[10.0, 9, 8, 7, 6, 5, 2, 1]])
    pairs_LEE = np.zeros((1, 8, 8))
    for e, f, count in ((0, 6, 9), (0, 1, 5), (6, 7, 8), (7, 4, 7), (1, 2, 3), (2, 3, 2)):
        pairs_LEE[0, e, f] = pairs_LEE[0, f, e] = count
    assert affinity_groups.cooccurrence(load_LE, pairs_LEE, 2).tolist() == [
        [0, 1, 1, 0, 1, 1, 0, 0]
    ]


def test_cooccurrence_with_no_share_is_packing():
    load_LE = np.random.default_rng(0).integers(1, 50, (3, 12)).astype(float)
    pairs_LEE = np.stack([symmetric(np.random.default_rng(n), 12) for n in range(3)])
    np.testing.assert_array_equal(
        affinity_groups.cooccurrence(load_LE, pairs_LEE, 3, alpha=0.0), baselines.lpt(load_LE, 3)
    )


def test_occult_by_hand():
    """The best pair 1-4 (9) takes 2 (6 + 3); of 0, 3, 5 the best pair is 0-5."""
    pairs_LEE = np.zeros((1, 6, 6))
    for e, f, count in ((1, 4, 9), (1, 2, 6), (4, 2, 3), (4, 3, 8), (0, 5, 2), (0, 3, 1)):
        pairs_LEE[0, e, f] = pairs_LEE[0, f, e] = count
    assert affinity_groups.occult(pairs_LEE, 2).tolist() == [[1, 0, 0, 1, 0, 1]]


def test_groups_that_are_planted_are_found():
    """Three groups of uneven size that share nothing; Occult's are the equal ones."""
    rng = np.random.default_rng(0)
    for sizes, find in (
        ((4, 4, 4), lambda EE: affinity_groups.occult(EE[None], 3)[0]),
        ((6, 4, 2), lambda EE: grace.bounded_groups(EE[None], 1, 3, 0)[0]),
    ):
        label_E = rng.permutation(np.repeat(np.arange(3), sizes))
        pairs_EE = np.where(label_E[:, None] == label_E[None, :], 100.0, 1.0)
        np.fill_diagonal(pairs_EE, 0.0)
        assert len(set(zip(label_E, find(pairs_EE), strict=True))) == 3


@pytest.mark.parametrize("seed", range(6))
def test_nearest_groups_are_optimal_within_their_sizes(seed):
    cost_EG = np.random.default_rng(seed).random((7, 3))
    costs = [
        cost_EG[np.arange(7), labels].sum()
        for labels in itertools.product(range(3), repeat=7)
        if all(2 <= labels.count(g) <= 3 for g in range(3))
    ]
    group_E = grace.nearest(cost_EG, 2, 3)
    assert {2, 3} >= set(np.bincount(group_E, minlength=3))
    assert cost_EG[np.arange(7), group_E].sum() == pytest.approx(min(costs), abs=1e-12)


def test_grace_keeps_its_sizes_on_nodes_too():
    pairs_LEE = np.stack([symmetric(np.random.default_rng(n), 24) ** 3 for n in range(4)])
    device_LE = grace.bounded_groups(pairs_LEE, 2, 6, 0)
    sizes_LM = np.stack([np.bincount(row, minlength=6) for row in device_LE])
    assert sizes_LM.min() >= 2
    assert sizes_LM.max() <= 6
    assert len(np.unique(sizes_LM)) > 1  # they are uneven
    np.testing.assert_array_equal(device_LE, grace.bounded_groups(pairs_LEE, 2, 6, 0))


@pytest.mark.parametrize("spare", [0.02, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_topology_cost_ends_where_no_allowed_swap_helps(seed, spare):
    rng = np.random.default_rng(seed)
    price_MM = topology_prices()
    traffic_SLE = rng.integers(0, 50, (4, 2, 8)).astype(float)
    start_LE = baselines.random(2, 8, 4, seed)
    device_LE = topology_cost.swapped(traffic_SLE, price_MM, start_LE, spare)

    def total(layer, device_E):
        return sum(
            traffic_SLE[s, layer, e] * price_MM[s, device_E[e]] for s in range(4) for e in range(8)
        )

    def fullest(layer, device_E):
        return np.bincount(device_E, weights=traffic_SLE[:, layer].sum(axis=0), minlength=4).max()

    for layer in range(2):
        done_E = device_LE[layer]
        cap = (1 + spare) * fullest(layer, start_LE[layer])
        assert total(layer, done_E) <= total(layer, start_LE[layer])
        assert spare < 0.5 or total(layer, done_E) < total(layer, start_LE[layer])
        assert fullest(layer, done_E) <= cap * (1 + 1e-9)
        for e, f in itertools.combinations(range(8), 2):
            other_E = done_E.copy()
            other_E[e], other_E[f] = done_E[f], done_E[e]
            assert fullest(layer, other_E) > cap or total(layer, other_E) >= total(layer, done_E)


def topology_prices() -> np.ndarray:
    price_MM = np.where(np.arange(4)[:, None] // 2 == np.arange(4)[None, :] // 2, 1.0, 9.0)
    np.fill_diagonal(price_MM, 0.0)
    return price_MM


def test_topology_cost_of_even_traffic_changes_nothing():
    start_LE = baselines.random(2, 8, 4, 0)
    even_SLE = np.tile(np.random.default_rng(0).random((1, 2, 8)), (4, 1, 1))
    np.testing.assert_array_equal(
        topology_cost.swapped(even_SLE, topology_prices(), start_LE), start_LE
    )


def test_traffic_is_counted_token_by_token():
    trace = instances.noisy_trace(0, num_tokens=50)
    home_T = np.random.default_rng(0).integers(0, 4, trace.num_tokens)
    want_SLE = np.zeros((4, 3, 8), int)
    for t, ids_LK in enumerate(trace.expert_ids_TLK):
        for layer, ids_K in enumerate(ids_LK):
            for e in ids_K:
                want_SLE[home_T[t], layer, e] += 1
    got_SLE = topology_cost.traffic_SLE(trace.expert_ids_TLK, home_T, 4, 8)
    np.testing.assert_array_equal(got_SLE, want_SLE)


@pytest.mark.parametrize("seed", range(4))
def test_exflow_solves_each_pair_exactly(seed):
    trace = instances.noisy_trace(seed, num_experts=6, num_tokens=100)
    keep_LEE = Problem(trace, topology.flat(3), "exflow").top1_LEE
    found = exflow.staged(keep_LEE, 1, 3, 20)
    assert not found.cut
    labels = instances.partitions(6, 3)

    def kept(layer, before_E, after_E):
        return exflow.kept(keep_LEE[layer : layer + 1], np.stack([before_E, after_E]))

    first = max(kept(0, a, b) for a, b in itertools.product(labels, labels))
    assert kept(0, *found.device_LE[:2]) == first
    assert kept(1, *found.device_LE[1:]) == max(kept(1, found.device_LE[1], b) for b in labels)


def test_exflow_on_one_device_is_that_device(monkeypatch):
    """Whatever memory held before."""
    made = np.empty

    def dirty(*args, **named):
        array = made(*args, **named)
        array.fill(7)
        return array

    monkeypatch.setattr(np, "empty", dirty)
    staged = exflow.pair_by_pair(np.ones((2, 4, 4)), 1, 1.0)
    np.testing.assert_array_equal(staged.device_LE, np.zeros((3, 4)))


def test_exflow_counts_what_stays():
    trace = instances.noisy_trace(3)
    task = Problem(trace, topology.flat(4), "exflow")
    device_LE = baselines.random(3, 8, 4, 0)
    assert exflow.kept(task.top1_LEE, device_LE) == task.chain(task.top1_LEE).value(device_LE)


def test_exflow_decides_nodes_before_devices():
    """As one node of two, node by node: the nodes are those of the two-way program."""
    trace = instances.noisy_trace(1, num_experts=8, num_tokens=200)
    keep_LEE = Problem(trace, topology.flat(4), "exflow").top1_LEE
    found = exflow.staged(keep_LEE, 2, 4, 20)
    nodes = exflow.pair_by_pair(keep_LEE, 2, 10)
    np.testing.assert_array_equal(found.device_LE // 2, nodes.device_LE)
    assert all(np.bincount(row).tolist() == [2, 2, 2, 2] for row in found.device_LE)


def test_exflow_says_when_it_is_cut_and_still_answers():
    trace = instances.noisy_trace(0, num_experts=32, num_tokens=3000)
    keep_LEE = Problem(trace, topology.flat(8), "exflow").top1_LEE
    found = exflow.staged(keep_LEE, 1, 8, 0.01)
    assert found.cut
    Placement.from_device_LE(found.device_LE, 8)
    swept_LE = chain.sweep(
        Problem(trace, topology.flat(8), "exflow").chain(keep_LEE), found.device_LE[0], np.inf
    )
    np.testing.assert_array_equal(found.device_LE, swept_LE)  # greedy from the first layer


@pytest.mark.parametrize(("bound_above", "cut"), [(0.0, False), (1.0, True)])
def test_exflow_is_cut_where_its_program_has_no_proof(bound_above, cut, monkeypatch):
    keep_LEE = Problem(instances.noisy_trace(0), topology.flat(2), "exflow").top1_LEE
    device_LE = baselines.random(2, 8, 2, 0)
    kept = exflow.kept(keep_LEE[:1], device_LE)
    answer = ilp.Solved(device_LE, kept + bound_above)
    monkeypatch.setattr(ilp, "whole_chain", lambda *_: answer)
    found = exflow.staged(keep_LEE, 1, 2, 1.0)
    assert found.cut == cut
    np.testing.assert_array_equal(found.device_LE[0], device_LE[0])


@pytest.mark.parametrize("dispatch", ["exchange", "hierarchical", "coherent", "gathered"])
@pytest.mark.parametrize("seed", range(2))
def test_uneven_groups_count_as_if_idle_experts_filled_their_slots(seed, dispatch):
    """The oracle is an equal placement of more experts, of which no token uses the new ones."""
    trace, machine = instances.noisy_trace(seed), topology.nodes_by_devices(2, 4)
    rng = np.random.default_rng(seed)
    device_LE = np.stack([rng.permutation([0, 0, 0, 1, 2, 2, 3, 3]) for _ in range(3)])
    placement = uneven.of_devices(device_LE, 4)
    assert isinstance(placement, uneven.Uneven)
    assert (placement.num_slots, placement.padding) == (12, 4)
    np.testing.assert_array_equal(placement.device_LE, device_LE)
    more = Trace(trace.expert_ids_TLK, 12, trace.seq_len)
    idle_E = [1, 1, 2, 3]
    equal = Placement.from_device_LE(np.column_stack([device_LE, np.tile(idle_E, (3, 1))]), 4)
    for objective in ("seconds", "rows", "load", "exflow"):
        if (objective, dispatch) == ("rows", "gathered"):
            continue
        here, there = (Problem(t, machine, objective, dispatch) for t in (trace, more))
        assert here.value_of(placement) == pytest.approx(there.value_of(equal), rel=1e-12)
    ids_TLK = trace.expert_ids_TLK
    load_LM = cost.computed_LM(ids_TLK, placement)
    np.testing.assert_array_equal(load_LM, cost.computed_LM(ids_TLK, equal))
    one, other = (evidence.judge(t, p, machine) for t, p in ((trace, placement), (more, equal)))
    assert one == other
    before = Placement.contiguous(3, 8, 4)
    moved = move.move(before, placement, machine, 1)
    assert moved.experts == int((before.device_LE != device_LE).sum())


def test_equal_groups_make_a_plain_placement():
    device_LE = baselines.random(2, 8, 4, 0)
    assert type(uneven.of_devices(device_LE, 4)) is Placement


def unused_expert() -> Trace:
    """Nobody asks for expert 3 of the second layer, nor for two experts together in the third."""
    trace = instances.noisy_trace(0)
    ids_TLK = trace.expert_ids_TLK.copy()
    ids_TLK[:, 1][(ids_TLK[:, 1] == 3).any(axis=1)] = trace.no_expert
    ids_TLK[:, 2, 1:] = trace.no_expert
    return Trace(ids_TLK, 8, trace.seq_len)


@pytest.mark.parametrize(
    ("trace", "devices", "nodes", "slots"),
    [
        (instances.noisy_trace(0), 4, 1, None),
        (instances.noisy_trace(0), 4, 2, None),
        (instances.noisy_trace(0), 4, 2, 12),
        (instances.noisy_trace(0, top_k=1), 4, 1, None),
        (unused_expert(), 4, 2, None),
        (unused_expert(), 4, 2, 12),
    ],
    ids=["flat", "nodes", "slots", "one expert a token", "unused", "unused, slots"],
)
def test_every_baseline_places_every_expert(trace, devices, nodes, slots):
    machine = topology.nodes_by_devices(nodes, devices)
    problem = Problem(trace, machine, num_slots=slots)
    names = []
    for one in registry.chosen(None, problem):
        made = one.make(problem, 0, 1.0)
        names.append(one.key)
        for row_P in made.placement.physical_to_logical_LP:
            assert set(row_P) - {uneven.EMPTY} == set(range(8)), one.key
        if made.valid:
            Placement(made.placement.physical_to_logical_LP, 8, devices)
        padded = made.placement.num_slots > 8 and not made.placement.has_replicas
        assert made.valid == (made.duplicates == 0 and not padded)
        assert one.key in ("grace", "moetuner-free") or not padded
    assert len(set(names)) == len(names)
    assert ("eplb-hierarchical" in names) == (nodes > 1)
    assert ("balanced-slots" in names) == (slots is not None)


def test_baselines_are_chosen_by_name():
    problem = Problem(instances.noisy_trace(0), topology.flat(4))
    assert [one.key for one in registry.chosen(["lpt", "contiguous"], problem)] == [
        "contiguous",
        "lpt",
    ]
    with pytest.raises(Refused, match="methods"):
        registry.chosen(["best"], problem)
    with pytest.raises(Refused, match=r"methods = 'balanced-slots': needs copies \(--slots\)"):
        registry.chosen(["lpt", "balanced-slots"], problem)


def test_occult_with_a_device_for_every_expert():
    pairs_LEE = np.array([[[0, 3, 1], [3, 0, 2], [1, 2, 0]]], float)
    np.testing.assert_array_equal(np.sort(affinity_groups.occult(pairs_LEE, 3)), [[0, 1, 2]])
