"""From logits to the next token: greedy, temperature, top-p. One random stream per sequence.

Axes: B sequences, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax import config as config_lib
from moe_jax.errors import Refused

LEAST_TEMPERATURE = 1e-6  # below it logits that are divided may be infinite in float32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens.

    Attributes:
      temperature: 0, or less than `LEAST_TEMPERATURE`, = greedy; otherwise logits are divided by
        it.
      top_p: keep the smallest set of tokens whose probability reaches this (nucleus sampling,
        arXiv 1904.09751).
      seed: of the random streams; sequence b and position s draw from (seed, b, s) alone.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise Refused("--temperature", self.temperature, "must be at least 0", "0 = greedy")
        if not 0 < self.top_p <= 1:
            raise Refused("--top_p", self.top_p, "must lie in (0, 1]", "1 keeps every token")
        config_lib.check_seed("--seed", self.seed)


def choose(logits_BV: jax.Array, position_B: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of every sequence, int32 [B]."""
    if sampling.temperature < LEAST_TEMPERATURE:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled_BV = nucleus(logits_BV / sampling.temperature, sampling.top_p)
    base = jax.random.key(sampling.seed)

    def draw(sequence, position, logits_V):
        key = jax.random.fold_in(jax.random.fold_in(base, sequence), position)
        return jax.random.categorical(key, logits_V)

    sequence_B = jnp.arange(logits_BV.shape[0], dtype=jnp.int32)
    return jax.vmap(draw)(sequence_B, position_B, scaled_BV).astype(jnp.int32)


def nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    """Logits with -inf outside the smallest set of tokens that holds `top_p` of the mass."""
    if top_p >= 1:
        return logits_BV
    order_BV = jnp.argsort(logits_BV, axis=-1, descending=True, stable=True)
    probability_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV), order_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    # What crosses the mark is kept: never empty, even of a mark that float32 rounds to 0.
    first_1V = jnp.arange(logits_BV.shape[1])[None] == 0
    kept_BV = first_1V | (before_BV < top_p)
    rank_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.where(jnp.take_along_axis(kept_BV, rank_BV, axis=-1), logits_BV, -jnp.inf)
