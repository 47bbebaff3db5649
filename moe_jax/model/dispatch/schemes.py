"""Dispatch: tokens to the devices of their experts and back. Called inside one `shard_map`.

Every scheme is a function

    dispatch(x_TD, expert_TK, weight_TK, table, experts_fn) -> (y_TD, Traffic)

of this device's tokens; `Traffic` holds this device's row of each table. The router is logical;
`table` alone knows where experts live, so outputs cannot depend on it except through the order of
sums. `exchange` sums at home in rank order, for outputs and for gradients (the `exact` combine:
bit-identical under every placement); `gathered` sums on the way (a reduce-scatter), which is equal
only within rounding.

Axes: T tokens here, M devices on the expert axis, X = M * T tokens of all of them, K top_k,
e experts here, P = M * e physical experts, A rows computed here, D d_model.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.mesh import Axis
from moe_jax.model.dispatch import sorting as sorting_lib
from moe_jax.model.dispatch.traffic import Traffic
from moe_jax.model.dispatch.wire import Wire
from moe_jax.pytree import Leaf

# (rows_AD sorted by local expert, group_sizes_e) -> [A, D]; zeros beyond the groups
ExpertsFn = Callable[[jax.Array, jax.Array], jax.Array]


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


def combine_at_home(
    rows_TKD: Float[Array, "T K D"], weight_TK: Float[Array, "T K"]
) -> Float[Array, "T D"]:
    """sum_k weight * row in rank order, in float32."""
    weighted_TKD = rows_TKD.astype(jnp.float32) * weight_TK[:, :, None]
    return sorting_lib.sum_in_rank_order(weighted_TKD).astype(rows_TKD.dtype)


def local(
    x_TD: Float[Array, "T D"],
    expert_TK: Int[Array, "T K"],
    weight_TK: Float[Array, "T K"],
    table: Table,
    experts_fn: ExpertsFn,
    *,
    num_physical: int,
    axis: Axis,
    transport: str,
) -> tuple[Float[Array, "T D"], Traffic]:
    """All experts on this device: sort, compute, unsort, combine."""
    assert jax.lax.axis_size(axis) == 1, "local dispatch keeps every expert on one device"
    slot_TK = physical_of(expert_TK, table)
    local_TK = jnp.where(slot_TK < 0, num_physical, slot_TK)
    sorting = sorting_lib.sort_by_expert(local_TK, num_local=num_physical)
    y_AD = experts_fn(sorting_lib.fan_out(x_TD, sorting), sorting.group_sizes_e)
    y_TD = combine_at_home(sorting_lib.fan_in(y_AD, sorting), weight_TK)
    zero_M = jnp.zeros_like(sorting.group_sizes_e[:1])
    return y_TD, Traffic.of_source(zero_M, zero_M, zero_M, zero_M, sorting.group_sizes_e)


def gathered(
    x_TD: Float[Array, "T D"],
    expert_TK: Int[Array, "T K"],
    weight_TK: Float[Array, "T K"],
    table: Table,
    experts_fn: ExpertsFn,
    *,
    num_physical: int,
    axis: Axis,
    transport: str,
) -> tuple[Float[Array, "T D"], Traffic]:
    """All-gather tokens, compute the local experts, reduce-scatter the weighted sums."""
    num_devices = jax.lax.axis_size(axis)
    num_local = num_physical // num_devices
    gather = functools.partial(jax.lax.all_gather, axis_name=axis, tiled=True)
    slot_TK = physical_of(expert_TK, table)
    x_XD, slot_XK, weight_XK = gather(x_TD), gather(slot_TK), gather(weight_TK)
    local_XK = _local_expert(slot_XK, num_local, axis)
    sorting = sorting_lib.sort_by_expert(local_XK, num_local=num_local)
    y_AD = experts_fn(sorting_lib.fan_out(x_XD, sorting), sorting.group_sizes_e)
    partial_XD = combine_at_home(sorting_lib.fan_in(y_AD, sorting), weight_XK)
    y_TD = jax.lax.psum_scatter(partial_XD, axis, tiled=True)

    # Every row goes everywhere and comes back from everywhere, whatever the router says.
    others_M = jnp.arange(num_devices) != jax.lax.axis_index(axis)
    rows_M = jnp.where(others_M, x_TD.shape[0], 0).astype(jnp.int32)
    distinct_M = _off_diagonal(_goes_to(slot_TK, num_local, num_devices).sum(0), axis)
    zero_M = jnp.zeros_like(rows_M)
    return y_TD, Traffic.of_source(rows_M, rows_M, distinct_M, zero_M, sorting.group_sizes_e)


def exchange(
    x_TD: Float[Array, "T D"],
    expert_TK: Int[Array, "T K"],
    weight_TK: Float[Array, "T K"],
    table: Table,
    experts_fn: ExpertsFn,
    *,
    num_physical: int,
    axis: Axis,
    transport: str,
) -> tuple[Float[Array, "T D"], Traffic]:
    """Each token once to every distinct device of its experts; one row per assignment back.

    Dropless. The slots of all tokens are all-gathered (K integers a token), from which every
    device derives which rows come from where without further talk.
    """
    num_devices = jax.lax.axis_size(axis)
    slot_TK = physical_of(expert_TK, table)
    wire = Wire.of(axis, transport, num_tokens=x_TD.shape[0])
    route = _plan_route(slot_TK, num_physical // num_devices, axis)
    y_AD = experts_fn(_send(wire, x_TD, route), route.sorting.group_sizes_e)
    y_TD = combine_at_home(_send_home(wire, y_AD, route), weight_TK)

    out_M, home_M = route.tokens_to_M, route.assignments_from_M
    padding_M = wire.padding_M(out_M) + wire.padding_M(home_M)
    out_M, home_M = _off_diagonal(out_M, axis), _off_diagonal(home_M, axis)
    group_sizes_e = route.sorting.group_sizes_e
    return y_TD, Traffic.of_source(out_M, home_M, out_M, padding_M, group_sizes_e)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Route:
    """All indices of one exchange, as this device needs them. Segments are in device order.

    Attributes:
      token_R: token of each row sent out (by device, then token); R = T * min(K, M).
      assignment_N: assignment (t * K + k) of each row that comes home (by device, then t * K + k).
      home_position_TK: where the row of an assignment lies among those that come home.
      arrival_A: for each row computed here, the arrived row that it is.
      position_by_source_A: for each row sent home (by source, then assignment), the row computed.
      arrival_by_assignment_A: inverse of `position_by_source_A`, padded beyond the real rows.
      tokens_to_M, tokens_from_M: rows out; assignments_to_M, assignments_from_M: rows home, where
        `to` counts what this device's tokens cause and `from` what it computes for others.
    """

    token_R: Leaf
    assignment_N: Leaf
    home_position_TK: Leaf
    arrival_A: Leaf
    position_by_source_A: Leaf
    arrival_by_assignment_A: Leaf
    tokens_to_M: Leaf
    tokens_from_M: Leaf
    assignments_to_M: Leaf
    assignments_from_M: Leaf
    sorting: sorting_lib.Sorting


def _plan_route(slot_TK: jax.Array, num_local: int, axis: Axis) -> _Route:
    num_devices = jax.lax.axis_size(axis)
    num_tokens, top_k = slot_TK.shape
    device_TK = jnp.where(slot_TK < 0, num_devices, slot_TK // num_local)

    # Home: rows out are (device, token) pairs; rows back are assignments, by device.
    goes_MT = _goes_to(slot_TK, num_local, num_devices).T
    token_R = _indices_of_true(goes_MT, size=num_tokens * min(top_k, num_devices)) % num_tokens
    assignment_N = jnp.argsort(device_TK.reshape(-1), stable=True).astype(jnp.int32)
    home_position_N = jnp.zeros_like(assignment_N)
    home_position_N = home_position_N.at[assignment_N].set(
        jnp.arange(assignment_N.size, dtype=jnp.int32)
    )
    home_position_TK = jnp.where(
        slot_TK < 0, assignment_N.size, home_position_N.reshape(slot_TK.shape)
    )
    assignments_to_M = jnp.sum(
        device_TK.reshape(-1, 1) == jnp.arange(num_devices)[None], axis=0, dtype=jnp.int32
    )

    # Expert side: the same from everybody's slots.
    slot_XK = jax.lax.all_gather(slot_TK, axis, tiled=True)
    local_XK = _local_expert(slot_XK, num_local, axis)
    sorting = sorting_lib.sort_by_expert(local_XK, num_local=num_local)
    here_XK = local_XK < num_local
    arrives_X = here_XK.any(axis=1)
    arrival_X = jnp.cumsum(arrives_X, dtype=jnp.int32) - 1
    by_assignment_A = _indices_of_true(here_XK, size=sorting.order_A.size)
    rank_N = (jnp.cumsum(here_XK.reshape(-1), dtype=jnp.int32) - 1)[sorting.order_A]
    by_source = (num_devices, num_tokens)
    return _Route(
        token_R=token_R,
        assignment_N=assignment_N,
        home_position_TK=home_position_TK,
        arrival_A=arrival_X[sorting.order_A // top_k],
        position_by_source_A=sorting.position_XK.reshape(-1)[by_assignment_A],
        arrival_by_assignment_A=rank_N,
        tokens_to_M=goes_MT.sum(1, dtype=jnp.int32),
        tokens_from_M=arrives_X.reshape(by_source).sum(1, dtype=jnp.int32),
        assignments_to_M=assignments_to_M,
        assignments_from_M=here_XK.reshape(num_devices, -1).sum(1, dtype=jnp.int32),
        sorting=sorting,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send(wire: Wire, x_TD: jax.Array, route: _Route) -> jax.Array:
    """Tokens to the devices of their experts, expanded there to one row per assignment, [A, D].

    Backward: one row per assignment comes home and is summed there in rank order. Summing where
    the rows were expanded would save rows, but its order would depend on the placement.
    """
    num_received = jax.lax.axis_size(wire.axis) * x_TD.shape[0]
    arrived_XD = wire.exchange(
        x_TD[route.token_R], route.tokens_to_M, route.tokens_from_M, num_received
    )
    return _zero_beyond_groups(arrived_XD[route.arrival_A], route)


def _send_fwd(wire, x_TD, route):
    return _send(wire, x_TD, route), route


def _send_bwd(wire, route, g_AD):
    g_TKD = _send_home(wire, g_AD, route)
    return sorting_lib.sum_in_rank_order(g_TKD), sorting_lib.no_gradient(route)


_send.defvjp(_send_fwd, _send_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send_home(wire: Wire, y_AD: jax.Array, route: _Route) -> jax.Array:
    """Computed rows, one per assignment, back to the devices of their tokens, [T, K, D]."""
    home_ND = wire.exchange(
        sorting_lib.take_rows(y_AD, route.position_by_source_A),
        route.assignments_from_M,
        route.assignments_to_M,
        route.home_position_TK.size,
    )
    return sorting_lib.take_rows(home_ND, route.home_position_TK)


def _send_home_fwd(wire, y_AD, route):
    return _send_home(wire, y_AD, route), route


def _send_home_bwd(wire, route, g_TKD):
    arrived_AD = wire.exchange(
        g_TKD.reshape(-1, g_TKD.shape[-1])[route.assignment_N],
        route.assignments_to_M,
        route.assignments_from_M,
        route.sorting.order_A.size,
    )
    g_AD = _zero_beyond_groups(arrived_AD[route.arrival_by_assignment_A], route)
    return g_AD, sorting_lib.no_gradient(route)


_send_home.defvjp(_send_home_fwd, _send_home_bwd)


def _zero_beyond_groups(rows_AD: jax.Array, route: _Route) -> jax.Array:
    real_A = jnp.arange(rows_AD.shape[0]) < route.sorting.group_sizes_e.sum()
    return jnp.where(real_A[:, None], rows_AD, jnp.zeros((), rows_AD.dtype))


def _local_expert(slot_XK: jax.Array, num_local: int, axis: Axis) -> jax.Array:
    """Local expert of each assignment; `num_local` where it is computed elsewhere or nowhere."""
    local_XK = slot_XK - jax.lax.axis_index(axis) * num_local
    return jnp.where((local_XK >= 0) & (local_XK < num_local), local_XK, num_local)


def _goes_to(slot_TK: jax.Array, num_local: int, num_devices: int) -> jax.Array:
    """bool [T, M]: does token t have an expert on device m?"""
    device_TK1 = jnp.where(slot_TK < 0, num_devices, slot_TK // num_local)[:, :, None]
    return (device_TK1 == jnp.arange(num_devices)[None, None]).any(axis=1)


def _indices_of_true(mask: jax.Array, *, size: int) -> jax.Array:
    """Flat indices of the true entries in order, int32 [size]; arbitrary valid ones beyond."""
    return jnp.nonzero(mask.reshape(-1), size=size, fill_value=0)[0].astype(jnp.int32)


def _off_diagonal(rows_M: jax.Array, axis: Axis) -> jax.Array:
    me = jax.lax.axis_index(axis)
    return jnp.where(jnp.arange(rows_M.size) == me, 0, rows_M).astype(jnp.int32)


SCHEMES = {"local": local, "gathered": gathered, "exchange": exchange}
