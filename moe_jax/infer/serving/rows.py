"""The next token of every row, each with settings of its own; the draw of sampling.py.

Axes: R rows on this device, V vocabulary.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.infer import sampling
from moe_jax.infer.serving.packing import OUT_WORDS, TOP
from moe_jax.pytree import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """Of every row; see packing.py. `top_k_R`: 0 = all; `temperature_R`: 0, or less than
    `sampling.LEAST_TEMPERATURE`, = greedy."""

    temperature_R: Leaf
    top_p_R: Leaf
    top_k_R: Leaf
    seed_R: Leaf
    choice_R: Leaf
    draw_R: Leaf
    logprobs_R: Leaf


def choose(logits_RV: jax.Array, settings: Settings) -> jax.Array:
    """int32 [R]. A row draws from (seed, number of the choice, position) alone.

    The largest K are taken first, then the nucleus of what is left.
    """
    greedy_R = _first_of_the_largest(logits_RV)
    drawn = settings.temperature_R >= sampling.LEAST_TEMPERATURE

    def draw(logits_RV):
        temperature_R = jnp.where(drawn, settings.temperature_R, 1.0)
        scaled_RV = logits_RV / temperature_R[:, None]
        narrow = drawn & ((settings.top_p_R < 1) | (settings.top_k_R > 0))
        scaled_RV = jax.lax.cond(narrow.any(), keep, lambda rows, _: rows, scaled_RV, settings)

        def one(seed, choice, position, logits_V):
            key = jax.random.fold_in(jax.random.key(seed), choice)
            return jax.random.categorical(jax.random.fold_in(key, position), logits_V)

        rows = (settings.seed_R, settings.choice_R, settings.draw_R, scaled_RV)
        return jnp.where(drawn, jax.vmap(one)(*rows).astype(jnp.int32), greedy_R)

    return jax.lax.cond(drawn.any(), draw, lambda _: greedy_R, logits_RV)


def _first_of_the_largest(logits_RV: jax.Array) -> jax.Array:
    """int32 [R]: `argmax` of finite logits. XLA makes one scalar loop of that on CPU; these two
    reductions are vectors."""
    id_1V = jnp.arange(logits_RV.shape[1], dtype=jnp.int32)[None]
    largest_R1 = logits_RV.max(axis=-1, keepdims=True)
    return jnp.where(logits_RV == largest_R1, id_1V, logits_RV.shape[1] - 1).min(axis=-1)


def by_row(function: Callable[[jax.Array], jax.Array], x_RV: jax.Array) -> jax.Array:
    """The function, over the last axis; on CPU of each row by itself, so that its bits do not
    depend on how many rows there are (model/short.py says how they would)."""
    return jax.lax.platform_dependent(
        x_RV, cpu=lambda x_RV: jax.lax.map(function, x_RV), default=function
    )


def keep(logits_RV: jax.Array, settings: Settings) -> jax.Array:
    """Logits with -inf outside the K largest and outside the nucleus of mass `top_p` of these."""
    vocabulary = logits_RV.shape[1]
    order_RV = jnp.argsort(logits_RV, axis=-1, descending=True, stable=True)
    sorted_RV = jnp.take_along_axis(logits_RV, order_RV, axis=-1)
    count_R = jnp.where(settings.top_k_R > 0, settings.top_k_R, vocabulary)
    rank_1V = jnp.arange(vocabulary, dtype=jnp.int32)[None]
    first_RV = rank_1V < count_R[:, None]
    probability_RV = by_row(jax.nn.softmax, jnp.where(first_RV, sorted_RV, -jnp.inf))
    before_RV = jnp.cumsum(probability_RV, axis=-1) - probability_RV
    # What crosses the mark is kept: never empty, even of a mark that float32 rounds to 0. A mass of
    # 1 keeps all, whatever the sums round to.
    top_p_R1 = settings.top_p_R[:, None]
    kept_RV = first_RV & ((before_RV < top_p_R1) | (top_p_R1 >= 1) | (rank_1V == 0))
    rank_RV = jnp.argsort(order_RV, axis=-1)
    return jnp.where(jnp.take_along_axis(kept_RV, rank_RV, axis=-1), logits_RV, -jnp.inf)


def report(logits_RV: jax.Array, token_R: jax.Array, settings: Settings) -> jax.Array:
    """int32 [R, OUT_WORDS]: the token and, if any row wants them, logprobs, see packing.py.

    Logprobs are those of the model, before temperature and before anything is left out.
    """

    def likely(logits_RV):
        logprob_RV = by_row(jax.nn.log_softmax, logits_RV)
        own_R1 = jnp.take_along_axis(logprob_RV, token_R[:, None], axis=-1)
        top_RX, id_RX = jax.lax.top_k(logprob_RV, min(TOP, logprob_RV.shape[1]))
        missing = ((0, 0), (0, TOP - top_RX.shape[1]))
        top_RX, id_RX = jnp.pad(top_RX, missing), jnp.pad(id_RX, missing, constant_values=-1)
        bits = jax.lax.bitcast_convert_type(jnp.concatenate([own_R1, top_RX], axis=1), jnp.int32)
        return jnp.concatenate([bits[:, :1], id_RX.astype(jnp.int32), bits[:, 1:]], axis=1)

    def nothing(logits_RV):
        # Zeros of the same mesh axes as the logits.
        zero_R1 = jax.lax.bitcast_convert_type(logits_RV[:, :1] * 0, jnp.int32) * 0
        return jnp.broadcast_to(zero_R1, (zero_R1.shape[0], OUT_WORDS - 1))

    wanted = (settings.logprobs_R >= 0).any()
    rest_RX = jax.lax.cond(wanted, likely, nothing, logits_RV)
    return jnp.concatenate([token_R[:, None], rest_RX], axis=1)
