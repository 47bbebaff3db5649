"""Groups, sigmoid scores and corrections against loops over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.model import router
from tests import tiny

# DeepSeek-V2 in small, and DeepSeek-V3.
V2 = router.Scheme(3, "softmax", scale=16.0, group_scores="max", groups=4, top_groups=2)
V3 = router.Scheme(
    4, "normalised", scores="sigmoid", scale=2.5, group_scores="top2", groups=4, top_groups=2
)
CASES = {
    "groups by their best": (V2, False),
    "greedy, scaled": (router.Scheme(3, "softmax", scale=2.0), False),
    "sigmoid, groups by their best two, correction": (V3, True),
    "correction without groups": (router.Scheme(2, "softmax", "sigmoid"), True),
    "one group": (router.Scheme(2, group_scores="top2"), True),
}


def by_hand(logits_E, scheme, correction_E):
    """(experts, weights) of one token, best first."""
    if scheme.scores == "softmax":
        score_E = np.exp(logits_E) / np.exp(logits_E).sum()
    else:
        score_E = 1 / (1 + np.exp(-logits_E))
    wanted_E = score_E + correction_E
    size = len(logits_E) // scheme.groups
    if scheme.group_scores:
        number = {"max": 1, "top2": 2}[scheme.group_scores]
        of_group = [
            sum(sorted(wanted_E[g * size : (g + 1) * size])[-number:]) for g in range(scheme.groups)
        ]
        best = sorted(range(scheme.groups), key=lambda g: -of_group[g])[: scheme.top_groups]
        allowed = [g * size + i for g in best for i in range(size)]
    else:
        allowed = list(range(len(logits_E)))
    chosen = sorted(allowed, key=lambda e: -wanted_E[e])[: scheme.top_k]
    chosen = sorted(chosen, key=lambda e: -score_E[e])
    weights = score_E[chosen]
    if scheme.weights == "normalised":
        weights = weights / weights.sum()
    return chosen, scheme.scale * weights, score_E / score_E.sum()


def inputs():
    rng = np.random.default_rng(0)
    x_TD, router_DE = rng.normal(size=(40, 6)), rng.normal(size=(6, 16))
    return x_TD, router_DE, 0.5 * rng.normal(size=16)


@pytest.mark.parametrize("name", CASES)
def test_choices_weights_and_loss_equal_loops(name):
    scheme, corrected = CASES[name]
    x_TD, router_DE, correction_E = inputs()
    correction_E = correction_E * corrected
    routing = router.route(
        jnp.asarray(x_TD, jnp.float32),
        jnp.asarray(router_DE, jnp.float32),
        jnp.ones(40, bool),
        scheme,
        jnp.asarray(correction_E, jnp.float32) if corrected else None,
    )
    share_E, mean_E = np.zeros(16), np.zeros(16)
    moved = 0
    for t, logits_E in enumerate(x_TD @ router_DE):
        experts, weights, probability_E = by_hand(logits_E, scheme, correction_E)
        np.testing.assert_array_equal(routing.expert_TK[t], experts)
        np.testing.assert_allclose(routing.weight_TK[t], weights, rtol=2e-5)
        share_E[experts] += 1 / (40 * scheme.top_k)
        mean_E += probability_E / 40
        moved += set(experts) != set(np.argsort(-logits_E)[: scheme.top_k])
    np.testing.assert_allclose(routing.load_balance, 16 * share_E @ mean_E, rtol=1e-5)
    assert moved or name == "greedy, scaled"  # groups and corrections do change choices


def test_the_correction_has_no_gradient_and_scores_have_that_of_a_dense_formula():
    x_TD, router_DE, correction_E = (jnp.asarray(a, jnp.float32) for a in inputs())
    aim_TK = jnp.asarray(np.random.default_rng(1).normal(size=(40, 4)), jnp.float32)
    expert_TK = router.route(x_TD, router_DE, jnp.ones(40, bool), V3, correction_E).expert_TK

    def loss(router_DE, correction_E):
        routing = router.route(x_TD, router_DE, jnp.ones(40, bool), V3, correction_E)
        return (routing.weight_TK * aim_TK).sum()

    def dense(router_DE):
        score_TE = jax.nn.sigmoid(x_TD @ router_DE)
        chosen_TKE = jax.nn.one_hot(expert_TK, 16)
        top_TK = jnp.einsum("te,tke->tk", score_TE, chosen_TKE)
        return (2.5 * top_TK / top_TK.sum(axis=1, keepdims=True) * aim_TK).sum()

    of_router, of_correction = jax.grad(loss, argnums=(0, 1))(router_DE, correction_E)
    np.testing.assert_array_equal(of_correction, np.zeros(16))
    np.testing.assert_allclose(of_router, jax.grad(dense)(router_DE), rtol=0, atol=2e-5)


@pytest.mark.parametrize("num_experts", [4, 5, 6, 7, 8, 64])
def test_softmax_has_bits_that_do_not_depend_on_a_rows_place(num_experts):
    rng = np.random.default_rng(num_experts)
    compiled = jax.jit(router.softmax)
    for num_rows in (26, 27, 31, 47, 131):
        logits_TE = rng.normal(size=(num_rows, num_experts)).astype(np.float32)
        share_TE = np.asarray(compiled(logits_TE))
        for _ in range(8):
            order_T = rng.permutation(num_rows)
            np.testing.assert_array_equal(compiled(logits_TE[order_T]), share_TE[order_T])
    np.testing.assert_allclose(share_TE, jax.nn.softmax(logits_TE), rtol=1e-6)
    logits_TE = jnp.asarray(logits_TE)
    aim_TE = rng.normal(size=logits_TE.shape).astype(np.float32)
    gradient, expected = (
        jax.grad(lambda x, f=f: (f(x) * aim_TE).sum())(logits_TE)
        for f in (router.softmax, jax.nn.softmax)
    )
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6)  # sums of E terms up to 1


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"groups": 4}, "needs model.router_group_scores"),
        ({"top_groups": 2}, "needs model.router_group_scores"),
        ({"group_scores": "mean"}, "must be one of '', 'max', 'top2'"),
        ({"group_scores": "max", "groups": 3}, "must divide model.num_experts = 8"),
        ({"group_scores": "max", "groups": 2, "top_groups": 3}, "choose 1 to 2"),
        ({"group_scores": "max", "groups": 8}, "at most the 1 x 1 experts of a token's groups"),
        ({"group_scores": "top2", "groups": 8, "top_groups": 8}, "the sum of the best two"),
        ({"scores": "sigmoyd"}, "did you mean 'sigmoid'"),
        ({"scale": 0.0}, "above 0"),
    ],
)
def test_refusals(fields, match):
    with pytest.raises(Refused, match=match):
        tiny.config(**{f"model__router_{name}": value for name, value in fields.items()})
