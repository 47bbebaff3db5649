"""MoETuner: its objective token by token, its two stages, and a search that is better than they."""

import itertools
import json
import time

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import __main__ as command_line
from moe_jax.placement import (
    baselines,
    moetuner,
    moetuner_moves,
    moetuner_search,
    relax,
    solve,
    topology,
)
from moe_jax.placement.baselines import moetuner as two_stages
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from tests.placement import instances


def made(seed: int, nodes: int = 1, devices: int = 2, cap: str | None = None, **changes) -> Problem:
    sizes = {"num_tokens": 60, "num_layers": 3, "num_experts": 4, "top_k": 2, "num_classes": 4}
    trace = synthetic.realistic(**(sizes | changes), seed=seed, num_sequences=4)
    machine = topology.nodes_by_devices(nodes, devices)
    if nodes > 1 and devices == 3:
        machine = topology.uneven((2, 1))
    return Problem(
        trace, machine, "moetuner", load_cap=LoadCap.parse(cap) if cap is not None else None
    )


def placements(problem: Problem) -> list[np.ndarray]:
    """All placements of one layer."""
    equal = sorted(np.arange(problem.trace.num_experts) % problem.num_devices)
    return [np.array(p) for p in sorted(set(itertools.permutations(equal)))]


def everything(problem: Problem) -> float:
    """The least value of all placements within the caps."""
    layers = placements(problem)
    several = itertools.product(layers, repeat=problem.trace.num_layers)
    return min(
        problem.value(device_LE)
        for device_LE in map(np.stack, several)
        if problem.all_allowed(device_LE)
    )


@pytest.mark.parametrize(("nodes", "uneven"), [(1, False), (2, False), (2, True)])
def test_value_is_counted_token_by_token(nodes, uneven):
    problem = made(0, nodes, 4, num_experts=8, top_k=3)
    device_LE = baselines.random(3, 8, 4, 1)
    if uneven:
        device_LE = np.random.default_rng(0).integers(0, 4, (3, 8))
    assert problem.value(device_LE) == pytest.approx(
        instances.stages(problem, device_LE), rel=1e-12
    )


@pytest.mark.parametrize(("nodes", "devices", "experts"), [(1, 2, 6), (2, 4, 8), (1, 4, 8)])
@pytest.mark.parametrize("cap", [None, "1.0x"])
def test_a_swap_is_the_best_of_all(nodes, devices, experts, cap):
    problem = made(1, nodes, devices, cap, num_experts=experts, num_tokens=200)
    tuner = problem.tuner
    for layer, seed in itertools.product(range(3), range(3)):
        device_LE = problem.balanced_LE.astype(np.int64)
        if cap is None:
            device_LE = baselines.random(3, experts, devices, seed)
        before, best = tuner.value(device_LE), tuner.value(device_LE)
        for e, f in itertools.combinations(range(experts), 2):
            other_LE = device_LE.copy()
            other_LE[layer, e], other_LE[layer, f] = device_LE[layer, f], device_LE[layer, e]
            if tuner.allowed(other_LE):
                best = min(best, tuner.value(other_LE))
        saved = moetuner_moves.swap(tuner, device_LE, layer)
        assert tuner.value(device_LE) == pytest.approx(best, rel=1e-9)
        assert before - saved / 3 == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_slowest_pair_after_every_swap(seed):
    """Tables in which two devices stand out, so that the best of the others decides after swaps."""
    rng = np.random.default_rng(seed)
    with_ME = rng.integers(1, 5, (4, 8)).astype(float)
    with_ME[:, rng.choice(8, 2, replace=False)] *= 6
    side = moetuner_moves.Side(with_ME, rng.integers(0, 3, (4, 4)).astype(float))
    device_E = rng.permutation(np.arange(8) % 4)
    e_P, f_P = np.nonzero(np.triu(device_E[:, None] != device_E[None, :]))
    slowest_P = side.swapped_P(device_E, e_P, f_P)
    for e, f, slowest in zip(e_P, f_P, slowest_P, strict=True):
        other_E = device_E.copy()
        other_E[[e, f]] = device_E[[f, e]]
        assert slowest == side.slowest(other_E)


@pytest.mark.parametrize("seed", range(30))
def test_labels_are_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 6))
    one_MM, other_MM = rng.integers(0, 12, (2, count, count)).astype(float)
    group = np.arange(count)

    def value(device_M):
        return one_MM[group, device_M].max() + other_MM[group, device_M].max()

    device_M = moetuner_moves.best_labels(one_MM, other_MM)
    assert sorted(device_M) == list(range(count))
    assert value(device_M) == min(value(np.array(p)) for p in itertools.permutations(range(count)))


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_relabelling_a_layer_is_the_best_of_all(nodes, layer):
    tuner = made(2, nodes, 4, num_experts=8).tuner
    several = []
    for start in range(4):
        device_LE, best = baselines.random(3, 8, 4, start), np.inf
        for names in itertools.permutations(range(4)):
            other_LE = device_LE.copy()
            other_LE[layer] = np.array(names)[device_LE[layer]]
            best = min(best, tuner.value(other_LE))
        before = tuner.value(device_LE)
        several.append(moetuner_moves.relabel(tuner, device_LE, layer))
        assert tuner.value(device_LE) == pytest.approx(best, rel=1e-12)
        assert before - several[-1] / 3 == pytest.approx(best, rel=1e-9)
    assert max(several) > 0


@pytest.mark.usefixtures("all_placements")
@pytest.mark.parametrize(("nodes", "cap"), [(1, None), (2, None), (1, "1.0x")])
@pytest.mark.parametrize("seed", range(3))
def test_solve_equals_brute_force_and_proves_it(seed, nodes, cap):
    problem = made(seed, nodes, cap=cap)
    best = everything(problem)
    report = solve.solve_problem(problem, 0, 10).report
    assert report.objective == pytest.approx(best, rel=1e-9)
    assert report.bound == pytest.approx(best, rel=1e-6)
    assert report.bound <= best


@pytest.mark.parametrize("seed", instances.rest_slow(range(5), 2))
@pytest.mark.parametrize(
    ("nodes", "devices", "experts"), [(1, 2, 4), (2, 2, 4), (1, 3, 6), (3, 3, 6)]
)
def test_the_bound_is_below_every_placement(seed, nodes, devices, experts):
    """Without the exact program. It is above zero, and moves up with the steps or not at all."""
    problem = made(
        seed, nodes, devices, num_experts=experts, num_layers=2, num_tokens=30 + 7 * seed
    )
    best = everything(problem)
    bounds = [relax.lower_bound(problem, time.monotonic() + 20, steps) for steps in (1, 200)]
    assert 0 < bounds[0] <= bounds[1] * (1 + 1e-9)
    assert bounds[1] <= best


def test_the_bound_sees_both_stages():
    """A hot expert that no placement evens out; groups that no placement keeps on one node."""
    problem = made(0, 2, 4, num_experts=8, num_tokens=400, popularity=3.0)
    tuner = problem.tuner
    least = 2 * sum(
        max(max(np.sort(work_E)[-1:].sum() + np.sort(work_E)[0], work_E.sum() / 4), 0)
        - work_E.sum() / 4
        for work_E in tuner.work_LE
    )
    bound = relax.lower_bound(problem, time.monotonic() + 20, 200)
    assert bound > least / 3 > 0


def test_clusters_are_optimal_within_the_gap():
    rng = np.random.default_rng(0)
    for _ in range(6):
        work_E = rng.integers(1, 40, 6).astype(float)
        values = {True: np.inf, False: np.inf}
        for labels in itertools.product(range(3), repeat=6):
            sizes = [labels.count(m) for m in range(3)]
            work_M = np.bincount(labels, weights=work_E, minlength=3)
            off = np.abs(work_M - work_M.mean()).sum()
            for equal in (True, False):
                if min(sizes) > 0 and (not equal or sizes == [2, 2, 2]):
                    values[equal] = min(values[equal], off)
        for equal, best in values.items():
            cluster_E, done = two_stages.clusters(work_E, 3, equal, 10)
            assert done
            sizes_M = np.bincount(cluster_E, minlength=3)
            assert sizes_M.min() == 2 if equal else sizes_M.min() > 0
            off = np.abs(np.bincount(cluster_E, weights=work_E) - work_E.sum() / 3).sum()
            assert best - 1e-6 <= off <= best * (1 + two_stages.GAP) + 1e-6


def test_clusters_cut_short_are_no_worse_than_packing():
    work_E = np.random.default_rng(1).lognormal(size=64)
    for seconds in (0.05, 0.3):
        cluster_E, _ = two_stages.clusters(work_E, 8, True, seconds)
        packed_E = two_stages.packed(work_E, 8, True)
        off = [
            np.abs(np.bincount(one_E, weights=work_E) - work_E.sum() / 8).sum()
            for one_E in (cluster_E, packed_E)
        ]
        assert off[0] <= off[1]
        assert np.bincount(cluster_E).tolist() == [8] * 8


@pytest.mark.parametrize("equal", [True, False])
def test_clusters_cut_short_are_packed(equal):
    work_E = np.random.default_rng(0).lognormal(size=64)
    cluster_E, done = two_stages.clusters(work_E, 16, equal, 0.0)
    assert not done
    sizes_M = np.bincount(cluster_E, minlength=16)
    assert sizes_M.min() == sizes_M.max() == 4 if equal else sizes_M.min() > 0


@pytest.mark.parametrize(("nodes", "devices", "layers"), [(1, 3, 4), (2, 4, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_devices_of_clusters_are_optimal_within_the_gap(seed, nodes, devices, layers):
    tuner = made(seed, nodes, devices, num_experts=2 * devices, num_layers=layers).tuner
    cluster_LE = baselines.random(layers, 2 * devices, devices, seed)
    assert devices**4 * (layers - 1) <= two_stages.WHOLE
    device_LE, done = two_stages.devices(tuner, cluster_LE, 60)
    assert done
    names = [np.array(p) for p in itertools.permutations(range(devices))]
    best = min(
        tuner.stages(
            np.stack([n[row] for n, row in zip(several, cluster_LE, strict=True)])
        ).slowest_l.sum()
        for several in itertools.product(names, repeat=layers)
    )
    found = tuner.stages(device_LE)
    assert found.slowest_l.sum() <= best * (1 + two_stages.GAP) + 1e-12
    np.testing.assert_allclose(
        found.deviation_L, tuner.stages(cluster_LE).deviation_L, rtol=1e-12, atol=1e-18
    )


def test_layer_after_layer_is_optimal_given_the_one_before(monkeypatch):
    monkeypatch.setattr(two_stages, "WHOLE", 0)
    tuner = made(1, 2, 4, num_experts=8).tuner
    device_LE, done = two_stages.devices(tuner, baselines.random(3, 8, 4, 1), 60)
    assert done
    for layer in (1, 2):
        slowest = tuner.stages(device_LE).slowest_l[layer - 1]
        for names in itertools.permutations(range(4)):
            other_LE = device_LE.copy()
            other_LE[layer] = np.array(names)[device_LE[layer]]
            other = tuner.stages(other_LE).slowest_l[layer - 1]
            assert slowest <= other * (1 + two_stages.GAP) + 1e-12


@pytest.mark.parametrize("nodes", [1, 2])
def test_solve_is_better_than_two_stages_greedy_and_random(nodes):
    problem = made(3, nodes, 4, num_experts=16, num_tokens=1000, top_k=4)
    staged = two_stages.two_stages(problem.tuner, True, 5)
    placement, report = solve.solve_problem(problem, 0, 6)
    assert report.objective == problem.value(placement.device_LE)
    draws = [problem.value(baselines.random(3, 16, 4, draw)) for draw in range(20)]
    assert report.bound <= report.objective <= report.greedy
    assert report.objective <= min(problem.value(staged.device_LE), *draws)


def test_search_starts_from_the_two_stages(monkeypatch):
    """With every move taken away, the two stages are what is left to win by."""
    problem = made(3, 2, 4, num_experts=16, num_tokens=1000)
    monkeypatch.setattr(moetuner_moves, "swap", lambda *_: 0.0)
    monkeypatch.setattr(moetuner_moves, "relabel", lambda *_: 0.0)
    worst_LE = baselines.contiguous(3, 16, 4)
    staged = two_stages.two_stages(problem.tuner, True, 5)
    assert problem.value(staged.device_LE) < problem.value(worst_LE)
    monkeypatch.setattr(two_stages, "two_stages", lambda *_: staged)
    found = moetuner_search.search(
        problem.tuner, worst_LE, worst_LE, np.random.default_rng(0), time.monotonic() + 60
    )
    assert min(map(problem.value, found)) <= problem.value(staged.device_LE)


def test_load_caps_are_kept():
    problem = made(4, 1, 4, "1.02x", num_experts=16, num_tokens=2000)
    placement = solve.solve_problem(problem, 0, 3).placement
    assert problem.all_allowed(placement.device_LE)
    free = made(4, 1, 4, num_experts=16, num_tokens=2000)
    assert free.tuner.allowed(baselines.contiguous(3, 16, 4))
    assert not problem.tuner.allowed(baselines.contiguous(3, 16, 4))


def test_one_layer_one_device_and_replicas():
    problem = made(0, num_layers=1)
    report = solve.solve_problem(problem, 0, 5).report
    assert report.objective == pytest.approx(everything(problem), rel=1e-9, abs=1e-18)
    single = made(0, devices=1)
    assert solve.solve_problem(single, 0, 5).report.objective == 0
    with pytest.raises(Refused, match="no replicas"):
        Problem(problem.trace, topology.flat(2), "moetuner", num_slots=6)


def test_bandwidth_is_that_of_the_tier():
    machine = topology.nodes_by_devices(2, 4)
    fast, slow, own = machine.fast.bandwidth, machine.slow.bandwidth, np.inf
    assert moetuner.bandwidth_MM(machine).tolist() == [
        [own, fast, slow, slow],
        [fast, own, slow, slow],
        [slow, slow, own, fast],
        [slow, slow, fast, own],
    ]


def test_the_command_solves_and_compares(tmp_path, capsys):
    trace_lib.save(made(0, num_experts=8, num_tokens=200).trace, tmp_path / "t.npz")
    words = [str(tmp_path / "t.npz"), "--devices=4", "--objective=moetuner", "--time-limit=1"]
    page = f"--report={tmp_path / 'page.html'}"
    assert command_line.main(["solve", *words, f"--out={tmp_path / 'p.json'}", "--json", page]) == 0
    solved = json.loads(capsys.readouterr().out)
    assert 0 < solved["bound"] <= solved["objective"]
    keys = "--methods=contiguous,moetuner,moetuner-free"
    assert command_line.main(["compare", *words, "--json", keys, page]) == 0
    methods = {m["key"]: m for m in json.loads(capsys.readouterr().out)["methods"]}
    assert methods["planner"]["objective"] <= methods["moetuner"]["objective"]
    assert methods["moetuner"]["valid_plan"]
    free = methods["moetuner-free"]
    assert free["valid_plan"] == (free["slots"] == 8)
