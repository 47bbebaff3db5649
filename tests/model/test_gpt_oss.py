"""All that gpt-oss asks of a model at once, against a plain forward pass and its gradients.

The oracle is written by the formulas: every expert computes every token, every head is one matrix,
and gradients are JAX's own. Parity with the reference implementation: tests/hf/test_parity.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax.model import parameter, rope, transformer
from tests import tiny
from tests.model.test_parts import shaken

pytestmark = pytest.mark.compiled_quickly

ROPE = {"kind": "yarn", "factor": 8.0, "original_seq_len": 4, "truncate": False}
PARTS = {
    "model__rope": ROPE,
    "model__rope_theta": 100.0,
    "model__windows": (5, 0),
    "model__attention_sinks": True,
    "model__attention_bias": "qkvo",
    "model__router_bias": True,
    "model__expert_bias": True,
    "model__activation": "clamped_swiglu",
}
TOKEN_BS = tiny.tokens(8, 12)
WEIGHT_BSV = np.random.default_rng(2).normal(size=(8, 12, 256)).astype(np.float32)


def config_with(dispatch, **mesh):
    return tiny.config(mesh=mesh, model__dispatch=dispatch, **PARTS)


def parameters():
    """Large enough that gates and ups are cut off now and then."""
    config = config_with("local", data=1, expert=1)
    model = shaken(transformer.Transformer(jax.random.key(1), config.model))
    for name in ("gate_PDF", "up_PDF"):
        weight = getattr(model.blocks.moe, name)
        setattr(model.blocks.moe, name, weight.replace(4 * weight[...]))
    return model


def norm(x_BSD, scale_D, eps):
    rms_BS1 = jnp.sqrt(jnp.mean(x_BSD**2, axis=-1, keepdims=True) + eps)
    return x_BSD / rms_BS1 * scale_D[None, None]


def of_layer(module, layer):
    """Arrays by name; a module's other attributes are None or no parameters."""
    return {k: v[...][layer] for k, v in vars(module).items() if isinstance(v, nnx.Param)}


def attention(x_BSD, block, layer, config, window):
    w = of_layer(block, layer)
    made = rope.of_config(config.rope, config.rope_theta, config.d_head)
    length, per_group = x_BSD.shape[1], config.num_heads // config.num_kv_heads
    position_BS = jnp.broadcast_to(jnp.arange(length)[None], x_BSD.shape[:2])
    query_BSHQ, key_BSGQ, value_BSGQ = (
        jnp.einsum("bsd,dhq->bshq", x_BSD, w[f"{name}_D{heads}Q"])
        + w[f"{name}_bias_{heads}Q"][None, None]
        for name, heads in (("query", "H"), ("key", "G"), ("value", "G"))
    )
    query_BSHQ, key_BSGQ = (rope.rotate(a, position_BS, made) for a in (query_BSHQ, key_BSGQ))
    key_BSHQ, value_BSHQ = (jnp.repeat(a, per_group, axis=2) for a in (key_BSGQ, value_BSGQ))
    back_SC = np.arange(length)[:, None] - np.arange(length)[None]
    seen_SC = (back_SC >= 0) & ((back_SC < window) if window else True)
    logits_BHSC = jnp.einsum("bshq,bchq->bhsc", query_BSHQ, key_BSHQ) / np.sqrt(config.d_head)
    power_BHSC = jnp.where(seen_SC[None, None], jnp.exp(logits_BHSC), 0)
    total_BHS1 = power_BHSC.sum(axis=-1, keepdims=True) + jnp.exp(w["sink_H"])[None, :, None, None]
    mixed_BSHQ = jnp.einsum("bhsc,bchq->bshq", power_BHSC / total_BHS1, value_BSHQ)
    out_BSD = jnp.einsum("bshq,hqd->bsd", mixed_BSHQ, w["output_HQD"])
    return out_BSD + w["output_bias_D"][None, None]


def experts(x_BSD, moe, layer, config, cut):
    w = of_layer(moe, layer)
    logits_BSE = x_BSD @ w["router_DE"] + w["router_bias_E"][None, None]
    top_BSK, chosen_BSK = jax.lax.top_k(logits_BSE, config.top_k)
    chosen_BSKE = jax.nn.one_hot(chosen_BSK, config.num_experts)
    share_BSE = jnp.einsum("bsk,bske->bse", jax.nn.softmax(top_BSK), chosen_BSKE)
    gate_BSEF, up_BSEF = (
        jnp.einsum("bsd,edf->bsef", x_BSD, w[f"{name}_PDF"]) + w[f"{name}_bias_PF"][None, None]
        for name in ("gate", "up")
    )
    cut.append(jnp.mean((gate_BSEF > 7) | (jnp.abs(up_BSEF) > 7), axis=(0, 1, 3)))
    gate_BSEF, up_BSEF = jnp.minimum(gate_BSEF, 7), jnp.clip(up_BSEF, -7, 7)
    h_BSEF = (up_BSEF + 1) * gate_BSEF * jax.nn.sigmoid(1.702 * gate_BSEF)
    y_BSED = jnp.einsum("bsef,efd->bsed", h_BSEF, w["down_PFD"]) + w["down_bias_PD"][None, None]
    return jnp.einsum("bse,bsed->bsd", share_BSE, y_BSED)


def oracle(model, config):
    x_BSD, cut, eps = model.embedding_VD[...][TOKEN_BS], [], config.norm_eps
    blocks = model.blocks
    for layer in range(config.num_layers):
        normed_BSD = norm(x_BSD, blocks.attention_norm_D[...][layer], eps)
        x_BSD += attention(normed_BSD, blocks.attention, layer, config, config.windows[layer])
        normed_BSD = norm(x_BSD, blocks.moe_norm_D[...][layer], eps)
        x_BSD += experts(normed_BSD, blocks.moe, layer, config, cut)
    logits_BSV = norm(x_BSD, model.final_norm_D[...], eps) @ model.output_DV[...]
    return logits_BSV, jnp.stack(cut)


@pytest.mark.parametrize(
    ("dispatch", "mesh"),
    [
        ("local", {}),
        pytest.param("exchange", {"data": 2, "expert": 4}, marks=pytest.mark.slow),
        pytest.param("gathered", {"fsdp": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("shuffled", {"data": 2, "expert": 4}, marks=pytest.mark.slow),
        pytest.param("shuffled", {"expert": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_logits_and_gradients_equal_the_oracle(dispatch, mesh):
    config, plain = config_with(dispatch, **mesh), parameters()

    def loss_of(logits_BSV):
        return (logits_BSV * WEIGHT_BSV).sum()

    def by_formula(model):
        logits_BSV, cut_X = oracle(model, config.model)
        return loss_of(logits_BSV), (logits_BSV, cut_X)

    (_, (wanted_BSV, cut_X)), wanted = jax.jit(jax.value_and_grad(by_formula, has_aux=True))(plain)
    assert (np.asarray(cut_X) > 0).mean() > 0.8  # of experts and layers

    placed_on = tiny.mesh(config)
    model = jax.tree.map(
        lambda a, names: jax.device_put(a, mesh_lib.sharding(placed_on, *names)),
        plain,
        parameter.logical_axes(plain),
    )
    # Loops of kernels take long to compile: they are in the slow cases.
    implementation = "reference" if dispatch == "local" else "cpu"
    forward = transformer.build_forward(config.model, placed_on, implementation)
    table = transformer.identity_table(tiny.LAYERS, tiny.EXPERTS)

    def ours(model):
        logits_BSV = forward(model, jnp.asarray(TOKEN_BS), table).logits_BSV
        return loss_of(logits_BSV), logits_BSV

    (_, actual_BSV), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(model)
    deviation = np.abs(actual_BSV - wanted_BSV).max() / np.ptp(wanted_BSV)
    assert deviation < 1e-5
    found, expected = (jax.tree.leaves_with_path(tree) for tree in (grads, wanted))
    assert len(found) == len(expected) == 22
    for (path, a), (_, b) in zip(found, expected, strict=True):
        scale = np.abs(b).max()
        assert scale > 0, path
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * scale, err_msg=str(path))


def test_the_config_is_kept():
    config = config_with("exchange", data=2, expert=4)
    assert config_lib.from_json(config_lib.to_json(config)) == config
    other = dataclasses.replace(config.model, activation="swiglu")
    assert config_lib.digest(dataclasses.replace(config, model=other)) != config_lib.digest(config)
