"""Labels of one layer worth choosing from: few moves and little gain, or more of both.

Axes: E experts, C options, P swaps.

A move has a price. Best-swap descents on (value + price x moves) from the plan in use, the price
falling, and from the free plan, the price rising, run along the border between moves and value;
every step also offers the best neighbour for each number of moves. All values are exact.
"""

import dataclasses

import numpy as np

from moe_jax.placement import clock, swaps
from moe_jax.placement.problem import Problem

PRICES = (8.0, 4.0, 2.0, 1.4, 1.0, 0.7, 0.5, 0.25, 0.1, 0.0)  # in mean gains of a move


@dataclasses.dataclass(frozen=True, eq=False)
class Menu:
    """Options of a layer: more moves, less value.

    Attributes:
      moves_C: ascending.
      value_C: descending.
      device_CE: labels.
    """

    moves_C: np.ndarray
    value_C: np.ndarray
    device_CE: np.ndarray


class Border:
    """The best labels that were seen, for each number of moves."""

    def __init__(self, problem: Problem, layer: int, old_E: np.ndarray):
        self._problem, self._layer, self._old_E = problem, layer, old_E
        self._best: dict[int, tuple[float, np.ndarray]] = {}

    def moves(self, device_E: np.ndarray) -> int:
        return int((device_E != self._old_E).sum())

    def add(self, device_E: np.ndarray) -> float:
        """Takes in labels that keep pins and cap; returns their value."""
        value = self._problem.layer_value(self._layer, device_E)
        self._take(self.moves(device_E), value, device_E)
        return value

    def descend(self, device_E: np.ndarray, price: float, deadline: float) -> np.ndarray:
        """Best-swap descent on value + price x moves; pins and cap are kept."""
        problem, layer = self._problem, self._layer
        device_E, value = device_E.copy(), self.add(device_E)
        free_E = np.ones(len(device_E), bool)
        if problem.pins is not None:
            free_E = problem.pins.device_LE[layer] < 0
        while not clock.late(deadline):
            apart_EE = device_E[:, None] != device_E[None, :]
            e_P, f_P = np.nonzero(np.triu(apart_EE & free_E[:, None] & free_E[None, :]))
            if not e_P.size:
                break
            score_P = swaps.values_P(problem, layer, device_E, e_P, f_P)
            more_P = self._more_P(device_E, e_P, f_P)
            moves = self.moves(device_E)
            for more in np.unique(more_P):
                at = int(np.where(more_P == more, score_P, np.inf).argmin())
                if more_P[at] != more:  # every swap of these is above the cap
                    continue
                if score_P[at] < self._known(moves + int(more)):
                    self._take(moves + int(more), score_P[at], _swapped(device_E, e_P[at], f_P[at]))
            total_P = score_P + price * more_P
            best = int(total_P.argmin())
            if not total_P[best] < value - 1e-9 * abs(value):
                break
            device_E = _swapped(device_E, e_P[best], f_P[best])
            value = float(score_P[best])
        return device_E

    def menu(self) -> Menu:
        """What no other option beats in moves and value together."""
        moves: list[int] = []
        values: list[float] = []
        rows: list[np.ndarray] = []
        for count in sorted(self._best):
            value, device_E = self._best[count]
            if not values or value < values[-1]:
                moves.append(count)
                values.append(value)
                rows.append(device_E)
        return Menu(np.array(moves), np.array(values), np.stack(rows))

    def _more_P(self, device_E: np.ndarray, e_P: np.ndarray, f_P: np.ndarray) -> np.ndarray:
        """int64: by how many moves a swap is more than what is there."""
        old_E = self._old_E
        away_E = (device_E != old_E).astype(int)
        after_P = (device_E[f_P] != old_E[e_P]).astype(int) + (device_E[e_P] != old_E[f_P])
        return after_P - away_E[e_P] - away_E[f_P]

    def _known(self, moves: int) -> float:
        return self._best[moves][0] if moves in self._best else np.inf

    def _take(self, moves: int, value: float, device_E: np.ndarray) -> None:
        if value < self._known(moves):
            self._best[moves] = (float(value), device_E.copy())


def extended(border: Border, start_E: np.ndarray, free_E: np.ndarray, deadline: float) -> None:
    """Descents along the border from both of its ends."""
    first, last = border.add(start_E), border.add(free_E)
    mean = max(first - last, 0.0) / max(border.moves(free_E) - border.moves(start_E), 1)
    for price in PRICES:
        start_E = border.descend(start_E, price * mean, deadline)
    for price in reversed(PRICES):
        free_E = border.descend(free_E, price * mean, deadline)


def _swapped(device_E: np.ndarray, e: np.integer, f: np.integer) -> np.ndarray:
    device_E = device_E.copy()
    device_E[e], device_E[f] = device_E[f], device_E[e]
    return device_E
