"""Capacity: how many rows an expert takes at most; what is beyond is dropped, and counted.

Tutel's rule (arXiv 2206.03382): with a factor f an expert takes |f| K T / E rows of the T tokens
that one set of experts serves, rounded up; 0 means that nothing is dropped. The tokens that come
first in global order (device by device, as the batch is split) have their place; assignments beyond
are dropped before dispatch, so nothing of them travels and the token's other experts keep their
weights. What is dropped depends on the router alone, not on where experts live.

The sign says what buffers are made for: f > 0 for the capacity, which is known when the program is
built and saves memory; f < 0 for whatever the router may do, as without a capacity.

Axes: T tokens here, K top_k, E logical experts, M devices that share one set of experts.
"""

import fractions
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_jax.mesh import Axis


def of_factor(factor: float, *, num_assignments: int, num_experts: int) -> int | None:
    """Rows an expert takes at most; None: any number.

    Args:
      num_assignments: K times the tokens of all devices that share one set of experts, padding
        included: a number that the program is built for.
    """
    if not factor:
        return None
    # as it is written: 1.1 * 800 / 8 is 110, and a little more in floats
    rows = math.ceil(abs(fractions.Fraction(str(factor))) * num_assignments / num_experts)
    return min(rows, num_assignments)


def keep_within(
    expert_TK: Int[Array, "T K"], capacity: int | None, *, num_experts: int, axis: Axis
) -> tuple[Int[Array, "T K"], Int[Array, " E"]]:
    """The assignments that have a place (-1 for the others), and how many here have none.

    To be called inside a `shard_map`; experts of a token are distinct, -1 stays -1.

    Args:
      capacity: see `of_factor`.
      axis: over which the devices lie that share one set of experts.
    """
    if capacity is None:
        none_E = jnp.zeros_like(expert_TK, shape=num_experts)
        return expert_TK, none_E
    expert_N = jnp.where(expert_TK < 0, num_experts, expert_TK).reshape(-1)
    is_of_NE = expert_N[:, None] == jnp.arange(num_experts, dtype=jnp.int32)[None]
    count_E = is_of_NE.sum(axis=0, dtype=jnp.int32)
    counts_ME = jax.lax.all_gather(count_E, axis)
    earlier_M1 = (jnp.arange(len(counts_ME)) < jax.lax.axis_index(axis))[:, None]
    before_E = jnp.where(earlier_M1, counts_ME, 0).sum(axis=0, dtype=jnp.int32)

    order_N = jnp.argsort(expert_N, stable=True)
    sorted_N = jnp.zeros_like(expert_N).at[order_N].set(jnp.arange(expert_N.size, dtype=jnp.int32))
    turn_E = before_E - (jnp.cumsum(count_E, dtype=jnp.int32) - count_E)
    turn_N = sorted_N + jnp.append(turn_E, 0)[expert_N]  # among all rows of its expert
    kept_TK = jnp.where((turn_N < capacity).reshape(expert_TK.shape), expert_TK, -1)
    places_E = jnp.clip(capacity - before_E, 0, count_E)
    return kept_TK, count_E - places_E
