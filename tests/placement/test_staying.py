"""Replicas for transitions: the rule `stay`, its program and search, against slow counts."""

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest
from scipy import optimize

from moe_jax.errors import Refused
from moe_jax.placement import (
    bounds,
    clock,
    copies,
    cost,
    evidence,
    nodes,
    shares,
    solve,
    spare,
    staying,
    staying_program,
    topology,
    verdict,
    with_copies,
)
from moe_jax.placement import move as move_lib
from moe_jax.placement.formats import convert
from moe_jax.placement.formats.hints import Hints
from moe_jax.placement.limits.previous import Previous, holds_LEM
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.routing import synthetic
from moe_jax.routing.trace import Trace


def problem(seed=0, devices=4, num_nodes=1, slots=12, cap=None, top_k=2, layers=4, experts=8):
    trace = synthetic.realistic(
        num_tokens=400,
        num_sequences=8,
        num_layers=layers,
        num_experts=experts,
        top_k=top_k,
        seed=seed,
    )
    return Problem(
        trace,
        topology.nodes_by_devices(num_nodes, devices),
        "exflow",
        load_cap=LoadCap.parse(cap) if cap else None,
        num_slots=slots,
    )


def shared(some, seed=0):
    """Some placement with random shares."""
    rng = np.random.default_rng(seed)
    balanced = spare.balanced(some)
    rows = []
    for row_P in balanced.physical_to_logical_LP:
        weight_NP = rng.random((some.topology.num_nodes + 1, some.num_slots))
        rows.append(shares.quantised(weight_NP, row_P))
    slots_LP = balanced.physical_to_logical_LP
    return Placement(slots_LP, some.trace.num_experts, some.num_devices, np.stack(rows))


def slow_slot(placement, layer, node_M, expert, k, home, position):
    """The rule in words, one assignment at a time."""
    row_P = placement.physical_to_logical_LP[layer]
    each = placement.slots_per_device
    slots = [slot for slot in range(placement.num_slots) if row_P[slot] == expert]
    if k == 0:
        for slot in slots:
            if slot // each == home:
                return slot
    row = node_M[home] if k == 0 else placement.share_LNP.shape[1] - 1
    mixed = (position * 0x9E3779B1 + k * 0x85EBCA6B) % 2**32
    part = mixed >> 26
    for slot in slots:
        part -= placement.share_LNP[layer, row, slot]
        if part < 0:
            return slot
    raise AssertionError("shares do not add up")


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_the_rule_token_by_token(num_nodes):
    some = problem(num_nodes=num_nodes)
    placement = shared(some)
    ids_TLK = some.trace.expert_ids_TLK[:60].astype(np.int64)
    ids_TLK[7, 1, 1] = 255
    each = some.topology.devices_per_node
    home_T = np.arange(60) % 4
    for layer in range(4):
        table = copies.candidates(placement, layer, each)
        assert isinstance(table, copies.Stay)
        slot_TK = table.slots_TK(ids_TLK[:, layer], home_T, np.arange(60))
        for t, k in np.ndindex(60, 2):
            expert = ids_TLK[t, layer, k]
            wanted = -1
            if expert < 8:
                node_M = some.topology.node_M
                wanted = slow_slot(placement, layer, node_M, expert, k, home_T[t], t)
            assert slot_TK[t, k] == wanted


def test_shares_are_met_over_many_tokens():
    part_TK = shares.part_TK(np.arange(6400), 4)
    for k in range(4):
        count_W = np.bincount(part_TK[:, k], minlength=64)
        assert count_W.min() >= 95
        assert count_W.max() <= 105


def test_quantised_by_hand():
    expert_P = np.array([0, 1, 0, 2, 2, 2])
    share_XP = shares.quantised(np.array([[3.0, 9.0, 1.0, 0, 0, 0]]), expert_P)
    np.testing.assert_array_equal(share_XP, [[48, 64, 16, 22, 21, 21]])


def test_layers_without_shares_follow_the_other_rule():
    some = problem()
    placement = shared(some)
    share_LNP = placement.share_LNP.copy()
    share_LNP[1] = 0
    mixed = dataclasses.replace(placement, share_LNP=share_LNP)
    assert isinstance(copies.candidates(mixed, 1), copies.Candidates)
    assert isinstance(copies.candidates(mixed, 0), copies.Stay)
    none = dataclasses.replace(placement, share_LNP=np.zeros_like(share_LNP))
    assert none == spare.balanced(some)
    assert copies.rule_of(none) == "local"
    assert copies.rule_of(mixed) == "stay"


def test_another_number_of_nodes_is_refused():
    placement = shared(problem(num_nodes=2))
    with pytest.raises(Refused, match="the machine has 1"):
        copies.candidates(placement, 0)


@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize("top_k", [1, 3])
def test_counting_agrees_with_the_counts_of_every_token(num_nodes, top_k):
    some = problem(num_nodes=num_nodes, top_k=top_k)
    ids_TLK = some.trace.expert_ids_TLK.copy()
    ids_TLK[5] = 255
    ids_TLK[9, 2] = 255
    some = dataclasses.replace(some, trace=dataclasses.replace(some.trace, expert_ids_TLK=ids_TLK))
    placement = shared(some)
    counted = staying.counted(some, placement)
    assert counted.hops == pytest.approx(some.value_of(placement))
    each = some.topology.devices_per_node
    load_LM = cost.computed_LM(ids_TLK, placement, "coherent", None, each)
    np.testing.assert_allclose(counted.load_LM, load_LM)
    judged = evidence.judge(some.trace, placement, some.topology)
    assert judged.load_mean.value == pytest.approx((load_LM.max(1) / load_LM.mean(1)).mean())
    if num_nodes == 1:
        assert judged.top1.value == pytest.approx(1 - counted.hops / 3)


def given(rng, experts=4, devices=2, num_nodes=1, slots=3, cap=np.inf):
    here_EH = rng.integers(0, 20, (experts, devices)).astype(float)
    others_E = rng.integers(0, 40, experts).astype(float)
    mean = (here_EH.sum() + others_E.sum()) / devices
    return staying_program.Given(
        here_EH,
        here_EH * rng.random((experts, devices)) * 2,
        rng.random((experts, num_nodes, devices)),
        others_E,
        slots,
        np.full(devices, cap * mean),
    )


def slow_value(one, node_M, holds_EM):
    """The best flows of some slots by another linear program: a column per flow that may be."""
    experts, devices = holds_EM.shape
    columns, gains, totals = [], [], []
    equal, value = [], 0.0
    load_M = np.zeros(devices)
    for e in range(experts):
        value += one.stay_EM[e, holds_EM[e]].sum()
        load_M += one.here_EH[e] * holds_EM[e]
        for n in range(node_M.max() + 1):
            moving = one.here_EH[e, (node_M == n) & ~holds_EM[e]].sum()
            equal.append(moving)
            for m in np.flatnonzero(holds_EM[e]):
                columns.append((len(equal) - 1, m))
                gains.append(one.move_ENM[e, n, m])
        equal.append(one.others_E[e])
        for m in np.flatnonzero(holds_EM[e]):
            columns.append((len(equal) - 1, m))
            gains.append(0.0)
    sums = np.zeros((len(equal), len(columns) + 1))
    totals = np.zeros((devices, len(columns) + 1))
    for c, (group, m) in enumerate(columns):
        sums[group, c] = totals[m, c] = 1
    totals[:, -1] = -1
    capped = np.isfinite(one.cap_M)
    result = optimize.linprog(
        -np.array([*gains, -staying_program.PENALTY]),
        totals[capped],
        (one.cap_M - load_M)[capped],
        sums,
        equal,
    )
    return value - result.fun


@pytest.mark.parametrize("cap", [np.inf, 1.3, 1.0, 0.5])
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_the_program_finds_what_trying_everything_finds(cap, num_nodes):
    rng = np.random.default_rng(int(10 * min(cap, 9)) + num_nodes)
    one = given(rng, num_nodes=num_nodes, cap=cap)
    machine = nodes.of(2, 2 // num_nodes)
    start_EM = np.array([[1, 0], [0, 1], [1, 1], [1, 1]], bool)
    everything = np.ones_like(start_EM)
    answer = staying_program.solve(one, machine, start_EM, everything, 20.0)
    best = max(
        slow_value(one, machine.node_M, np.array(bits, bool).reshape(4, 2))
        for bits in itertools.product((0, 1), repeat=8)
        if (np.array(bits).reshape(4, 2).sum(axis=0) == 3).all()
        and (np.array(bits).reshape(4, 2).sum(axis=1) >= 1).all()
    )
    assert answer.value == pytest.approx(best, rel=2 * staying_program.GAP, abs=1e-6)
    assert answer.value == pytest.approx(slow_value(one, machine.node_M, answer.holds_EM), abs=1e-4)
    flows = answer.best_ENM.sum(axis=1) + answer.other_EM + one.here_EH * answer.holds_EM
    assert flows.sum() == pytest.approx(one.here_EH.sum() + one.others_E.sum())
    most = (flows.sum(axis=0) - one.cap_M).max() if np.isfinite(cap) else 0.0
    assert answer.excess == pytest.approx(max(most, 0.0), abs=1e-4)


def test_what_is_not_free_stays():
    rng = np.random.default_rng(3)
    one = given(rng, cap=1.1)
    start_EM = np.array([[1, 0], [0, 1], [1, 1], [1, 1]], bool)
    machine = nodes.of(2, None)
    fixed = staying_program.solve(one, machine, start_EM, np.zeros_like(start_EM), 5.0)
    np.testing.assert_array_equal(fixed.holds_EM, start_EM)
    assert fixed.value == pytest.approx(slow_value(one, machine.node_M, start_EM), abs=1e-4)
    free_EM = np.zeros_like(start_EM)
    free_EM[[0, 2]] = True
    part = staying_program.solve(one, machine, start_EM, free_EM, 5.0)
    np.testing.assert_array_equal(part.holds_EM[[1, 3]], start_EM[[1, 3]])
    assert part.value >= fixed.value - 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_no_placement_with_copies_keeps_more_than_the_bound(seed):
    rng = np.random.default_rng(seed)
    experts, devices, slots = 3, 2, 4
    keep_EE = rng.integers(0, 30, (experts, experts)).astype(float)
    holds = [
        np.array(bits, bool).reshape(experts, devices)
        for bits in itertools.product((0, 1), repeat=experts * devices)
    ]
    valid = [h for h in holds if (h.sum(axis=0) == 2).all() and (h.sum(axis=1) >= 1).all()]
    most = max(
        (keep_EE * ((one[:, None] & two[None, :]).any(axis=2))).sum()
        for one, two in itertools.product(valid, repeat=2)
    )
    bound = bounds.kept_with_copies(keep_EE, slots, devices)
    assert most <= bound * (1 + 1e-12)
    assert bound < keep_EE.sum()  # it says something


def test_the_bound_with_copies_is_met_where_experts_are_pairs():
    keep_EE = np.kron(np.eye(4), np.full((2, 2), 5.0))
    assert bounds.kept_with_copies(keep_EE, 8, 4) == keep_EE.sum()
    chain_EE = np.full((8, 8), 1.0)
    assert bounds.kept_with_copies(chain_EE, 8, 4) == 16.0
    assert bounds.kept_with_copies(chain_EE, 12, 4) == 12 * 3


@pytest.mark.parametrize(
    ("num_nodes", "cap", "top_k"),
    [
        pytest.param(1, None, 2, marks=pytest.mark.slow),
        pytest.param(1, "1.1x", 2, marks=pytest.mark.slow),
        (1, "1.2", 1),
        (2, "1.2x", 2),
        (2, None, 3),
    ],
)
def test_plans_keep_their_caps_and_beat_the_start(num_nodes, cap, top_k):
    some = problem(1, num_nodes=num_nodes, cap=cap, top_k=top_k)
    placement, report = solve.solve_problem(some, 0, 3.0)
    assert report.objective == pytest.approx(some.value_of(placement))
    assert 0 < report.bound <= report.objective < report.greedy
    assert placement.num_slots == 12
    assert placement.share_LNP.shape == (4, num_nodes + 1, 12)
    if cap:
        cap_L = with_copies.begin(some).cap_L
        assert (staying.counted(some, placement).largest_L <= cap_L * (1 + 1e-9)).all()
    bare = solve.solve_problem(spare.without(some), 0, 1.5).report.objective
    assert report.objective < bare


def test_a_cap_out_of_reach_names_the_layer():
    some = problem(cap="1.0")
    with pytest.raises(Refused, match="was not balanced better"):
        solve.solve_problem(some, 0, 1.0)


def test_one_sequence_of_copies_everywhere_never_moves():
    ids_TLK = np.tile(np.array([[[0, 1], [1, 0], [2, 3]]], np.uint8), (40, 1, 1))
    trace = Trace(ids_TLK, 4, np.array([40], np.int32))
    some = Problem(trace, topology.flat(2), "exflow", num_slots=8)  # every expert everywhere
    placement, report = solve.solve_problem(some, 0, 3.0)
    assert report.objective == 0.0
    assert report.bound == 0.0
    assert placement.num_replicas_LE.min() == 2


@pytest.mark.parametrize("found", [True, False])
def test_a_search_whose_programs_were_cut_short_has_not_finished(found, monkeypatch):
    """Else "finished" would promise the same plan on a faster machine."""
    some, whole = problem(layers=2), staying_program.solve

    def cut(given, nodes_, holds_EM, free_EM, time_limit):
        answer = whole(given, nodes_, holds_EM, free_EM, time_limit)
        if answer is None or not free_EM.any():
            return answer
        return dataclasses.replace(answer, ended=False) if found else None

    monkeypatch.setattr(staying, "SWEEPS", 2)
    device_LE = spare.without(some).balanced_LE
    run = with_copies.begin(some)
    with clock.watched() as watch:
        assert list(run.filled(device_LE, 0, time.monotonic() + 1e6))
    assert not watch.cut
    monkeypatch.setattr(staying_program, "solve", cut)
    with clock.watched() as watch:
        assert list(run.filled(device_LE, 0, time.monotonic() + 1e6))
    assert watch.cut
    assert not solve.solve_problem(some, 0, 3.0).report.finished


def test_a_program_says_that_its_time_ended_it():
    ended = []
    for experts, devices, limit in ((16, 4, 60.0), (64, 8, 0.0)):
        one = given(
            np.random.default_rng(0), experts=experts, devices=devices, slots=experts // devices + 1
        )
        start_EM = np.arange(experts)[:, None] % devices == np.arange(devices)
        everything = np.ones_like(start_EM)
        answer = staying_program.solve(one, nodes.of(devices, None), start_EM, everything, limit)
        ended.append(answer is not None and answer.ended)
    assert ended == [True, False]


def test_time_limit_zero_answers_with_even_shares():
    placement, report = solve.solve_problem(problem(), 0, 0.0)
    assert placement.num_slots == 12
    assert report.objective > 0


def test_plan_files_hold_the_shares(tmp_path):
    some = problem(num_nodes=2)
    placement = shared(some)
    path = tmp_path / "plan.json"
    Plan(placement).write(path)
    again = Plan.read(path).placement
    assert again == placement
    np.testing.assert_array_equal(again.share_LNP, placement.share_LNP)
    assert placement.digest != dataclasses.replace(placement, share_LNP=None).digest
    text = json.loads(path.read_text())
    for change, words in [
        (lambda s: s[1][0].__setitem__(0, 65), "from 0 to 64"),
        (lambda s: s[1][0].__setitem__(0, (s[1][0][0] + 1) % 65), "add up to 64"),
        (lambda s: s[1][0].pop(), "equal lengths"),
        (lambda s: s.pop(), r"\[L, N \+ 1, P\]"),
        (lambda s: s[0][0].__setitem__(0, 1.5), "whole numbers"),
    ]:
        damaged = json.loads(json.dumps(text))
        change(damaged[shares.FIELD])
        path.write_text(json.dumps(damaged))
        with pytest.raises(Refused, match=words):
            Plan.read(path)
    swapped = json.loads(json.dumps(text))
    del swapped[shares.FIELD]
    path.write_text(json.dumps(swapped))
    with pytest.raises(Refused, match="digest"):
        Plan.read(path)


def test_slots_that_stay_take_their_shares_along():
    some = problem()
    placement = shared(some)
    old_LP = placement.physical_to_logical_LP.reshape(4, 4, 3)[:, :, ::-1].reshape(4, 12)
    moved = Previous(Placement(old_LP, 8, 4), 0).slotted(placement)
    np.testing.assert_array_equal(moved.physical_to_logical_LP, old_LP)
    order_P = np.arange(12).reshape(4, 3)[:, ::-1].ravel()
    np.testing.assert_array_equal(moved.share_LNP, placement.share_LNP[:, :, order_P])


@pytest.mark.parametrize("objective", ["exflow", "rows"])  # one numbering, and one per layer
def test_new_device_numbers_take_shares_and_nodes_along(objective):
    some = problem(devices=6, num_nodes=3, experts=12, slots=18)
    after = shared(some)
    turned_M = np.array([5, 4, 0, 1, 2, 3])  # nodes go round, and one turns
    slots_LMS = after.physical_to_logical_LP.reshape(4, 6, 3)
    before = Placement(slots_LMS[:, np.argsort(turned_M)].reshape(4, 18), 12, 6)
    some = dataclasses.replace(some, objective=objective, dispatch="hierarchical")
    found = move_lib.relabelled(some, before, after)
    np.testing.assert_array_equal(holds_LEM(found), holds_LEM(before))
    node_N = np.array([2, 0, 1, 3])  # the last row is of no node
    for layer, slot in np.ndindex(4, 18):
        expert = after.physical_to_logical_LP[layer, slot]
        there_s = found.physical_to_logical_LP[layer].reshape(6, 3)[turned_M[slot // 3]]
        now = 3 * turned_M[slot // 3] + there_s.tolist().index(expert)
        for row in range(4):
            share = after.share_LNP[layer, row, slot]
            assert found.share_LNP[layer, node_N[row], now] == share


def test_a_verdict_judges_under_the_rule_of_its_plan():
    some = dataclasses.replace(problem(), dispatch="coherent")
    found = verdict.verdict(some, settings=verdict.Settings(time_limit=0.0))
    assert copies.rule_of(found.placement) == "stay"


@pytest.mark.parametrize(("name", "out"), [("sglang", "s.json"), ("own", "o.json")])
def test_a_conversion_keeps_shares_or_says_that_they_are_lost(name, out, tmp_path):
    placement = shared(problem())
    Plan(placement).write(tmp_path / "plan.json")
    done = convert.convert(tmp_path / "plan.json", tmp_path / out, name, Hints())
    lost = any("shares of its copies are lost" in note for note in done.notes)
    assert lost == (name != "own")
    if name == "own":
        assert Plan.read(tmp_path / out).placement == placement
