"""The search for coherent dispatch: what it counts, against the rows of every token."""

import itertools

import numpy as np
import pytest

from moe_jax.placement import anneal, chain, coherent, solve, topology
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.routing import synthetic
from moe_jax.routing.trace import Trace

NEVER = float("inf")


def problem(seed, devices=4, experts=8, top_k=2, layers=4, cap=None, tokens=240):
    trace = synthetic.realistic(
        num_tokens=tokens,
        num_sequences=6,
        num_layers=layers,
        num_experts=experts,
        top_k=top_k,
        seed=seed,
    )
    load_cap = LoadCap.parse(cap) if cap else None
    return Problem(trace, topology.flat(devices), "rows", "coherent", load_cap=load_cap)


def labels(some, rng):
    equal_E = np.arange(some.trace.num_experts) % some.num_devices
    return np.stack([rng.permutation(equal_E) for _ in range(some.trace.num_layers)])


@pytest.mark.parametrize(
    ("devices", "top_k", "layers"), [(4, 2, 4), (2, 1, 3), (8, 4, 2), (4, 3, 1), (1, 2, 3)]
)
def test_the_chain_counts_the_rows_of_every_token(devices, top_k, layers):
    some = problem(0, devices, 8, top_k, layers)
    (one,) = coherent.chains_of(some, (np.inf,))
    rng = np.random.default_rng(0)
    for _ in range(5):
        device_LE = labels(some, rng)
        rows = some.value(device_LE) * some.token_layers
        assert -one.value(device_LE) - some.token_layers == pytest.approx(rows)


def test_sets_too_many_for_one_whole_number_count_as_well():
    ids_TLK = np.random.default_rng(0).permuted(np.tile(np.arange(128), (30, 2, 1)), axis=2)[
        ..., :9
    ]
    some = Problem(
        Trace(ids_TLK.astype(np.uint8), 128, np.array([30], np.int32)),
        topology.flat(8),
        "rows",
        "coherent",
    )
    (one,) = coherent.chains_of(some, (np.inf,))
    device_LE = labels(some, np.random.default_rng(1))
    rows = some.value(device_LE) * some.token_layers
    assert -one.value(device_LE) - some.token_layers == pytest.approx(rows)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_every_swap_is_priced_exactly(layer):
    some = problem(1, cap="1.3x")
    (one,) = coherent.chains_of(some, (np.inf,))
    device_LE = labels(some, np.random.default_rng(2))
    device_E = device_LE[layer]
    sets = one.sets[layer].waiting(device_LE[layer - 1], 4)
    ahead_EM = np.zeros((8, 4))
    if layer < 3:
        ahead_EM = one.ahead_EM(layer + 1, device_LE[layer + 1])
    e_P, f_P = np.nonzero(np.triu(device_E[:, None] != device_E[None, :]))
    gain_P = coherent.gains_P(one, layer, sets, ahead_EM, device_E, e_P, f_P)
    seen = set()
    for e, f, gain in zip(e_P, f_P, gain_P, strict=True):
        swapped_LE = device_LE.copy()
        swapped_LE[layer, [e, f]] = device_E[[f, e]]
        load_M = np.bincount(swapped_LE[layer], weights=one.load_LE[layer])
        changed = load_M[[device_E[e], device_E[f]]].max()
        over = changed > one.cap_L[layer] * (1 + 1e-9)
        seen.add(bool(over))
        if over:
            assert gain == -np.inf
        else:
            assert gain == pytest.approx(one.value(swapped_LE) - one.value(device_LE))
    assert seen == {True, False}


@pytest.mark.parametrize("cap", [None, "1.2x"])
def test_descent_gains_until_no_swap_does_and_keeps_the_cap(cap):
    some = problem(3, cap=cap)
    (one,) = coherent.chains_of(some, (np.inf,))
    start_LE = some.balanced_LE if cap else labels(some, np.random.default_rng(4))
    end_LE = coherent.descended(one, start_LE, NEVER)
    assert one.value(end_LE) > one.value(start_LE)
    assert some.all_allowed(end_LE)
    for layer in range(4):
        for e, f in itertools.combinations(range(8), 2):
            near_LE = end_LE.copy()
            near_LE[layer, [e, f]] = end_LE[layer, [f, e]]
            if some.all_allowed(near_LE):
                assert one.value(near_LE) <= one.value(end_LE) + 1e-6


def test_the_pool_joins_partitions_by_their_exact_rows():
    some = problem(5, devices=2, experts=4, layers=3)
    (one,) = coherent.chains_of(some, (np.inf,))
    rng = np.random.default_rng(0)
    pool, members = chain.Pool(one, 8), [labels(some, rng) for _ in range(3)]
    for device_LE in members:
        pool.add(device_LE)
    best = -np.inf
    for choice in itertools.product(range(3), repeat=3):
        for flips in itertools.product((0, 1), repeat=3):
            mixed = [members[choice[n]][n] ^ flips[n] for n in range(3)]
            best = max(best, one.value(np.stack(mixed)))
    assert one.value(pool.best_chain(NEVER)) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(3))
def test_tiny_cases_are_solved_to_the_optimum(seed):
    some = problem(seed, devices=2, experts=4, layers=3)
    halves = [np.array(row) for row in set(itertools.permutations([0, 0, 1, 1]))]
    best = min(some.value(np.stack(rows)) for rows in itertools.product(halves, repeat=3))
    solution = solve.solve_problem(some, 0, 5.0)
    assert solution.report.objective == pytest.approx(best)
    assert solution.report.bound <= best * (1 + 1e-12)


def test_annealing_counts_what_a_layer_keeps_by_itself():
    some = problem(6)
    (one,) = coherent.chains_of(some, (np.inf,))
    own_LEE = some.coactivation_LEE
    rng = np.random.default_rng(0)
    state = anneal._State.of(one, np.stack([labels(some, rng) for _ in range(3)]), own_LEE)
    for step in range(12):
        before = [kept(one, own_LEE, device_LE) for device_LE in state.device_BLE]
        moves = state._propose(step % 2, np.random.default_rng(step))
        state.step(step % 2, 1e30, 0.0, np.random.default_rng(step))
        after = [kept(one, own_LEE, device_LE) for device_LE in state.device_BLE]
        gained = moves.gain_BLP.sum(axis=(1, 2))
        np.testing.assert_allclose(np.subtract(after, before), gained, atol=1e-6)


def kept(one, own_LEE, device_LE):
    pairs = sum(
        own_EE[device_E[:, None] == device_E[None, :]].sum() / 2
        for own_EE, device_E in zip(own_LEE, device_LE, strict=True)
    )
    return chain.Chain.value(one, device_LE) + pairs
