"""Slots of a layer for the fewest hops with copies: greedy, then the best change until none helps.

Axes: E experts, M devices, H held (expert, device) pairs, X candidates.

An expert's hops depend on its own copies alone (hops_counts.py), so what a copy adds, removes or
changes by going elsewhere is known exactly, expert by expert; loads add up. `filled_EM` takes one
without copies, adds the copy that saves most, slot by slot, and then descends by replacing a copy
with one of another expert on its device, or by exchanging two copies between devices. What is above
a load cap goes first. Small machines ask an integer program over all sets of devices first
(hops_sets.py); on others the descent begins again from a few slots that changed places at random.
Not proven to be best; hops_bound.py says how far off it is.
"""

import numpy as np
from jaxtyping import Bool

from moe_jax.placement import clock, hops_counts, hops_sets
from moe_jax.placement.problem import Problem

FIRST = 1e6  # what an overload of 1 counts, in hops of all assignments
KICKS, KICKED = 8, 4  # times that the descent begins again, and copies that change before it
ENOUGH = 1e-9  # relative gain below which a change is none
MOST = 2**24  # numbers in a table of pairs of changes; larger ones are looked at in part


def filled_EM(
    problem: Problem,
    layer: int,
    holds_EM: Bool[np.ndarray, "E M"],
    cap: float,
    seed: int,
    deadline: float,
) -> Bool[np.ndarray, "E M"]:
    """One layer of a plan without copies, its spare slots filled and improved until the deadline.

    Args:
      problem: of the objective `hops`.
      layer: its number.
      holds_EM: who holds what so far.
      cap: largest load of a device, over its speed.
      seed: of the restarts.
      deadline: of time.monotonic().
    """
    assert problem.num_slots is not None
    experts, devices = holds_EM.shape
    ids_TK, ways = problem.trace.expert_ids_TLK[:, layer], problem.hop_ways[layer]
    counts = hops_counts.Layer(ids_TK, experts, ways, problem.topology.nodes)
    cap_M = cap * problem.topology.speed_M
    one = _Slots(counts, holds_EM, cap_M)
    one.fill(problem.num_slots // devices)
    best = one.descended(deadline)
    if hops_sets.small(experts, devices) and not clock.late(deadline):
        sets = hops_sets.Sets(counts, devices, problem.num_slots // devices)
        held_EM = sets.program(cap_M, clock.left(deadline))
        if held_EM is not None:
            best = min(best, _Slots(counts, held_EM, cap_M).descended(deadline), key=_first)
        return best[1]
    rng = np.random.default_rng((seed, layer))
    for _ in range(KICKS):
        if clock.late(deadline):
            break
        again = _Slots(counts, best[1], cap_M)
        again.kick(rng)
        best = min(best, again.descended(deadline), key=_first)
    return best[1]


def _first(one: tuple[float, np.ndarray]) -> float:
    return one[0]


class _Slots:
    """One layer: who holds what, and what that costs.

    Attributes:
      holds_EM: bool.
    """

    def __init__(self, counts: hops_counts.Layer, holds_EM: Bool[np.ndarray, "E M"], cap_M):
        self._counts, self._cap_M, self.holds_EM = counts, cap_M, holds_EM.copy()
        experts, devices = holds_EM.shape
        self._hops_E, self._load_EM = counts.priced(np.arange(experts), holds_EM)
        # of a copy that comes (it is not there) or goes (it is there)
        self._flip_EM = np.full((experts, devices), np.inf)
        self._load_EMM = np.zeros((experts, devices, devices))
        self._flipped(np.arange(experts))

    def fill(self, slots: int) -> None:
        """Copy by copy, the best one first; until every device holds so many."""
        while (room_M := self.holds_EM.sum(axis=0) < slots).any():
            value_EM = self._values(self._flip_EM, self._load_EMM)
            value_EM = np.where(room_M & ~self.holds_EM, value_EM, np.inf)
            expert, device = np.unravel_index(int(value_EM.argmin()), value_EM.shape)
            self._change([(int(expert), int(device))])

    def descended(self, deadline: float) -> tuple[float, np.ndarray]:
        """The best change of all, until none helps or time is up: what it costs, and who holds."""
        while not clock.late(deadline):
            found = min(self._replacement(), self._exchange(), key=lambda one: one[0])
            if found[0] > self._value - ENOUGH * max(abs(self._value), 1.0):
                break
            self._change(found[1])
        return self._value, self.holds_EM

    def kick(self, rng: np.random.Generator) -> None:
        """A few copies give way to others on their devices, at random."""
        for _ in range(KICKED):
            device = int(rng.integers(self.holds_EM.shape[1]))
            goes = np.flatnonzero(self.holds_EM[:, device] & (self.holds_EM.sum(axis=1) > 1))
            comes = np.flatnonzero(~self.holds_EM[:, device])
            if goes.size and comes.size:
                flips = [(int(rng.choice(goes)), device), (int(rng.choice(comes)), device)]
                self._change(flips)

    @property
    def _value(self) -> float:
        return float(self._values(np.zeros(1), np.zeros((1, len(self._cap_M))))[0])

    def _values(self, hops_X, load_XM) -> np.ndarray:
        """What all costs after changes of hops and loads; overloads first."""
        over = ((self._load_EM.sum(axis=0) + load_XM) / self._cap_M).max(axis=-1) - 1
        over = np.where(over > ENOUGH, over, 0.0)
        return self._hops_E.sum() + hops_X + FIRST * max(self._hops_E.sum(), 1.0) * over

    def _change(self, flips: list[tuple[int, int]]) -> None:
        for expert, device in flips:
            self.holds_EM[expert, device] ^= True
        changed = np.unique([expert for expert, _ in flips])
        hops, load = self._counts.priced(changed, self.holds_EM[changed])
        self._hops_E[changed], self._load_EM[changed] = hops, load
        self._flipped(changed)

    def _flipped(self, experts: np.ndarray) -> None:
        """Prices one copy more or less, of these experts on every device; the last one stays."""
        devices = self.holds_EM.shape[1]
        holds_XM = np.repeat(self.holds_EM[experts], devices, axis=0)
        expert_X, device_X = np.repeat(experts, devices), np.tile(np.arange(devices), len(experts))
        holds_XM[np.arange(len(holds_XM)), device_X] ^= True
        some_X = holds_XM.any(axis=1)
        self._flip_EM[experts] = np.inf
        hops, load = self._counts.priced(expert_X[some_X], holds_XM[some_X])
        at = expert_X[some_X], device_X[some_X]
        self._flip_EM[at] = hops - self._hops_E[expert_X[some_X]]
        self._load_EMM[at] = load - self._load_EM[expert_X[some_X]]

    def _replacement(self) -> tuple[float, list[tuple[int, int]]]:
        """The best copy to give way to one of another expert on its device."""
        best: tuple[float, list[tuple[int, int]]] = (np.inf, [])
        for device in range(self.holds_EM.shape[1]):
            goes = np.flatnonzero(self.holds_EM[:, device] & np.isfinite(self._flip_EM[:, device]))
            comes = np.flatnonzero(~self.holds_EM[:, device])
            if not goes.size or not comes.size:
                continue
            hops, load = self._flip_EM[:, device], self._load_EMM[:, device]
            value = self._values(
                hops[goes][:, None] + hops[comes], load[goes][:, None] + load[comes]
            )
            g, c = np.unravel_index(int(value.argmin()), value.shape)
            flips = [(int(goes[g]), device), (int(comes[c]), device)]
            best = min(best, (float(value[g, c]), flips), key=lambda one: one[0])
        return best

    def _exchange(self) -> tuple[float, list[tuple[int, int]]]:
        """The best two copies on two devices to change places."""
        expert_H, at_H = np.nonzero(self.holds_EM)
        devices = self.holds_EM.shape[1]
        most = max(int((MOST // devices) ** 0.5), devices)
        if len(expert_H) > most:  # those that cost most
            first = np.argsort(-self._hops_E[expert_H], kind="stable")[:most]
            expert_H, at_H = expert_H[first], at_H[first]
        held = len(expert_H)
        # every one of them goes to every device that does not hold it
        pair, to = np.nonzero(~self.holds_EM[expert_H])
        holds_XM = self.holds_EM[expert_H[pair]]
        holds_XM[np.arange(len(pair)), at_H[pair]] = False
        holds_XM[np.arange(len(pair)), to] = True
        hops, load = self._counts.priced(expert_H[pair], holds_XM)
        hops_HM = np.full((held, devices), np.inf)
        load_HMM = np.zeros((held, devices, devices))
        hops_HM[pair, to] = hops - self._hops_E[expert_H[pair]]
        load_HMM[pair, to] = load - self._load_EM[expert_H[pair]]
        there_HH = hops_HM[:, at_H]  # the first goes where the second is
        both_HHM = load_HMM[:, at_H]
        there_HH = there_HH + there_HH.T
        value_HH = self._values(there_HH, both_HHM + both_HHM.transpose(1, 0, 2))
        a, b = np.unravel_index(int(value_HH.argmin()), value_HH.shape)
        moves = [(a, at_H[a]), (b, at_H[b]), (a, at_H[b]), (b, at_H[a])]
        return float(value_HH[a, b]), [(int(expert_H[x]), int(m)) for x, m in moves]
