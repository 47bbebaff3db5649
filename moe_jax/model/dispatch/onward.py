"""One layer's rows in coherent dispatch: to their experts, and on to the device of the best one.

ExFlow (arXiv 2401.08383). A token sends its residual row once to each distinct device of its
experts, where norm and experts are applied; results go to the device of its best expert (k = 0),
which has the residual row and holds the token from then on. With top_k = 1 that is where the only
result is: one exchange a layer.

Axes: X tokens of the group, M devices, T = X / M, K top_k, R packed rows, W rows a tile, A rows
computed here, e experts here, N rows that arrive, D d_model.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.model.dispatch import grid, stay
from moe_jax.model.dispatch import sorting as sorting_lib
from moe_jax.model.dispatch.hop import first_of
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
        with_shared: Callable[[jax.Array, jax.Array], jax.Array],
        add: Callable[[jax.Array, jax.Array], jax.Array],
    ) -> tuple[jax.Array, jax.Array, Traffic]:
        """Moves the tokens on.

        Args:
          slot_XK: int32, by descending weight; the same on all devices, as are the weights. A token
            has K slots, a position without a token -1.
          weight_XK: float32.
          norm: [N, D] -> [N, D], of the rows that experts see.
          experts_fn: the experts here; of each, its columns on this device of `tensor`.
          with_shared: [N, D] and [N, D] -> [N, D], residual rows and what the experts say of them
            -> that and what the shared expert says, where there is one; of its columns here.
          add: [N, D] and [N, D] -> [N, D], residual rows and what all experts say of them -> the
            rows that tokens go on with, where they go on from.

        Returns:
          x_RD of the tokens that are here then, packed; at_X, where all are; this device's traffic.
        """
        device_XK = jnp.where(slot_XK < 0, -1, slot_XK // self.setting.num_local)
        first_XK = first_of(device_XK)
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

        combine = self._combine(y_AD, sorting.position_XK, weight_XK)
        rows_ND, row_XK, on = y_AD, sorting.position_XK, None
        if top_k > 1:
            on = self._on(device_XK, first_XK, num_sent=combine.most_sent)
            rows_ND = on.move(
                lambda item_W: combine.sent(item_W // top_k, item_W % top_k),
                combine.most_received(self.setting.num_devices),
                like_ZZ=combine.like_ZZ,
                tile=self.tile,
            )
            row_XK = on.position_N.reshape(-1, top_k)
        next_X = device_XK[:, 0]
        there = Residence.of(next_X, self.setting.axes, len(self.x_RD))

        def compute(i):
            token_W = jax.lax.dynamic_slice_in_dim(there.token_R, i * self.tile, self.tile)
            y_WD = combine.total(token_W, sorting_lib.take_rows(rows_ND, row_XK[token_W]))
            x_WD = arrived_XD[arrival_X[token_W]]
            return i * self.tile, (x_WD, with_shared(x_WD, y_WD.astype(self.x_RD.dtype)))

        tiles, nothing_RD = stay.num_tiles(there.count, self.tile), jnp.zeros_like(self.x_RD)
        x_RD, y_RD = stay.fill(compute, tiles, (nothing_RD, nothing_RD))
        y_RD = stay.whole(y_RD, there, num_group // self.setting.num_devices)

        def finish(i):
            start = i * self.tile
            cut = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=self.tile
            )
            return start, add(cut(x_RD), cut(y_RD))

        x_RD = stay.fill(finish, tiles, nothing_RD)
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
        exact = self.setting.combine == "exact"
        source_XK = device_XK if exact else jnp.where(first_XK, device_XK, -1)
        target_XK = jnp.broadcast_to(device_XK[:, :1], device_XK.shape)
        return Leg.of(source_XK.reshape(-1), target_XK.reshape(-1), self.wire, num_sent)

    def _combine(self, y_AD: jax.Array, row_XK: jax.Array, weight_XK: jax.Array) -> "Exact":
        kind = Exact if weight_XK.shape[1] == 1 else _COMBINES[self.setting.combine]
        return kind(self.setting, y_AD, row_XK, weight_XK)


class Exact:
    """A row for each assignment; sums where the token goes, in rank order."""

    def __init__(self, setting: Setting, y_AD, row_XK, weight_XK):
        """`y_AD` of the assignments computed here, found at `row_XK`; beyond its rows elsewhere."""
        self._y_AD, self._row_XK, self._weight_XK = y_AD, row_XK, weight_XK
        self._num_group, self._top_k = row_XK.shape
        self.like_ZZ, self.most_sent = y_AD, len(y_AD)

    def most_received(self, num_devices: int) -> int:
        """Rows that can come to one device."""
        return self._num_group * self._top_k

    def sent(self, token_W: jax.Array, choice_W: jax.Array) -> jax.Array:
        """Rows to send of assignments that are here."""
        return sorting_lib.take_rows(self._y_AD, self._row_XK[token_W, choice_W])

    def total(self, token_W: jax.Array, rows_WKD: jax.Array) -> jax.Array:
        """Sums over K of what came of these tokens; zeros where nothing did. Float32."""
        return sorting_lib.weighted_sum(rows_WKD, self._weight_XK[token_W])


class Partial(Exact):
    """A sum from each device of the experts."""

    def __init__(self, setting: Setting, y_AD, row_XK, weight_XK):
        super().__init__(setting, y_AD, row_XK, weight_XK)
        self.most_sent = self._num_group

    def most_received(self, num_devices: int) -> int:
        return self._num_group * min(self._top_k, num_devices)

    def _weighted(self, token_W: jax.Array) -> jax.Array:
        rows_WKD = sorting_lib.take_rows(self._y_AD, self._row_XK[token_W])
        return rows_WKD.astype(jnp.float32) * self._weight_XK[token_W][:, :, None]

    def sent(self, token_W: jax.Array, choice_W: jax.Array) -> jax.Array:
        sum_WD = sorting_lib.sum_in_rank_order(self._weighted(token_W))
        return sum_WD.astype(self._y_AD.dtype)

    def total(self, token_W: jax.Array, rows_WKD: jax.Array) -> jax.Array:
        return sorting_lib.sum_in_rank_order(rows_WKD.astype(jnp.float32))


class Reproducible(Partial):
    """A sum from each device, as integers on a grid that all terms of a token share (grid.py)."""

    def __init__(self, setting: Setting, y_AD, row_XK, weight_XK):
        super().__init__(setting, y_AD, row_XK, weight_XK)
        self.like_ZZ = jnp.zeros((1, y_AD.shape[1]), jnp.int32)
        weight_A = jnp.zeros(len(y_AD) + 1, jnp.float32).at[row_XK].set(weight_XK)[:-1]
        exponent_A = grid.exponent_of(y_AD.astype(jnp.float32) * weight_A[:, None])
        exponent_XK = sorting_lib.take_rows(exponent_A, row_XK)  # 0, the least, of those elsewhere
        self._exponent_X = jax.lax.pmax(exponent_XK.max(axis=1), setting.axes)

    def sent(self, token_W: jax.Array, choice_W: jax.Array) -> jax.Array:
        weighted_WKD, exponent_W = self._weighted(token_W), self._exponent_X[token_W]
        terms = [
            grid.to_grid(weighted_WKD[:, k], exponent_W, num_terms=self._top_k)
            for k in range(self._top_k)
        ]
        return sum(terms[1:], start=terms[0])

    def total(self, token_W: jax.Array, rows_WKD: jax.Array) -> jax.Array:
        sum_WD = rows_WKD.sum(axis=1, dtype=jnp.int32)
        return grid.from_grid(sum_WD, self._exponent_X[token_W], num_terms=self._top_k)


_COMBINES = {"exact": Exact, "partial": Partial, "reproducible": Reproducible}


def _traffic(out: Leg, on: Leg | None, group_sizes_e: jax.Array) -> Traffic:
    out_M, padding_M = out.rows_M(), out.padding_M()
    on_M = jnp.zeros_like(out_M)
    if on is not None:
        on_M, padding_M = on.rows_M(), padding_M + on.padding_M()
    return Traffic.of_source(out_M, on_M, out_M, padding_M, group_sizes_e)
