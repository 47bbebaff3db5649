"""Nodes of different sizes: every count against an oracle that follows each row by hand."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import (
    baselines,
    chain,
    copies,
    cost,
    evidence,
    move,
    nodes,
    paired,
    relax,
    seating,
    solve,
    topology,
)
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.routing import synthetic
from moe_jax.routing.trace import Trace
from tests.placement import instances

FAR = 1e12
SIZES = [(3, 1), (1, 2, 1), (2, 1, 1)]  # of four devices


def made(seed: int, **changes) -> Trace:
    """Some tokens lack experts, the first one all of them."""
    sizes = {"num_tokens": 40, "num_layers": 3, "num_experts": 8, "top_k": 3, "num_classes": 4}
    trace = synthetic.realistic(**(sizes | changes), seed=seed, num_sequences=4)
    ids_TLK = trace.expert_ids_TLK.copy()
    ids_TLK[::5, :, 1:] = trace.no_expert
    ids_TLK[0] = trace.no_expert
    return dataclasses.replace(trace, expert_ids_TLK=ids_TLK, expert_weights_TLK=None)


def relayed_by_hand(sizes, devices_of_token, home):
    """The (source, destination) rows of one token's way out, one row per node and device."""
    members = {}
    first = 0
    for node, size in enumerate(sizes):
        members[node] = list(range(first, first + size))
        first += size
    at_home = next(n for n, inside in members.items() if home in inside)
    place = members[at_home].index(home)
    rows = []
    for node, inside in members.items():
        wanted = sorted(set(devices_of_token) & set(inside))
        if not wanted:
            continue
        entry = home if node == at_home else inside[place % len(inside)]
        rows += [(home, entry)] + [(entry, device) for device in wanted]
    return [(a, b) for a, b in rows if a != b]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("known", [True, False])
def test_hierarchical_rows_follow_each_row_by_hand(sizes, known):
    trace = made(1)
    placement = Placement.from_device_LE(baselines.random(3, 8, 4, 1), 4)
    home_T = np.random.default_rng(0).integers(4, size=trace.num_tokens)
    wanted_LMM = np.zeros((3, 4, 4))
    for token, given in zip(trace.expert_ids_TLK.tolist(), home_T.tolist(), strict=True):
        for layer, chosen in enumerate(token):
            places = [int(placement.device_LE[layer, e]) for e in chosen if e != trace.no_expert]
            for home in [given] if known else range(4):
                for source, destination in relayed_by_hand(sizes, places, home):
                    wanted_LMM[layer, source, destination] += 1 if known else 1 / 4
    found = cost.rows(
        trace.expert_ids_TLK,
        placement,
        "hierarchical",
        home_T if known else None,
        devices_per_node=sizes,
    )
    np.testing.assert_allclose(found.dispatch_LMM, wanted_LMM, atol=1e-12)
    np.testing.assert_allclose(found.combine_LMM, wanted_LMM.transpose(0, 2, 1), atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
def test_evidence_and_samples_equal_the_counts(sizes):
    trace, machine = made(2), topology.uneven(sizes)
    placement = Placement.from_device_LE(baselines.random(3, 8, 4, 2), 4)
    found = evidence.judge(trace, placement, machine)
    tokens = (trace.expert_ids_TLK != trace.no_expert).any(axis=2).sum()
    once = paired.weights(trace.num_sequences, 0)
    for dispatch in cost.DISPATCHES:
        rows = cost.rows(trace.expert_ids_TLK, placement, dispatch, devices_per_node=sizes)
        counted = rows.total_LMM.sum() / tokens
        assert found.rows[dispatch].value == pytest.approx(counted, rel=1e-12)
        problem = Problem(trace, machine, "seconds", dispatch)
        samples = paired.sample(problem, placement, once)
        assert samples.rows_B[0] == pytest.approx(counted, rel=1e-12)
        assert samples.seconds_B[0] == pytest.approx(problem.value_of(placement), rel=1e-12)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dispatch", ["exchange", "hierarchical"])
def test_copies_serve_their_node_first(sizes, dispatch):
    """With one slot per expert and device to spare: counts of a plan with copies, home by home."""
    trace = made(3)
    rng = np.random.default_rng(3)
    slots_LP = np.stack(
        [np.concatenate([rng.permutation(8)[:4] for _ in range(4)]) for _ in range(3)]
    )
    slots_LP[:, :8] = np.arange(8)  # every expert once at least
    placement = Placement(slots_LP, 8, 4)
    node_of = np.repeat(np.arange(len(sizes)), sizes)
    for home in range(4):
        home_T = np.full(trace.num_tokens, home)
        device_TK = cost.devices_TK(trace.expert_ids_TLK, placement, 1, home_T, sizes)
        for chosen, device_K in zip(trace.expert_ids_TLK[:, 1].tolist(), device_TK, strict=True):
            for e, device in zip(chosen, device_K.tolist(), strict=True):
                if e == trace.no_expert:
                    continue
                holders = set((np.flatnonzero(slots_LP[1] == e) // 4).tolist())
                assert device in holders
                near = {m for m in holders if node_of[m] == node_of[home]}
                assert device == home if home in holders else device in (near or holders)
    problem = Problem(trace, topology.uneven(sizes), "seconds", dispatch, num_slots=16)
    figures = evidence.judge(trace, placement, problem.topology)
    every = [
        cost.rows(
            trace.expert_ids_TLK, placement, dispatch, np.full(40, home), devices_per_node=sizes
        )
        for home in range(4)
    ]
    tokens = (trace.expert_ids_TLK != trace.no_expert).any(axis=2).sum()
    wanted = sum(one.total_LMM.sum() for one in every) / 4 / tokens
    assert figures.rows[dispatch].value == pytest.approx(wanted, rel=1e-12)


def every_placement(experts: int, devices: int, layers: int) -> list[np.ndarray]:
    equal = sorted(np.arange(experts) % devices)
    labels = sorted(set(itertools.permutations(equal)))
    return [np.array(rows) for rows in itertools.product(labels, repeat=layers)]


@pytest.mark.parametrize("sizes", [(2, 1), pytest.param((1, 2), marks=pytest.mark.slow)])
@pytest.mark.parametrize("objective", ["rows", "seconds"])
@pytest.mark.parametrize("dispatch", ["exchange", "hierarchical", "gathered"])
def test_bound_and_plan_of_one_layer_against_brute_force(sizes, objective, dispatch):
    if (objective, dispatch) == ("rows", "gathered"):
        return
    for seed in range(4):
        trace = made(seed, num_layers=1, num_experts=6, num_tokens=60)
        problem = Problem(trace, topology.uneven(sizes), objective, dispatch)
        best = min(problem.value(labels) for labels in every_placement(6, 3, 1))
        assert 0 < relax.lower_bound(problem, FAR, 100) <= best
        report = solve.solve_problem(problem, seed, 5.0).report
        assert report.bound <= best * (1 + 1e-12)
        assert best * (1 - 1e-12) <= report.objective <= best * 1.05


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_bound_is_reached_where_two_experts_are_used_by_turns(sizes):
    """Tokens of one expert: both on one device, on the one that costs least to reach."""
    ids_TLK = np.array([[[0]], [[1]]] * 30, np.uint8)
    problem = Problem(
        Trace(ids_TLK, 6, np.array([60])), topology.uneven(sizes), "rows", "hierarchical"
    )
    best = min(problem.value(labels) for labels in every_placement(6, 3, 1))
    assert best * 0.99 < relax.lower_bound(problem, FAR, 100) <= best
    assert solve.solve_problem(problem, 0, 5.0).report.objective == pytest.approx(best)


@pytest.mark.parametrize("seed", instances.rest_slow(range(4), 2))
@pytest.mark.parametrize("objective", ["exflow", "rows"])
def test_bound_and_plan_of_tied_layers_against_brute_force(objective, seed):
    """Two layers of three experts on 2 + 1 devices; without swaps between unlike nodes."""
    trace = made(seed, num_layers=2, num_experts=6, top_k=2, num_tokens=60)
    problem = Problem(trace, topology.uneven((2, 1)), objective, "coherent")
    labels = every_placement(6, 3, 1)
    best = min(problem.value(np.concatenate([a, b])) for a in labels[::5] for b in labels[::3])
    assert 0 <= relax.lower_bound(problem, FAR, 100) <= best
    report = solve.solve_problem(problem, seed, 5.0).report
    assert report.bound <= report.objective
    assert report.objective <= best * 1.05  # best of a fifteenth of all placements


@pytest.mark.parametrize("sizes", SIZES)
def test_labels_are_the_best_that_keep_nodes_together(sizes):
    rng = np.random.default_rng(4)
    machine = topology.uneven(sizes)
    for _ in range(10):
        keep_LEE = rng.integers(0, 9, size=(1, 8, 8)).astype(float)
        part_LE = np.stack([rng.permutation(np.arange(8) % 4) for _ in range(2)])
        task = chain.Chain(keep_LEE, 4, sizes, 0.4, np.ones((2, 8)), np.full(2, np.inf))
        kept = task.value(chain.align(task, part_LE))
        best = -np.inf
        for label in itertools.permutations(range(4)):
            label_M = np.array(label)
            together = machine.node_M[label_M][:, None] == machine.node_M[label_M][None, :]
            if (together == machine.nodes.same_MM).all():
                best = max(best, task.value(np.stack([part_LE[0], label_M[part_LE[1]]])))
        assert kept == pytest.approx(best)


def test_equal_nodes_are_one_number():
    assert topology.uneven((4, 4)) == dataclasses.replace(topology.uneven((4, 4)), num_nodes=2)
    assert topology.uneven((4, 4)).devices_per_node == 4
    machine = topology.Topology("x", 2, (8, 4))
    assert machine.devices_per_node == (8, 4)
    assert machine.shape == "8 + 4"
    assert hash(machine) == hash(topology.from_json(json.loads(json.dumps(machine.to_json()))))
    np.testing.assert_array_equal(machine.nodes.relayed_M, [2] * 4 + [1] * 4 + [3] * 4)


@pytest.mark.parametrize(
    "devices_per_node", [[8], [8, 0], [8, 4, 4], [8, "4"], [8, True], [], [[8], [4]], 8.0]
)
def test_sizes_that_do_not_fit_are_refused(devices_per_node):
    with pytest.raises(Refused, match="devices_per_node"):
        topology.from_json({"name": "x", "num_nodes": 2, "devices_per_node": devices_per_node})
    with pytest.raises(Refused, match="their sum"):
        nodes.of(12, (8, 5))


def test_a_move_keeps_devices_in_nodes_of_their_size():
    machine = topology.uneven((1, 2, 1))
    problem = Problem(made(5), machine, "rows", "hierarchical")
    before = Placement.from_device_LE(baselines.random(3, 8, 4, 8), 4)
    after = Placement.from_device_LE(np.array([3, 1, 2, 0])[before.device_LE], 4)
    back = move.relabelled(problem, before, after)
    assert back.digest == before.digest
    assert problem.value_of(back) == pytest.approx(problem.value_of(after), rel=1e-12)


def test_cap_and_search_of_all_dispatches_on_uneven_nodes():
    trace, machine = made(6, num_experts=12, num_tokens=200), topology.uneven((4, 2))
    for dispatch in cost.DISPATCHES:
        problem = Problem(trace, machine, "seconds", dispatch, load_cap=LoadCap(1.1, relative=True))
        found = solve.solve_problem(problem, 0, 2.0)
        assert problem.all_allowed(found.placement.device_LE)
        assert found.report.objective == pytest.approx(problem.value_of(found.placement))
        assert 0 < found.report.bound <= found.report.objective


def test_tables_of_one_node_are_the_default():
    placement = Placement.contiguous(1, 8, 4)
    one, two = copies.candidates(placement, 0), copies.candidates(placement, 0, (4,))
    np.testing.assert_array_equal(one.slot_EMR, two.slot_EMR)


@pytest.mark.parametrize("dispatch", ["exchange", "hierarchical"])
def test_groups_seated_anew_are_where_no_swap_of_two_helps(dispatch):
    trace = made(7, num_experts=12, num_tokens=200)
    problem = Problem(trace, topology.uneven((3, 1, 2)), "seconds", dispatch)
    for seed in range(5):
        start_E = baselines.random(1, 12, 6, seed)[0]
        found_E = seating.seated(problem, 1, start_E, FAR)
        pairs = set(zip(start_E.tolist(), found_E.tolist(), strict=True))
        assert len(pairs) == 6  # the same groups
        value = problem.layer_value(1, found_E)
        assert value <= problem.layer_value(1, start_E)
        for a, b in itertools.combinations(range(6), 2):
            label = np.arange(6)
            label[[a, b]] = b, a
            assert value <= problem.layer_value(1, label[found_E]) * (1 + 1e-8)
