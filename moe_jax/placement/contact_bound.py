"""Fewest (token, device) contacts, set by set of experts: the bound of `rows` and `seconds`.

Axes: C cliques of n (layer, expert) nodes (layout.py), Q distinct sets of a clique, K nodes of
a set, M devices, s slots.

A set touches d devices. With X_ij = 1 where i and j share one, and T any of its nodes,
    d >= |T| - (pairs of T together)                    (each group of size p has p - 1 <= C(p, 2))
    d >= a(b) - b (pairs of all K nodes together)       (bounds.py, contacts from pairs)
    d >= 1.
Any choice of one of them per set makes   contacts >= level - sum_ij W_ij X_ij,   of which the
relaxation bounds the last term. So the bound holds for every choice; the best one is a saddle
point (worst X, best choice), which is approached by fictitious play: every few steps the choices
that are best for the X of the relaxation are mixed into those so far.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence

import numpy as np

from moe_jax.placement import bounds, semidefinite
from moe_jax.placement.layout import Groups
from moe_jax.placement.semidefinite import Relaxation, Running

EVERY = 20  # steps between two choices, at least
LEAST_MIX = 0.1  # share of a new choice


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSets:
    """Distinct sets of one clique.

    Attributes:
      node_QK: nodes 0..n-1 of the clique (those of its second layer begin with E); n: none.
      weight_Q: how often a set's contacts count.
    """

    node_QK: np.ndarray
    weight_Q: np.ndarray


def fewest(
    sets: Sequence[Sequence[TokenSets]], groups: Groups, deadline: float, steps: int
) -> np.ndarray:
    """float64: lower limits of the weighted contacts of `sets`.

    One entry per layer where layers are independent, else one for all of them together.

    Args:
      sets: for every clique those of its tokens.
      groups: sizes, devices and caps.
      deadline, steps: as for semidefinite.most_kept.
    """
    least_A = np.array([sum(float(one.weight_Q.sum()) for one in clique) for clique in sets])
    if groups.layout.width == 2:
        least_A = least_A.sum(keepdims=True)
    if groups.devices == 1 or not least_A.any():
        return least_A
    choices, chance_Cnn = _Choices(sets, groups), groups.layout.cliques(groups.chance_N)
    needed = semidefinite.few_seconds(groups) + 2 * choices.seconds(chance_Cnn)
    if time.monotonic() + needed > deadline:
        return least_A
    weight_N = choices.best(chance_Cnn).weight_N
    if weight_N.any():
        run = Relaxation(groups, weight_N)
        least_A = np.maximum(semidefinite.least(run, deadline, steps, choices), least_A)
    return least_A


@dataclasses.dataclass(frozen=True, eq=False)
class _Choice:
    """Contacts are at least level_A less what weight_N keeps."""

    level_A: np.ndarray
    weight_N: np.ndarray


class _Choices:
    """Fictitious play of the choices against the relaxation; an `Adapt`."""

    def __init__(self, sets: Sequence[Sequence[TokenSets]], groups: Groups):
        self._sets, self._layout = sets, groups.layout
        most = max(one.node_QK.shape[1] for clique in sets for one in clique)
        # of a set across two layers a device can hold the slots of both
        held = groups.slots * self._layout.width
        self._lines = [bounds.contact_lines(size, held, groups.devices) for size in range(most + 1)]
        cells = sum(one.node_QK.size * one.node_QK.shape[1] for clique in sets for one in clique)
        nodes = self._layout.width * self._layout.experts
        self.every = max(EVERY, cells // (5 * len(sets) * nodes**2))
        self._mixed: _Choice | None = None
        self._count = 0

    def __call__(self, run: Running) -> np.ndarray:
        new, old = self.best(run.clique_Cnn()), self._mixed
        share = max(2 / (self._count + 2), LEAST_MIX)
        self._count += 1
        if old is not None:
            level_A = (1 - share) * old.level_A + share * new.level_A
            new = _Choice(level_A, (1 - share) * old.weight_N + share * new.weight_N)
        self._mixed, run.weight_N = new, new.weight_N
        return new.level_A

    def seconds(self, x_Cnn: np.ndarray) -> float:
        """About how long a choice takes, from that of the largest clique."""
        cells_C = [sum(one.node_QK.size for one in clique) for clique in self._sets]
        largest = int(np.argmax(cells_C))
        x_nn, started = x_Cnn[largest], time.monotonic()
        for one in self._sets[largest]:
            chosen(one, x_nn, self._lines, np.zeros_like(x_nn))
        return (time.monotonic() - started) * sum(cells_C) / max(cells_C[largest], 1)

    def best(self, x_Cnn: np.ndarray) -> _Choice:
        """The best choice of every set for this X."""
        weight_Cnn, level_C = np.zeros_like(x_Cnn), np.zeros(len(x_Cnn))
        for c, (clique, x_nn) in enumerate(zip(self._sets, x_Cnn, strict=True)):
            for one in clique:
                level_C[c] += chosen(one, x_nn, self._lines, weight_Cnn[c])
        weight_N = self._layout.collected(weight_Cnn) / 2
        level_A = level_C if self._layout.width == 1 else level_C.sum(keepdims=True)
        return _Choice(level_A, weight_N)


def chosen(one: TokenSets, x_nn: np.ndarray, lines, weight_nn: np.ndarray) -> float:
    """Adds the best choices' weights, on (i, j) and (j, i), to weight_nn; returns their level."""
    node_QK, size = one.node_QK, len(x_nn)
    real_QK = node_QK < size
    x_QKK = np.pad(x_nn, (0, 1))[node_QK[:, :, None], node_QK[:, None, :]]
    own = np.arange(node_QK.shape[1])
    x_QKK[:, own, own] = 0.0
    value_Q, level_Q = np.ones(len(node_QK)), np.ones(len(node_QK))
    slope_QKK = np.zeros_like(x_QKK)
    total_QK = x_QKK.sum(axis=2)
    pairs_Q, sizes_Q = total_QK.sum(axis=1) / 2, real_QK.sum(axis=1)
    for of_size_S in itertools.zip_longest(*lines, fillvalue=bounds.Line(0.0, 0.0)):
        line_Q2 = np.array(of_size_S)[sizes_Q]
        found_Q = line_Q2[:, 0] - line_Q2[:, 1] * pairs_Q
        better_Q = found_Q > value_Q
        value_Q[better_Q], level_Q[better_Q] = found_Q[better_Q], line_Q2[better_Q, 0]
        slope_QKK[better_Q] = line_Q2[better_Q, 1, None, None]
    for order_QK in (np.argsort(total_QK, axis=1), np.argsort(-total_QK, axis=1)):
        taken_QK = _apart(x_QKK, real_QK, order_QK)
        both_QKK = taken_QK[:, :, None] & taken_QK[:, None, :]
        found_Q = taken_QK.sum(axis=1) - (x_QKK * both_QKK).sum(axis=(1, 2)) / 2
        better_Q = found_Q > value_Q
        value_Q[better_Q] = found_Q[better_Q]
        level_Q[better_Q] = taken_QK[better_Q].sum(axis=1)
        slope_QKK[better_Q] = both_QKK[better_Q]
    slope_QKK *= one.weight_Q[:, None, None]
    slope_QKK[:, own, own] = 0.0
    cell_QKK = node_QK[:, :, None] * (size + 1) + node_QK[:, None, :]
    sums = np.bincount(cell_QKK.ravel(), slope_QKK.ravel(), (size + 1) ** 2)
    weight_nn += sums.reshape(size + 1, size + 1)[:size, :size]
    return float(one.weight_Q @ level_Q)


def _apart(x_QKK: np.ndarray, real_QK: np.ndarray, order_QK: np.ndarray) -> np.ndarray:
    """bool [Q, K]: nodes taken in this order, each if it is less than once with those before it."""
    taken_QK, row_Q = np.zeros_like(real_QK), np.arange(len(real_QK))
    for node_Q in order_QK.T:
        with_Q = (x_QKK[row_Q, node_Q] * taken_QK).sum(axis=1)
        taken_QK[row_Q, node_Q] = real_QK[row_Q, node_Q] & (with_Q < 1)
    return taken_QK
