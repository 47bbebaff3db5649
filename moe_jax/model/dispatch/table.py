"""Where the experts of one layer live, as arrays: all that a program knows of a plan.

Of an expert with several copies, each token takes one: placement/copies.py says which, and this
module is that rule inside a program. Every device chooses for the tokens it holds, from where it
is and from the tokens' positions, and no device asks another. The work is on [E, R] and [T, K]
integers.

Axes: T tokens here, K top_k, E experts, R copies of an expert, P physical experts (slots),
N nodes, X = N + 1 rows of shares, B batch, S sequence.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_jax.pytree import Leaf

_PART_BITS = 6  # placement/shares.py divides every expert in 2**6 parts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """Where the experts of one layer live (identity: physical = logical).

    Attributes:
      logical_to_physical_ER: int32; the physical experts (slots) that hold expert e, ascending,
        padded with -1. Slot p lives on device p // (P / M).
      num_replicas_E: int32; valid entries of each row.
      share_end_XER: int32; shares of the copies, each added to those before it, by node of the
        token and in a last row for experts that are not a token's best: the rule `stay`. None, or
        zeros (a layer without shares): the rule `local`.
    """

    logical_to_physical_ER: Leaf
    num_replicas_E: Leaf
    share_end_XER: Leaf | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Home:
    """Where the tokens are for which copies are chosen.

    Attributes:
      device: int32 scalar, as plans count.
      devices_per_node: devices are numbered node by node.
      slots_per_device: P / M.
    """

    device: Leaf
    devices_per_node: int = dataclasses.field(metadata={"static": True})
    slots_per_device: int = dataclasses.field(metadata={"static": True})


def rule_position(position_BS: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """What copies take turns by: row in the batch + position in the sequence.

    Neighbours in a sequence differ, and so do the sequences of a decode step, which may all be at
    one position.
    """
    return position_BS + jnp.arange(len(position_BS), dtype=position_BS.dtype)[:, None]


def slots_of(
    expert_TK: Int[Array, "T K"], position_T: Int[Array, " T"], table: Table, home: Home
) -> Int[Array, "T K"]:
    """int32: the slot of every assignment; -1 stays -1 (a position without a token)."""
    real_TK, expert_TK = expert_TK >= 0, jnp.maximum(expert_TK, 0)
    if table.logical_to_physical_ER.shape[1] == 1:
        slot_TK = table.logical_to_physical_ER[:, 0][expert_TK]
    else:
        slot_TK = _in_turn(expert_TK, position_T, table, home)
        if table.share_end_XER is not None:
            has_shares = (table.share_end_XER > 0).any()
            by_share_TK = _by_share(expert_TK, position_T, table, table.share_end_XER, home)
            slot_TK = jnp.where(has_shares, by_share_TK, slot_TK)
    return jnp.where(real_TK, slot_TK, -1).astype(jnp.int32)


def experts_of(slot_ER: Int[Array, "E R"], num_physical: int) -> Int[Array, " P"]:
    """int32: the expert that each slot holds, from the slots of every expert."""
    expert_E1 = jnp.arange(len(slot_ER), dtype=jnp.int32)[:, None]
    nowhere_ER = jnp.where(slot_ER < 0, num_physical, slot_ER)
    expert_P = jnp.zeros(num_physical, jnp.int32)
    return expert_P.at[nowhere_ER].set(jnp.broadcast_to(expert_E1, slot_ER.shape), mode="drop")


def _in_turn(expert_TK: jax.Array, position_T: jax.Array, table: Table, home: Home) -> jax.Array:
    """The rule `local`: of the nearest copies, number (position + k) mod their number."""
    slot_ER, device_ER = table.logical_to_physical_ER, _device_of_copy(table, home)
    on_node_ER = device_ER // home.devices_per_node == home.device // home.devices_per_node
    near_ER = jnp.where(device_ER == home.device, 2, jnp.where(on_node_ER, 1, 0))
    near_ER = jnp.where(device_ER < 0, -1, near_ER)
    nearest_ER = near_ER == near_ER.max(axis=1, keepdims=True)
    first_ER = jnp.argsort(~nearest_ER, axis=1, stable=True)
    candidate_ER = jnp.take_along_axis(slot_ER, first_ER, axis=1)
    count_E = nearest_ER.sum(axis=1, dtype=jnp.int32)
    turn_TK = position_T[:, None] + jnp.arange(expert_TK.shape[1], dtype=jnp.int32)[None]
    return candidate_ER[expert_TK, turn_TK.astype(jnp.int32) % count_E[expert_TK]]


def _by_share(
    expert_TK: jax.Array,
    position_T: jax.Array,
    table: Table,
    share_end_XER: jax.Array,
    home: Home,
) -> jax.Array:
    """The rule `stay`: the best expert at home if it can be, everything else by shares."""
    slot_ER, top_k = table.logical_to_physical_ER, expert_TK.shape[1]
    mixed_TK = position_T.astype(jnp.uint32)[:, None] * jnp.uint32(0x9E3779B1)
    mixed_TK = mixed_TK + jnp.arange(top_k, dtype=jnp.uint32)[None] * jnp.uint32(0x85EBCA6B)
    part_TK = (mixed_TK >> (32 - _PART_BITS)).astype(jnp.int32)
    best_K = jnp.arange(top_k) == 0
    row_K = jnp.where(best_K, home.device // home.devices_per_node, len(share_end_XER) - 1)
    passed_TKR = share_end_XER[row_K[None], expert_TK] <= part_TK[:, :, None]
    copy_TK = passed_TKR.sum(axis=2, dtype=jnp.int32)
    on_home_ER = _device_of_copy(table, home) == home.device
    here_TK = best_K[None] & on_home_ER.any(axis=1)[expert_TK]
    copy_TK = jnp.where(here_TK, on_home_ER.argmax(axis=1).astype(jnp.int32)[expert_TK], copy_TK)
    # In a layer without shares every copy is passed; what is read there is not used.
    return slot_ER[expert_TK, jnp.minimum(copy_TK, slot_ER.shape[1] - 1)]


def _device_of_copy(table: Table, home: Home) -> jax.Array:
    """int32 [E, R]: the device of every copy, -1 where there is none."""
    slot_ER = table.logical_to_physical_ER
    copy_R = jnp.arange(slot_ER.shape[1], dtype=jnp.int32)
    real_ER = copy_R[None] < table.num_replicas_E[:, None]
    return jnp.where(real_ER, slot_ER // home.slots_per_device, -1)
