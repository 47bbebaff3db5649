"""Exact moves for MoETuner's objective: all swaps of a layer at once, and its best labels.

Axes: E experts, M devices, P pairs (e, f) to swap.

Only neighbours enter a layer's terms. With them fixed a swap of e on a with f on b changes two
columns of the traffic with each neighbour, so that the slowest pair after every swap is the largest
of the two new columns and of the best of the others. The labels of given groups are a sum of two
bottleneck assignments, one per neighbour: for every limit of the first the second is a bottleneck
assignment by itself, and only M^2 limits are to be tried.
"""

import dataclasses

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from moe_jax.placement.moetuner import Tuner


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """Traffic of a layer with one neighbour whose devices are fixed.

    Attributes:
      with_ME: bytes between a device of the neighbour and an expert.
      per_byte_MM: seconds per byte, [device of the neighbour, own device]; 0 on one device.
    """

    with_ME: np.ndarray
    per_byte_MM: np.ndarray

    def sums_MM(self, device_E: np.ndarray) -> np.ndarray:
        return self.with_ME @ np.eye(len(self.with_ME))[device_E]

    def slowest(self, device_E: np.ndarray) -> float:
        return float((self.sums_MM(device_E) * self.per_byte_MM).max())

    def swapped_P(self, device_E: np.ndarray, e_P: np.ndarray, f_P: np.ndarray) -> np.ndarray:
        """float64 [P]: the slowest pair after each swap."""
        sums_MM = self.sums_MM(device_E)
        change_MP = self.with_ME[:, f_P] - self.with_ME[:, e_P]  # what the device of e gains
        a_P, b_P = device_E[e_P], device_E[f_P]
        new_a_P = ((sums_MM[:, a_P] + change_MP) * self.per_byte_MM[:, a_P]).max(axis=0)
        new_b_P = ((sums_MM[:, b_P] - change_MP) * self.per_byte_MM[:, b_P]).max(axis=0)
        column_M = (sums_MM * self.per_byte_MM).max(axis=0)
        rest_P = np.zeros(len(e_P))
        for m in np.argsort(column_M)[-3:]:  # ascending: the last that is left wins
            rest_P = np.where((a_P == m) | (b_P == m), rest_P, column_M[m])
        return np.maximum(np.maximum(new_a_P, new_b_P), rest_P)

    def label_MM(self, device_E: np.ndarray) -> np.ndarray:
        """float64 [M, M]: the slowest pair of a group if it goes to a device."""
        return (self.sums_MM(device_E)[:, :, None] * self.per_byte_MM[:, None, :]).max(axis=0)


def sides(tuner: Tuner, device_LE: np.ndarray, layer: int) -> list[Side]:
    """The layer before, and the layer after, where there is one."""
    onehot_MM, per_byte_MM = np.eye(tuner.num_devices), 1 / tuner.bandwidth_MM
    found = []
    if layer:
        before_EM = onehot_MM[device_LE[layer - 1]]
        found.append(Side(before_EM.T @ tuner.flow_lEE[layer - 1], per_byte_MM))
    if layer + 1 < tuner.num_layers:
        after_EM = onehot_MM[device_LE[layer + 1]]
        found.append(Side((tuner.flow_lEE[layer] @ after_EM).T, per_byte_MM.T))
    return found


def swap(tuner: Tuner, device_LE: np.ndarray, layer: int) -> float:
    """Makes the best swap of a layer, in place, that keeps its cap; returns what it saves."""
    device_E, work_E = device_LE[layer], tuner.work_LE[layer]
    e_P, f_P = np.nonzero(np.triu(device_E[:, None] != device_E[None, :]))
    if not e_P.size:
        return 0.0
    both = sides(tuner, device_LE, layer)
    work_M = np.bincount(device_E, weights=work_E, minlength=tuner.num_devices)
    off_M, mean = np.abs(work_M - work_M.mean()), work_M.mean()
    a_P, b_P = device_E[e_P], device_E[f_P]
    gain_P = work_E[f_P] - work_E[e_P]
    new_a_P, new_b_P = work_M[a_P] + gain_P, work_M[b_P] - gain_P
    more_P = np.abs(new_a_P - mean) - off_M[a_P] + np.abs(new_b_P - mean) - off_M[b_P]
    for side in both:
        more_P += side.swapped_P(device_E, e_P, f_P) - side.slowest(device_E)
    over_P = np.maximum(new_a_P, new_b_P) > tuner.cap_L[layer] * (1 + 1e-9)
    more_P[over_P] = np.inf
    best = int(more_P.argmin())
    least = 1e-9 * (off_M.sum() + sum(side.slowest(device_E) for side in both))
    if not more_P[best] < -least:
        return 0.0
    e, f = e_P[best], f_P[best]
    device_E[e], device_E[f] = device_E[f], device_E[e]
    return -float(more_P[best])


def relabel(tuner: Tuner, device_LE: np.ndarray, layer: int) -> float:
    """Gives the groups of a layer their best devices, in place; returns what that saves (exact)."""
    device_E = device_LE[layer]
    both = [side.label_MM(device_E) for side in sides(tuner, device_LE, layer)]
    if not both:
        return 0.0
    before = sum(cost_MM.diagonal().max() for cost_MM in both)
    device_M = best_labels(both[0], both[1] if len(both) > 1 else np.zeros_like(both[0]))
    after = sum(cost_MM[np.arange(len(device_M)), device_M].max() for cost_MM in both)
    if not after < before * (1 - 1e-12):
        return 0.0
    device_LE[layer] = device_M[device_E]
    return float(before - after)


def best_labels(one_MM: np.ndarray, other_MM: np.ndarray) -> np.ndarray:
    """int64 [M]: the bijection group -> device of least max(one) + max(other), exactly.

    Along the limits of `one`, upwards, those of `other` only go down.
    """
    limits, others = np.unique(one_MM), np.unique(other_MM)
    best, best_M, place = np.inf, np.arange(len(one_MM)), len(others) - 1
    for limit in limits:
        if limit + others[0] >= best:
            break
        while (
            place >= 0
            and (found_M := _matched((one_MM <= limit) & (other_MM <= others[place]))) is not None
        ):
            if limit + others[place] < best:
                best, best_M = limit + others[place], found_M
            place -= 1
        if place < 0:
            break
    return best_M


def _matched(allowed_MM: np.ndarray) -> np.ndarray | None:
    """A device for every group among those allowed, no two alike; None if there is none."""
    if not (allowed_MM.any(axis=0).all() and allowed_MM.any(axis=1).all()):
        return None
    device_M = csgraph.maximum_bipartite_matching(sparse.csr_matrix(allowed_MM), "column")
    return None if (device_M < 0).any() else device_M.astype(np.int64)
