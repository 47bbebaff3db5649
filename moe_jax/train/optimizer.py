"""AdamW, and a gradient norm that does not depend on where experts live.

Everything AdamW does is element by element, so it commutes with a permutation of experts. A norm
is a sum, and its order would change with the placement: here the squares are summed per expert,
brought into logical order, and then added up.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import OptimizerConfig
from moe_jax.model import parameter


def make(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW; linear warm-up, cosine decay to a tenth; norms and biases are not decayed."""
    warmup = min(config.warmup_steps, num_steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else config.learning_rate,
        config.learning_rate,
        warmup,
        num_steps,
        end_value=config.learning_rate / 10,
    )

    def decayed(params):
        """Matrices: two axes at least. A vector cut into heads is none, nor is one per expert."""
        axes = parameter.logical_axes(params)
        return jax.tree.map(lambda names: len({*names} - {"layer", "expert", "d_head"}) > 1, axes)

    return optax.adamw(
        schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decayed
    )


def global_norm(grads: Any, slot_LE: jax.Array, replicated: jax.sharding.Sharding) -> jax.Array:
    """sqrt of the sum of squares of all gradients, bit-identical under every placement.

    Args:
      grads: a model's gradients; expert arrays are [layer, physical expert, ...].
      slot_LE: int32, the physical expert that holds each logical one.
      replicated: sharding of the small per-expert sums, so that they are added in one order.
    """

    def squares(grad: jax.Array, names: tuple[str, ...]) -> jax.Array:
        if "expert" not in names:
            return jnp.sum(jnp.square(grad))
        by_slot_LP = jnp.sum(jnp.square(grad), axis=tuple(range(2, grad.ndim)))
        by_slot_LP = jax.lax.with_sharding_constraint(by_slot_LP, replicated)
        return jnp.sum(jnp.take_along_axis(by_slot_LP, slot_LE, axis=1))

    parts = jax.tree.map(
        squares, jax.tree.leaves(grads), jax.tree.leaves(parameter.logical_axes(grads))
    )
    return jnp.sqrt(sum(parts))
