"""Rows in 8 bits on the wire: rounding within its bound, and what does not change with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.dispatch import quantise
from moe_jax.placement.plan import Placement
from tests.model.test_dispatch import E, problem, run

FP8 = "float8_e4m3fn"


def there_and_back(rows_ND):
    return quantise.unpack(quantise.pack(jnp.asarray(rows_ND), FP8), FP8, jnp.float32)


def test_rounding_stays_within_its_bound():
    rng = np.random.default_rng(0)
    rows_ND = rng.normal(size=(200, 64)) * 2.0 ** rng.integers(-20, 1, size=(200, 64))
    rows_ND = (rows_ND * 2.0 ** rng.integers(-60, 60, size=(200, 1))).astype(np.float32)
    found_ND = np.asarray(there_and_back(rows_ND))
    scale_N1 = np.abs(rows_ND).max(axis=1, keepdims=True) / 448
    bound_ND = np.maximum(np.abs(rows_ND) * 2.0**-4, scale_N1 * 2.0**-10) * (1 + 1e-5)
    assert (np.abs(found_ND - rows_ND) <= bound_ND).all()
    assert (found_ND != rows_ND).mean() > 0.9


def test_zeros_and_what_is_not_finite():
    rows_ND = np.array([[0, 0], [1e-44, 0], [1, np.nan], [np.inf, 1]], np.float32)
    found_ND = np.asarray(there_and_back(rows_ND))
    np.testing.assert_array_equal(found_ND[:2], 0)
    assert np.isnan(found_ND[2:]).any(axis=1).all()


@pytest.mark.parametrize("dispatch", ["exchange", pytest.param("gathered", marks=pytest.mark.slow)])
def test_outputs_move_little_and_not_with_the_placement(dispatch):
    """The same as a dispatch of rows that were rounded before; gradients in full."""
    x_TD, *rest = problem(0, 8 * 13, 2)
    rounded = (there_and_back(x_TD), *rest)
    expected_TD, expected_grads, expected = run((2, 4), dispatch, rounded)
    for seed in range(3):
        slots = np.random.default_rng(seed).permutation(E)[None].astype(np.int32)
        placement = Placement(slots, E, 4)
        y_TD, grads, traffic = run((2, 4), dispatch, (x_TD, *rest), placement, wire_dtype=FP8)
        np.testing.assert_array_equal(y_TD, expected_TD)
        jax.tree.map(np.testing.assert_array_equal, grads, expected_grads)
        assert traffic.computed_P.sum() == expected.computed_P.sum()
