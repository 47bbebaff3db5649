"""One layer as distinct sets of experts: exact contacts of a placement, and of all its swaps.

Axes: Q distinct sets, K experts per set, E experts, M devices, N nodes, P pairs (e, f) to swap.

A contact is a (token, device) pair that a row is sent for. With n_qm the experts that set q has on
device m, swapping e on a with f on b changes the contacts of a by
  - sum over q with e, n_qa = 1            (e was the only one there)
  + sum over q with f, n_qa = 0            (f comes alone)
  + sum over q with both, n_qa = 1         (f takes e's place: nothing was lost)
and those of b likewise. So one pass over the sets gives the exact contacts after all E^2 swaps.
"""

import dataclasses
import functools

import numpy as np

from moe_jax.placement.cost import first_of
from moe_jax.routing.trace import Trace


@dataclasses.dataclass(frozen=True, eq=False)
class Sets:
    """Distinct expert sets of one layer.

    Attributes:
      expert_QK: int64, ascending; num_experts where a set has fewer than K.
      count_Q: float64, tokens with that set.
      num_experts: E.
    """

    expert_QK: np.ndarray
    count_Q: np.ndarray
    num_experts: int

    @functools.cached_property
    def member_QE(self) -> np.ndarray:
        """bool [Q, E]: the set has the expert."""
        return (self.expert_QK[:, :, None] == np.arange(self.num_experts)).any(axis=1)

    def weight_QM(self, devices: int) -> np.ndarray:
        """float64 [Q, M]: what a contact of the set counts; here its tokens, on every device."""
        return np.broadcast_to(self.count_Q[:, None], (len(self.count_Q), devices))

    def touched_M(self, device_E: np.ndarray, devices: int) -> np.ndarray:
        """float64 [M]: contacts of every device (or node, given the node of every expert)."""
        device_QK = np.append(device_E, -1)[self.expert_QK]
        first_QK = first_of(device_QK)
        row_QK = np.broadcast_to(np.arange(len(device_QK))[:, None], first_QK.shape)
        device = device_QK[first_QK]
        weight = self.weight_QM(devices)[row_QK[first_QK], device]
        return np.bincount(device, weights=weight, minlength=devices)

    def swapped_PM(self, device_E, devices: int, e_P: np.ndarray, f_P: np.ndarray) -> np.ndarray:
        """float64 [P, M]: contacts after swapping e and f, pair by pair; on different devices."""
        there_QM = self._experts_on(device_E, devices)
        alone_E, new_EM, both_EE = self._changes(device_E, there_QM)
        touched_M = (self.weight_QM(devices) * (there_QM > 0)).sum(axis=0)
        touched_PM = np.tile(touched_M, (len(e_P), 1))
        pair = np.arange(len(e_P))
        for e, f in ((e_P, f_P), (f_P, e_P)):
            device_P = device_E[e]
            touched_PM[pair, device_P] += new_EM[f, device_P] + both_EE[e, f] - alone_E[e]
        return touched_PM

    def arrivals_EM(self, device_E: np.ndarray, devices: int, out_E: np.ndarray) -> np.ndarray:
        """float64 [len(out_E), M]: contacts that each expert of `out_E` adds to each device.

        The experts of `out_E` are taken out first, all at once. So if each goes to another device
        the contacts of the whole are the rest's plus the sum of these entries, exactly.
        """
        rest_E = device_E.copy()
        rest_E[out_E] = devices
        there_QM = self._experts_on(rest_E, devices)
        arrivals_EM = np.empty((len(out_E), devices))
        weight_QM = self.weight_QM(devices)
        for row, e in enumerate(out_E):
            has_Q = (self.expert_QK == e).any(axis=1)
            arrivals_EM[row] = (weight_QM[has_Q] * (there_QM[has_Q] == 0)).sum(axis=0)
        return arrivals_EM

    def present_QM(self, device_E: np.ndarray, devices: int) -> np.ndarray:
        """bool [Q, M]: the set has an expert on the device."""
        return self._experts_on(device_E, devices) > 0

    def _experts_on(self, device_E: np.ndarray, devices: int) -> np.ndarray:
        """int16 [Q, M]: how many experts of a set live on each device."""
        there_QM = np.zeros((len(self.count_Q), devices + 1), np.int16)
        row_Q = np.arange(len(self.count_Q))
        device_QK = np.append(device_E, devices)[self.expert_QK]
        for k in range(device_QK.shape[1]):
            there_QM[row_Q, device_QK[:, k]] += 1
        return there_QM[:, :devices]

    def _changes(self, device_E: np.ndarray, there_QM: np.ndarray):
        experts, devices = self.num_experts, there_QM.shape[1]
        alone_E = np.zeros(experts + 1)
        new_EM = np.zeros((experts + 1, devices))
        both_J = np.zeros((experts + 1) ** 2)
        weight_QM = self.weight_QM(devices)
        absent_QM = (there_QM == 0) * weight_QM
        row_Q = np.arange(len(self.count_Q))
        for k in range(self.expert_QK.shape[1]):
            e_Q = self.expert_QK[:, k]
            own_Q = np.append(device_E, 0)[e_Q]
            alone_Q = weight_QM[row_Q, own_Q] * (there_QM[row_Q, own_Q] == 1)
            alone_E += np.bincount(e_Q, weights=alone_Q, minlength=experts + 1)
            for m in range(devices):
                new_EM[:, m] += np.bincount(e_Q, weights=absent_QM[:, m], minlength=experts + 1)
            for j in range(self.expert_QK.shape[1]):
                if j != k:
                    pair_Q = e_Q * (experts + 1) + self.expert_QK[:, j]
                    both_J += np.bincount(pair_Q, weights=alone_Q, minlength=len(both_J))
        both_EE = both_J.reshape(experts + 1, experts + 1)
        return alone_E[:experts], new_EM[:experts], both_EE[:experts, :experts]


def sets_of(trace: Trace, layer: int) -> Sets:
    """The distinct sets of one layer; tokens without an expert are left out."""
    experts = trace.num_experts
    ids_TK = np.sort(np.minimum(trace.expert_ids_TLK[:, layer].astype(np.int64), experts), axis=1)
    ids_TK = ids_TK[ids_TK[:, 0] < experts]
    base, top_k = experts + 1, trace.top_k
    if base**top_k >= 2**63:  # one whole number cannot hold a set; so many sets hardly repeat
        return Sets(ids_TK, np.ones(len(ids_TK)), experts)
    power_K = base ** np.arange(top_k, dtype=np.int64)
    code_Q, count_Q = np.unique(ids_TK @ power_K, return_counts=True)
    return Sets(code_Q[:, None] // power_K % base, count_Q.astype(float), experts)
