"""Traffic: integers counted inside the running program, always on.

M devices on the expert axis, P physical experts (slots). A row is one token's activation.
Rows that stay on their device are not on the wire: the diagonals are zero.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one MoE layer moved and computed, summed over the data axis; all int32.

    Attributes:
      dispatch_MM: rows on the wire, [source, destination], on their way to the experts.
      combine_MM: rows on the wire, [source, destination], on their way home.
      distinct_MM: rows that an exchange which sends each token once to each distinct device
        would move on the way out; on the way home it would move the transpose.
      padding_MM: rows on the wire, both ways, that carry no token.
      computed_P: rows computed by each physical expert.
    """

    dispatch_MM: jax.Array
    combine_MM: jax.Array
    distinct_MM: jax.Array
    padding_MM: jax.Array
    computed_P: jax.Array

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
        rows_M = (dispatch_M, combine_M, distinct_M, padding_M)
        return cls(*(row_M.astype(jnp.int32)[None] for row_M in rows_M), computed_e)
