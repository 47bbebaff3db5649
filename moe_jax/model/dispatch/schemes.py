"""Dispatch: tokens to the devices of their experts and back. Called inside one `shard_map`.

    dispatch(x_TD, slot_TK, weight_TK, experts_fn, setting) -> (y_TD, Traffic)

of this device's tokens; `Traffic` holds this device's row of each table. The router is logical and
a `Table` says in which slots experts live; here only slots are left. A scheme is a list of hops
(hop.py) to the devices of the experts; what happens to rows on that path (path.py) is the same for
all: out, through the experts, back and summed, as `setting.combine` says.

- local: no hop, all experts are here.
- gathered: every token is shown to every device; sums are made on the way back.
- exchange: each token once to every distinct device of its experts.
- hierarchical: each token once to every distinct node of its experts, to the device with this
  one's place there, and from that one to the distinct devices of the node.

Axes: T tokens here, M devices on the expert axes, K top_k, e experts here, P = M * e physical
experts, A rows computed here, D d_model.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.mesh import Axis
from moe_jax.model.dispatch import hop as hop_lib
from moe_jax.model.dispatch import path as path_lib
from moe_jax.model.dispatch import sorting as sorting_lib
from moe_jax.model.dispatch.hop import Exchange, Gather
from moe_jax.model.dispatch.path import Path
from moe_jax.model.dispatch.traffic import Traffic, away
from moe_jax.model.dispatch.wire import Wire

# (rows_AD sorted by local expert, group_sizes_e) -> [A, D]; zeros beyond the groups
ExpertsFn = Callable[[jax.Array, jax.Array], jax.Array]

COMBINES = ("exact", "partial", "reproducible")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a dispatch has to know of its surroundings; all static.

    Attributes:
      axes: of the mesh, over which experts are split, the slowest first. Device m of a plan is
        the m-th in their joint order, and holds slots m * e to (m + 1) * e - 1.
      num_physical: P.
      transport: how rows travel, see wire.py.
      near: devices of the axes, one after the other, that share a process.
      combine: where the rows of a token are summed: "exact" = at home, in rank order, one row per
        assignment back: bit-identical under every placement, gradients included; "partial" = where
        its experts are, one row per device back: fewest rows, equal within rounding;
        "reproducible" = there too, on a common grid (grid.py): as few rows, of 32-bit integers,
        and bit-identical under every placement, gradients included.
      capacity: rows that any expert has at most, whatever the router says; None: not known.
      wire_dtype: of rows on their way to the experts, see quantise.py; "" = that of activations.
    """

    axes: tuple[str, ...]
    num_physical: int
    transport: str
    near: int
    combine: str
    capacity: int | None = None
    wire_dtype: str = ""

    @property
    def num_devices(self) -> int:
        """M; to be read inside the `shard_map`."""
        return jax.lax.axis_size(self.axes)

    @property
    def num_local(self) -> int:
        """e; to be read inside the `shard_map`."""
        return self.num_physical // self.num_devices


# (slot_TK, setting) -> hops of the way out, and the slots of the tokens at its end: [X, K], -1
# where an assignment is not computed here
Hops = tuple[Exchange | Gather, ...]
Way = Callable[[jax.Array, Setting], tuple[Hops, jax.Array]]
Scheme = Callable[[jax.Array, jax.Array, jax.Array, ExpertsFn, Setting], tuple[jax.Array, Traffic]]


def local(slot_TK: Int[Array, "T K"], setting: Setting) -> tuple[Hops, Int[Array, "T K"]]:
    """All experts are on this device."""
    assert setting.num_devices == 1, "local dispatch keeps every expert on one device"
    return (), slot_TK


def gathered(slot_TK: Int[Array, "T K"], setting: Setting) -> tuple[Hops, Int[Array, "X K"]]:
    """Every token to every device, by an all-gather; sums come back by a reduce-scatter."""
    slot_MTK = hop_lib.everyone(slot_TK, [setting.axes])
    hop, here_XK = hop_lib.gather(_device_of(slot_MTK, setting), setting.axes)
    return (hop,), _arrived(slot_MTK, here_XK)


def exchange(slot_TK: Int[Array, "T K"], setting: Setting) -> tuple[Hops, Int[Array, "X K"]]:
    """Each token once to every distinct device of its experts, over all axes as one."""
    wire = Wire.of(setting.axes, setting.transport, num_tokens=len(slot_TK), near=setting.near)
    slot_MTK = hop_lib.everyone(slot_TK, [setting.axes])
    device_MTK = _device_of(slot_MTK, setting)
    hop, here_XK = hop_lib.exchange(
        device_MTK, lambda: device_MTK[None], wire, most=setting.num_local
    )
    return (hop,), _arrived(slot_MTK, here_XK)


def hierarchical(slot_TK: Int[Array, "T K"], setting: Setting) -> tuple[Hops, Int[Array, "Y K"]]:
    """Two exchanges: between nodes along the first axis, then within the node along the others.

    N nodes of M devices. X are the tokens that a device relays, those of its place on all nodes; Y
    are all tokens, in the relays' order.
    """
    node_axis, device_axes = setting.axes[0], setting.axes[1:]
    node, place = jax.lax.axis_index(node_axis), jax.lax.axis_index(device_axes)
    devices, top_k = jax.lax.axis_size(device_axes), slot_TK.shape[1]
    slot_MNTK = hop_lib.everyone(slot_TK, [node_axis, device_axes])
    device_MNTK = _device_of(slot_MNTK, setting)
    node_MNTK = jnp.where(device_MNTK < 0, -1, device_MNTK // devices)
    between = Wire.of(
        node_axis,
        setting.transport,
        num_tokens=len(slot_TK),
        near=setting.near // devices if setting.near % devices == 0 else 1,
        beside=device_axes,
    )
    first, _ = hop_lib.exchange(
        node_MNTK[place], lambda: node_MNTK, between, most=devices * setting.num_local
    )

    def relayed_MXK(node: jax.Array) -> jax.Array:
        """Devices within a node of the assignments that its devices relay."""
        at_MNTK = jnp.where(node_MNTK == node, device_MNTK % devices, -1)
        return at_MNTK.reshape(devices, -1, top_k)

    node_N = jnp.arange(jax.lax.axis_size(node_axis), dtype=jnp.int32)
    within = Wire.of(
        device_axes,
        setting.transport,
        num_tokens=len(node_N) * len(slot_TK),
        near=math.gcd(setting.near, devices),  # blocks of both sizes begin at device 0
    )
    second, here_YK = hop_lib.exchange(
        relayed_MXK(node), lambda: jax.vmap(relayed_MXK)(node_N), within, most=setting.num_local
    )
    hops = tuple(hop for hop in (first, second) if jax.lax.axis_size(hop.axis) > 1)
    return hops, _arrived(slot_MNTK, here_YK)


def _arrived(slot_ZTK: jax.Array, here_XK: jax.Array) -> jax.Array:
    """Slots of the tokens of all devices; -1 where an assignment did not come here."""
    return jnp.where(here_XK, slot_ZTK.reshape(here_XK.shape), -1)


def _along(
    way: Way,
    x_TD: Float[Array, "T D"],
    slot_TK: Int[Array, "T K"],
    weight_TK: Float[Array, "T K"],
    experts_fn: ExpertsFn,
    setting: Setting,
) -> tuple[Float[Array, "T D"], Traffic]:
    """Out, through the experts, back: the same for every scheme. Dropless."""
    if setting.num_devices == 1:
        way = local  # rows are not copied to where they are
    hops, slot_XK = way(slot_TK, setting)
    first = jax.lax.axis_index(setting.axes) * setting.num_local
    local_XK = jnp.where(slot_XK < 0, setting.num_local, slot_XK - first)
    sorting = sorting_lib.sort_by_expert(
        local_XK, num_local=setting.num_local, capacity=setting.capacity
    )
    assignment_TK = jnp.arange(slot_TK.size, dtype=jnp.int32).reshape(slot_TK.shape)
    path = Path(hops, sorting, assignment_TK)

    rows_AD = path_lib.spread(path, x_TD, combine=setting.combine, wire_dtype=setting.wire_dtype)
    y_AD = experts_fn(rows_AD, sorting.group_sizes_e)
    if setting.combine == "exact":
        rows_TKD = path_lib.collect(path, y_AD)
        y_TD = sorting_lib.weighted_sum(rows_TKD, weight_TK).astype(rows_TKD.dtype)
    else:
        weight_A = path_lib.assignments(path, weight_TK)
        weighted_AD = y_AD.astype(jnp.float32) * weight_A[:, None]
        y_TD = path_lib.collect_sums(path, weighted_AD, x_TD.dtype, combine=setting.combine)
    return y_TD, _traffic(path, slot_TK, setting)


def _traffic(path: Path, slot_TK: jax.Array, setting: Setting) -> Traffic:
    """This device's rows: its own tokens out, and what it computed for others home."""
    size, singly = setting.num_devices, setting.combine == "exact"
    device_TK1 = _device_of(slot_TK, setting)[:, :, None]
    goes_TM = (device_TK1 == jnp.arange(size, dtype=jnp.int32)[None, None]).any(axis=1)
    distinct_M = goes_TM.sum(axis=0, dtype=jnp.int32)
    zero_M = jnp.zeros_like(distinct_M)
    out_M, home_M, padding_M = zero_M, zero_M, zero_M
    for hop in path.hops:
        on_axis = _devices_along(hop.axis, setting.axes)
        out_M = out_M.at[on_axis].add(hop.rows_out_M())
        home_M = home_M.at[on_axis].add(hop.rows_home_M(singly=singly))
        padding_M = padding_M.at[on_axis].add(hop.padding_M(singly=singly))
    out_M, home_M, distinct_M, padding_M = (
        away(rows_M, setting.axes) for rows_M in (out_M, home_M, distinct_M, padding_M)
    )
    computed_e = path.sorting.group_sizes_e
    return Traffic.of_source(out_M, home_M, distinct_M, padding_M, computed_e)


def _devices_along(axis: Axis, axes: tuple[str, ...]) -> jax.Array:
    """int32: the devices that share this one's coordinates on all axes but these, in order."""
    along = (axis,) if isinstance(axis, str) else axis
    device = jnp.zeros(1, jnp.int32)
    for name in axes:
        size = jax.lax.axis_size(name)
        here = (
            jnp.arange(size, dtype=jnp.int32) if name in along else jax.lax.axis_index(name)[None]
        )
        device = (device[:, None] * size + here[None]).reshape(-1)
    return device


def _device_of(slot_ZTK: jax.Array, setting: Setting) -> jax.Array:
    """int32: the device of each slot; -1 where there is none."""
    return jnp.where(slot_ZTK < 0, -1, slot_ZTK // setting.num_local)


WAYS: dict[str, Way] = {
    "local": local,
    "gathered": gathered,
    "exchange": exchange,
    "hierarchical": hierarchical,
    "shuffled": exchange,  # from homes that shuffled.py chooses
}
SCHEMES: dict[str, Scheme] = {name: functools.partial(_along, way) for name, way in WAYS.items()}
