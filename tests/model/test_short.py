"""Short rows: against NumPy, and the same bits however many rows there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model import router, short


@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 8, 12, 60, 63, 64, 100])
def test_totals_and_maxima_equal_numpy(width):
    x = np.random.default_rng(width).normal(size=(4, 3, width)).astype(np.float32)
    expected = x.astype(np.float64).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(short.total(jnp.asarray(x)), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(short.largest(jnp.asarray(x)), x.max(axis=-1, keepdims=True))


@pytest.mark.parametrize("experts", [3, 8, 16, 32, 60, 64, 256])
def test_the_router_has_the_same_bits_for_few_and_many_rows(experts):
    """64 rows are the fewest of a step of serving (on CPU)."""
    logits_TE = jnp.asarray(np.random.default_rng(0).normal(size=(4096, experts)), jnp.float32)

    def shares(rows):
        share_TE = router.softmax(logits_TE[:rows])
        return share_TE, router.normalised(share_TE[:, : min(experts, 8)])

    all_TE, all_TK = jax.jit(shares, static_argnums=0)(4096)
    for rows in (64, 80, 320, 1000):
        share_TE, weight_TK = jax.jit(shares, static_argnums=0)(rows)
        np.testing.assert_array_equal(share_TE, all_TE[:rows])
        np.testing.assert_array_equal(weight_TK, all_TK[:rows])
