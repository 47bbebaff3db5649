"""Traffic: integers counted inside the running program, always on.

M devices on the expert axis, P physical experts (slots), E logical ones. A row is one token's
activation. Rows that stay on their device are not on the wire: the diagonals are zero.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.mesh import Axis
from moe_jax.pytree import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one MoE layer moved and computed, summed over replicas; all int32.

    Attributes:
      dispatch_MM: rows on the wire, [source, destination], on their way to the experts.
      combine_MM: rows on the wire, [source, destination], on their way home.
      distinct_MM: rows that an exchange which sends each token once to each distinct device
        would move on the way out; on the way home it would move the transpose.
      padding_MM: rows on the wire, both ways, that carry no token.
      computed_P: rows computed by each physical expert.
      dropped_ME: assignments beyond the capacity, by the token's device and the logical expert.
        Schemes do not know of them: the layer adds them.
    """

    dispatch_MM: Leaf
    combine_MM: Leaf
    distinct_MM: Leaf
    padding_MM: Leaf
    computed_P: Leaf
    dropped_ME: Leaf = None

    @classmethod
    def of_source(
        cls,
        dispatch_M: jax.Array,
        combine_M: jax.Array,
        distinct_M: jax.Array,
        padding_M: jax.Array,
        computed_e: jax.Array,
    ) -> "Traffic":
        """What one device sent and computed: its row of each table, to be joined by `shard_map`."""

        def row(rows_M: jax.Array) -> jax.Array:
            return rows_M.astype(jnp.int32)[None]

        return cls(
            dispatch_MM=row(dispatch_M),
            combine_MM=row(combine_M),
            distinct_MM=row(distinct_M),
            padding_MM=row(padding_M),
            computed_P=computed_e,
        )


def away(rows_M: jax.Array, axes: Axis) -> jax.Array:
    """Rows to each device [M], without those that stay on this one. Inside `shard_map`."""
    away_M = jnp.arange(rows_M.size) != jax.lax.axis_index(axes)
    return jnp.where(away_M, rows_M, 0)
