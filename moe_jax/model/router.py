"""Routing: which experts a token visits, and with which weight. Always logical, always float32.

A routing scheme is a function `route(x_TD, router_DE) -> Routing`, chosen once when the model is
built. Axes: T tokens, D d_model, E experts, K top_k.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.pytree import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Attributes:
    expert_TK: int32, logical ids in order of descending weight; -1 at positions without a token.
    weight_TK: float32; sums to 1 over K if `normalised`, to less otherwise.
    load_balance: scalar; 1 when all experts get the same share.
    z: scalar; mean squared log-partition of the router's logits.
    """

    expert_TK: Leaf
    weight_TK: Leaf
    load_balance: Leaf
    z: Leaf


# values_TE -> (the K largest of each row, descending, their columns)
Largest = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def normalised(top_TK: Float[Array, "T K"]) -> Float[Array, "T K"]:
    """Scaled to sum to 1: the softmax over the chosen logits alone, up to rounding."""
    return top_TK / top_TK.sum(axis=1, keepdims=True)


def unchanged(top_TK: Float[Array, "T K"]) -> Float[Array, "T K"]:
    """The chosen experts' shares of the softmax over all (OLMoE, arXiv 2409.02060)."""
    return top_TK


WEIGHTS = {"normalised": normalised, "softmax": unchanged}


def route_top_k(
    x_TD: Float[Array, "T D"],
    router_DE: Float[Array, "D E"],
    real_T: Bool[Array, "T"],
    top_k: int,
    largest: Largest | None = None,
    weigh: Callable[[jax.Array], jax.Array] = normalised,
) -> Routing:
    """Softmax over all experts, the K largest, their weights as `weigh` makes them of it.

    The losses are means over real tokens: load balance is E sum_e f_e p_e with f the share of
    assignments and p the mean probability (Switch Transformer, arXiv 2101.03961, equation 4, over
    K choices); z is mean(logsumexp^2) (ST-MoE, arXiv 2202.08906, equation 5).

    Args:
      real_T: False at positions without a token: routed nowhere, counted nowhere.
      largest: `jax.lax.top_k` of K, where tokens are split over devices: left to itself, the
        partitioner gathers all probabilities on every device to sort them there.
      weigh: of `WEIGHTS`.
    """
    num_experts = router_DE.shape[1]
    logits_TE = x_TD.astype(jnp.float32) @ router_DE.astype(jnp.float32)
    probability_TE = jax.nn.softmax(logits_TE)
    if largest is None:
        top_TK, expert_TK = jax.lax.top_k(probability_TE, top_k)
    else:
        top_TK, expert_TK = largest(probability_TE)
    weight_TK = weigh(top_TK)

    real_T1 = real_T[:, None]
    num_real = jnp.maximum(real_T.sum(), 1).astype(jnp.float32)
    chosen_TE = jax.nn.one_hot(expert_TK, num_experts, dtype=jnp.float32).sum(axis=1)
    share_E = jnp.where(real_T1, chosen_TE, 0).sum(axis=0) / (num_real * top_k)
    mean_E = jnp.where(real_T1, probability_TE, 0).sum(axis=0) / num_real
    z_T = jnp.square(jax.nn.logsumexp(logits_TE, axis=1))
    return Routing(
        expert_TK=jnp.where(real_T1, expert_TK, -1).astype(jnp.int32),
        weight_TK=weight_TK,
        load_balance=num_experts * jnp.sum(share_E * mean_E),
        z=jnp.where(real_T, z_T, 0).sum() / num_real,
    )
