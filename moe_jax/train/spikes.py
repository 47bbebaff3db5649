"""What a loss may be before it counts as a spike: so many standard deviations above recent ones.

The losses of good steps alone are kept, on the device and in the checkpoint: a NaN or a spike
cannot move the limit, and a resumed run skips the steps that one that never stopped would skip.

Axes: W losses.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.pytree import Leaf

# A loss that has settled varies little: what is within so much of the mean is no spike.
SMALLEST_DEVIATION = 1e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recent:
    """The last losses of good steps.

    Attributes:
      loss_W: float32, nats; the next one takes place `count` mod W.
      count: int32, how many there have been.
    """

    loss_W: Leaf
    count: Leaf

    @classmethod
    def empty(cls, window: int) -> "Recent":
        return cls(jnp.zeros(window, jnp.float32), jnp.zeros((), jnp.int32))

    def limit(self, sigmas: float) -> jax.Array:
        """float32: a loss above it is a spike. Infinite for 0 sigmas, and before W losses."""
        window = self.loss_W.shape[0]
        mean = self.loss_W.mean()
        deviation = jnp.sqrt(jnp.square(self.loss_W - mean).mean())
        deviation = jnp.maximum(deviation, SMALLEST_DEVIATION * jnp.abs(mean))
        limit = mean + sigmas * deviation
        return jnp.where((self.count >= window) & (sigmas > 0), limit, jnp.inf)

    def with_loss(self, loss: jax.Array) -> "Recent":
        """One more."""
        place = self.count % self.loss_W.shape[0]
        return Recent(self.loss_W.at[place].set(loss), self.count + 1)
