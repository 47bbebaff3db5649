"""Capacity: which assignments are dropped, against a loop over tokens; and what the others keep."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.dispatch import capacity
from moe_jax.placement.plan import Placement
from tests.model.test_dispatch import E, assert_close, count_traffic, problem, run, run_oracle

T, K = 8 * 13, 2
SHAPE = (2, 4)  # two sets of experts: a capacity for each


def drop(expert_TK, factor):
    """Token by token: (kept assignments, [devices, E] dropped)."""
    kept_TK, dropped_ME = np.array(expert_TK), np.zeros((SHAPE[1], E), int)
    capacity = math.ceil(abs(factor) * T // SHAPE[0] * K / E)
    for replica in range(SHAPE[0]):
        taken_E = np.zeros(E, int)
        for token in range(replica * T // SHAPE[0], (replica + 1) * T // SHAPE[0]):
            for k, expert in enumerate(kept_TK[token]):
                if expert >= 0 and taken_E[expert] == capacity:
                    kept_TK[token, k] = -1
                    dropped_ME[token // 13 % SHAPE[1], expert] += 1
                elif expert >= 0:
                    taken_E[expert] += 1
    return kept_TK, dropped_ME


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(1.1, 110), (-1.1, 110), (1.101, 111), (1e-300, 1), (8.0, 800), (1e7, 800), (1e300, 800)],
)
def test_rounds_up_what_is_written(factor, expected):
    assert capacity.of_factor(factor, num_assignments=800, num_experts=8) == expected
    assert capacity.of_factor(0.0, num_assignments=800, num_experts=8) is None


@pytest.mark.parametrize(
    ("dispatch", "combine", "factor", "routing"),
    [
        ("exchange", "exact", 1.0, "random"),
        ("exchange", "exact", 1.0, "one"),
        ("exchange", "exact", 1.0, "holes"),
        pytest.param("exchange", "exact", -0.5, "few", marks=pytest.mark.slow),
        pytest.param("exchange", "partial", 0.5, "random", marks=pytest.mark.slow),
        ("gathered", "reproducible", 0.5, "few"),
    ],
)
def test_drops_equal_the_oracle(dispatch, combine, factor, routing):
    args = problem(0, T, K, routing=routing)
    kept_TK, dropped_ME = drop(args[1], factor)
    assert dropped_ME.any()
    slots = np.random.default_rng(0).permutation(E)[None].astype(np.int32)
    y_TD, grads, traffic = run(
        SHAPE, dispatch, args, Placement(slots, E, 4), combine, capacity_factor=factor
    )
    np.testing.assert_array_equal(traffic.dropped_ME, dropped_ME)
    np.testing.assert_array_equal(
        traffic.computed_P, np.bincount(kept_TK[kept_TK >= 0], minlength=E)[slots[0]]
    )
    expected_TD, expected_grads = run_oracle((args[0], jnp.asarray(kept_TK), *args[2:]))
    assert_close(y_TD, expected_TD, 3e-6)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected, 3e-6)
    if dispatch == "exchange":  # nothing of what is dropped travels
        out, _, _ = count_traffic(kept_TK, Placement(slots, E, 4), *SHAPE)
        np.testing.assert_array_equal(traffic.dispatch_MM, out)


def test_bits_and_drops_do_not_depend_on_the_placement():
    args = problem(1, T, K)
    expected_TD, expected_grads, expected = run(SHAPE, "exchange", args, capacity_factor=1.0)
    for seed in range(10):
        slots = np.random.default_rng(seed).permutation(E)[None].astype(np.int32)
        y_TD, grads, traffic = run(
            SHAPE, "exchange", args, Placement(slots, E, 4), capacity_factor=1.0
        )
        np.testing.assert_array_equal(traffic.dropped_ME, expected.dropped_ME)
        np.testing.assert_array_equal(y_TD, expected_TD)
        jax.tree.map(np.testing.assert_array_equal, grads, expected_grads)


def test_enough_capacity_drops_nothing():
    """The same bits as without one, whatever buffers are made for."""
    args = problem(2, T, K)
    expected_TD, _, expected = run(SHAPE, "gathered", args)
    assert not np.any(expected.dropped_ME)
    y_TD, _, traffic = run(SHAPE, "gathered", args, capacity_factor=float(E))
    assert not np.any(traffic.dropped_ME)
    np.testing.assert_array_equal(y_TD, expected_TD)
