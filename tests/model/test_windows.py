"""Sliding windows and attention sinks against plain NumPy in float64, with and without a cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax.kernels.activation import ACTIVATIONS
from moe_jax.model import attention, parameter, rope, transformer
from tests import tiny
from tests.model.test_parts import shaken

pytestmark = pytest.mark.compiled_quickly

LENGTH = 13
ATTENTION = {"d_model": 16, "num_heads": 6, "num_kv_heads": 3, "d_head": 4}
SETTING = attention.Setting(rope.plain(100.0, 4))


@functools.cache
def weights():
    made = attention.Attention(jax.random.key(0), bias="qkvo", sinks=True, **ATTENTION)
    return shaken(made)


def rows():
    return np.random.default_rng(0).normal(size=(2, LENGTH, 16)).astype(np.float32)


def positions(first, stop):
    return jnp.broadcast_to(jnp.arange(first, stop, dtype=jnp.int32)[None], (2, stop - first))


def by_hand(window, has_sinks):
    """One head, one query at a time; the sink is a key of which the logit is given, its value 0."""
    x_BSD = rows()
    projected = attention.project(jnp.asarray(x_BSD), weights(), positions(0, LENGTH), SETTING)
    query_BSHQ, key_BSGQ, value_BSGQ = (np.asarray(a, np.float64) for a in projected)
    mixed_BSHQ = np.zeros(query_BSHQ.shape)
    for b, s, h in np.ndindex(query_BSHQ.shape[:3]):
        first = max(0, s - window + 1) if window else 0
        key_CQ, value_CQ = (a[b, first : s + 1, h // 2] for a in (key_BSGQ, value_BSGQ))
        power_C = np.exp(key_CQ @ query_BSHQ[b, s, h] / 2)
        total = power_C.sum() + (np.exp(np.float64(weights().sink_H[h])) if has_sinks else 0)
        mixed_BSHQ[b, s, h] = power_C @ value_CQ / total
    output_HQD = np.asarray(weights().output_HQD[...], np.float64)
    bias_D = np.asarray(weights().output_bias_D[...], np.float64)
    return np.einsum("bshq,hqd->bsd", mixed_BSHQ, output_HQD) + bias_D


def of(has_sinks):
    parts = {
        name: param[...] for name, param in parameter.present(weights(), attention.Heads).items()
    }
    return attention.Heads(**{n: p for n, p in parts.items() if has_sinks or n != "sink_H"})


CASES = [(4, True), (4, False), (1, True), (0, True), (100, False)]


@pytest.mark.parametrize(("window", "has_sinks"), CASES)
def test_without_a_cache(window, has_sinks):
    case = (jnp.asarray(rows()), of(has_sinks), positions(0, LENGTH), SETTING, None)
    actual_BSD, _ = attention.attend(*case, jnp.int32(window))
    np.testing.assert_allclose(actual_BSD, by_hand(window, has_sinks), rtol=0, atol=3e-6)


@pytest.mark.parametrize("prompt", [2, 7])
@pytest.mark.parametrize(("window", "has_sinks"), CASES[:2])
def test_decoding_across_the_window(window, has_sinks, prompt):
    x_BSD, parts = jnp.asarray(rows()), of(has_sinks)
    empty = jnp.zeros((2, 16, 3, 4))
    found, cache = attention.attend(
        *(x_BSD[:, :prompt], parts, positions(0, prompt), SETTING),
        *(attention.LayerCache(empty, empty), jnp.int32(window)),
    )
    found_BSD = [found]
    for at in range(prompt, LENGTH):
        one = (x_BSD[:, at : at + 1], parts, positions(at, at + 1), SETTING, cache)
        found, cache = attention.attend(*one, jnp.int32(window))
        found_BSD.append(found)
    actual_BSD = np.concatenate(found_BSD, axis=1)
    np.testing.assert_allclose(actual_BSD, by_hand(window, has_sinks), rtol=0, atol=3e-6)


def test_a_sink_of_any_size_is_safe():
    """Far above the other logits nothing is left, far below the sink is not there."""
    query, key, value = (jnp.asarray(np.random.default_rng(1).normal(size=(1, 5, 2, 4)),
                                     jnp.float32) for _ in range(3))  # fmt: skip
    seen_1SC = attention.seen(jnp.arange(5)[None], 5)
    plain = attention.mix(query, key, value, seen_1SC)
    low, high = (attention.mix(query, key, value, seen_1SC, jnp.full(2, v)) for v in (-1e4, 1e4))
    np.testing.assert_allclose(low, plain, rtol=0, atol=1e-6)
    assert (np.asarray(high) == 0).all()
    grads = jax.grad(lambda s: attention.mix(query, key, value, seen_1SC, s).sum())(jnp.zeros(2))
    step = 1e-2
    for head in range(2):
        up, down = (
            attention.mix(query, key, value, seen_1SC, jnp.zeros(2).at[head].set(d)).sum()
            for d in (step, -step)
        )
        np.testing.assert_allclose(grads[head], (up - down) / (2 * step), rtol=0, atol=2e-3)


def test_windows_of_layers():
    model = tiny.config(model__num_layers=6, model__windows=(3, 0, 5)).model
    assert attention.windows(model).tolist() == [3, 0, 5, 3, 0, 5]
    assert attention.windows(dataclasses.replace(model, windows=(0, 0))) is None
    assert attention.windows(dataclasses.replace(model, windows=())) is None
    assert config_lib.from_json(config_lib.to_json(tiny.config(model__windows=[3, 0]))) == (
        tiny.config(model__windows=(3, 0))
    )


def test_how_far_a_token_reaches():
    """By 1 position in each of two layers with windows of 2; to the end where one has none."""
    config = tiny.config(mesh={"data": 1, "expert": 1}, model__dispatch="local")
    table = transformer.identity_table(tiny.LAYERS, tiny.EXPERTS)
    token_BS = np.repeat(tiny.tokens(1, 10), 2, axis=0)
    token_BS[1, 0] += 1
    for windows, reach in (((2, 2), 3), ((0, 2), 10)):
        model = dataclasses.replace(config.model, windows=windows)
        forward = transformer.build_forward(model, tiny.mesh(config), "reference")
        logits_BSV = np.asarray(jax.jit(forward)(tiny.model(1, 1), token_BS, table).logits_BSV)
        moved_S = np.abs(logits_BSV[0] - logits_BSV[1]).max(axis=1)
        assert (moved_S[:reach] > 1e-4).all()
        assert (moved_S[reach:] < 1e-6).all()


def test_activations_are_those_of_the_kernels():
    assert tuple(ACTIVATIONS) == config_lib.fields.ACTIVATIONS
