"""The best choice of one option per layer when all options together may cost only so many moves.

Axes: L layers, C options of a layer, B moves so far.

Layers by themselves: the multiple-choice knapsack, f_l[b] = min over c of f_(l-1)[b - moves_c] +
value_c. Layers in a chain, where options of neighbours have a value together: one such row per
option of the last layer. Both are exact dynamic programs, and f[b] never rises with b.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """The least values and the choices behind them.

    Attributes:
      value_B: least value with at most b moves; inf where no choice needs so few.
    """

    value_B: np.ndarray
    _moves: Sequence[np.ndarray]
    _chosen: Sequence[np.ndarray]  # [C, B] of every layer: the option of the layer before
    _last_B: np.ndarray

    def choice(self, moves: int) -> list[int] | None:
        """The option of every layer, with at most so many moves; None if there is none."""
        left = min(moves, len(self.value_B) - 1)
        if not np.isfinite(self.value_B[left]):
            return None
        options = [int(self._last_B[left])]
        for moves_C, before_CB in zip(self._moves[:0:-1], self._chosen[:0:-1], strict=True):
            option = options[-1]
            options.append(int(before_CB[option, left]))
            left -= int(moves_C[option])
        return options[::-1]


def apart(value: Sequence[np.ndarray], moves: Sequence[np.ndarray], most: int) -> Table:
    """Layers by themselves: value[l][c] and moves[l][c] of every option, at most `most` moves."""
    best_B, chosen = np.zeros(most + 1), []
    last_B = np.zeros(most + 1, np.int32)
    for value_C, moves_C in zip(value, moves, strict=True):
        # which option came before does not depend on this layer's, but on the moves that are left
        total_CB = np.full((len(value_C), most + 1), np.inf)
        before_CB = np.zeros((len(value_C), most + 1), np.int32)
        for c, count in enumerate(moves_C):
            if count <= most:
                total_CB[c, count:] = best_B[: most + 1 - count] + value_C[c]
                before_CB[c, count:] = last_B[: most + 1 - count]
        chosen.append(before_CB)
        last_B = total_CB.argmin(axis=0).astype(np.int32)
        best_B = total_CB.min(axis=0)
    return Table(best_B, moves, chosen, last_B)


def chained(
    first_C: np.ndarray, edges: Iterable[np.ndarray], moves: Sequence[np.ndarray], most: int
) -> Table:
    """Layers in a chain: first_C of the first layer's options, edges[l][c, d] of two neighbours."""
    best_CB = np.full((len(first_C), most + 1), np.inf)
    for c, count in enumerate(moves[0]):
        best_CB[c, count:] = first_C[c]
    chosen = [np.zeros(best_CB.shape, np.int32)]
    for edge_CD, moves_D in zip(edges, moves[1:], strict=True):
        next_DB = np.full((len(moves_D), most + 1), np.inf)
        before_DB = np.zeros(next_DB.shape, np.int32)
        for d, count in enumerate(moves_D):
            if count <= most:
                total_CB = best_CB[:, : most + 1 - count] + edge_CD[:, d : d + 1]
                before_DB[d, count:] = total_CB.argmin(axis=0)
                next_DB[d, count:] = total_CB.min(axis=0)
        chosen.append(before_DB)
        best_CB = next_DB
    return Table(best_CB.min(axis=0), moves, chosen, best_CB.argmin(axis=0).astype(np.int32))
