"""Homes: costs against the token-by-token oracle, exact assignments, and the alternation."""

import dataclasses
import itertools
import time

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import baselines, contacts, cost, solve, topology
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.homes import assign, experts, joint, tally
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.routing import synthetic
from moe_jax.routing.trace import Trace

FAR = 1e6  # seconds


def soon() -> float:
    return time.monotonic() + FAR


def made(seed: int, **changes) -> Trace:
    """A trace with tokens that have fewer experts, or none."""
    sizes = {"num_tokens": 200, "num_layers": 3, "num_experts": 8, "top_k": 2, "num_classes": 6}
    trace = synthetic.realistic(**(sizes | changes), seed=seed, num_sequences=9)
    ids_TLK = trace.expert_ids_TLK.copy()
    rng = np.random.default_rng(seed)
    ids_TLK[rng.random(ids_TLK.shape) < 0.1] = trace.no_expert
    return dataclasses.replace(trace, expert_ids_TLK=ids_TLK)


def topical(
    topics: int, sequences: int = 24, length: int = 10, layers: int = 3, seed: int = 0
) -> tuple[Trace, np.ndarray]:
    """Sequences of one topic each, whose tokens use experts of that topic only; returns topic_LE.

    On `topics` devices no row has to travel: the optimum is 0.
    """
    rng = np.random.default_rng(seed)
    size = 4
    topic_LE = np.stack(
        [rng.permutation(np.repeat(np.arange(topics), size)) for _ in range(layers)]
    )
    topic_S = np.arange(sequences) % topics
    topic_T = np.repeat(topic_S, length)
    ids_TLK = np.empty((len(topic_T), layers, 2), np.uint8)
    for layer in range(layers):
        members_GE = np.argsort(topic_LE[layer], kind="stable").reshape(topics, size)
        for token, topic in enumerate(topic_T):
            ids_TLK[token, layer] = rng.choice(members_GE[topic], size=2, replace=False)
    names = tuple(f"topic{topic}/{s}" for s, topic in enumerate(topic_S))
    seq_len = np.full(sequences, length, np.int32)
    return Trace(ids_TLK, topics * size, seq_len, seq_name=names), topic_LE


MACHINES = [
    ("exchange", topology.flat(4)),
    ("exchange", topology.nodes_by_devices(2, 4)),
    ("hierarchical", topology.nodes_by_devices(2, 4)),
    ("hierarchical", topology.nodes_by_devices(2, 8)),
    ("hierarchical", topology.nodes_by_devices(4, 4)),
    ("exchange", topology.uneven((3, 1))),
    ("hierarchical", topology.uneven((3, 1))),
    ("hierarchical", topology.uneven((2, 5, 1))),
]


def counted_rows(trace, device_LE, dispatch, machine, home_S) -> cost.Rows:
    """The oracle: token by token."""
    return cost.rows(
        trace.expert_ids_TLK,
        Placement.from_device_LE(device_LE, machine.num_devices),
        dispatch,
        np.repeat(home_S, trace.seq_len),
        devices_per_node=machine.devices_per_node,
    )


@pytest.mark.parametrize(("dispatch", "machine"), MACHINES)
@pytest.mark.parametrize("slow_weight", [1.0, 9.0])
def test_costs_of_every_home_are_those_counted_token_by_token(dispatch, machine, slow_weight):
    trace, devices = made(1), machine.num_devices
    device_LE = baselines.random(3, 8, devices, 2)
    found_SM = tally.cost_SM(
        tally.count(trace, device_LE, machine), tally.prices(machine, dispatch, slow_weight)
    )
    node_M = machine.node_M
    weight_MM = np.where(node_M[:, None] == node_M, 1.0, slow_weight)
    for s, home in itertools.product(range(trace.num_sequences), range(devices)):
        one = trace.select(np.array([s]))
        rows = counted_rows(one, device_LE, dispatch, machine, np.array([home]))
        assert found_SM[s, home] == (rows.total_LMM * weight_MM).sum()


@pytest.mark.parametrize(("dispatch", "machine"), MACHINES)
@pytest.mark.parametrize("objective", ["rows", "seconds"])
def test_the_problem_with_homes_counts_as_the_oracle(dispatch, machine, objective):
    trace, devices = made(3), machine.num_devices
    device_LE = baselines.random(3, 8, devices, 5)
    home_S = np.random.default_rng(0).integers(devices, size=trace.num_sequences)
    problem = Problem(trace, machine, objective, dispatch)
    rows = counted_rows(trace, device_LE, dispatch, machine, home_S)
    found = experts.with_homes(problem, home_S).exact(device_LE)
    if objective == "rows":
        wanted = (rows.total_LMM * problem.row_weight_MM).sum() / problem.token_layers
    else:
        load_LM = cost.computed_LM(
            trace.expert_ids_TLK, Placement.from_device_LE(device_LE, devices)
        )
        wanted = seconds_lib.seconds(
            rows, load_LM, machine, problem.work, dispatch, trace.num_tokens
        ).total_L.mean()
    assert found == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("dispatch", "machine"), MACHINES)
def test_the_wire_is_that_of_the_oracle(dispatch, machine):
    trace, devices = made(4), machine.num_devices
    device_LE = baselines.random(3, 8, devices, 6)
    home_S = np.arange(trace.num_sequences) % devices
    rows = counted_rows(trace, device_LE, dispatch, machine, home_S)
    counted = tally.count(trace, device_LE, machine)
    onehot_SH = np.eye(devices, dtype=np.int64)[home_S]
    out_LMM = tally.wire_LMM(
        np.einsum("sh,slm->lhm", onehot_SH, counted.touched_SLM),
        np.einsum("sh,sln->lhn", onehot_SH, counted.node_SLN),
        machine,
        dispatch,
    )
    np.testing.assert_array_equal(out_LMM, rows.dispatch_LMM)
    np.testing.assert_array_equal(out_LMM.transpose(0, 2, 1), rows.combine_LMM)


def test_priced_swaps_and_arrivals_are_exact():
    trace = made(5, num_experts=12, top_k=3)
    problem = Problem(trace, topology.flat(4), "rows")
    home_S = np.random.default_rng(1).integers(4, size=trace.num_sequences)
    homed = experts.with_homes(problem, home_S)
    device_E = baselines.random(1, 12, 4, 0)[0]
    sets = homed.sets[1]
    e_P, f_P = np.nonzero(np.triu(device_E[:, None] != device_E[None, :]))
    swapped_PM = sets.swapped_PM(device_E, 4, e_P, f_P)
    for pair, (e, f) in enumerate(zip(e_P, f_P, strict=True)):
        after_E = device_E.copy()
        after_E[e], after_E[f] = device_E[f], device_E[e]
        np.testing.assert_allclose(swapped_PM[pair], sets.touched_M(after_E, 4))
    out_E = np.array([np.flatnonzero(device_E == m)[0] for m in range(4)])
    arrivals_EM = sets.arrivals_EM(device_E, 4, out_E)
    base = sets.touched_M(device_E, 4).sum() - np.trace(arrivals_EM)
    for order in itertools.permutations(range(4)):
        after_E = device_E.copy()
        after_E[out_E] = order
        added = arrivals_EM[np.arange(4), list(order)].sum()
        assert base + added == pytest.approx(sets.touched_M(after_E, 4).sum())


def test_homed_sets_without_prices_by_home_are_the_plain_ones():
    trace = made(6)
    plain = contacts.sets_of(trace, 0)
    homed = experts.with_homes(Problem(trace, topology.flat(4), "rows"), np.zeros(9, int)).sets[0]
    np.testing.assert_array_equal(homed.expert_QK, plain.expert_QK)
    np.testing.assert_array_equal(homed.count_Q, plain.count_Q)


@pytest.mark.parametrize("seed", range(8))
def test_equal_numbers_is_brute_force(seed):
    rng = np.random.default_rng(seed)
    sequences, devices = ((6, 3), (7, 3), (5, 2), (4, 4))[seed % 4]
    cost_SM = rng.integers(0, 50, (sequences, devices)).astype(float)
    least, most = sequences // devices, -(-sequences // devices)
    best = min(
        sum(cost_SM[s, m] for s, m in enumerate(homes))
        for homes in itertools.product(range(devices), repeat=sequences)
        if least <= min(np.bincount(homes, minlength=devices)) and max(np.bincount(homes)) <= most
    )
    found = assign.equal(cost_SM)
    held_M = np.bincount(found.home_S, minlength=devices)
    assert held_M.min() >= least
    assert held_M.max() <= most
    assert found.value == found.bound == best == cost_SM[np.arange(sequences), found.home_S].sum()


def test_a_device_that_nobody_wants_is_as_full_as_the_others():
    cost_SM = np.zeros((7, 3))
    cost_SM[:, 0] = 100.0
    assert sorted(np.bincount(assign.equal(cost_SM).home_S)) == [2, 2, 3]
    assert assign.equal(cost_SM).value == 200


def test_a_device_that_nobody_wants_is_as_full_beyond_exact_assignments(monkeypatch):
    cost_SM = np.random.default_rng(0).random((97, 8))
    cost_SM[:, 0] += 100.0
    exact = assign.equal(cost_SM)
    monkeypatch.setattr(assign, "ASSIGNED", 10)
    found = assign.equal(cost_SM)
    assert sorted(np.bincount(found.home_S)) == [12] * 7 + [13]
    assert found.bound <= exact.value <= found.value < exact.value * 1.01
    assert found.value == pytest.approx(cost_SM[np.arange(97), found.home_S].sum())


@pytest.mark.parametrize("seed", range(12))
def test_equal_tokens_lies_between_its_bound_and_brute_force(seed):
    rng = np.random.default_rng(seed)
    sequences, devices = ((7, 3), (9, 2), (6, 4))[seed % 3]
    cost_SM = rng.integers(0, 50, (sequences, devices)).astype(float)
    len_S = rng.integers(3, 12, sequences)
    slack = assign.least_slack(len_S, devices) + (0.0, 0.2)[seed % 2]
    cap = (1 + slack) * len_S.sum() / devices * (1 + 1e-12)
    best = min(
        sum(cost_SM[s, m] for s, m in enumerate(homes))
        for homes in itertools.product(range(devices), repeat=sequences)
        if np.bincount(homes, weights=len_S, minlength=devices).max() <= cap
    )
    for scale in (0.1, 1.0, 10.0):  # whatever the prices, what they prove holds
        proven = assign._dual_value(cost_SM, len_S, cap, scale * rng.random(devices))
        assert proven <= best
    assert assign._dual(cost_SM, len_S, cap)[1] <= best
    found = assign.within_tokens(cost_SM, len_S, slack)
    assert np.bincount(found.home_S, weights=len_S, minlength=devices).max() <= cap
    assert found.bound <= best <= found.value
    assert found.value == cost_SM[np.arange(sequences), found.home_S].sum()


def test_large_assignments_have_a_small_proven_gap(monkeypatch):
    rng = np.random.default_rng(0)
    cost_SM, len_S = rng.random((600, 8)) * 100, rng.integers(20, 500, 600)
    exact = assign.equal(cost_SM).value
    program = assign.within_tokens(cost_SM, len_S, 0.05)
    monkeypatch.setattr(assign, "ASSIGNED", 10)
    monkeypatch.setattr(assign, "PROGRAM", 10)
    found = assign.equal(cost_SM)
    assert found.bound <= exact <= found.value + 1e-9
    assert found.gap < 0.02
    lagrangian = assign.within_tokens(cost_SM, len_S, 0.05)
    assert lagrangian.gap < 0.02
    assert program.gap < 0.005
    assert lagrangian.bound <= program.value


def test_slack_that_cannot_be_kept_is_refused_with_one_that_can():
    cost_SM, len_S = np.zeros((3, 2)), np.array([10, 10, 10])
    with pytest.raises(Refused, match=r"Use 0\.3334 or more"):
        assign.within_tokens(cost_SM, len_S, 0.1)
    assert assign.within_tokens(cost_SM, len_S, 0.3334).value == 0


def test_arrivals_keep_their_capacity():
    rng = np.random.default_rng(0)
    cost_SM = rng.random((150, 4))
    homes_S = assign.in_batches(cost_SM, 64)
    for batch_S in (homes_S[:64], homes_S[64:128], homes_S[128:]):
        held_M = np.bincount(batch_S, minlength=4)
        assert held_M.max() - held_M.min() <= 1
    cost_SM[:, 0] -= 10  # everyone's favourite
    homes_S = assign.online(cost_SM, np.zeros(4), 3)
    for now in range(1, 151):
        held_M = np.bincount(homes_S[:now], minlength=4)
        assert held_M.max() - held_M.min() <= 3


def test_prices_keep_a_scarce_device_for_those_who_need_it():
    """All prefer device 0, every fourth sequence much more: it should have just these."""
    rng = np.random.default_rng(1)
    cost_SM = rng.random((400, 4)) * 0.1
    needs_S = rng.permutation(np.arange(400) % 4 == 0)
    cost_SM[:, 0] -= np.where(needs_S, 10.0, 1.0)
    price_M = assign.prices_M(cost_SM)
    assert price_M.min() == 0
    assert 0.8 < price_M[0] < 10.2
    for slack in (4, 16):
        priced_S = assign.online(cost_SM, price_M, slack)
        plain_S = assign.online(cost_SM, np.zeros(4), slack)
        assert (priced_S[needs_S] == 0).mean() > (plain_S[needs_S] == 0).mean() + 0.2


@pytest.mark.parametrize(("dispatch", "machine"), MACHINES)
def test_numbers_are_the_best_of_all(dispatch, machine):
    trace, devices = made(7, num_layers=1), machine.num_devices
    if devices > 4:
        machine = topology.nodes_by_devices(2, 4)
        devices = 4
    device_LE = baselines.random(1, 8, devices, 3)
    home_S = np.random.default_rng(2).integers(devices, size=trace.num_sequences)
    problem = Problem(trace, machine, "rows", dispatch)
    homed, price = experts.with_homes(problem, home_S), tally.prices_of(problem)
    number_LP = joint.numbers_LP(
        tally.count(trace, device_LE, machine), price, home_S, machine.devices_per_node
    )
    same_MM, best = machine.nodes.same_MM, np.inf
    for order in itertools.permutations(range(devices)):
        if dispatch == "hierarchical" and (same_MM[np.ix_(order, order)] != same_MM).any():
            continue  # tears a node apart
        best = min(best, homed.exact(np.array(order)[device_LE]))
    found = homed.exact(np.take_along_axis(number_LP, device_LE, 1))
    assert found == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_joint_is_brute_force_where_that_is_possible(seed):
    """One layer, two devices, four experts, four sequences: 6 x 6 answers."""
    trace = synthetic.realistic(
        num_tokens=40, num_layers=1, num_experts=4, top_k=2, seed=seed, num_sequences=4
    )
    problem = Problem(trace, topology.flat(2), "rows")
    halves = [np.array(p) for p in sorted(set(itertools.permutations([0, 0, 1, 1])))]
    best = min(
        experts.with_homes(problem, home_S).exact(device_E[None])
        for device_E, home_S in itertools.product(halves, halves)
    )
    # alternation ends where neither side improves alone: from every partition of the experts
    found = [joint.solve(problem, start_E[None], 0, soon()).value for start_E in halves[:3]]
    assert all(value >= best * (1 - 1e-12) for value in found)
    assert min(found) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("topics", [2, 4])
def test_topics_with_experts_of_their_own_need_no_row(topics):
    trace, _ = topical(topics)
    machine = topology.flat(topics)
    problem = Problem(trace, machine, "rows")
    start_LE = baselines.random(3, trace.num_experts, topics, 1)
    found = joint.solve(problem, start_LE, 0, soon())
    assert found.value == 0
    rows = cost.rows(
        trace.expert_ids_TLK,
        Placement.from_device_LE(found.device_LE, topics),
        "exchange",
        np.repeat(found.home_S, trace.seq_len),
    )
    assert rows.total_LMM.sum() == 0
    assert (np.bincount(found.home_S) == trace.num_sequences // topics).all()


@pytest.mark.parametrize(
    ("case", "objective"),
    [(0, "rows"), (1, "seconds"), (2, "rows"), (2, "seconds"), (4, "rows")],
)
def test_joint_only_improves_keeps_the_cap_and_repeats_itself(case, objective):
    dispatch, machine = MACHINES[case]
    trace = made(8 + case)
    problem = Problem(trace, machine, objective, dispatch, load_cap=LoadCap(1.4, relative=True))
    start_LE = problem.balanced_LE.astype(np.int64)
    found = joint.solve(problem, start_LE, 3, soon())
    assert found.finished
    assert found.value <= found.numbered
    if objective == "rows":
        assert found.numbered <= found.seated <= found.uniform
    assert problem.all_allowed(found.device_LE)
    held_M = np.bincount(found.home_S, minlength=machine.num_devices)
    assert held_M.max() - held_M.min() <= 1
    again = joint.solve(problem, start_LE, 3, soon())
    np.testing.assert_array_equal(again.device_LE, found.device_LE)
    np.testing.assert_array_equal(again.home_S, found.home_S)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("nodes", [1, 2])
def test_joint_keeps_the_cap_where_devices_differ_in_speed(seed, nodes):
    """A heavy group that becomes another device stays with devices of its speed."""
    trace = synthetic.realistic(
        num_tokens=600, num_layers=3, num_experts=16, top_k=2, seed=seed, num_sequences=20
    )
    flops = (4e14, 4e14, 1e14, 1e14)
    machine = dataclasses.replace(topology.nodes_by_devices(nodes, 4), device_flops=flops)
    problem = Problem(trace, machine, "rows", load_cap=LoadCap(1.2, relative=True))
    start_LE = solve.solve_problem(problem, 0, 0.3).placement.device_LE.astype(np.int64)
    assert problem.all_allowed(start_LE)
    found = joint.solve(problem, start_LE, 0, soon())
    assert problem.all_allowed(found.device_LE)
    assert found.value <= found.seated


def test_no_time_gives_homes_and_numbers():
    trace = made(9)
    problem = Problem(trace, topology.flat(4), "rows")
    start_LE = baselines.contiguous(3, 8, 4).astype(np.int64)
    found = joint.solve(problem, start_LE, 0, time.monotonic())
    assert not found.finished
    assert found.value == found.numbered <= found.seated


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dispatch": "coherent"}, "do not return"),
        ({"dispatch": "gathered", "objective": "seconds"}, "everywhere"),
        ({"objective": "load"}, "rows and seconds only"),
        ({"num_slots": 12}, r"without replicas.*\. Leave --slots out\.$"),
        (  # which three devices would refuse
            {"num_slots": 9, "topology": topology.flat(3)},
            "Leave --slots out, and take devices that divide the 8 experts",
        ),
    ],
)
def test_questions_that_homes_do_not_answer_are_refused(changes, message):
    machine = {"topology": topology.flat(4), "objective": "rows"}
    problem = Problem(made(0), **(machine | changes))
    with pytest.raises(Refused, match=message):
        tally.check(problem)


def test_tokens_between():
    trace = made(2)
    longest = int(trace.seq_len.max())
    after = tally.tokens_between(trace, 5)
    np.testing.assert_array_equal(after.seq_len, trace.seq_len[trace.seq_len > 5] - 5)
    before = tally.tokens_between(trace, 0, 5)
    np.testing.assert_array_equal(before.seq_len, np.minimum(trace.seq_len, 5))
    first, length = 0, int(trace.seq_len[0])
    np.testing.assert_array_equal(before.expert_ids_TLK[:5], trace.expert_ids_TLK[first:5])
    np.testing.assert_array_equal(
        after.expert_ids_TLK[: length - 5], trace.expert_ids_TLK[5:length]
    )
    with pytest.raises(Refused, match="longest sequence"):
        tally.tokens_between(trace, longest)
