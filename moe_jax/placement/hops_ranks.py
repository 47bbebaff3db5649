"""What every set of devices costs an expert's hops on one node, for machines of up to 16 devices.

Axes: E experts, M devices, S = 2^M - 1 sets, s slots of a device, H homes, R ranks of a copy.

On one node the rule `local` sends an assignment from home h to h itself, where that is in the set,
and otherwise to the copy of rank r, one of c remainders: served_er assignments of e, whatever the
home (hops_counts.py). So a set {m_1 < m_2 < ... < m_c} costs e
    sum_r served_er (sum of ways to m_r from homes that are not in the set)  +  load_e (own ways),
over H: one product of matrices for all sets of a size. As in hops_sets.py, for all prices p of
devices' slots a layer has at least  sum_e min_S (hops_eS + p(S)) - s sum_m p_m  hops. The prices
are found by subgradient steps: where more copies are asked for than there are slots, the price
rises. Any prices prove; caps do not enter.
"""

import itertools
import time

import numpy as np

from moe_jax.placement import hops_counts
from moe_jax.placement.hops import Ways
from moe_jax.placement.problem import Problem

MOST_DEVICES = 16
LARGEST = 2**22  # costs of all sets for all experts
STEPS = (2, *[16] * 10)  # of every layer, round by round
LENGTH, SHRINKS = 0.03, 0.6  # of a step, over an expert's mean hops; and how it falls


def knows(problem: Problem) -> bool:
    """The machine is one node, and small enough."""
    devices = problem.num_devices
    small = devices <= MOST_DEVICES and problem.trace.num_experts * 2**devices <= LARGEST
    return small and problem.topology.num_nodes == 1


class Machine:
    """All sets of devices, in order of their sizes, and how far homes are from their copies.

    Attributes:
      holds_SM: bool.
      first_C: int64, the first set of every size.
    """

    def __init__(self, ways: Ways):
        homes, devices = ways.way_HM.shape
        home_HM = ways.home_H[:, None] == np.arange(devices)
        self.holds_SM = np.zeros((2**devices - 1, devices), bool)
        self._far: list[np.ndarray] = []
        first, self.first_C = 0, np.zeros(devices, np.int64)
        for size in range(1, devices + 1):
            member_XR = np.array(list(itertools.combinations(range(devices), size)))
            self.first_C[size - 1] = first
            holds_XM = self.holds_SM[first : first + len(member_XR)]
            holds_XM[np.arange(len(member_XR))[:, None], member_XR] = True
            inside_XH = holds_XM.astype(float) @ home_HM.T
            far_XM = ways.way_HM.sum(axis=0) - inside_XH @ ways.way_HM
            self._far.append(np.take_along_axis(far_XM, member_XR, axis=1) / homes)
            first += len(member_XR)
        own_M = (home_HM * ways.way_HM).sum(axis=0)
        self._own_S = self.holds_SM @ own_M / homes

    def hops_ES(self, counts: hops_counts.Layer) -> np.ndarray:
        """float64 [E, S]: hops of an expert's assignments, the mean over homes."""
        parts = [counts.served_ER(far_XR.shape[1]).astype(float) @ far_XR.T for far_XR in self._far]
        return np.concatenate(parts, axis=1) + counts.load_E[:, None] * self._own_S


class Prices:
    """One layer's prices and what they prove.

    Attributes:
      best: most hops that any prices so far prove.
      best_M: those prices.
    """

    def __init__(self, slots: int):
        self._slots, self._step = slots, 0
        self.best, self.best_M = -np.inf, np.zeros(0)

    def improve(self, machine: Machine, hops_ES: np.ndarray, steps: int, deadline: float) -> None:
        """Steps, one at least, from the best prices so far; at first from one for all."""
        devices = machine.holds_SM.shape[1]
        price_M = self.best_M
        if not len(price_M):
            least_EC = np.minimum.reduceat(hops_ES, machine.first_C, axis=1)
            price_M = np.full(devices, _one_price(least_EC, self._slots * devices))
        length, row_E = LENGTH * float(hops_ES.mean()), np.arange(len(hops_ES))
        for _ in range(steps):
            paid_ES = hops_ES + machine.holds_SM @ price_M
            least_E = paid_ES.argmin(axis=1)
            found = float(paid_ES[row_E, least_E].sum() - self._slots * price_M.sum())
            if found > self.best:
                self.best, self.best_M = found, price_M
            over_M = machine.holds_SM[least_E].sum(axis=0) - self._slots
            if not over_M.any() or time.monotonic() >= deadline:
                return
            self._step += 1
            price_M = price_M + length / self._step**SHRINKS * over_M


def _one_price(least_EC: np.ndarray, slots: int) -> float:
    """The price of all slots at which as many are asked for as there are, about.

    Args:
      least_EC: hops of an expert with the best set of every size.
      slots: P.
    """
    size_C = np.arange(1, least_EC.shape[1] + 1)
    low, high = 0.0, float(least_EC.max())
    for _ in range(40):
        price = (low + high) / 2
        wanted = size_C[(least_EC + price * size_C).argmin(axis=1)].sum()
        low, high = (price, high) if wanted > slots else (low, price)
    return high


def fewest_L(problem: Problem, deadline: float) -> np.ndarray:
    """float64 [L]: fewest hops of every layer; 0 where there is no time."""
    assert problem.num_slots is not None
    slots = problem.num_slots // problem.num_devices
    experts, nodes = problem.trace.num_experts, problem.topology.nodes
    prices = [Prices(slots) for _ in problem.hop_ways]
    machines: dict[bytes, Machine] = {}
    for steps in STEPS:
        for layer, ways in enumerate(problem.hop_ways):
            if time.monotonic() >= deadline:
                break
            key = ways.home_H.tobytes() + ways.way_HM.tobytes()
            if key not in machines:
                machines = {key: Machine(ways)}  # neighbouring layers have the same ways
            ids_TK = problem.trace.expert_ids_TLK[:, layer]
            counts = hops_counts.Layer(ids_TK, experts, ways, nodes)
            prices[layer].improve(machines[key], machines[key].hops_ES(counts), steps, deadline)
    return np.array([max(one.best, 0.0) for one in prices])
