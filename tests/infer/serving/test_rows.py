"""Settings of every row: the draw of sampling.py, top-k and nucleus against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.infer import sampling
from moe_jax.infer.serving import rows

RNG = np.random.default_rng(0)
LOGITS_RV = jnp.asarray(RNG.normal(size=(40, 11)) * 2, jnp.float32)


def settings(**fields):
    kinds = {"temperature": np.float32, "top_p": np.float32}
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0}
    plain |= {"choice": 0, "draw": 0, "logprobs": -1, **fields}
    full = {
        f"{name}_R": jnp.asarray(np.broadcast_to(value, 40).astype(kinds.get(name, np.int32)))
        for name, value in plain.items()
    }
    return rows.Settings(**full)


def test_the_draw_is_that_of_one_request_alone():
    seed_R, draw_R = RNG.integers(0, 99, 40), RNG.integers(0, 500, 40)
    temperature_R = RNG.choice([0.0, 0.5, 1.0, 2.0], 40)
    top_p_R = RNG.choice([0.3, 0.9, 1.0], 40)
    mixed = settings(seed=seed_R, draw=draw_R, temperature=temperature_R, top_p=top_p_R)
    found_R = np.asarray(jax.jit(rows.choose)(LOGITS_RV, mixed))
    for r in range(40):
        how = sampling.Sampling(float(temperature_R[r]), float(top_p_R[r]), int(seed_R[r]))
        position_B = jnp.asarray(draw_R[r : r + 1], jnp.int32)
        assert found_R[r] == sampling.choose(LOGITS_RV[r : r + 1], position_B, how)[0]


def test_top_k_then_nucleus_equals_the_definition():
    top_k_R, top_p_R = RNG.integers(0, 12, 40), RNG.choice([0.2, 0.6, 0.95, 1.0], 40)
    kept_RV = np.isfinite(rows.keep(LOGITS_RV, settings(top_k=top_k_R, top_p=top_p_R)))
    for r, logits_V in enumerate(np.asarray(LOGITS_RV, np.float64)):
        order = np.argsort(-logits_V)[: top_k_R[r] or 11]
        share = np.exp(logits_V[order]) / np.exp(logits_V[order]).sum()
        needed = len(order)
        if top_p_R[r] < 1:
            needed = int(np.searchsorted(np.cumsum(share), top_p_R[r])) + 1
        assert set(np.flatnonzero(kept_RV[r])) == set(order[:needed])


def test_the_smallest_nucleus_is_the_most_likely_token():
    largest_R = np.argmax(LOGITS_RV, axis=1)
    tiny = settings(top_p=1e-50, temperature=0.5)  # 0 in float32
    np.testing.assert_array_equal(rows.choose(LOGITS_RV, tiny), largest_R)
    how = sampling.Sampling(temperature=0.5, top_p=1e-50)
    found_R = sampling.choose(LOGITS_RV, jnp.zeros(40, jnp.int32), how)
    np.testing.assert_array_equal(found_R, largest_R)


def test_the_smallest_temperatures_are_greedy():
    """Logits divided by them are infinite in float32."""
    largest_R = np.argmax(LOGITS_RV, axis=1)
    for temperature in (1e-50, 1e-38, 1e-7, 1e-6):
        found_R = rows.choose(LOGITS_RV, settings(temperature=temperature))
        np.testing.assert_array_equal(found_R, largest_R)
        how = sampling.Sampling(temperature)
        found_R = sampling.choose(LOGITS_RV, jnp.zeros(40, jnp.int32), how)
        np.testing.assert_array_equal(found_R, largest_R)


def test_choices_differ_and_seeds_repeat():
    found = {}
    for choice in range(2):
        draws = [rows.choose(LOGITS_RV * 0, settings(choice=choice, draw=d)) for d in range(3)]
        found[choice] = np.stack(draws)
    assert (found[0] != found[1]).any()
    again = np.asarray(rows.choose(LOGITS_RV * 0, settings(draw=2)))
    np.testing.assert_array_equal(again, found[0][2])


@pytest.mark.parametrize("vocabulary", [11, 256, 258])
def test_bits_do_not_depend_on_the_number_of_rows(vocabulary):
    """Of logprobs, and of the mass that a nucleus is cut by."""
    logits_RV = jnp.asarray(RNG.normal(size=(40, vocabulary)) * 3, jnp.float32)
    of_all = settings(logprobs=5, top_p=0.9)

    def said(rows_):
        own = jax.tree.map(lambda setting_R: setting_R[:rows_], of_all)
        token_R = jnp.argmax(logits_RV[:rows_], axis=1).astype(jnp.int32)
        return jax.jit(rows.report)(logits_RV[:rows_], token_R, own)

    def kept(rows_, rank):
        """Cut where the mass before a rank is: any other rounding of it shows."""
        sorted_RV = -jnp.sort(-logits_RV, axis=1)
        mass_RV = jax.jit(rows.by_row, static_argnums=0)(jax.nn.softmax, sorted_RV)
        before_RV = jnp.cumsum(mass_RV, axis=1) - mass_RV
        cut = settings(top_p=np.asarray(before_RV[:, rank]))
        own = jax.tree.map(lambda setting_R: setting_R[:rows_], cut)
        return jax.jit(rows.keep)(logits_RV[:rows_], own)

    for few in (2, 3, 5, 8, 16):
        np.testing.assert_array_equal(said(few), said(40)[:few])
        for rank in (2, 4, 8):
            np.testing.assert_array_equal(kept(few, rank), kept(40, rank)[:few])
