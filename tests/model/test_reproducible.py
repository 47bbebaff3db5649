"""The reproducible combine: one row back per device, and the bits of every placement are the same.

The grid is tested by itself against sums in float64, then the whole dispatch under placements.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.dispatch import grid
from moe_jax.placement.plan import Placement
from tests.model import test_dispatch as dispatch_lib
from tests.model import test_mesh_axes as nodes_lib

NUM_TERMS = 6


def terms(seed, scale=1.0):
    """[K, N, D] float32 with magnitudes over 30 binary orders in every row."""
    rng = np.random.default_rng(seed)
    magnitude_KND = 2.0 ** rng.integers(-30, 1, size=(NUM_TERMS, 20, 8))
    return (rng.normal(size=magnitude_KND.shape) * magnitude_KND * scale).astype(np.float32)


def grid_sum(term_KND, order):
    """Sums half and half, as two devices would, in the order given."""
    exponent_N = jnp.stack([grid.exponent_of(jnp.asarray(t)) for t in term_KND]).max(axis=0)
    whole = [
        grid.to_grid(jnp.asarray(t), exponent_N, num_terms=len(term_KND)) for t in term_KND[order]
    ]
    halves = [sum(whole[: len(whole) // 2]), sum(whole[len(whole) // 2 :])]
    return np.asarray(grid.from_grid(sum(halves), exponent_N, num_terms=len(term_KND)))


@pytest.mark.parametrize("scale", [1.0, 2.0**120, 2.0**-90, 2.0**-130], ids=str)
def test_sums_have_no_order_and_stay_within_the_bound(scale):
    term_KND = terms(0, scale)
    expected_ND = grid_sum(term_KND, np.arange(NUM_TERMS))
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(NUM_TERMS)
        np.testing.assert_array_equal(grid_sum(term_KND, order), expected_ND)
    true_ND = term_KND.astype(np.float64).sum(axis=0)
    greatest_N1 = np.abs(term_KND).max(axis=(0, 2)).astype(np.float64)[:, None]
    bound_ND = NUM_TERMS * 2.0 ** (3 - 31) * greatest_N1 + 2.0**-24 * np.abs(true_ND)
    assert (np.abs(expected_ND - true_ND) <= bound_ND + NUM_TERMS * 2.0**-127).all()


def test_float32_sums_of_the_same_terms_do_have_an_order():
    term_KND = terms(0)
    assert (sum(term_KND) != sum(term_KND[::-1])).any()


@pytest.mark.parametrize("num_terms", [1, 2, 3, 8, 64])
def test_no_sum_leaves_32_bits(num_terms):
    """All terms at the greatest value below a power of two, where carries are largest."""
    largest = np.nextafter(np.float32(2), np.float32(0))
    term_KND = np.full((num_terms, 1, 2), largest) * np.array([1, -1], np.float32)
    found_ND = grid_sum(term_KND, np.arange(num_terms))
    np.testing.assert_array_equal(found_ND, term_KND.astype(np.float64).sum(0).astype(np.float32))


def test_rows_of_zeros_and_rows_that_are_not_finite():
    row_ND = np.array([[0, 0], [np.inf, 1], [1, np.nan], [-np.inf, 2], [3, 4]], np.float32)
    found_ND = grid_sum(np.stack([row_ND, np.zeros_like(row_ND)]), np.arange(2))
    np.testing.assert_array_equal(found_ND[[0, 4]], row_ND[[0, 4]])
    assert np.isnan(found_ND[1:4]).all()


RUNS = [
    ("exchange", (2, 4), 8, jnp.float32),
    ("exchange", (2, 4), 2, jnp.bfloat16),
    ("gathered", (2, 4), 8, jnp.float32),
    ("exchange", (1, 8), 2, jnp.float32),
]


def assert_same_bits(dispatch, shape, top_k, dtype, num_placements):
    args = dispatch_lib.problem(3, 8 * 13, top_k, dtype=dtype)
    run = lambda *placement: dispatch_lib.run(  # noqa: E731
        shape, dispatch, args, *placement, combine="reproducible"
    )
    expected_TD, expected_grads, _ = run()
    rng = np.random.default_rng(0)
    for _ in range(num_placements):
        slots = rng.permutation(dispatch_lib.E)[None].astype(np.int32)
        y_TD, grads, _ = run(Placement(slots, dispatch_lib.E, shape[1]))
        np.testing.assert_array_equal(y_TD, expected_TD)
        for grad, expected in zip(grads, expected_grads, strict=True):
            np.testing.assert_array_equal(grad, expected)


@pytest.mark.parametrize(("dispatch", "shape", "top_k", "dtype"), RUNS[:-1])
def test_bit_identical_under_placements(dispatch, shape, top_k, dtype):
    assert_same_bits(dispatch, shape, top_k, dtype, num_placements=20)


@pytest.mark.slow
@pytest.mark.parametrize(("dispatch", "shape", "top_k", "dtype"), RUNS)
def test_bit_identical_under_200_placements(dispatch, shape, top_k, dtype):
    assert_same_bits(dispatch, shape, top_k, dtype, num_placements=200)


@pytest.mark.slow
def test_bit_identical_under_200_placements_through_two_hops():
    """Few placements are tried by default: test_mesh_axes.py."""
    args, shape = dispatch_lib.problem(3, 8 * 13, 8), nodes_lib.NODES[1]
    run = lambda seed: nodes_lib.run(  # noqa: E731
        shape, "hierarchical", args, nodes_lib.random_placement(seed, shape), "reproducible"
    )
    expected_TD, expected_grads, _ = run(0)
    for seed in range(1, 200):
        y_TD, grads, _ = run(seed)
        np.testing.assert_array_equal(y_TD, expected_TD)
        for grad, expected in zip(grads, expected_grads, strict=True):
            np.testing.assert_array_equal(grad, expected)


def test_deviation_from_exact():
    """Both round: `exact` K - 1 sums, `reproducible` its terms; see the head of grid.py."""
    args = dispatch_lib.problem(5, 8 * 13, 8)
    exact_TD, _, _ = dispatch_lib.run((2, 4), "exchange", args)
    y_TD, _, _ = dispatch_lib.run((2, 4), "exchange", args, combine="reproducible")
    greatest_T1 = np.abs(largest_terms(args))[:, None]
    bound_T1 = greatest_T1 * (8 * 2.0 ** (3 - 31) + 8 * 2.0**-24 + 8 * 7 * 2.0**-24)
    assert (np.abs(y_TD - exact_TD) <= bound_T1).all()
    assert (y_TD != exact_TD).any()


def largest_terms(args):
    """The greatest value of each token's weighted expert outputs."""
    x_TD, expert_TK, weight_TK, *weights = args
    one_at_a_time = [
        dispatch_lib.oracle(x_TD, expert_TK[:, k : k + 1], weight_TK[:, k : k + 1], *weights)
        for k in range(expert_TK.shape[1])
    ]
    return np.abs(np.stack(one_at_a_time)).max(axis=(0, 2))


@pytest.mark.parametrize(("dispatch", "value"), [("exchange", np.nan), ("gathered", np.inf)])
def test_what_is_not_finite_stays_with_its_tokens(dispatch, value):
    x_TD, *rest = dispatch_lib.problem(6, 8 * 13, 2)
    bad_T = np.random.default_rng(0).random(len(x_TD)) < 0.2
    spoiled_TD = jnp.where(bad_T[:, None], x_TD.at[:, 3].set(value), x_TD)
    expected_TD, _, _ = dispatch_lib.run((2, 4), dispatch, (x_TD, *rest), combine="reproducible")
    y_TD, grads, _ = dispatch_lib.run((2, 4), dispatch, (spoiled_TD, *rest), combine="reproducible")
    np.testing.assert_array_equal(y_TD[~bad_T], expected_TD[~bad_T])
    assert np.isnan(y_TD[bad_T]).all()
    assert np.isnan(grads[0][bad_T]).all()
    assert np.isfinite(grads[0][~bad_T]).all()


def test_every_device_rounds_to_the_same_grid():
    """A term far below the others, alone on its device, loses the bits that it would lose there."""
    args = dispatch_lib.problem(7, 8 * 13, 2)
    x_TD, expert_TK, weight_TK, gate, up, down = args
    small = np.where(np.arange(dispatch_lib.E) < 8, 1e-9, 1.0).astype(np.float32)
    args = (x_TD, expert_TK, weight_TK, gate, up, down * jnp.asarray(small)[:, None, None])
    expected_TD, _, _ = dispatch_lib.run((2, 4), "exchange", args, combine="reproducible")
    slots = np.arange(16).reshape(2, 8).T.reshape(1, -1).astype(np.int32)
    placement = Placement(slots, dispatch_lib.E, 4)
    y_TD, _, _ = dispatch_lib.run((2, 4), "exchange", args, placement, combine="reproducible")
    np.testing.assert_array_equal(y_TD, expected_TD)
    assert y_TD.any()
