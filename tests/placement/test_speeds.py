"""Devices of different speed: seconds by hand, bounds and searches against brute force."""

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import (
    anneal,
    at_speeds,
    baselines,
    bounds,
    chain,
    clusters,
    cost,
    evidence,
    greedy,
    ilp,
    move,
    paired,
    relax,
    replication,
    solve,
    topology,
    with_copies,
)
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.__main__ import main
from moe_jax.placement.limits import pins
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.placement.seconds import Work
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace

FAR = 1e12


def machine_of(flops, nodes: int = 1) -> topology.Topology:
    return topology.Topology("speeds", nodes, len(flops) // nodes, device_flops=tuple(flops))


def made(seed: int, **changes) -> Trace:
    sizes = {"num_tokens": 120, "num_layers": 2, "num_experts": 6, "top_k": 2, "num_classes": 4}
    return synthetic.realistic(**(sizes | changes), seed=seed, num_sequences=4)


def labels_of(experts: int, devices: int) -> list[np.ndarray]:
    equal = sorted(np.arange(experts) % devices)
    return [np.array(p) for p in sorted(set(itertools.permutations(equal)))]


def test_the_slowest_device_decides():
    """4 rows on a device of 2 Gflop/s, 3 on one of 1: the second takes longer."""
    machine = machine_of([2e9, 1e9])
    work = Work(d_model=500, d_ff=1, batch_tokens=20)
    rows = cost.Rows(np.zeros((1, 2, 2), int), np.zeros((1, 2, 2), int))
    found = seconds_lib.seconds(rows, np.array([[4, 3]]), machine, work, "exchange", 10)
    assert found.compute_L[0] == pytest.approx(2 * 3 * 3000 / 1e9)
    np.testing.assert_allclose(machine.speed_M, [4 / 3, 2 / 3])


@pytest.mark.parametrize("dispatch", ["exchange", "hierarchical", "gathered"])
@pytest.mark.parametrize("shared", [0, 2])
def test_closed_forms_and_samples_equal_the_counts(dispatch, shared):
    trace, machine = made(1), machine_of([3e12, 1e12, 2e12, 2e12, 1e12, 3e12], nodes=2)
    work = Work(num_shared_experts=shared, d_ff_shared=300, batch_tokens=5000)
    placement = Placement.from_device_LE(baselines.random(2, 6, 6, 3), 6)
    problem = Problem(trace, machine, "seconds", dispatch, work)
    rows = cost.rows(
        trace.expert_ids_TLK, placement, dispatch, devices_per_node=machine.devices_per_node
    )
    load_LM = cost.computed_LM(trace.expert_ids_TLK, placement)
    counted = seconds_lib.seconds(rows, load_LM, machine, work, dispatch, trace.num_tokens)
    np.testing.assert_allclose(problem.values_L(placement.device_LE), counted.total_L, rtol=1e-12)
    share = 5000 / 6 * 6 * 2048 * 300 * shared  # operations of the shared experts on a device
    by_hand = [
        max(
            (n * 5000 / 120 * 6 * 2048 * 1024 + share) / f
            for n, f in zip(row, machine.flops_M, strict=True)
        )
        for row in load_LM.tolist()
    ]
    np.testing.assert_allclose(counted.compute_L, by_hand, rtol=1e-12)
    samples = paired.sample(problem, placement, paired.weights(trace.num_sequences, 0))
    assert samples.seconds_B[0] == pytest.approx(counted.total_L.mean(), rel=1e-12)
    # twice the tokens in a sample change nothing of a batch
    twice = paired.sample(problem, placement, np.full((1, 4), 2.0))
    assert twice.seconds_B[0] == pytest.approx(counted.total_L.mean(), rel=1e-12)
    over = (load_LM / machine.speed_M).max(axis=1) / load_LM.mean(axis=1)
    assert samples.load_B[0] == pytest.approx(over.mean(), rel=1e-12)
    figures = evidence.judge(trace, placement, machine)
    assert figures.load_mean.value == pytest.approx(over.mean(), rel=1e-12)
    assert Problem(trace, machine, "load").value(placement.device_LE) == pytest.approx(over.mean())


@pytest.mark.parametrize(("experts", "devices"), [(4, 2), (6, 3), (6, 2), (4, 4), (6, 6)])
def test_bound_of_the_load_against_brute_force(experts, devices):
    rng = np.random.default_rng(experts + devices)
    labels, tight = labels_of(experts, devices), []
    for _ in range(25):
        load_E = np.floor(rng.exponential(20, size=experts) ** 1.4)
        speed_M = rng.choice([1.0, 2.0, 5.0], size=devices)
        speed_M = speed_M / speed_M.mean()
        extra = float(rng.choice([0.0, 30.0]))
        best = min(
            ((np.bincount(p, weights=load_E, minlength=devices) + extra) / speed_M).max()
            for p in labels
        )
        bound = bounds.load_lower(load_E, devices, speed_M, extra)
        assert bound <= best * (1 + 1e-12)
        tight.append(bound / best)
    assert np.mean(tight) > 0.75


def test_slow_devices_hold_as_many_experts():
    """Six equal experts: the slowest device needs as long for its two, whatever is done."""
    assert bounds.load_lower(np.ones(6), 3, np.array([0.5, 2.0, 0.5])) == 4.0


@pytest.mark.parametrize("seed", range(6))
def test_even_loads_and_their_program_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    load_E = np.floor(rng.exponential(20, size=6) ** 1.4)
    speed_M = np.array([0.5, 1.0, 1.5])
    best = min((np.bincount(p, weights=load_E) / speed_M).max() for p in labels_of(6, 3))
    packed_E = greedy.balanced(load_E[None], 3, speed_M)[0]
    assert best <= (np.bincount(packed_E, weights=load_E) / speed_M).max() <= 1.35 * best
    solved_E = ilp.balance(load_E, 3, 5.0, speed_M)
    assert solved_E is not None
    found = (np.bincount(solved_E, weights=load_E) / speed_M).max()
    assert found == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_a_layer_re_assigned_under_caps_of_devices(seed):
    rng = np.random.default_rng(seed)
    benefit_EM, load_E = rng.random((6, 3)), rng.integers(1, 20, size=6).astype(float)
    cap_M = np.array([0.5, 1.0, 1.5]) * load_E.sum() / 3 * 1.6
    kept = [p for p in labels_of(6, 3) if (np.bincount(p, weights=load_E) <= cap_M).all()]
    best = max(benefit_EM[np.arange(6), p].sum() for p in kept)
    found_E = ilp.assign_capped(benefit_EM, load_E, cap_M, 5.0)
    assert found_E is not None
    assert (np.bincount(found_E, weights=load_E) <= cap_M * (1 + 1e-9)).all()
    assert benefit_EM[np.arange(6), found_E].sum() == pytest.approx(best, rel=1e-5)


def test_descent_knows_the_cap_of_every_device():
    rng = np.random.default_rng(0)
    affinity_EE = rng.random((6, 6))
    affinity_EE = np.triu(affinity_EE, 1) + np.triu(affinity_EE, 1).T
    load_E, cap_M = np.array([9.0, 8, 3, 2, 1, 1]), np.array([4.0, 9, 18])
    task = clusters.Layer(affinity_EE, load_E, np.eye(3), cap_M)
    start_BE = clusters.random_starts(6, 3, 20, rng)
    found_BE = clusters.descend(task, start_BE, time.monotonic() + 10)
    best = max(task.value(p) for p in labels_of(6, 3))
    values = [task.value(device_E) for device_E in found_BE]
    assert max(values) == pytest.approx(best)
    for device_E, value in zip(found_BE, values, strict=True):  # no swap of two helps
        for e, f in itertools.combinations(range(6), 2):
            other_E = device_E.copy()
            other_E[[e, f]] = other_E[[f, e]]
            assert task.value(other_E) <= value + 1e-6


def test_annealing_ends_within_the_caps_of_devices():
    rng = np.random.default_rng(2)
    keep_LEE = rng.random((3, 12, 12))
    load_LE, speed_M = np.ones((4, 12)), np.ones(3)
    load_LE[:, :4] = 5.0
    speed_M = np.array([0.5, 0.8, 1.7])
    cap_L = np.full(4, load_LE[0].sum() / 3 * 1.1)
    task = chain.Chain(keep_LEE, 3, 3, 0.0, load_LE, cap_L, speed_M)
    start_BLE = np.tile(np.arange(12) % 3, (6, 4, 1))
    found_BLE = anneal.anneal(task, start_BLE, rng, 300, FAR)
    over_BL = np.stack([task.over_L(device_LE) for device_LE in found_BLE])
    assert over_BL.mean() < 0.2
    start_over = task.over_L(start_BLE[0])
    load_LM = np.stack(
        [np.bincount(d, weights=w) for d, w in zip(start_BLE[0], load_LE, strict=True)]
    )
    np.testing.assert_array_equal(
        start_over, (load_LM > cap_L[:, None] * speed_M * (1 + 1e-9)).any(axis=1)
    )


@pytest.mark.parametrize("objective", ["seconds", "load"])
@pytest.mark.parametrize("dispatch", ["exchange", "gathered"])
@pytest.mark.parametrize("shared", [0, 3])
def test_bound_and_plan_against_brute_force(objective, dispatch, shared):
    work = Work(num_shared_experts=shared)
    for seed in range(3):
        trace = made(seed, num_layers=1)
        problem = Problem(trace, machine_of([4e14, 1e14, 2e14]), objective, dispatch, work)
        best = min(problem.value(p[None]) for p in labels_of(6, 3))
        assert 0 < relax.lower_bound(problem, FAR, 100) <= best
        report = solve.solve_problem(problem, seed, 5.0).report
        assert report.bound <= best * (1 + 1e-12)
        assert report.objective == pytest.approx(best, rel=0.03)


@pytest.mark.parametrize(
    ("objective", "dispatch"),
    [("exflow", "exchange"), ("rows", "coherent"), ("rows", "exchange"), ("seconds", "exchange")],
)
def test_plans_keep_the_cap_of_every_device(objective, dispatch):
    """Against brute force over the placements within the caps."""
    for seed in range(3):
        trace = made(seed, num_layers=2, num_experts=4, top_k=1, num_tokens=80)
        machine = machine_of([3e14, 1e14])
        cap = LoadCap(1.3, relative=True)
        problem = Problem(trace, machine, objective, dispatch, load_cap=cap)
        every = [np.stack(p) for p in itertools.product(labels_of(4, 2), repeat=2)]
        kept = [p for p in every if problem.all_allowed(p)]
        assert 0 < len(kept) < len(every)
        load_LM = [np.bincount(d, weights=w) for d, w in zip(kept[0], problem.load_LE, strict=True)]
        assert (np.stack(load_LM) / machine.speed_M <= problem.cap_L[:, None] * (1 + 1e-9)).all()
        best = min(problem.value(p) for p in kept)
        found = solve.solve_problem(problem, seed, 4.0)
        assert problem.all_allowed(found.placement.device_LE)
        assert found.report.bound <= best * (1 + 1e-12)
        assert found.report.objective == pytest.approx(best, rel=0.02)


def test_labels_only_go_to_devices_of_the_same_speed():
    rng = np.random.default_rng(5)
    flops = [1.0, 2.0, 2.0, 1.0, 1.0, 3.0]
    for nodes in (1, 3):
        machine = machine_of(flops, nodes)
        problem = Problem(made(2, num_experts=12, num_layers=2), machine, "seconds")
        kind_M = problem.kind_M
        assert kind_M is not None
        part_LE = np.stack([rng.permutation(np.arange(12) % 6) for _ in range(2)])
        task = problem.chain(rng.random((1, 12, 12)))
        found_LE = chain.align(task, part_LE)
        went_M = np.zeros(6, int)
        went_M[part_LE[1]] = found_LE[1]
        np.testing.assert_array_equal(machine.flops_M[went_M], flops)
        best = -np.inf
        for label in itertools.permutations(range(6)):
            label_M = np.array(label)
            together = machine.node_M[label_M][:, None] == machine.node_M[label_M][None, :]
            alike = (machine.flops_M[label_M] == flops).all()
            if alike and (together == machine.nodes.same_MM).all():
                best = max(best, task.value(np.stack([part_LE[0], label_M[part_LE[1]]])))
        assert task.value(found_LE) == pytest.approx(best)
        placements = [Placement.from_device_LE(p, 6) for p in (part_LE, found_LE[::-1].copy())]
        again = move.relabelled(problem, *placements)
        assert problem.value_of(again) == pytest.approx(problem.value_of(placements[1]), rel=1e-12)


def test_moetuner_knows_no_speeds():
    with pytest.raises(Refused, match="one speed"):
        Problem(made(1), machine_of([2e12, 1e12]), "moetuner")


def test_equal_speeds_are_one_number():
    assert machine_of([2e12, 2e12]).device_flops == 2e12
    machine = machine_of([2e12, 1e12])
    again = topology.from_json(json.loads(json.dumps(machine.to_json())))
    assert again == machine
    np.testing.assert_array_equal(topology.flat(3).speed_M, 1.0)


@pytest.mark.parametrize(
    "flops", [[1e12], [1e12, 0.0], [1e12, float("nan")], [1e12, "x"], [], [1e12, 10**400], 10**400]
)
def test_speeds_that_do_not_fit_are_refused(flops):
    fields = {"name": "x", "num_nodes": 1, "devices_per_node": 2, "device_flops": flops}
    with pytest.raises(Refused, match="device_flops"):
        topology.from_json(fields)


def test_seconds_of_a_whole_step():
    """10 layers of 1 ms; 2 dense ones, 6 x 4 x 5 operations for 8 / 2 tokens, 100 per second."""
    work = Work(d_model=4, num_dense_layers=2, d_ff_dense=5, batch_tokens=8)
    machine = machine_of([100.0, 300.0])
    found = seconds_lib.step_seconds(1e-3, 10, machine, work)
    assert found == pytest.approx(10e-3 + 2 * 4 * 120 / 100)
    with pytest.raises(Refused, match="d_ff_dense"):
        Work(num_dense_layers=1)
    with pytest.raises(Refused, match="num_shared_experts"):
        Work(num_shared_experts=-1)


def test_the_command_takes_speeds_and_shared_experts(tmp_path, capsys):
    trace_lib.save(made(3, num_experts=8), tmp_path / "trace.npz")
    arguments = ["solve", str(tmp_path / "trace.npz"), "--node-sizes=1,3", "--time-limit=1"]
    arguments += [f"--out={tmp_path / 'plan.json'}", "--device-flops=4e14,2e14,2e14,2e14"]
    arguments += ["--num-shared-experts=1", "--num-dense-layers=2", "--d-ff-dense=4096"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "a step of 2 MoE and 2 dense layers" in printed
    saved = topology.from_json(Plan.read(tmp_path / "plan.json").topology)
    assert saved.devices_per_node == (1, 3)
    assert saved.device_flops == (4e14, 2e14, 2e14, 2e14)
    again = ["evaluate", str(tmp_path / "trace.npz"), str(tmp_path / "plan.json")]
    assert main(again) == 0
    for wrong in ("--device-flops=1e12,2e12", "--device-flops=fast", "--node-sizes=1,2"):
        assert main([*arguments, wrong]) == 1


@pytest.mark.parametrize(
    ("objective", "dispatch", "layers"),
    [("rows", "exchange", 1), ("rows", "hierarchical", 1), ("exflow", "exchange", 2)],
)
def test_bound_under_the_caps_of_devices(objective, dispatch, layers):
    for seed in range(5):
        trace = made(seed, num_layers=layers, top_k=3 if layers == 1 else 1)
        nodes = 2 if dispatch == "hierarchical" else 1
        cap = LoadCap(1.02, relative=True)
        machine = machine_of([3e14, 1e14], nodes)
        problem = Problem(trace, machine, objective, dispatch, load_cap=cap)
        every = [np.stack(p) for p in itertools.product(labels_of(6, 2), repeat=layers)]
        best = min(problem.value(p) for p in every if problem.all_allowed(p))
        assert 0 < relax.lower_bound(problem, FAR, 200) <= best


@pytest.mark.parametrize(
    ("objective", "dispatch"), [("seconds", "exchange"), ("exflow", "exchange")]
)
def test_pins_within_the_caps_of_devices(objective, dispatch):
    trace, machine = made(4), machine_of([4e14, 1e14, 1e14])
    pinned = pins.parse(["*:2:1"], 6, 3, trace.layer_ids)
    cap = LoadCap(1.2, relative=True)
    problem = Problem(trace, machine, objective, dispatch, load_cap=cap, pins=pinned)
    found = solve.solve_problem(problem, 0, 3.0)
    assert (found.placement.device_LE[:, 2] == 1).all()
    load_LM = cost.computed_LM(trace.expert_ids_TLK, found.placement)
    assert (load_LM <= problem.cap_L[:, None] * machine.speed_M * (1 + 1e-9)).all()
    every = [np.stack(p) for p in itertools.product(labels_of(6, 3), repeat=2)]
    best = min(problem.value(p) for p in every[::7] if problem.all_allowed(p))
    assert found.report.bound <= best * (1 + 1e-12)
    assert found.report.objective <= best * 1.02


def every_layer_with_copies(experts: int, devices: int, slots: int) -> list[np.ndarray]:
    """Rows of slots: every device a set of experts, every expert somewhere."""
    sets = list(itertools.combinations(range(experts), slots // devices))
    return [
        np.concatenate(rows)
        for rows in itertools.product(sets, repeat=devices)
        if len(set(itertools.chain(*rows))) == experts
    ]


def over_speed(expert_P: np.ndarray, load_E: np.ndarray, speed_M: np.ndarray) -> float:
    """The fullest device, slot by slot."""
    copies = np.bincount(expert_P, minlength=len(load_E))
    slots, load_M = len(expert_P) // len(speed_M), np.zeros(len(speed_M))
    for slot, expert in enumerate(expert_P.tolist()):
        load_M[slot // slots] += load_E[expert] / copies[expert]
    return float((load_M / speed_M).max())


def test_replicas_for_balance_count_speeds():
    """Against every plan, and never below what they reach without speeds."""
    rng, better, gaps = np.random.default_rng(0), 0, []
    for trial in range(20):
        load_LE = np.ceil(rng.lognormal(3, 1, size=(1, 4)))
        speed_M = np.array([0.5, 1.0, 1.5]) if trial % 2 else np.array([0.4, 1.3, 1.3])
        even = replication.balanced_slots(load_LE, 6, 3, rounds=1000)
        plan = at_speeds.dealt_anew(even, load_LE, speed_M)
        found, before = (
            over_speed(one.physical_to_logical_LP[0].astype(np.int64), load_LE[0], speed_M)
            for one in (plan, even)
        )
        every = every_layer_with_copies(4, 3, 6)
        best = min(over_speed(row_P, load_LE[0], speed_M) for row_P in every)
        assert best * (1 - 1e-12) <= found <= before * (1 + 1e-12)
        better += found < before * 0.99
        gaps.append(found / best)
    assert better >= 10
    assert np.mean(gaps) < 1.05


def test_copies_are_as_many_as_the_speeds_ask_for():
    """Without speeds experts 0 and 1 have two copies; the best of all plans has more of 1 and 3."""
    load_LE, speed_M = np.array([[30, 20, 10, 5]]), np.array([2.0, 0.5, 0.5])
    even = replication.balanced_slots(load_LE, 6, 3)
    plan = at_speeds.dealt_anew(even, load_LE, speed_M)
    found_P = plan.physical_to_logical_LP[0].astype(np.int64)
    every = every_layer_with_copies(4, 3, 6)
    best = min(over_speed(row_P, load_LE[0], speed_M) for row_P in every)
    assert over_speed(found_P, load_LE[0], speed_M) == pytest.approx(best)
    assert best / (65 / 3) == pytest.approx(1.1538, abs=1e-4)


@pytest.mark.parametrize("shared", [0, 1, 4])
@pytest.mark.parametrize("dispatch", ["exchange", "coherent"])
@pytest.mark.parametrize(("flops", "nodes"), [((1e12, 4e12), 1), ((1e12, 2e12, 1e12, 5e11), 2)])
def test_no_plan_with_copies_is_below_its_bound(flops, nodes, dispatch, shared):
    """As it is proven, before the plan's own value caps it."""
    work = Work(d_ff=8192, num_shared_experts=shared, batch_tokens=64)
    every = every_layer_with_copies(4, len(flops), 2 * len(flops) + 2 * (nodes == 1))
    for seed in range(3):
        trace = made(seed, num_tokens=12, num_layers=1, num_experts=4, top_k=1)
        slots = len(every[0])
        problem = Problem(trace, machine_of(flops, nodes), "seconds", dispatch, work, None, slots)
        plans = [Placement(row_P[None], 4, len(flops)) for row_P in every]
        best = min(problem.value_of(plan) for plan in plans[:: max(len(plans) // 60, 1)])
        assert 0 < with_copies.lower_bound(problem, 0.0)[0] <= best


def test_slow_devices_need_not_compute_the_mean_of_routed_rows():
    """Shared experts fill the slow device; rows may all be on the fast one."""
    ids_TLK = np.repeat(np.arange(4), [10, 2, 1, 1]).astype(np.uint8)[:, None, None]
    work = Work(d_model=64, d_ff=64, num_shared_experts=1, batch_tokens=1400)
    far = topology.Tier(1e15, 0.0)
    machine = topology.Topology("two", 1, 2, far, far, (1e12, 2e12))
    trace = Trace(ids_TLK, 4, np.array([14]))
    problem = Problem(trace, machine, "seconds", work=work, num_slots=6)
    plans = [Placement(row_P[None], 4, 2) for row_P in every_layer_with_copies(4, 2, 6)]
    best = min(problem.value_of(plan) for plan in plans)
    # 1400 routed rows on both together, and 700 shared ones on each
    mean = (1400 + 2 * 700) * work.row_flops / 3e12
    assert with_copies.lower_bound(problem, 0.0)[0] == pytest.approx(mean, rel=1e-6)
    assert mean <= best
    slower = dataclasses.replace(
        problem, topology=dataclasses.replace(machine, device_flops=(1e11, 2e12))
    )
    alone = 700 * work.row_flops / 1e11
    assert with_copies.lower_bound(slower, 0.0)[0] == pytest.approx(alone, rel=1e-6)


def test_the_objective_load_with_replicas_counts_speeds():
    trace, machine = made(5, num_tokens=400, num_experts=12), machine_of([4e14, 1e14, 2e14, 1e14])
    problem = Problem(trace, machine, "load", num_slots=16)
    placement, report = solve.solve_problem(problem, 0, 5.0)
    even = replication.balanced_slots(problem.load_LE, 16, 4, rounds=1000)
    assert 1 <= report.bound <= report.objective == problem.value_of(placement)
    assert report.objective < 0.8 * problem.value_of(even)
