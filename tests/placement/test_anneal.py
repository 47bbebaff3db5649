"""Annealing and the nested search: what a step keeps count of, against counting anew."""

import time

import numpy as np
import pytest

from moe_jax.placement import anneal, chainwise, topology
from moe_jax.placement import chain as chain_lib
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.routing import synthetic

NEVER = float("inf")


def problem(seed, nodes=1, devices=4, cap=None, layers=5):
    trace = synthetic.realistic(
        num_tokens=480,
        num_sequences=12,
        num_layers=layers,
        num_experts=16,
        top_k=2,
        seed=seed,
    )
    load_cap = LoadCap.parse(cap) if cap else None
    machine = topology.nodes_by_devices(nodes, devices)
    return Problem(trace, machine, "exflow", "exchange", load_cap=load_cap)


def random_labels(copies, layers, experts, devices, seed=0):
    rng = np.random.default_rng(seed)
    equal_E = np.arange(experts) % devices
    return np.stack(
        [np.stack([rng.permutation(equal_E) for _ in range(layers)]) for _ in range(copies)]
    )


@pytest.mark.parametrize(("nodes", "devices"), [(1, 4), (2, 4), (1, 2), (1, 8)])
@pytest.mark.parametrize("layers", [2, 5])
def test_a_step_keeps_its_books(nodes, devices, layers):
    some = problem(0, nodes, devices, cap="1.2x", layers=layers)
    chain = some.chain(some.top1_LEE)
    start_BLE = random_labels(3, chain.num_layers, 16, devices)
    state = anneal._State.of(chain, start_BLE)
    for step in range(20):
        before = [chain.value(labels) for labels in state.device_BLE]
        moves = state._propose(step % 2, np.random.default_rng(step))
        state.step(step % 2, 1e30, 0.0, np.random.default_rng(step))  # so hot that all is accepted
        gained = moves.gain_BLP.sum(axis=(1, 2))
        after = [chain.value(labels) for labels in state.device_BLE]
        np.testing.assert_allclose(np.subtract(after, before), gained, atol=1e-6)
        for copy, labels in enumerate(state.device_BLE):
            counts = [np.bincount(row_E, minlength=devices) for row_E in labels]
            np.testing.assert_array_equal(counts, 16 // devices)
            load_LM = [
                np.bincount(row_E, weights=load_E, minlength=devices)
                for row_E, load_E in zip(labels, chain.load_LE, strict=True)
            ]
            np.testing.assert_allclose(state.load_BLM[copy], load_LM)


def test_cold_annealing_only_gains_and_keeps_caps():
    capped = problem(3, cap="1.1x")
    chain = capped.chain(capped.top1_LEE)
    start_BLE = np.tile(capped.balanced_LE, (4, 1, 1))
    rng = np.random.default_rng(0)
    end_BLE = anneal.anneal(chain, start_BLE, rng, sweeps=150, deadline=NEVER, hot=0.02)
    assert all(chain.value(labels) > chain.value(capped.balanced_LE) for labels in end_BLE)
    assert any(not chain.over_L(labels).any() for labels in end_BLE)


@pytest.mark.parametrize("seed", range(3))
def test_annealing_beats_random_labels_by_far(seed):
    chain = problem(seed).chain(problem(seed).top1_LEE)
    start_BLE = random_labels(4, chain.num_layers, 16, 4, seed)
    end_BLE = anneal.anneal(chain, start_BLE, np.random.default_rng(0), 300, NEVER)
    assert min(map(chain.value, end_BLE)) > 1.5 * max(map(chain.value, start_BLE))


def test_the_deadline_ends_it():
    chain = problem(0).chain(problem(0).top1_LEE)
    start_BLE = random_labels(2, chain.num_layers, 16, 4)
    past = time.monotonic() - 1
    end_BLE = anneal.anneal(chain, start_BLE, np.random.default_rng(0), 10**9, past)
    np.testing.assert_array_equal(end_BLE, start_BLE)


def test_layers_over_their_cap_are_named():
    capped = problem(1, cap="1.05x")
    chain = capped.chain(capped.top1_LEE)
    assert not chain.over_L(capped.balanced_LE).any()
    for labels in random_labels(5, chain.num_layers, 16, 4, seed=7):
        expected = [not capped.allowed(layer, row_E) for layer, row_E in enumerate(labels)]
        np.testing.assert_array_equal(chain.over_L(labels), expected)


def test_nodes_first_is_a_placement_and_close_to_the_flat_search():
    two = problem(2, nodes=2, devices=8)
    chain = two.chain(two.top1_LEE)
    labels = chainwise._nested(chain, np.random.default_rng(0), time.monotonic() + 2)
    np.testing.assert_array_equal([np.bincount(row_E, minlength=8) for row_E in labels], 2)
    alternated = chain_lib.alternate(chain, random_labels(1, 5, 16, 8)[0], NEVER)
    assert chain.value(labels) > chain.value(alternated)


def test_the_pool_remembers_what_it_computed():
    chain = problem(4).chain(problem(4).top1_LEE)
    pool, fresh = chain_lib.Pool(chain, 8), chain_lib.Pool(chain, 8)
    for labels in random_labels(6, chain.num_layers, 16, 4, seed=1):
        pool.add(labels)
        pool.best_chain(NEVER)
        fresh.add(labels)
    joined, anew = pool.best_chain(NEVER), fresh.best_chain(NEVER)
    np.testing.assert_array_equal(joined, anew)
    single = [chain.value(chain_lib.align(chain, x)) for x in random_labels(6, 5, 16, 4, seed=1)]
    assert chain.value(joined) >= max(single)
