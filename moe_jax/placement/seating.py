"""Which group of experts goes on which device, where devices differ: whole groups change places.

Axes: L MoE layers, E experts, M devices, N nodes, P pairs of devices, Q distinct sets of experts.

On a machine whose devices are all alike it does not matter. Where nodes differ in size, where some
devices are slower, or on a torus, it does, and swaps of single experts rarely get there: every step
here swaps the groups of the two devices that gain most by the exact objective.
"""

import numpy as np

from moe_jax.placement import clock
from moe_jax.placement.problem import Problem


def seated(problem: Problem, layer: int, device_E: np.ndarray, deadline: float) -> np.ndarray:
    """int64 [E]: the same groups on other devices, never worse and never over the load cap.

    Unchanged where it cannot matter (problem.devices_differ).
    """
    if not problem.devices_differ:
        return device_E
    devices, sets = problem.num_devices, problem.sets[layer]
    group_M = np.arange(devices)  # the group that each device has
    touched_M = sets.touched_M(device_E, devices)
    load_M = np.bincount(device_E, weights=problem.load_LE[layer], minlength=devices)
    on_nodes = _OnNodes(problem, layer, device_E)
    value = problem.scores(layer, touched_M[None], on_nodes.count(group_M)[None], load_M[None])[0]
    a_P, b_P = np.triu_indices(devices, 1)
    pair = np.arange(len(a_P))
    while pair.size and not clock.late(deadline):
        group_PM = np.tile(group_M, (len(pair), 1))
        group_PM[pair, a_P], group_PM[pair, b_P] = group_M[b_P], group_M[a_P]
        load_PM = load_M[group_PM]
        node_PN = on_nodes.counts(group_M, group_PM, a_P, b_P)
        score_P = problem.scores(layer, touched_M[group_PM], node_PN, load_PM)
        score_P[problem.over(layer, load_PM)] = np.inf
        best = int(score_P.argmin())
        if not score_P[best] < value * (1 - 1e-9):
            break
        value, group_M = float(score_P[best]), group_PM[best]
    return np.argsort(group_M)[device_E]


class _OnNodes:
    """Contacts (token, node) when groups are seated; counted only where they enter."""

    def __init__(self, problem: Problem, layer: int, device_E: np.ndarray):
        self._node_M = problem.topology.node_M
        self._nodes = problem.topology.num_nodes
        self._counted = problem.dispatch == "hierarchical" and self._nodes > 1
        sets = problem.sets[layer]
        self._weight_Q = sets.count_Q
        if self._counted:
            self._present_QM = sets.present_QM(device_E, problem.num_devices)

    def count(self, group_M: np.ndarray) -> np.ndarray:
        """float64 [N]."""
        if not self._counted:
            return np.zeros(self._nodes)
        present_QM = self._present_QM[:, group_M]
        some_QN = [present_QM[:, self._node_M == n].any(axis=1) for n in range(self._nodes)]
        return self._weight_Q @ np.stack(some_QN, axis=1)

    def counts(self, group_M, group_PM: np.ndarray, a_P, b_P) -> np.ndarray:
        """float64 [P, N]: after each swap; one within a node changes nothing."""
        node_PN = np.tile(self.count(group_M), (len(group_PM), 1))
        if self._counted:
            for pair in np.flatnonzero(self._node_M[a_P] != self._node_M[b_P]):
                node_PN[pair] = self.count(group_PM[pair])
        return node_PN
