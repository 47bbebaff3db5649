"""One layer's rows in coherent dispatch: to their experts, and on to the device of the best one.

ExFlow (arXiv 2401.08383). A token sends its residual row once to each distinct device of its
experts, where norm and experts are applied; results go to the device of its best expert (k = 0),
which has the residual row and holds the token from then on. With top_k = 1 that is where the only
result is: one exchange a layer.

Axes: X tokens of the group, M devices, T = X / M, K top_k, R packed rows, W rows a tile, A rows
computed here, e experts here, N rows that arrive, D d_model.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.model.dispatch import sorting as sorting_lib
from moe_jax.model.dispatch import stay
from moe_jax.model.dispatch.schemes import ExpertsFn, Setting
from moe_jax.model.dispatch.stay import Leg, Residence
from moe_jax.model.dispatch.traffic import Traffic
from moe_jax.model.dispatch.wire import Wire


@dataclasses.dataclass(frozen=True)
class Onward:
    """The tokens here before a layer's experts. Called inside `shard_map`.

    Attributes:
      setting: of the dispatch.
      wire: how rows travel.
      tile: W.
      x_RD: residual rows of the tokens here, packed.
      here: where all tokens are.
    """

    setting: Setting
    wire: Wire
    tile: int
    x_RD: jax.Array
    here: Residence

    def __call__(
        self,
        slot_XK: jax.Array,
        weight_XK: jax.Array,
        norm: Callable[[jax.Array], jax.Array],
        experts_fn: ExpertsFn,
    ) -> tuple[jax.Array, jax.Array, Traffic]:
        """Moves the tokens on.

        Args:
          slot_XK: int32, by descending weight; the same on all devices, as are the weights. A token
            has K slots, a position without a token -1.
          weight_XK: float32.
          norm: [N, D] -> [N, D], of the rows that experts see.
          experts_fn: the experts here.

        Returns:
          x_RD of the tokens that are here then, packed; at_X, where all are; this device's traffic.
        """
        device_XK = jnp.where(slot_XK < 0, -1, slot_XK // self.setting.num_local)
        first_XK = _first_of(device_XK)
        out = self._out(device_XK, first_XK)
        top_k, num_group = slot_XK.shape[1], len(slot_XK)
        arrived_XD = out.move(
            lambda item_W: self.x_RD[self.here.rank_X[item_W // top_k]],
            num_group,
            like_ZZ=self.x_RD,
            tile=self.tile,
        )
        arrival_X = out.position_N.reshape(-1, top_k).min(axis=1)
        sorting = self._sort(slot_XK)
        rows_AD = norm(arrived_XD)[arrival_X[sorting.order_A // top_k]]
        y_AD = experts_fn(rows_AD, sorting.group_sizes_e)

        rows_ND, row_XK, on = y_AD, sorting.position_XK, None
        singly = self.setting.combine == "exact" or top_k == 1
        if top_k > 1:
            on = self._on(device_XK, first_XK, num_sent=len(y_AD) if singly else num_group)
            rows_ND = self._send_on(on, y_AD, row_XK, weight_XK)
            row_XK = on.position_N.reshape(-1, top_k)
        next_X = device_XK[:, 0]
        there = Residence.of(next_X, self.setting.axes, len(self.x_RD))

        def compute(i):
            token_W = jax.lax.dynamic_slice_in_dim(there.token_R, i * self.tile, self.tile)
            weight_WK = weight_XK[token_W] if singly else jnp.ones((self.tile, top_k))
            y_WD = _weighted_sum(rows_ND, row_XK[token_W], weight_WK).astype(self.x_RD.dtype)
            return i * self.tile, arrived_XD[arrival_X[token_W]] + y_WD

        tiles = stay.num_tiles(there.count, self.tile)
        x_RD = stay.fill(compute, tiles, jnp.zeros_like(self.x_RD))
        return x_RD, next_X, _traffic(out, on, sorting.group_sizes_e)

    def _out(self, device_XK: jax.Array, first_XK: jax.Array) -> Leg:
        """Each token once to every distinct device of its experts; an item is (token, k)."""
        source_XK = jnp.broadcast_to(self.here.at_X[:, None], device_XK.shape)
        target_XK = jnp.where(first_XK, device_XK, -1)
        num_sent = len(device_XK) * min(device_XK.shape[1], self.setting.num_devices)
        return Leg.of(source_XK.reshape(-1), target_XK.reshape(-1), self.wire, num_sent)

    def _sort(self, slot_XK: jax.Array) -> sorting_lib.Sorting:
        """The assignments computed here, by expert, tokens in their order."""
        num_local = self.setting.num_local
        local_XK = slot_XK - jax.lax.axis_index(self.setting.axes) * num_local
        here_XK = (slot_XK >= 0) & (local_XK >= 0) & (local_XK < num_local)
        return sorting_lib.sort_by_expert(
            jnp.where(here_XK, local_XK, num_local), num_local=num_local
        )

    def _on(self, device_XK: jax.Array, first_XK: jax.Array, num_sent: int) -> Leg:
        """To the best expert's device: each assignment (`exact`) or one sum from each device."""
        source_XK = device_XK
        if self.setting.combine == "partial":
            source_XK = jnp.where(first_XK, device_XK, -1)
        target_XK = jnp.broadcast_to(device_XK[:, :1], device_XK.shape)
        return Leg.of(source_XK.reshape(-1), target_XK.reshape(-1), self.wire, num_sent)

    def _send_on(
        self, on: Leg, y_AD: jax.Array, row_XK: jax.Array, weight_XK: jax.Array
    ) -> jax.Array:
        num_group, top_k = row_XK.shape

        def assignment(item_W):
            return sorting_lib.take_rows(y_AD, row_XK.reshape(-1)[item_W])

        def partial_sum(item_W):
            token_W = item_W // top_k
            sum_WD = _weighted_sum(y_AD, row_XK[token_W], weight_XK[token_W])
            return sum_WD.astype(y_AD.dtype)

        exact = self.setting.combine == "exact"
        most = top_k if exact else min(top_k, self.setting.num_devices)
        rows_of = assignment if exact else partial_sum
        return on.move(rows_of, num_group * most, like_ZZ=y_AD, tile=self.tile)


def _first_of(device_XK: jax.Array) -> jax.Array:
    """bool [X, K]: the first assignment of its token on its device."""
    top_k = device_XK.shape[1]
    earlier_KK = jnp.tril(jnp.ones((top_k, top_k), bool), -1)
    same_XKK = device_XK[:, :, None] == device_XK[:, None, :]
    return (device_XK >= 0) & ~(same_XKK & earlier_KK[None]).any(axis=2)


def _weighted_sum(rows_ND: jax.Array, row_WK: jax.Array, weight_WK: jax.Array) -> jax.Array:
    """sum_k weight * row in rank order, in float32; rows beyond the buffer count as zeros."""
    rows_WKD = sorting_lib.take_rows(rows_ND, row_WK).astype(jnp.float32)
    return sorting_lib.sum_in_rank_order(rows_WKD * weight_WK[:, :, None])


def _traffic(out: Leg, on: Leg | None, group_sizes_e: jax.Array) -> Traffic:
    out_M, padding_M = out.rows_M(), out.padding_M()
    on_M = jnp.zeros_like(out_M)
    if on is not None:
        on_M, padding_M = on.rows_M(), padding_M + on.padding_M()
    return Traffic.of_source(out_M, on_M, out_M, padding_M, group_sizes_e)
