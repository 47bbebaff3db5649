"""Which experts share a device, as one flat vector; and the groups that are asked for.

Axes: L layers, E experts, M devices, s = E / M slots, W layers of a clique (2 where layers are tied
to the next, else 1), n = W E nodes of a clique, C cliques, N entries of the flat vector.

The unknowns are 0/1 "do e and f share a device?": symmetric within a layer (G_LEE) and from a layer
to the next (O_LEE), one after the other in one vector x_N. A clique is the matrix of one layer, or
of two adjacent ones: [[G_l, O_l], [O_l', G_l+1]].
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Where G and O lie in the flat vector, and which of its entries each clique consists of.

    Attributes:
      layers, experts: L and E.
      width: 2 where layers are tied to the next (cliques are pairs of layers), else 1.
    """

    layers: int
    experts: int
    width: int = 1

    @property
    def pairs(self) -> int:
        return (self.layers - 1) if self.width == 2 else 0

    @property
    def size(self) -> int:
        return (self.layers + self.pairs) * self.experts**2

    def within(self, x_N: np.ndarray) -> np.ndarray:
        """[L, E, E], a view."""
        shape = (self.layers, self.experts, self.experts)
        return x_N[: self.layers * self.experts**2].reshape(shape)

    def across(self, x_N: np.ndarray) -> np.ndarray:
        """[pairs, E, E], a view."""
        shape = (self.pairs, self.experts, self.experts)
        return x_N[self.layers * self.experts**2 :].reshape(shape)

    def flat(self, within_LEE: np.ndarray, across_LEE: np.ndarray) -> np.ndarray:
        return np.concatenate([within_LEE.ravel(), across_LEE.ravel()])

    def cliques(self, x_N: np.ndarray) -> np.ndarray:
        """[C, n, n]: the matrix of each clique."""
        g_LEE = self.within(x_N)
        if self.width == 1:
            return g_LEE.copy()
        o_LEE, e = self.across(x_N), self.experts
        x_Cnn = np.empty((self.pairs, 2 * e, 2 * e))
        x_Cnn[:, :e, :e], x_Cnn[:, e:, e:] = g_LEE[:-1], g_LEE[1:]
        x_Cnn[:, :e, e:], x_Cnn[:, e:, :e] = o_LEE, o_LEE.transpose(0, 2, 1)
        return x_Cnn

    def collected(self, x_Cnn: np.ndarray) -> np.ndarray:
        """[N]: the adjoint of `cliques`: for every entry the sum of what cliques have there."""
        if self.width == 1:
            return x_Cnn.reshape(-1).copy()
        e = self.experts
        g_LEE = np.zeros((self.layers, e, e))
        g_LEE[:-1] += x_Cnn[:, :e, :e]
        g_LEE[1:] += x_Cnn[:, e:, e:]
        return self.flat(g_LEE, x_Cnn[:, :e, e:] + x_Cnn[:, e:, :e].transpose(0, 2, 1))

    @functools.cached_property
    def count_N(self) -> np.ndarray:
        """How many entries of clique matrices each entry is."""
        size = self.width * self.experts
        cliques = self.layers if self.width == 1 else self.pairs
        return self.collected(np.ones((cliques, size, size)))

    @functools.cached_property
    def entry_Cnn(self) -> np.ndarray:
        """int64: the flat entry of each entry of a clique; (e, f) and (f, e) of G are one."""
        g_LEE = np.arange(self.layers * self.experts**2).reshape(self.layers, self.experts, -1)
        upper_LEE = np.minimum(g_LEE, g_LEE.transpose(0, 2, 1))
        entry_N = np.arange(self.size)
        entry_N[: upper_LEE.size] = upper_LEE.ravel()
        return self.cliques(entry_N).astype(np.int64)

    def symmetric(self, x_N: np.ndarray) -> np.ndarray:
        """What lies on (e, f) of G, half of it moved to (f, e)."""
        x_N = x_N.copy()
        g_LEE = self.within(x_N)
        g_LEE[:] = (g_LEE + g_LEE.transpose(0, 2, 1)) / 2
        return x_N


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """Equal groups of experts in every layer, within caps.

    Attributes:
      layout: layers, experts, and whether layers are tied.
      devices: M.
      load_LE: float64, tokens per expert.
      cap_L: largest load of a device; inf where there is none.
    """

    layout: Layout
    devices: int
    load_LE: np.ndarray
    cap_L: np.ndarray

    @property
    def slots(self) -> int:
        return self.layout.experts // self.devices

    @property
    def chance_N(self) -> np.ndarray:
        """How much experts are together in placements at random."""
        layout = self.layout
        square = (layout.experts, layout.experts)
        within_LEE = np.full((layout.layers, *square), (self.slots - 1) / max(square[0] - 1, 1))
        within_LEE[:, np.eye(*square, dtype=bool)] = 1.0
        return layout.flat(within_LEE, np.full((layout.pairs, *square), 1 / self.devices))
