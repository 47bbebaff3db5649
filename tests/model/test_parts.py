"""What published families differ in: norms, biases, tied embeddings, shared experts, weights.

Against plain NumPy in float64, and, all together, every dispatch and mesh against one device, with
gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax.errors import Refused
from moe_jax.model import attention, parameter, rope, router, shared, transformer
from tests import tiny
from tests.model.test_transformer import numpy_attention
from tests.model.whole import Whole

PARTS = {
    "model__router_weights": "softmax",
    "model__qk_norm": "all",
    "model__attention_bias": "qkvo",
    "model__tied_output": True,
    "model__d_ff_shared": 12,
    "model__shared_gate": True,
    "model__windows": (5, 0),
    "model__attention_sinks": True,
    "model__router_bias": True,
    "model__expert_bias": True,
}


def shaken(tree, seed=0):
    """Norms and biases as training might leave them."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    noise = [rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(
        structure, [leaf + 0.2 * n for leaf, n in zip(leaves, noise, strict=True)]
    )


def numpy_norm(x, scale, axes, eps):
    return x / np.sqrt((x**2).mean(axis=axes, keepdims=True) + eps) * scale


@pytest.mark.parametrize(("qk_norm", "axes"), [("head", (-1,)), ("all", (-2, -1))])
def test_projections_equal_numpy(qk_norm, axes):
    weights = shaken(
        attention.Attention(
            jax.random.key(0),
            d_model=16,
            num_heads=6,
            num_kv_heads=3,
            d_head=4,
            qk_norm=qk_norm,
            bias="qkvo",
        )
    )
    x_BSD = np.random.default_rng(0).normal(size=(2, 1, 16))
    setting = attention.Setting(rope.plain(100.0, 4), norm_eps=1e-2)
    at_0 = jnp.zeros((2, 1), jnp.int32)  # where positions turn nothing
    actual = attention.project(jnp.asarray(x_BSD, jnp.float32), weights, at_0, setting)
    values = {
        name: np.asarray(w, np.float64)
        for name, w in parameter.present(weights, attention.Heads).items()
    }
    query = np.einsum("bsd,dhq->bshq", x_BSD, values["query_DHQ"]) + values["query_bias_HQ"]
    key = np.einsum("bsd,dgq->bsgq", x_BSD, values["key_DGQ"]) + values["key_bias_GQ"]
    value = np.einsum("bsd,dgq->bsgq", x_BSD, values["value_DGQ"]) + values["value_bias_GQ"]
    query = numpy_norm(query, values["query_norm_Z"], axes, 1e-2)
    key = numpy_norm(key, values["key_norm_Z"], axes, 1e-2)
    for ours, theirs in zip(actual, (query, key, value), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)
    mixed = np.random.default_rng(1).normal(size=(2, 1, 6, 4))
    out = np.einsum("bshq,hqd->bsd", mixed, values["output_HQD"]) + values["output_bias_D"]
    ours = attention.project_out(jnp.asarray(mixed, jnp.float32), weights)
    np.testing.assert_allclose(ours, out, rtol=0, atol=3e-6)


def test_no_part_is_there_by_default():
    weights = attention.Attention(
        jax.random.key(0), d_model=16, num_heads=2, num_kv_heads=1, d_head=4
    )
    assert set(parameter.present(weights, attention.Heads)) == {
        "query_DHQ", "key_DGQ", "value_DGQ", "output_HQD"
    }  # fmt: skip
    parts = tuple(w for w in parameter.present(weights, attention.Heads).values())
    x_BSD = np.random.default_rng(0).normal(size=(1, 3, 16)).astype(np.float32)
    position_BS = jnp.arange(3)[None]
    actual_BSD, _ = attention.attend(
        jnp.asarray(x_BSD), weights, position_BS, attention.Setting(rope.plain(50.0, 4)), None
    )
    expected_BSD = numpy_attention(x_BSD.astype(np.float64), parts, 50.0)
    np.testing.assert_allclose(actual_BSD, expected_BSD, rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", list(router.WEIGHTS))
def test_weights_of_the_chosen_equal_numpy(name):
    rng = np.random.default_rng(0)
    x_TD, router_DE = rng.normal(size=(20, 5)), rng.normal(size=(5, 7))
    routing = router.route(
        jnp.asarray(x_TD, jnp.float32), jnp.asarray(router_DE, jnp.float32),
        jnp.ones(20, bool), router.Scheme(3, weights=name),
    )  # fmt: skip
    logits_TE = x_TD @ router_DE
    top_TK = -np.sort(-logits_TE, axis=1)[:, :3]
    among_TX = (
        top_TK if name == "normalised" else logits_TE
    )  # top-k, then softmax; or the other way
    expected_TK = np.exp(top_TK) / np.exp(among_TX).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(routing.weight_TK, expected_TK, rtol=0, atol=1e-6)


def by_the_sparse_mixer(logits_E):
    """Two experts and their weights, as the paper has them in inference, one row."""
    chosen, weights = [], []
    for _ in range(2):
        left = [e for e in range(len(logits_E)) if e not in chosen]
        best = max(left, key=lambda e: logits_E[e])
        near = [
            e
            for e in left
            if (logits_E[best] - logits_E[e]) / max(abs(logits_E[e]), logits_E[best]) <= 0.02
        ]
        power = {e: np.exp(logits_E[e] - logits_E[best]) for e in near}
        chosen.append(best)
        weights.append(1 / sum(power.values()))
    return chosen, weights


def test_the_sparse_mixer_equals_a_loop():
    """Most logits near one another, so that shares are neither 0 nor 1; of both signs."""
    rng = np.random.default_rng(0)
    logits_TE = (rng.choice([5.0, -5.0], (200, 1)) + 0.1 * rng.normal(size=(200, 7))).astype("f4")
    scheme = router.Scheme(2, weights="sparse_mixer")
    one_DE = jnp.eye(7)
    routing = router.route(jnp.asarray(logits_TE), one_DE, jnp.ones(200, bool), scheme)
    assert len(np.unique(np.round(routing.weight_TK, 3))) > 20
    for t, logits_E in enumerate(logits_TE.astype(np.float64)):
        chosen, weights = by_the_sparse_mixer(logits_E)
        assert routing.expert_TK[t].tolist() == chosen
        np.testing.assert_allclose(routing.weight_TK[t], weights, rtol=1e-4)


def test_a_bias_of_the_router_is_one_of_its_logits():
    rng = np.random.default_rng(0)
    x_TD, router_DE, bias_E = (rng.normal(size=s).astype(np.float32) for s in ((20, 5), (5, 7), 7))
    routing = router.route(
        jnp.asarray(x_TD), jnp.asarray(router_DE), jnp.ones(20, bool), router.Scheme(3),
        bias_E=jnp.asarray(bias_E),
    )  # fmt: skip
    logits_TE = x_TD.astype(np.float64) @ router_DE + bias_E
    np.testing.assert_array_equal(routing.expert_TK, np.argsort(-logits_TE, axis=1)[:, :3])
    top_TK = np.exp(-np.sort(-logits_TE, axis=1)[:, :3])
    expected_TK = top_TK / top_TK.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(routing.weight_TK, expected_TK, rtol=0, atol=1e-6)
    z = np.mean(np.log(np.exp(logits_TE).sum(axis=1)) ** 2)
    np.testing.assert_allclose(routing.z, z, rtol=1e-5)


@pytest.mark.parametrize("has_gate", [False, True])
def test_shared_expert_equals_numpy(has_gate):
    weights = shared.SharedExpert(jax.random.key(0), d_model=6, d_ff=10, has_gate=has_gate)
    x_TD = np.random.default_rng(0).normal(size=(9, 6))
    gate, up, down = (
        np.asarray(w[...], np.float64) for w in (weights.gate_DF, weights.up_DF, weights.down_FD)
    )
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    hidden = x_TD @ gate
    expected_TD = (hidden * sigmoid(hidden) * (x_TD @ up)) @ down
    if has_gate:
        expected_TD *= sigmoid(x_TD @ np.asarray(weights.share_D[...], np.float64))[:, None]
    actual_TD = shared.compute(jnp.asarray(x_TD, jnp.float32), weights)
    np.testing.assert_allclose(actual_TD, expected_TD, rtol=0, atol=2e-6)


@functools.cache
def trained():
    """Parameters with all parts."""
    config = config_with(data=1, expert=1, dispatch="local")
    return shaken(transformer.Transformer(jax.random.key(1), config.model))


@functools.cache
def on_one_device(compute):
    return compute(config_with(data=1, expert=1, dispatch="local"))


def config_with(dispatch="exchange", **mesh):
    return tiny.config(mesh=mesh, model__dispatch=dispatch, **PARTS)


_WHOLE = Whole(trained)
outputs, gradients = _WHOLE.outputs, _WHOLE.gradients


SLOW = pytest.mark.slow
CASES = [
    pytest.param("shuffled", {"expert": 2}, marks=SLOW),
    pytest.param("coherent", {"expert": 2}, marks=SLOW),
    pytest.param("exchange", {"data": 2, "expert": 4}, marks=SLOW),
    pytest.param("hierarchical", {"node": 2, "expert": 2}, marks=SLOW),
    pytest.param("gathered", {"fsdp": 2, "expert": 2, "tensor": 2}, marks=SLOW),
    pytest.param("shuffled", {"data": 2, "expert": 4}, marks=SLOW),  # a key/value head on 2 devices
    pytest.param("shuffled", {"data": 2, "expert": 2, "tensor": 2}, marks=SLOW),
    pytest.param("coherent", {"data": 2, "expert": 4}, marks=SLOW),
]


@pytest.mark.parametrize(("dispatch", "mesh"), CASES)
def test_every_dispatch_and_mesh_equals_one_device(dispatch, mesh):
    logits_BSV, expert_LBSK = on_one_device(outputs)
    actual_BSV, actual_LBSK = outputs(config_with(dispatch, **mesh))
    np.testing.assert_array_equal(actual_LBSK, expert_LBSK)
    np.testing.assert_allclose(actual_BSV, logits_BSV, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2, "expert": 2, "tensor": 2}, {"tensor": 2}], ids=str)
def test_coherent_over_tensor_equals_one_device(mesh):
    """Every part but the norm over all heads, which is refused there."""
    parts = {**PARTS, "model__qk_norm": "head"}

    def sized(dispatch, mesh):
        return tiny.config(mesh=mesh, model__dispatch=dispatch, **parts)

    one_device = sized("local", {"data": 1, "expert": 1})
    whole = Whole(lambda: shaken(transformer.Transformer(jax.random.key(1), one_device.model)))
    logits_BSV, expert_LBSK = whole.outputs(one_device)
    actual_BSV, actual_LBSK = whole.outputs(sized("coherent", mesh))
    np.testing.assert_array_equal(actual_LBSK, expert_LBSK)
    np.testing.assert_allclose(actual_BSV, logits_BSV, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dispatch", "mesh"),
    [
        ("exchange", {"data": 2, "expert": 4}),
        ("gathered", {"fsdp": 2, "expert": 2, "tensor": 2}),
        ("shuffled", {"data": 2, "expert": 4}),
        ("shuffled", {"node": 2, "expert": 1}),
        ("shuffled", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ],
)
def test_gradients_of_every_part_equal_those_of_one_device(dispatch, mesh):
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=3e-5 * np.abs(theirs).max()
        ),
        gradients(config_with(dispatch, **mesh)),
        on_one_device(gradients),
    )


def test_parts_at_their_defaults_leave_a_digest_as_it_was():
    """Runs of before resume; every part by itself makes another run."""
    plain = config_lib.digest(tiny.config())
    assert plain.startswith("727cb8460a171b41")  # what it was before there were parts
    digests = {config_lib.digest(tiny.config(**{name: value})) for name, value in PARTS.items()
               if name not in ("model__shared_gate",)}  # fmt: skip
    assert plain not in digests
    assert len(digests) == len(PARTS) - 1


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("router_weights", "sofmax", "did you mean 'softmax'"),
        ("qk_norm", "heads", "did you mean 'head'"),
        ("attention_bias", "qkvv", "did you mean 'qkv"),
        ("d_ff_shared", -1, "at least 0"),
        ("shared_gate", True, "there is none"),
        ("windows", (4, -1), r"windows\[1\] = -1: must be at least 0"),
        ("windows", (4, 0, 4), "divides model.num_layers = 2"),
        ("windows", (4, 0.5), r"windows\[1\] = 0.5: must be of type int"),
        ("windows", 4, r"must be a list of numbers. write it as \[1, 2\]"),
        ("activation", "swigl", "did you mean 'swiglu'"),
        ("norm", "layr", "did you mean 'layer'"),
        ("logits_divisor", 0.0, "must be above 0"),
        ("attention_scale", -1.0, "at least 0"),
    ],
)
def test_refusals(field, value, match):
    with pytest.raises(Refused, match=match):
        tiny.config(**{f"model__{field}": value})


@pytest.mark.parametrize("num_rows", [15, 26, 33, 65])
def test_a_shared_expert_gives_a_row_the_same_bits_in_any_place(num_rows):
    """`shuffled` puts rows where their experts were, and serving beside others."""
    weights = shared.SharedExpert(jax.random.key(0), d_model=64, d_ff=48, has_gate=True)
    compiled = jax.jit(shared.compute)
    rng = np.random.default_rng(num_rows)
    x_TD = rng.normal(size=(num_rows, 64)).astype(np.float32)
    y_TD = np.asarray(compiled(x_TD, weights))
    for _ in range(8):
        order_T = rng.permutation(num_rows)
        np.testing.assert_array_equal(compiled(x_TD[order_T], weights), y_TD[order_T])
