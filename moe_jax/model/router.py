"""Routing: which experts a token visits, and with which weight. Always logical, always float32.

A `Scheme` says how tokens choose, once, when the model is built. Axes: T tokens, D d_model, E
experts, K top_k, G groups of experts, X experts of a group.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.config import ModelConfig
from moe_jax.model import short
from moe_jax.pytree import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Attributes:
    expert_TK: int32, logical ids in order of descending weight; -1 at positions without a token.
    weight_TK: float32; sums to the scheme's scale over K if `normalised`.
    load_balance: scalar; 1 when all experts get the same share.
    z: scalar; mean squared log-partition of the router's logits.
    """

    expert_TK: Leaf
    weight_TK: Leaf
    load_balance: Leaf
    z: Leaf


def normalised(top_TK: Float[Array, "T K"]) -> Float[Array, "T K"]:
    """Scaled to sum to 1: of a softmax, that over the chosen logits alone, up to rounding."""
    # Sigmoids may all be 0; anything else is too large to see so small a number.
    return top_TK / (short.total(top_TK) + 1e-20)


def unchanged(top_TK: Float[Array, "T K"]) -> Float[Array, "T K"]:
    """The chosen experts' shares of the softmax over all (OLMoE, arXiv 2409.02060)."""
    return top_TK


WEIGHTS = {"normalised": normalised, "softmax": unchanged}
SPARSE_MIXER = "sparse_mixer"  # of logits: `sparse_mixer`
_NEAR = 0.02  # twice the noise that its training adds, as a part of the logit


def sparse_mixer(
    logits_TE: Float[Array, "T E"], expert_TK: Int[Array, "T K"]
) -> Float[Array, "T K"]:
    """The share of each chosen expert among those whose logits are near its own (Phi-3.5-MoE,
    GRIN, arXiv 2409.12136, in inference).

    Those chosen before it are left out, the next one is chosen of the rest. Weights do not sum to
    1, and need not descend.
    """
    chosen_TKE = jax.nn.one_hot(expert_TK, logits_TE.shape[1], dtype=jnp.bool_)
    left_TE, weights = jnp.ones(logits_TE.shape, bool), []
    for k in range(expert_TK.shape[1]):
        own_T1 = short.total(jnp.where(chosen_TKE[:, k], logits_TE, 0))
        far_TE = (own_T1 - logits_TE) / jnp.maximum(jnp.abs(logits_TE), own_T1) > _NEAR
        power_TE = jnp.where(left_TE & ~far_TE, jnp.exp(logits_TE - own_T1), 0)
        weights.append(1 / short.total(power_TE)[:, 0])
        left_TE = left_TE & ~chosen_TKE[:, k]
    return jnp.stack(weights, axis=1)


@jax.custom_jvp
def softmax(logits_TE: Float[Array, "T E"]) -> Float[Array, "T E"]:
    """`jax.nn.softmax` over experts, with bits that do not depend on a row's place among the rows,
    nor on their number.

    `shuffled` and `coherent` put rows where experts are. Where one loop subtracts and takes the
    exponential of rows of 3 to 8 experts, the rows that fill no vector have other bits than those
    that do (JAX 0.12, CPU with AVX-512), hence the barrier.
    """
    below_TE = jax.lax.optimization_barrier(logits_TE - short.largest(logits_TE))
    power_TE = jnp.exp(below_TE)
    return power_TE / short.total(power_TE)


@softmax.defjvp
def _softmax_jvp(primals, tangents):
    (logits_TE,), (tangent_TE,) = primals, tangents
    share_TE = softmax(logits_TE)
    return share_TE, share_TE * (tangent_TE - (share_TE * tangent_TE).sum(axis=1, keepdims=True))


Score = Callable[[jax.Array], jax.Array]
# What logits become, and what its shares are: the probabilities of the load-balance loss.
SCORES: dict[str, tuple[Score, Score]] = {
    "softmax": (softmax, unchanged),
    "sigmoid": (jax.nn.sigmoid, normalised),
}
# Of a group of experts: its best one (DeepSeek-V2, arXiv 2405.04434), or the sum of its best two
# (DeepSeek-V3, arXiv 2412.19437).
GROUP_SCORES = {
    "max": lambda score_TGX: score_TGX.max(axis=2),
    "top2": lambda score_TGX: jax.lax.top_k(score_TGX, 2)[0].sum(axis=2),
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How tokens choose, fixed when the model is built.

    Attributes:
      top_k: experts of a token.
      weights: of the chosen: a name in `WEIGHTS`, or `SPARSE_MIXER`.
      scores: of all experts: a name in `SCORES`.
      scale: of the weights.
      group_scores: a name in `GROUP_SCORES`, or "": a token chooses among all experts.
      groups: neighbours that experts are split into, E / groups each.
      top_groups: best of them that a token chooses among.
    """

    top_k: int
    weights: str = "normalised"
    scores: str = "softmax"
    scale: float = 1.0
    group_scores: str = ""
    groups: int = 1
    top_groups: int = 1


def scheme_of(config: ModelConfig) -> Scheme:
    """That of a model."""
    return Scheme(
        config.top_k,
        weights=config.router_weights,
        scores=config.router_scores,
        scale=config.router_scale,
        group_scores=config.router_group_scores,
        groups=config.router_groups,
        top_groups=config.router_top_groups,
    )


# (scores_TE, correction_E or None) -> (scores of the K chosen, descending, and their columns)
Choose = Callable[[jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]]


def chooser(scheme: Scheme) -> Choose:
    """The experts of each row, row by row: to be called where the rows are."""

    def choose(score_TE, correction_E):
        wanted_TE = score_TE if correction_E is None else score_TE + correction_E[None]
        if scheme.group_scores:
            wanted_TE = _in_best_groups(wanted_TE, scheme)
        if wanted_TE is score_TE:
            top_TK, expert_TK = jax.lax.top_k(score_TE, scheme.top_k)
            return top_TK, expert_TK
        # What is wanted decides which; the score says how much.
        _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(wanted_TE), scheme.top_k)
        top_TK = jnp.take_along_axis(score_TE, expert_TK, axis=1)
        top_TK, order_TK = jax.lax.top_k(top_TK, scheme.top_k)
        return top_TK, jnp.take_along_axis(expert_TK, order_TK, axis=1)

    return choose


def _in_best_groups(wanted_TE: jax.Array, scheme: Scheme) -> jax.Array:
    """-inf at experts outside a row's best groups."""
    wanted_TGX = wanted_TE.reshape(len(wanted_TE), scheme.groups, -1)
    group_TG = GROUP_SCORES[scheme.group_scores](wanted_TGX)
    _, best_TX = jax.lax.top_k(group_TG, scheme.top_groups)
    is_best_TG = jax.nn.one_hot(best_TX, scheme.groups, dtype=jnp.int32).sum(axis=1) > 0
    return jnp.where(is_best_TG[:, :, None], wanted_TGX, -jnp.inf).reshape(wanted_TE.shape)


def route(
    x_TD: Float[Array, "T D"],
    router_DE: Float[Array, "D E"],
    real_T: Bool[Array, "T"],
    scheme: Scheme,
    correction_E: Float[Array, "E"] | None = None,
    choose: Choose | None = None,
    bias_E: Float[Array, "E"] | None = None,
) -> Routing:
    """Scores of all experts, the K that a token chooses, their weights.

    The losses are means over real tokens: load balance is E sum_e f_e p_e with f the share of
    assignments and p the mean share of the scores (Switch Transformer, arXiv 2101.03961, equation
    4, over K choices); z is mean(logsumexp^2) (ST-MoE, arXiv 2202.08906, equation 5).

    Args:
      real_T: False at positions without a token: routed nowhere, counted nowhere.
      correction_E: added to the scores for the choice alone: it has no gradient (DeepSeek-V3).
      choose: `chooser(scheme)`, where tokens are split over devices inside a `shard_map`: left to
        itself, the partitioner gathers all scores on every device to sort them there.
      bias_E: of the logits.
    """
    num_experts, (score, share) = router_DE.shape[1], SCORES[scheme.scores]
    logits_TE = x_TD.astype(jnp.float32) @ router_DE.astype(jnp.float32)
    if bias_E is not None:
        logits_TE = logits_TE + bias_E.astype(jnp.float32)[None]
    score_TE = score(logits_TE)
    top_TK, expert_TK = (choose or chooser(scheme))(score_TE, correction_E)
    if scheme.weights == SPARSE_MIXER:
        weight_TK = sparse_mixer(logits_TE, expert_TK)
    else:
        weight_TK = WEIGHTS[scheme.weights](top_TK)
    weight_TK = weight_TK if scheme.scale == 1 else scheme.scale * weight_TK

    real_T1 = real_T[:, None]
    num_real = jnp.maximum(real_T.sum(), 1).astype(jnp.float32)
    chosen_TE = jax.nn.one_hot(expert_TK, num_experts, dtype=jnp.float32).sum(axis=1)
    share_E = jnp.where(real_T1, chosen_TE, 0).sum(axis=0) / (num_real * scheme.top_k)
    mean_E = jnp.where(real_T1, share(score_TE), 0).sum(axis=0) / num_real
    z_T = jnp.square(jax.nn.logsumexp(logits_TE, axis=1))
    return Routing(
        expert_TK=jnp.where(real_T1, expert_TK, -1).astype(jnp.int32),
        weight_TK=weight_TK,
        load_balance=num_experts * jnp.sum(share_E * mean_E),
        z=jnp.where(real_T, z_T, 0).sum() / num_real,
    )
