"""Inequalities that hold for every placement, for the relaxation of semidefinite.py.

Axes: L layers, E experts, C cliques of n nodes, N entries of the flat vector x (layout.py), Y
inequalities of a family.

- Triangles: if a is with b and with c, then b is with c: x_ab + x_ac - x_bc <= 1 (Groetschel and
  Wakabayashi 1989). There are too many of them; `separate` adds those that are violated most.
- Loads: under a cap the experts on the device of e have a load of at most cap, and, as the other
  M - 1 devices keep theirs, of at least total - (M - 1) cap. This holds for e of the same layer and
  of both neighbours, so a cap of layer l is a row for every expert of l - 1, l and l + 1.
- Conflicts: two experts whose loads with the s - 2 coldest others pass the cap are apart.

Each family has multipliers y >= 0 that Jacobi steps of a dual ascent keep up with x. Whatever they
are, y b - (y A) x >= 0 for every placement: so they can never make a bound wrong.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from scipy import sparse

from moe_jax.placement.layout import Groups, Layout

VIOLATED = 0.02  # by how much an inequality has to be violated to be added
WORK = 2**25  # triangles that are looked at in one separation, at most


@runtime_checkable  # for type checks while tests run
class Cuts(Protocol):
    """A family of inequalities A x <= b with multipliers y.

    Attributes:
      degree_N: column sums of |A|, on both (e, f) and (f, e) of G.
    """

    degree_N: np.ndarray

    @property
    def constant_L(self) -> np.ndarray:
        """y b, by layer where layers are independent; anywhere else its sum counts."""

    def force_N(self) -> np.ndarray:
        """y A, half of it on (e, f) and half on (f, e) of G."""

    def ascend(self, x_N: np.ndarray, spread_N: np.ndarray) -> None:
        """A Jacobi step of y; spread_N: how far all of an entry's force moves it, per unit."""


@dataclasses.dataclass(eq=False)
class Triangles:
    """x_ab + x_ac - x_bc <= 1 for the triangles that were violated.

    Attributes:
      entry_Y3: int64, the flat entries ab, ac and bc.
      y_Y: multipliers.
    """

    layout: Layout
    rng: np.random.Generator
    entry_Y3: np.ndarray = dataclasses.field(default_factory=lambda: np.empty((0, 3), np.int64))
    y_Y: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))

    def __post_init__(self):
        self._build()

    def separate(self, x_N: np.ndarray, most: int) -> None:
        """Adds up to `most` violated triangles; those without a multiplier go."""
        x_Cnn = self.layout.cliques(x_N)
        size = x_Cnn.shape[1]
        hubs = min(size, max(1, WORK // x_Cnn.size))
        upper_nn = np.triu(np.ones((size, size), bool), 1)
        found = [np.empty((0, 3), np.int64)]
        for hub in self.rng.choice(size, hubs, replace=False):
            over_Cnn = x_Cnn[:, hub, :, None] + x_Cnn[:, hub, None, :] - x_Cnn
            over_Cnn *= upper_nn  # 0 is not violated
            over_Cnn[:, hub], over_Cnn[:, :, hub] = 0, 0
            count = min(max(most // hubs, 1), int((over_Cnn > 1 + VIOLATED).sum()))
            if count:
                top = np.argpartition(over_Cnn.ravel(), -count)[-count:]
                clique, b, c = np.unravel_index(top, over_Cnn.shape)
                entry_Cnn = self.layout.entry_Cnn
                ab, ac = entry_Cnn[clique, hub, b], entry_Cnn[clique, hub, c]
                sides = np.stack([np.minimum(ab, ac), np.maximum(ab, ac)], 1)
                found.append(np.column_stack([sides, entry_Cnn[clique, b, c]]))
        used_Y = self.y_Y > 0
        old_Y3, old_Y = self.entry_Y3[used_Y], self.y_Y[used_Y]
        both_Y3 = np.concatenate([old_Y3, *found])
        _, first = np.unique(both_Y3, axis=0, return_index=True)
        new = first[first >= len(old_Y3)]
        self.entry_Y3 = np.concatenate([old_Y3, both_Y3[new]])
        self.y_Y = np.concatenate([old_Y, np.zeros(len(new))])
        self._build()

    def _build(self) -> None:
        row = np.repeat(np.arange(len(self.y_Y)), 3)
        sign = np.tile([1.0, 1.0, -1.0], len(self.y_Y))
        shape = (len(self.y_Y), self.layout.size)
        self._matrix = sparse.csr_matrix((sign, (row, self.entry_Y3.ravel())), shape=shape)
        self._transposed = self._matrix.T.tocsr()
        touched_N = np.bincount(self.entry_Y3.ravel(), minlength=self.layout.size)
        self.degree_N = 2 * self.layout.symmetric(touched_N.astype(float))
        self.layout.across(self.degree_N)[:] /= 2

    @property
    def constant_L(self) -> np.ndarray:
        layer_Y = self.entry_Y3[:, 2] // self.layout.experts**2
        sums_L = np.bincount(layer_Y, self.y_Y, self.layout.layers + self.layout.pairs)
        sums_L[: self.layout.pairs] += sums_L[self.layout.layers :]
        return sums_L[: self.layout.layers]

    def force_N(self) -> np.ndarray:
        return self.layout.symmetric(self._transposed @ self.y_Y)

    def ascend(self, x_N: np.ndarray, spread_N: np.ndarray) -> None:
        steps_Y = spread_N[self.entry_Y3].sum(axis=1)
        self.y_Y = np.maximum(self.y_Y + (self._matrix @ x_N - 1.0) / steps_Y, 0.0)


class Loads:
    """low <= load on the device of e <= 1 (the cap) for every e of a layer and its neighbours."""

    def __init__(self, groups: Groups):
        layout, load_LE, cap_L = groups.layout, groups.load_LE, groups.cap_L
        self.layout, slots, devices = layout, groups.slots, groups.devices
        # layers whose cap cannot bind have no load
        binds_L = np.sort(load_LE, axis=1)[:, -slots:].sum(axis=1) > cap_L
        cap_L1 = np.where(binds_L, cap_L * (1 + 1e-8), np.inf)[:, None]
        self._load_LE = load_LE / cap_L1
        total_L1 = self._load_LE.sum(axis=1, keepdims=True)
        coldest_L1 = np.sort(self._load_LE, axis=1)[:, :slots].sum(axis=1, keepdims=True)
        low_L1 = np.maximum(total_L1 - (devices - 1), coldest_L1)
        self._low_L1 = np.where(binds_L[:, None], low_L1, -1.0)
        self._y = [np.zeros((2, len(low), layout.experts)) for _, low in self._rows()]
        self.binds = bool(binds_L.any())
        self.apart_LEE = self._apart(slots)
        self.degree_N = self._spread([np.ones(y.shape[1:]) for y in self._y])
        self.layout.within(self.degree_N)[:] *= 2

    def _rows(self):
        """(load_LE, low_L1) of the layers whose loads are counted: within, after, before."""
        both = (self._load_LE, self._low_L1)
        if self.layout.width == 1:
            return [both]
        return [both, (both[0][1:], both[1][1:]), (both[0][:-1], both[1][:-1])]

    def _apart(self, slots: int) -> np.ndarray:
        """bool [L, E, E]: pairs that no device can hold together."""
        load_LE, experts = self._load_LE, self.layout.experts
        coldest_LE = np.argsort(load_LE, axis=1, kind="stable")
        apart_LEE = np.zeros((self.layout.layers, experts, experts), bool)
        if slots == 1:
            return apart_LEE | ~np.eye(experts, dtype=bool)
        for load_E, order_E, apart_EE in zip(load_LE, coldest_LE, apart_LEE, strict=True):
            # the coldest s - 2 of the others: of the s coldest, those that are not e or f
            few = order_E[:slots]
            taken_EF = np.arange(experts)[:, None] == few[None, :]
            taken_EEF = taken_EF[:, None] | taken_EF[None, :]
            left_EEF = np.where(taken_EEF, 0.0, load_E[few])
            rank_EEF = np.cumsum(~taken_EEF, axis=2)
            rest_EE = np.where(rank_EEF <= slots - 2, left_EEF, 0.0).sum(axis=2)
            apart_EE[:] = load_E[:, None] + load_E[None, :] + rest_EE > 1.0
            np.fill_diagonal(apart_EE, False)
        return apart_LEE

    def _sums(self, x_N: np.ndarray) -> list[np.ndarray]:
        """[rows of layers, E]: the load on the device of every expert."""
        sums = [np.einsum("lef,lf->le", self.layout.within(x_N), self._load_LE)]
        if self.layout.width == 2:
            o_LEE = self.layout.across(x_N)
            sums.append(np.einsum("lef,lf->le", o_LEE, self._load_LE[1:]))
            sums.append(np.einsum("lef,le->lf", o_LEE, self._load_LE[:-1]))
        return sums

    def _spread(self, y: list[np.ndarray]) -> np.ndarray:
        """The adjoint of `_sums`."""
        g_LEE = y[0][:, :, None] * self._load_LE[:, None, :]
        o_LEE = np.zeros((0, 1, 1))
        if self.layout.width == 2:
            o_LEE = y[1][:, :, None] * self._load_LE[1:, None, :]
            o_LEE = o_LEE + self._load_LE[:-1, :, None] * y[2][:, None, :]
        return self.layout.symmetric(self.layout.flat(g_LEE, o_LEE))

    @property
    def constant_L(self) -> np.ndarray:
        sums_L = np.zeros(self.layout.layers)
        for y, (_, low_L1) in zip(self._y, self._rows(), strict=True):
            sums_L[: len(low_L1)] += (y[0] - low_L1 * y[1]).sum(axis=1)
        return sums_L

    def force_N(self) -> np.ndarray:
        return self._spread([y[0] - y[1] for y in self._y])

    def ascend(self, x_N: np.ndarray, spread_N: np.ndarray) -> None:
        steps = [np.maximum(step, 1e-12) for step in self._sums(spread_N)]
        found = zip(self._y, self._sums(x_N), steps, self._rows(), strict=True)
        for y, sums, step, (_, low_L1) in found:
            y[0] = np.maximum(y[0] + (sums - 1.0) / step, 0.0)
            y[1] = np.maximum(y[1] + (low_L1 - sums) / step, 0.0)
