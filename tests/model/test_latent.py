"""Latent attention against loops in float64; rows that are kept against keys that are expanded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import checkpoint, permute
from moe_jax import config as config_lib
from moe_jax.errors import Refused
from moe_jax.infer import sampling
from moe_jax.infer.engine import Engine
from moe_jax.model import latent, transformer
from moe_jax.train import step as step_lib
from tests import tiny
from tests.model.test_parts import shaken
from tests.model.test_shuffled import assert_planned
from tests.model.whole import TOKEN_BS, WEIGHT_BSV, Whole

pytestmark = pytest.mark.compiled_quickly

LATENT = {"kv_rank": 6, "d_rope": 4, "d_value": 3, "query_rank": 8}
ROPE = {
    **{"kind": "yarn", "factor": 4.0, "original_seq_len": 16, "interleaved": True},
    **{"mscale": 1.0, "mscale_all_dim": 0.7},
}


def config_with(query_rank=8, rope=ROPE, **overrides):
    return tiny.config(
        model__latent={**LATENT, "query_rank": query_rank},
        model__num_kv_heads=4,
        model__d_head=5,
        model__rope=rope,
        **overrides,
    )


def weights_of(config):
    return shaken(latent.LatentAttention(jax.random.key(0), config.model))


def by_hand(x_BSD, weights, setting):
    """A head, a query and a position at a time; pairs are turned where they stand."""
    w = {
        name: np.asarray(getattr(weights, name)[...], np.float64)
        for name in vars(weights)
        if hasattr(getattr(weights, name), "get_metadata")
    }
    rank = len(w["latent_norm_R"])
    rms = lambda v, scale: v / np.sqrt((v**2).mean() + 1e-6) * scale  # noqa: E731

    def turned(v_N, position):
        out = np.zeros_like(v_N)
        for i, frequency in enumerate(setting.rope.frequencies):
            turn = setting.rope.scale * np.exp(1j * position * frequency)
            pair = (v_N[2 * i] + 1j * v_N[2 * i + 1]) * turn
            out[2 * i], out[2 * i + 1] = pair.real, pair.imag
        return out

    result = np.zeros(x_BSD.shape)
    for b, x_SD in enumerate(x_BSD):
        latents, keys = [], []
        for position, x_D in enumerate(x_SD):
            row_Z = x_D @ w["latent_down_DZ"]
            latents.append(rms(row_Z[:rank], w["latent_norm_R"]))
            keys.append(turned(row_Z[rank:], position))
            if "query_DHX" in w:
                query_HX = np.einsum("d,dhx->hx", x_D, w["query_DHX"])
            else:
                short_U = rms(x_D @ w["query_down_DU"], w["query_norm_U"])
                query_HX = np.einsum("u,uhx->hx", short_U, w["query_up_UHX"])
            for h, query_X in enumerate(query_HX):
                still_Q, turned_N = np.split(query_X, [setting.d_head])
                turned_N = turned(turned_N, position)
                logits, values = [], []
                for latent_R, key_N in zip(latents, keys, strict=True):
                    key_Q, value_W = np.split(latent_R @ w["expand_RHY"][:, h], [setting.d_head])
                    logits.append((still_Q @ key_Q + turned_N @ key_N) / setting.divisor)
                    values.append(value_W)
                share = np.exp(np.array(logits) - max(logits))
                mixed_W = (share / share.sum()) @ np.array(values)
                result[b, position] += mixed_W @ w["output_HWD"][h]
    return result


@pytest.mark.parametrize("query_rank", [0, 8])
def test_attention_equals_loops_with_and_without_a_cache(query_rank):
    config = config_with(query_rank)
    setting, weights = latent.setting_of(config.model), weights_of(config)
    temperature = 0.07 * np.log(4) + 1
    assert setting.divisor == pytest.approx(3 / temperature**2)  # 3 = sqrt(5 + 4)
    x_BSD = np.random.default_rng(0).normal(size=(2, 9, 16)).astype(np.float32)
    expected_BSD = by_hand(x_BSD.astype(np.float64), weights, setting)
    position_BS = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
    whole_BSD, _ = latent.attend(jnp.asarray(x_BSD), weights, position_BS, setting, None)
    np.testing.assert_allclose(whole_BSD, expected_BSD, rtol=0, atol=5e-6)

    cache = latent.LatentCache(jnp.zeros((2, 12, 10)))  # 6 + 4 numbers a position
    prefilled_BSD, cache = latent.attend(
        jnp.asarray(x_BSD[:, :4]), weights, position_BS[:, :4], setting, cache
    )
    np.testing.assert_allclose(prefilled_BSD, expected_BSD[:, :4], rtol=0, atol=5e-6)
    for s in range(4, 9):
        one_B1D, cache = latent.attend(
            jnp.asarray(x_BSD[:, s : s + 1]), weights, position_BS[:, s : s + 1], setting, cache
        )
        np.testing.assert_allclose(one_B1D, expected_BSD[:, s : s + 1], rtol=0, atol=5e-6)


def test_bfloat16_with_a_cache():
    """Within its roundings, 2^-8 each, of the same weights and rows in float64."""
    config = config_with()
    setting = latent.setting_of(config.model)
    weights = jax.tree.map(lambda a: a.astype(jnp.bfloat16), weights_of(config))
    x_BSD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.bfloat16)
    position_BS = jnp.broadcast_to(jnp.arange(5)[None], (2, 5))
    cache = latent.LatentCache(jnp.zeros((2, 8, 10), jnp.bfloat16))
    _, cache = latent.attend(x_BSD[:, :4], weights, position_BS[:, :4], setting, cache)
    last_B1D, cache = latent.attend(x_BSD[:, 4:], weights, position_BS[:, 4:], setting, cache)
    assert last_B1D.dtype == cache.row_BCZ.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), weights)
    expected_BSD = by_hand(np.asarray(x_BSD, np.float64), wide, setting)
    np.testing.assert_allclose(
        np.asarray(last_B1D, np.float32), expected_BSD[:, 4:], rtol=0, atol=0.03
    )


def test_what_is_not_there_is_none():
    with_rank, without = weights_of(config_with(8)), weights_of(config_with(0))
    assert with_rank.query_DHX is None
    assert with_rank.query_up_UHX.shape == (8, 4, 9)
    assert without.query_DHX.shape == (16, 4, 9)
    assert without.query_down_DU is without.query_norm_U is without.query_up_UHX is None


# --- the whole model: dense layers, a shared expert, groups of experts ---------------------------

WHOLE = {
    **{"model__num_layers": 4, "model__num_dense_layers": 2, "model__d_ff_dense": 20},
    **{"model__d_ff_shared": 12, "model__router_weights": "normalised"},
    **{"model__router_scores": "sigmoid", "model__router_group_scores": "top2"},
    **{"model__router_groups": 4, "model__router_top_groups": 2, "model__router_scale": 2.5},
    "model__router_correction": True,
}


def whole_config(dispatch="local", **mesh):
    return config_with(mesh={"data": 1, "expert": 1, **mesh}, model__dispatch=dispatch, **WHOLE)


@functools.cache
def trained():
    return shaken(transformer.Transformer(jax.random.key(1), whole_config().model))


_WHOLE = Whole(trained)
outputs, gradients = _WHOLE.outputs, _WHOLE.gradients


on_one_device = functools.cache(lambda compute: compute(whole_config()))
MESHES = [
    ("exchange", {"expert": 2}),
    pytest.param("exchange", {"data": 2, "expert": 4}, marks=pytest.mark.slow),
    pytest.param("hierarchical", {"node": 2, "expert": 2}, marks=pytest.mark.slow),
    pytest.param("gathered", {"fsdp": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow),
    ("shuffled", {"data": 2, "expert": 4}),
    pytest.param("shuffled", {"fsdp": 2, "node": 2, "expert": 2}, marks=pytest.mark.slow),
    pytest.param("shuffled", {"data": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow),
]
# Serves only. Its decoding steps: test_coherent.py.
COHERENT = pytest.param("coherent", {"data": 2, "expert": 4}, marks=pytest.mark.slow)


@pytest.mark.parametrize(("dispatch", "mesh"), [*MESHES, COHERENT])
def test_every_dispatch_and_mesh_equals_one_device(dispatch, mesh):
    logits_BSV, expert_LBSK = on_one_device(outputs)
    assert expert_LBSK.shape[0] == 2
    actual_BSV, actual_LBSK = outputs(whole_config(dispatch, **mesh))
    np.testing.assert_array_equal(actual_LBSK, expert_LBSK)
    np.testing.assert_allclose(actual_BSV, logits_BSV, rtol=0, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("dispatch", "mesh"), MESHES)
def test_gradients_equal_those_of_one_device(dispatch, mesh):
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=3e-5 * np.abs(theirs).max()
        ),
        gradients(whole_config(dispatch, **mesh)),
        on_one_device(gradients),
    )


def test_shuffled_rows_follow_placements_and_keep_their_bits():
    """Heads are split, latents are not; rows are at home in the dense layers. Rows are counted."""
    config = whole_config("shuffled", data=2, expert=4)
    mesh, single = tiny.mesh(config), tiny.contiguous()
    forward = jax.jit(transformer.build_forward(config.model, mesh))
    token_BS, real_BS = tiny.tokens(8, 6), np.arange(6)[None] < np.array([[6, 4] * 4]).T

    def placed(placement):
        model = jax.tree.map(np.asarray, permute.apply(trained(), single, placement))
        output = forward(model, token_BS, tiny.table(placement), real_BS=real_BS)
        assert_planned(output.record, placement, 2, "exact")
        return np.asarray(output.logits_BSV)[real_BS], np.asarray(output.record.home_BS)

    expected_XV, home_LBS = placed(single)
    others = [placed(tiny.random_placement(seed)) for seed in range(2)]
    for logits_XV, _ in others:
        np.testing.assert_array_equal(logits_XV, expected_XV)
    assert (others[0][1][1] != home_LBS[1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2, "expert": 4}, {"node": 2, "expert": 2}])
def test_shuffled_serves(mesh):
    """Prefill, and absorbed decoding over rows that every device of a group has."""
    said = []
    for config in (whole_config(), whole_config("shuffled", **mesh)):
        table = tiny.table(tiny.contiguous(config.mesh.expert_devices))
        engine = Engine(config, tiny.mesh(config), trained(), table)
        prompts = [list(range(5)), [7] * 11, [3, 1]]
        said.append(engine.generate(prompts, 12, sampling.Sampling()).tokens)
    assert said[0] == said[1]


def test_gradients_are_those_of_a_model_without_dispatch_and_cache():
    """Automatic differentiation of a plain model: every expert on every token, loops over layers.

    In float64 by its own formulas, with the experts that our routing chose.
    """
    model, config = trained(), whole_config().model
    chosen_LTK = np.asarray(on_one_device(outputs)[1]).reshape(2, -1, 2)
    setting = latent.setting_of(config)
    ours = on_one_device(gradients)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), model)
        theirs = jax.jit(jax.grad(functools.partial(plain_loss, config, setting, chosen_LTK)))(wide)
        theirs = jax.tree.map(np.asarray, theirs)
    correction_LE = theirs.blocks.moe.correction_E[...]
    np.testing.assert_array_equal(correction_LE, np.zeros((2, 8)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max()),
        ours,
        theirs,
    )


def plain_loss(config, setting, chosen_LTK, model):
    norm = lambda v, scale, eps=1e-6: (  # noqa: E731
        v / jnp.sqrt((v**2).mean(-1, keepdims=True) + eps) * scale
    )
    swiglu = lambda x, gate, up, down: (jax.nn.silu(x @ gate) * (x @ up)) @ down  # noqa: E731
    angle_SF = np.arange(8)[:, None] * np.array(setting.rope.frequencies)[None]
    cos, sin = setting.rope.scale * np.cos(angle_SF), setting.rope.scale * np.sin(angle_SF)

    def turned(v_BSHN):
        a, b = v_BSHN[..., 0::2], v_BSHN[..., 1::2]
        cos_SHF, sin_SHF = cos[:, None], sin[:, None]
        pairs = [a * cos_SHF - b * sin_SHF, a * sin_SHF + b * cos_SHF]
        return jnp.stack(pairs, axis=-1).reshape(v_BSHN.shape)

    def attention(x, w):
        value = lambda name: getattr(w, name)  # noqa: E731
        row = x @ value("latent_down_DZ")
        latents, key = norm(row[..., :6], value("latent_norm_R")), turned(row[:, :, None, 6:])
        short = norm(x @ value("query_down_DU"), value("query_norm_U"))
        query = jnp.einsum("bsu,uhx->bshx", short, value("query_up_UHX"))
        made = jnp.einsum("bcr,rhy->bchy", latents, value("expand_RHY"))
        logits = jnp.einsum("bshq,bchq->bhsc", query[..., :5], made[..., :5])
        logits += jnp.einsum("bshn,bcn->bhsc", turned(query[..., 5:]), key[:, :, 0])
        seen = np.tril(np.ones((8, 8), bool))
        share = jax.nn.softmax(jnp.where(seen, logits / setting.divisor, -jnp.inf))
        mixed = jnp.einsum("bhsc,bchw->bshw", share, made[..., 5:])
        return jnp.einsum("bshw,hwd->bsd", mixed, value("output_HWD"))

    def experts(x_TD, w, chosen_TK):
        score_TE = jax.nn.sigmoid(x_TD @ w.router_DE)
        chosen_TE = jax.nn.one_hot(chosen_TK, 8, dtype=x_TD.dtype).sum(1)
        weight_TE = score_TE * chosen_TE
        weight_TE = 2.5 * weight_TE / weight_TE.sum(-1, keepdims=True)
        each = jax.vmap(swiglu, (None, 0, 0, 0))(x_TD, w.gate_PDF, w.up_PDF, w.down_PFD)
        s = w.shared
        return jnp.einsum("te,etd->td", weight_TE, each) + swiglu(
            x_TD, s.gate_DF, s.up_DF, s.down_FD
        )

    layer_of = lambda stack, n: jax.tree.map(lambda a: a[n], stack)  # noqa: E731
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        plain = jax.tree.map(
            lambda param: param[...], model, is_leaf=lambda n: hasattr(n, "get_metadata")
        )
        x = plain.embedding_VD[TOKEN_BS]
        for n in range(2):
            block = layer_of(plain.dense_blocks, n)
            x = x + attention(norm(x, block.attention_norm_D), block.attention)
            m = block.mlp
            x = x + swiglu(norm(x, block.mlp_norm_D), m.gate_DF, m.up_DF, m.down_FD)
        for n in range(2):
            block = layer_of(plain.blocks, n)
            x = x + attention(norm(x, block.attention_norm_D), block.attention)
            rows = norm(x, block.moe_norm_D).reshape(-1, 16)
            x = x + experts(rows, block.moe, chosen_LTK[n]).reshape(x.shape)
        return ((norm(x, plain.final_norm_D) @ plain.output_DV) * WEIGHT_BSV).sum()


@pytest.mark.slow
def test_training_moves_all_parameters_but_the_correction():
    config = whole_config()
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, weight_decay=0.5)
    )
    mesh = tiny.mesh(config)
    state = step_lib.initial_state(config, mesh)
    state = dataclasses.replace(state, model=shaken(state.model))
    before = jax.tree.map(np.asarray, state.model)
    table = jax.tree.map(jnp.asarray, transformer.identity_table(tiny.LAYERS, tiny.EXPERTS))
    step = step_lib.build_step(config, mesh)
    losses = []
    with jax.numpy_dtype_promotion("standard"):  # as optax needs it
        for _ in range(4):
            state, metrics = step(state, jnp.asarray(tiny.tokens(8, 17)), table)
            losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.05
    assert int(metrics.bad_steps) == 0
    named, after = checkpoint.flatten(before), checkpoint.flatten(state.model)
    same = [n for n in named if np.array_equal(named[n], np.asarray(after[n]))]
    assert same == ["blocks.moe.correction_E"]


def test_counts_of_parameters_and_flops():
    config = whole_config().model
    attention = 16 * 8 + 8 + 8 * 4 * 9 + 16 * 10 + 6 + 6 * 4 * 8 + 4 * 3 * 16
    outside = 2 * 256 * 16 + 16
    dense = attention + 32 + 3 * 16 * 20
    moe = attention + 32 + 16 * 8 + 8 + 8 * 3 * 16 * 24 + 3 * 16 * 12
    assert transformer.num_parameters(config) == outside + 2 * dense + 2 * moe
    idle = 2 * 6 * 3 * 16 * 24
    assert transformer.num_active_parameters(config) == outside + 2 * dense + 2 * moe - idle
    # Those that are multiplied with rows, and 3 S H (X + W) for each layer's attention.
    norms = 2 * (attention - 14)
    multiplied = 256 * 16 + 2 * norms + 2 * 3 * 16 * 20 + 2 * (16 * 8 + 3 * 16 * (2 * 24 + 12))
    assert transformer.flops_per_token(config, 10) == 6 * multiplied + 4 * 3 * 10 * 4 * (9 + 3)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"latent": {"kv_rank": 0, "d_rope": 4}}, "kv_rank = 0: there is none"),
        ({"latent": {**LATENT, "d_value": 0}}, "d_value = 0: must be above 0"),
        ({"latent": {**LATENT, "d_rope": 3}}, "d_rope = 3: must be even"),
        ({"latent": {**LATENT, "query_rank": -1}}, "use 0 for none"),
        ({"num_kv_heads": 2}, "set it to 4"),
        ({"qk_norm": "head"}, "not there in latent attention"),
        ({"num_dense_layers": 3}, "choose 0 to 2"),
        ({"num_dense_layers": 2}, "must be 1 where all layers are dense"),
        ({"num_dense_layers": 1}, "d_ff_dense = 0: is the width"),
        ({"d_ff_dense": 8}, "set both, or none"),
    ],
)
def test_refusals(fields, match):
    with pytest.raises(Refused, match=match):
        tiny.config(**{
            "model__latent": LATENT,
            "model__num_kv_heads": 4,
            **{f"model__{name}": value for name, value in fields.items()},
        })  # fmt: skip


def test_ranks_are_split_over_fsdp():
    with pytest.raises(Refused, match=r"mesh.fsdp = 4: must divide model.latent.kv_rank = 6"):
        config_with(mesh={"fsdp": 4}, query_rank=8)
    config = whole_config("exchange", fsdp=2, expert=2)
    shapes = step_lib.abstract_state(config, tiny.mesh(config)).model
    whole = [
        name
        for name, leaf in checkpoint.flatten(shapes).items()
        if leaf.size > 200 and leaf.sharding.is_fully_replicated
    ]
    assert not whole  # what is large is held in parts


@pytest.mark.parametrize("dispatch", ["shuffled", "coherent"])
def test_tokens_cannot_follow_experts_where_there_is_none(dispatch):
    alone = {"num_experts": 1, "top_k": 1, "num_dense_layers": 2, "d_ff_dense": 8, "d_ff": 8}
    alone = {f"model__{name}": value for name, value in alone.items()}
    with pytest.raises(Refused, match=rf"dispatch = '{dispatch}': .* no layer has any"):
        tiny.config(**alone, model__dispatch=dispatch, mesh={"data": 1, "expert": 1})


def test_fields_read_back():
    config = whole_config()
    assert config_lib.from_json(config_lib.to_json(config)) == config
    assert config.model.num_moe_layers == 2
    assert dataclasses.replace(config.model, latent=config_lib.LatentConfig()).d_rotated == 5
