"""A layer with copies that is above its load cap, brought below it by few changes.

Axes: E experts, M devices, X changes.

A change is one copy for another on a device (one copy moves; the expert that leaves has others), or
an exchange of two copies (two move); the fullest device is a part of it. The change that takes most
off the loads above the cap, for each copy that moves, comes first. Greedy: nothing here is
proven to be the fewest, and where no single change helps there is no answer.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from moe_jax.placement import hops_counts
from moe_jax.placement.limits.caps import SLACK

LEAST = 1e-12  # of the cap: what a change has to take off
AT_ONCE = 2**22  # experts x devices^3 (a copy more or less, home, copy) counted in one piece


def relieved(
    served: hops_counts.Layer,
    held_EM: Bool[np.ndarray, "E M"],
    pin_EM: Bool[np.ndarray, "E M"],
    speed_M: Float[np.ndarray, " M"],
    cap: float,
) -> np.ndarray | None:
    """bool [E, M]: the layer with no device above the cap; None where no change helps any more.

    Args:
      served: what any copies of an expert compute on each device.
      held_EM: which device holds which expert.
      pin_EM: copies that stay.
      speed_M: of the devices; loads are over it.
      cap: rows, the largest load over a device's speed.
    """
    state = _State(served, held_EM.copy(), pin_EM, speed_M, cap)
    while state.excess_X(state.load_EM.sum(axis=0)[None])[0] > SLACK * cap:
        if not state.changed():
            return None
    return state.held_EM


@dataclasses.dataclass(frozen=True, eq=False)
class _Changes:
    """Changes of one kind: an expert's copy leaves a device, and another's arrives there.

    Attributes:
      moves: copies that move with each.
      leaving_X, arriving_X: the experts.
      device_X: the device.
      other_X: where the experts change places; the device itself where none does.
      load_XM: rows of every device afterwards.
    """

    moves: int
    leaving_X: np.ndarray
    arriving_X: np.ndarray
    device_X: np.ndarray
    other_X: np.ndarray
    load_XM: np.ndarray


class _State:
    """The layer, the loads of its experts, and what they are with a copy more or less.

    Attributes:
      held_EM: bool, which device holds which expert.
      load_EM: float64, rows of every expert on every device.
    """

    def __init__(
        self,
        served: hops_counts.Layer,
        held_EM: np.ndarray,
        pin_EM: np.ndarray,
        speed_M: np.ndarray,
        cap: float,
    ):
        self._served, self.held_EM, self._pin_EM = served, held_EM, pin_EM
        self._speed_M, self._cap = speed_M, cap
        experts, devices = held_EM.shape
        self.load_EM = np.zeros((experts, devices))
        self._toggled_EMM = np.zeros((experts, devices, devices))
        for some_E in np.array_split(np.arange(experts), -(-experts * devices**3 // AT_ONCE)):
            self._count(some_E)

    def excess_X(self, load_XM: np.ndarray) -> np.ndarray:
        """What devices have above the cap, together."""
        return np.maximum(load_XM / self._speed_M - self._cap, 0.0).sum(axis=1)

    def changed(self) -> bool:
        """Makes the best change; False if none helps."""
        load_M = self.load_EM.sum(axis=0)
        full = int((load_M / self._speed_M).argmax())
        before, best = self.excess_X(load_M[None])[0], LEAST * self._cap
        take: tuple[_Changes, int] | None = None
        for changes in (self._replaced(load_M, full), self._swapped(load_M, full)):
            if not len(changes.load_XM):
                continue
            rate_X = (before - self.excess_X(changes.load_XM)) / changes.moves
            x = int(rate_X.argmax())
            if rate_X[x] > best:
                best, take = rate_X[x], (changes, x)
        if take is None:
            return False
        changes, x = take
        leaving, arriving = changes.leaving_X[x], changes.arriving_X[x]
        device, other = changes.device_X[x], changes.other_X[x]
        self.held_EM[leaving, device], self.held_EM[arriving, device] = False, True
        if other != device:
            self.held_EM[leaving, other], self.held_EM[arriving, other] = True, False
        self._count(np.array([leaving, arriving]))
        return True

    def _replaced(self, load_M: np.ndarray, full: int) -> _Changes:
        """One copy for another on a device."""
        spare_EM = self.held_EM & ~self._pin_EM & (self.held_EM.sum(axis=1, keepdims=True) > 1)
        leaving_X, device_X = np.nonzero(spare_EM)
        # it has to touch the fullest device: a copy leaves it, or takes over some of its rows
        open_XE = ~self.held_EM.T[device_X]
        x, arriving_X = np.nonzero(open_XE & ((device_X == full)[:, None] | self.held_EM[:, full]))
        leaving_X, device_X = leaving_X[x], device_X[x]
        load_XM = load_M - self.load_EM[leaving_X] - self.load_EM[arriving_X]
        load_XM += self._toggled_EMM[leaving_X, device_X]
        load_XM += self._toggled_EMM[arriving_X, device_X]
        return _Changes(1, leaving_X, arriving_X, device_X, device_X, load_XM)

    def _swapped(self, load_M: np.ndarray, full: int) -> _Changes:
        """A copy on the fullest device (of Y ways to leave it) for one elsewhere (of Z to come)."""
        loose_EM, here_E = self.held_EM & ~self._pin_EM, self.held_EM[:, full]
        leaving_Y, other_Y = np.nonzero(loose_EM[:, full, None] & ~self.held_EM)
        arriving_Z, from_Z = np.nonzero(loose_EM & ~here_E[:, None])
        left_YM = self._moved(leaving_Y, full, other_Y) - self.load_EM[leaving_Y]
        came_ZM = self._moved(arriving_Z, from_Z, full) - self.load_EM[arriving_Z]
        y, z = np.nonzero(other_Y[:, None] == from_Z)
        load_XM = load_M + left_YM[y] + came_ZM[z]
        full_X = np.full(len(y), full)
        return _Changes(2, leaving_Y[y], arriving_Z[z], full_X, other_Y[y], load_XM)

    def _moved(self, expert_X: np.ndarray, from_X, to_X) -> np.ndarray:
        """float64 [X, M]: loads of experts with one copy on another device."""
        holds_XM, x = self.held_EM[expert_X], np.arange(len(expert_X))
        holds_XM[x, from_X], holds_XM[x, to_X] = False, True
        return self._served.priced(expert_X, holds_XM)[1]

    def _count(self, expert_X: np.ndarray) -> None:
        """Loads of these experts, and what they are with a copy more or less on each device."""
        devices = self.held_EM.shape[1]
        self.load_EM[expert_X] = self._served.priced(expert_X, self.held_EM[expert_X])[1]
        holds_XMM = self.held_EM[expert_X][:, None] ^ np.eye(devices, dtype=bool)
        some_XM = holds_XMM.any(axis=2)  # the last copy cannot go
        x, device = np.nonzero(some_XM)
        loads = self._served.priced(expert_X[x], holds_XMM[x, device])[1]
        self._toggled_EMM[expert_X[x], device] = loads
