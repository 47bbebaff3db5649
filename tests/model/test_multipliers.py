"""Multipliers, layer norms and a bias of logits: Granite-MoE and Phi-3.5-MoE have them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax.errors import Refused
from moe_jax.model import layers, parameter, transformer
from tests import tiny
from tests.model.test_parts import shaken

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


def logits_of(config, model):
    mesh = tiny.mesh(config)
    model = jax.tree.map(
        lambda a, names: jax.device_put(a, mesh_lib.sharding(mesh, *names)),
        model,
        parameter.logical_axes(model),
    )
    forward = transformer.build_forward(config.model, mesh, "reference")
    table = transformer.identity_table(tiny.LAYERS, tiny.EXPERTS)
    return np.asarray(jax.jit(forward)(model, jnp.asarray(TOKEN_BS), table).logits_BSV)


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


@pytest.mark.parametrize("dispatch", ["shuffled", "coherent"])
@pytest.mark.parametrize("name", ["embedding_scale", "residual_scale", "logits_divisor", *NORMS])
def test_layers_written_apart_refuse_them(dispatch, name):
    value = (MULTIPLIERS | NORMS)[name]
    with pytest.raises(Refused, match=f"model.{name} = .*whose layers are written apart"):
        config_with({name: value}, dispatch, expert=2)


def test_what_is_not_trained_is_refused():
    config = config_with({"router_weights": "sparse_mixer"}, "exchange", expert=2)
    with pytest.raises(Refused, match=r"router_weights = 'sparse_mixer': serves only"):
        config_lib.check_trainable(config)
    with pytest.raises(Refused, match=r"router_scores = 'sigmoid': does not go with"):
        config_with({"router_weights": "sparse_mixer", "router_scores": "sigmoid"})
    longrope = {"kind": "longrope", "factor": 2.0, "original_seq_len": 8,
                "short_factor": (1.0, 1.0), "long_factor": (2.0, 2.0)}  # fmt: skip
    with pytest.raises(Refused, match=r"rope.kind = 'longrope': goes by the length of each text"):
        config_with({"rope": longrope}, "coherent", expert=2)
