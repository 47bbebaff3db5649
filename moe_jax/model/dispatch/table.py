"""Where the experts of one layer live, as arrays: all that a program knows of a plan.

Axes: T tokens here, K top_k, E experts, R copies of an expert, P physical experts (slots).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_jax.pytree import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """Where the experts of one layer live (identity: physical = logical).

    Attributes:
      logical_to_physical_ER: int32; the physical experts (slots) that hold expert e, padded
        with -1. Slot p lives on device p // (P / M).
      num_replicas_E: int32; valid entries of each row.
    """

    logical_to_physical_ER: Leaf
    num_replicas_E: Leaf


def physical_of(expert_TK: Int[Array, "T K"], table: Table) -> Int[Array, "T K"]:
    """The slot of every assignment: the first copy. -1 stays -1 (a position without a token)."""
    slot_TK = table.logical_to_physical_ER[:, 0][expert_TK]
    return jnp.where(expert_TK < 0, -1, slot_TK).astype(jnp.int32)
