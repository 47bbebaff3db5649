"""Multipliers, layer norms and a bias of logits: Granite-MoE and Phi-3.5-MoE have them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax.errors import Refused
from moe_jax.model import coherent, layers, parameter, transformer
from tests import tiny
from tests.model.test_parts import shaken

pytestmark = pytest.mark.compiled_quickly

MULTIPLIERS = {
    "embedding_scale": 3.0,
    "residual_scale": 0.4,
    "attention_scale": 0.7,
    "logits_divisor": 5.0,
}
NORMS = {"norm": "layer", "output_bias": True}
TOKEN_BS = tiny.tokens(8, 8)


def config_with(parts, dispatch="local", **mesh):
    named = {f"model__{name}": value for name, value in parts.items()}
    return tiny.config(mesh=mesh, model__dispatch=dispatch, **named)


def run(config, model, **of_tokens):
    """(logits, experts of every token)"""
    mesh = tiny.mesh(config)
    model = jax.tree.map(
        lambda a, names: jax.device_put(a, mesh_lib.sharding(mesh, *names)),
        model,
        parameter.logical_axes(model),
    )
    layers_of = coherent if config.model.dispatch == "coherent" else transformer
    forward = layers_of.build_forward(config.model, mesh, "reference")
    table = transformer.identity_table(tiny.LAYERS, tiny.EXPERTS)
    output = jax.jit(forward)(model, jnp.asarray(TOKEN_BS), table, **of_tokens)
    return np.asarray(output.logits_BSV), np.asarray(output.record.expert_BSK)


def logits_of(config, model):
    return run(config, model)[0]


def test_multipliers_are_those_of_weights():
    """Each could be multiplied into weights; sums of both ways differ by rounding."""
    config = config_with(MULTIPLIERS)
    model = shaken(transformer.Transformer(jax.random.key(0), config.model))
    actual_BSV = logits_of(config, model)

    def scaled(module, name, factor):
        param = getattr(module, name)
        setattr(module, name, param.replace(factor * param[...]))

    scaled(model, "embedding_VD", 3.0)
    scaled(model.blocks.attention, "output_HQD", 0.4)
    scaled(model.blocks.moe, "down_PFD", 0.4)
    scaled(model.blocks.attention, "query_DHQ", 0.7 * config.model.d_head**0.5)
    scaled(model, "output_DV", 1 / 5.0)
    plain = dataclasses.replace(config.model, **{
        name: getattr(config_lib.ModelConfig, name) for name in MULTIPLIERS
    })  # fmt: skip
    expected_BSV = logits_of(dataclasses.replace(config, model=plain), model)
    np.testing.assert_allclose(actual_BSV, expected_BSV, rtol=0, atol=2e-6 * np.ptp(expected_BSV))
    assert np.ptp(actual_BSV) > 0.3


def test_layer_norm_equals_numpy():
    rng = np.random.default_rng(0)
    x_BSD, scale_D, bias_D = (rng.normal(size=s) for s in ((2, 3, 8), 8, 8))
    x_BSD += 5
    arrays = (jnp.asarray(a, jnp.float32) for a in (x_BSD, scale_D, bias_D))
    actual_BSD = layers.layer_norm(*arrays, 0.1)
    away_BSD = x_BSD - x_BSD.mean(-1, keepdims=True)
    expected_BSD = away_BSD / np.sqrt(x_BSD.var(-1, keepdims=True) + 0.1) * scale_D + bias_D
    np.testing.assert_allclose(actual_BSD, expected_BSD, rtol=0, atol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dispatch", "mesh"),
    [
        ("exchange", {"fsdp": 2, "expert": 2, "tensor": 2}),
        ("hierarchical", {"node": 2, "expert": 2}),
    ],
)
def test_meshes_equal_one_device(dispatch, mesh):
    parts = {**MULTIPLIERS, **NORMS}
    config = config_with(parts)
    model = shaken(transformer.Transformer(jax.random.key(0), config.model))
    expected_BSV = logits_of(config, model)
    actual_BSV = logits_of(config_with(parts, dispatch, **mesh), model)
    np.testing.assert_allclose(actual_BSV, expected_BSV, rtol=0, atol=1e-5 * np.ptp(expected_BSV))


LONGROPE = {
    **{"kind": "longrope", "factor": 2.0, "original_seq_len": 5},
    **{"short_factor": (1.0, 1.5), "long_factor": (2.0, 8.0)},
}
LENGTH_B = np.array([8, 5, 6, 3, 8, 1, 5, 7])  # of texts, on both sides of `original_seq_len`


@functools.cache
def trained(shared=0):
    parts = {**MULTIPLIERS, **NORMS, "rope": LONGROPE, "d_ff_shared": shared}
    return parts, shaken(transformer.Transformer(jax.random.key(0), config_with(parts).model))


@functools.cache
def on_one_device(shared):
    return of_real(config_with(trained(shared)[0]), trained(shared)[1])


def of_real(config, model):
    """Logits and experts of texts of several lengths, 0 and -1 elsewhere."""
    real_BS = np.arange(8)[None] < LENGTH_B[:, None]
    logits_BSV, expert_LBSK = run(config, model, real_BS=jnp.asarray(real_BS))
    return np.where(real_BS[:, :, None], logits_BSV, 0), expert_LBSK


@pytest.mark.parametrize(
    ("dispatch", "mesh", "shared"),
    [
        ("shuffled", {"expert": 2}, 0),
        ("coherent", {"expert": 2}, 0),
        pytest.param("shuffled", {"data": 2, "expert": 4}, 0, marks=pytest.mark.slow),
        pytest.param("coherent", {"data": 2, "expert": 4}, 12, marks=pytest.mark.slow),
    ],
)
def test_layers_written_apart_have_them(dispatch, mesh, shared):
    """And LongRoPE, by the length of each text."""
    parts, model = trained(shared)
    expected_BSV, expected_LBSK = on_one_device(shared)
    actual_BSV, actual_LBSK = of_real(config_with(parts, dispatch, **mesh), model)
    np.testing.assert_array_equal(actual_LBSK, expected_LBSK)
    np.testing.assert_allclose(actual_BSV, expected_BSV, rtol=0, atol=1e-5 * np.ptp(expected_BSV))


def test_what_is_not_trained_is_refused():
    config = config_with({"router_weights": "sparse_mixer"}, "exchange", expert=2)
    with pytest.raises(Refused, match=r"router_weights = 'sparse_mixer': serves only"):
        config_lib.check_trainable(config)
    with pytest.raises(Refused, match=r"router_scores = 'sigmoid': does not go with"):
        config_with({"router_weights": "sparse_mixer", "router_scores": "sigmoid"})
