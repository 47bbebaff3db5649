"""The model against plain NumPy in float64, and its promises: causal, padded, placed, cached."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import permute
from moe_jax.errors import Refused
from moe_jax.kernels import grouped_matmul
from moe_jax.model import attention, rope, router, transformer
from moe_jax.train import step
from tests import tiny


def numpy_attention(x_BSD, weights, theta):
    """Grouped-query attention by the textbook: one head, one query at a time."""
    query, key, value, output = (np.asarray(w[...], np.float64) for w in weights)
    batch, length, _ = x_BSD.shape
    heads, width = query.shape[1:]
    half, per_group = width // 2, heads // key.shape[1]
    angle = np.arange(length)[:, None] * theta ** (-np.arange(half) / half)[None]

    def turn(v_SQ):
        a, b = v_SQ[:, :half], v_SQ[:, half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)

    result = np.zeros(x_BSD.shape)
    for b in range(batch):
        for h in range(heads):
            q_SQ = turn(x_BSD[b] @ query[:, h])
            k_SQ = turn(x_BSD[b] @ key[:, h // per_group])
            v_SQ = x_BSD[b] @ value[:, h // per_group]
            for s in range(length):
                logits = k_SQ[: s + 1] @ q_SQ[s] / np.sqrt(width)
                share = np.exp(logits - logits.max())
                result[b, s] += (share / share.sum()) @ v_SQ[: s + 1] @ output[h]
    return result


def test_attention_equals_numpy():
    weights = attention.Attention(
        jax.random.key(0), d_model=16, num_heads=6, num_kv_heads=3, d_head=4
    )
    x_BSD = np.random.default_rng(0).normal(size=(2, 9, 16)).astype(np.float32)
    position_BS = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
    actual_BSD, _ = attention.attend(
        jnp.asarray(x_BSD), weights, position_BS, attention.Setting(rope.plain(100.0, 4)), None
    )
    parts = (weights.query_DHQ, weights.key_DGQ, weights.value_DGQ, weights.output_HQD)
    expected_BSD = numpy_attention(x_BSD.astype(np.float64), parts, 100.0)
    np.testing.assert_allclose(actual_BSD, expected_BSD, rtol=0, atol=3e-6)


def test_router_equals_numpy():
    rng = np.random.default_rng(0)
    x_TD, router_DE = rng.normal(size=(20, 5)), rng.normal(size=(5, 7))
    real_T = rng.random(20) < 0.7
    routing = router.route(
        jnp.asarray(x_TD, jnp.float32),
        jnp.asarray(router_DE, jnp.float32),
        jnp.asarray(real_T),
        router.Scheme(3),
    )
    logits_TE = x_TD @ router_DE
    probability_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(1, keepdims=True)
    share_E, mean_E, z = np.zeros(7), np.zeros(7), 0.0
    for t in range(20):
        if not real_T[t]:
            assert (routing.expert_TK[t] == -1).all()
            continue
        best = np.argsort(-logits_TE[t])[:3]
        np.testing.assert_array_equal(routing.expert_TK[t], best)
        weights = probability_TE[t, best] / probability_TE[t, best].sum()
        np.testing.assert_allclose(routing.weight_TK[t], weights, rtol=1e-5)
        share_E[best] += 1 / (3 * real_T.sum())
        mean_E += probability_TE[t] / real_T.sum()
        z += np.log(np.exp(logits_TE[t]).sum()) ** 2 / real_T.sum()
    np.testing.assert_allclose(routing.load_balance, 7 * share_E @ mean_E, rtol=1e-5)
    np.testing.assert_allclose(routing.z, z, rtol=1e-5)


@pytest.fixture(scope="module")
def forward():
    config = tiny.config()
    return jax.jit(transformer.build_forward(config.model, tiny.mesh(config)))


def test_later_tokens_do_not_change_earlier_logits(forward):
    table = tiny.table(tiny.contiguous())
    token_BS = tiny.tokens(8, 12)
    changed_BS = token_BS.copy()
    changed_BS[:, 7:] = (changed_BS[:, 7:] + 1) % 256
    before = forward(tiny.model(), token_BS, table).logits_BSV
    after = forward(tiny.model(), changed_BS, table).logits_BSV
    # Not bit by bit: other later tokens put a row elsewhere in its expert's tiles.
    np.testing.assert_allclose(before[:, :7], after[:, :7], rtol=0, atol=1e-5)
    assert np.abs(before[:, 7:] - after[:, 7:]).max() > 0.1


def test_padding_is_routed_nowhere_and_moves_nothing(forward):
    table = tiny.table(tiny.contiguous())
    real_BS = np.arange(12)[None] < np.array([12, 5, 0, 1, 7, 0, 0, 3])[:, None]
    output = forward(tiny.model(), tiny.tokens(8, 12), table, real_BS=real_BS)
    assert (np.asarray(output.record.expert_BSK)[:, ~real_BS] == -1).all()
    assert (np.asarray(output.record.expert_BSK)[:, real_BS] >= 0).all()
    computed = np.asarray(output.record.traffic.computed_P).sum(1)
    np.testing.assert_array_equal(computed, real_BS.sum() * 2)


def test_logits_are_bit_identical_under_100_placements(forward):
    token_BS, model = tiny.tokens(8, 12), tiny.model()
    expected = forward(model, token_BS, tiny.table(tiny.contiguous()))
    moved = set()
    for seed in range(100):
        placement = tiny.random_placement(seed)
        placed = permute.apply(model, tiny.contiguous(), placement)
        output = forward(placed, token_BS, tiny.table(placement))
        np.testing.assert_array_equal(output.logits_BSV, expected.logits_BSV)
        np.testing.assert_array_equal(output.record.expert_BSK, expected.record.expert_BSK)
        moved.add(int(output.record.traffic.dispatch_MM.sum()))
    assert len(moved) > 10  # the rows on the wire do change: the placements are not inert


def test_stacked_layers_equal_a_loop_over_blocks(forward):
    """The scan over stacked blocks against the same blocks one after the other, on one device."""
    config = tiny.config(mesh={"data": 1, "expert": 1}, model__dispatch="local")
    mesh = tiny.mesh(config)
    single = jax.jit(transformer.build_forward(config.model, mesh, "reference"))
    table = tiny.table(tiny.contiguous(1))
    token_BS = tiny.tokens(8, 12)
    expected = forward(tiny.model(), token_BS, tiny.table(tiny.contiguous())).logits_BSV
    actual = single(tiny.model(1, 1), token_BS, table).logits_BSV
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_active_parameters_are_those_of_a_model_with_top_k_experts():
    """But for the router, which keeps a column for every expert."""
    full, small = tiny.config().model, tiny.config(model__num_experts=4, model__top_k=2).model
    small = dataclasses.replace(small, num_experts=full.top_k)
    columns = full.num_layers * full.d_model * (full.num_experts - full.top_k)
    expected = transformer.num_parameters(small) + columns
    assert transformer.num_active_parameters(full) == expected


def test_pre_activations_are_stored_where_that_is_asked(monkeypatch):
    """By every layer's experts; kernels that cannot are refused when a model is built."""
    config, asked = tiny.config(), []
    grouped_ffn = grouped_matmul.grouped_ffn

    def recorded(*args, **how):
        asked.append(how["pre_activations"])
        return grouped_ffn(*args, **how)

    monkeypatch.setattr(grouped_matmul, "grouped_ffn", recorded)
    for how in ("recompute", "store"):
        forward = transformer.build_forward(
            config.model, tiny.mesh(config), "reference", pre_activations=how
        )
        jax.eval_shape(forward, tiny.model(), tiny.tokens(8, 12), tiny.table(tiny.contiguous()))
        assert set(asked) == {how}
        asked.clear()
    with pytest.raises(Refused, match=r"train.pre_activations = 'store': the cpu impl.* only rec"):
        transformer.build_forward(config.model, tiny.mesh(config), pre_activations="store")


def test_a_training_step_asks_as_its_config_says(monkeypatch):
    config = tiny.config(train__pre_activations="store")
    with pytest.raises(Refused, match=r"train.pre_activations = 'store'"):
        step.build_step(config, tiny.mesh(config))


def test_one_device_gathers_nothing():
    """XLA keeps a collective of one device, and on CPU copies what it gathers two times."""
    config = tiny.config(mesh={"data": 1, "expert": 1}, model__dispatch="local")
    forward = transformer.build_forward(config.model, tiny.mesh(config))
    table = transformer.identity_table(tiny.LAYERS, tiny.EXPERTS)
    lowered = jax.jit(forward).lower(tiny.model(1, 1), jnp.zeros((4, 8), jnp.int32), table)
    assert "all-gather(" not in lowered.compile().as_text()
