"""Hops of plans with copies, counted exactly: which copy serves which assignment, home by home.

Axes: T tokens, K experts per token, L MoE layers, E experts, M devices, H homes of a layer's tokens
(hops.Ways), R copies of an expert, X sets of devices that may hold one.

The rule `local` (copies.py) takes number (t + k) mod c of c candidates, t being a token's position
and k the rank of the expert. So how many assignments of an expert every candidate serves follows
from counts of (t + k) mod c: no walk over tokens for each home. Shares (the rule `stay`) are
counted token by token.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe_jax.placement import copies
from moe_jax.placement.hops import Ways
from moe_jax.placement.limits.previous import holds_LEM
from moe_jax.placement.nodes import Nodes
from moe_jax.placement.plan import Placement


@dataclasses.dataclass(frozen=True, eq=False)
class Counted:
    """Of a whole plan.

    Attributes:
      hops_L: of all assignments, the mean over homes.
      load_LM: assignments that every device computes, the mean over homes.
    """

    hops_L: np.ndarray
    load_LM: np.ndarray


def counted(ids_TLK, placement: Placement, ways: Sequence[Ways], nodes: Nodes) -> Counted:
    """Hops and loads of every layer, under the plan's copy rule.

    Args:
      ids_TLK: experts of every token; ids outside 0..E-1 mean "no expert".
      placement: which slots hold which experts.
      ways: by layer.
      nodes: that the copy rule knows.
    """
    if placement.share_LNP is not None:
        return _walked(ids_TLK, placement, ways, nodes)
    hops, loads = [], []
    expert_E = np.arange(placement.num_experts)
    for layer, holds_EM in enumerate(holds_LEM(placement)):
        one = Layer(ids_TLK[:, layer], placement.num_experts, ways[layer], nodes)
        hops_E, load_EM = one.priced(expert_E, holds_EM)
        hops.append(hops_E.sum())
        loads.append(load_EM.sum(axis=0))
    return Counted(np.array(hops), np.stack(loads))


def loads_LM(layers: Sequence["Layer"], placement: Placement) -> np.ndarray:
    """float64 [L, M]: rows that devices compute where homes are uniform and tokens return there.

    The same as cost.computed_LM, without a walk over all tokens for each home.

    Args:
      layers: of `uniform`.
      placement: under the rule `local`.
    """
    expert_E = np.arange(placement.num_experts)
    holds = holds_LEM(placement)
    priced = [one.priced(expert_E, holds[n])[1].sum(axis=0) for n, one in enumerate(layers)]
    return np.stack(priced)


def uniform(ids_TLK: np.ndarray, experts: int, nodes: Nodes) -> list["Layer"]:
    """Every layer of a trace where homes are uniform and ways cost nothing."""
    nowhere = Ways(np.arange(nodes.devices), np.zeros((nodes.devices, nodes.devices)))
    layers = range(ids_TLK.shape[1])
    return [Layer(ids_TLK[:, layer], experts, nowhere, nodes) for layer in layers]


class Layer:
    """Assignments of one layer, and what any set of copies of an expert costs them.

    The ids are kept as they are and gone through once for every number of candidates.
    """

    def __init__(self, ids_TK: np.ndarray, experts: int, ways: Ways, nodes: Nodes):
        self._ids_TK, self.experts, self._ways, self._nodes = ids_TK, experts, ways, nodes
        self._served: dict[int, np.ndarray] = {}

    @property
    def load_E(self) -> np.ndarray:
        """int64: assignments of every expert."""
        return self.served_ER(1)[:, 0]

    def served_ER(self, candidates: int) -> np.ndarray:
        """int64 [E, candidates]: assignments of an expert that each of so many serves."""
        if candidates not in self._served:
            ids_TK, size = self._ids_TK.astype(np.int64), (self.experts + 1) * candidates
            ids_TK[(ids_TK < 0) | (ids_TK >= self.experts)] = self.experts
            tokens, top_k = ids_TK.shape
            turn_TK = np.arange(tokens)[:, None] + np.arange(top_k)
            at_TK = ids_TK * candidates + turn_TK % candidates
            counts = np.bincount(at_TK.ravel(), minlength=size).reshape(-1, candidates)
            self._served[candidates] = counts[:-1]
        return self._served[candidates]

    def priced(self, expert_X: np.ndarray, holds_XM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hops [X], and loads [X, M], of experts held by these devices; means over homes.

        Args:
          expert_X: which expert.
          holds_XM: bool, which devices hold it; one at least.
        """
        if not len(expert_X):
            return np.zeros(0), np.zeros(holds_XM.shape)
        table, ways = copies.held(holds_XM, self._nodes), self._ways
        device_XHR, count_XH = table.slot_EMR[:, ways.home_H], table.count_EM[:, ways.home_H]
        rows_XHR = np.zeros(device_XHR.shape)
        for candidates in np.unique(count_XH):
            x, h = np.nonzero(count_XH == candidates)
            rows_XHR[x, h, :candidates] = self.served_ER(int(candidates))[expert_X[x]]
        homes, devices = len(ways.home_H), holds_XM.shape[1]
        safe_XHR = np.maximum(device_XHR, 0)  # padding serves nothing
        way_XHR = ways.way_HM[np.arange(homes)[:, None], safe_XHR]
        at_XHR = np.arange(len(expert_X))[:, None, None] * devices + safe_XHR
        load = np.bincount(at_XHR.ravel(), rows_XHR.ravel(), len(expert_X) * devices)
        hops_X = (rows_XHR * way_XHR).sum(axis=(1, 2)) / homes
        return hops_X, load.reshape(-1, devices) / homes


def _walked(ids_TLK, placement: Placement, ways: Sequence[Ways], nodes: Nodes) -> Counted:
    hops_L = np.zeros(placement.num_layers)
    load_LM = np.zeros((placement.num_layers, placement.num_devices))
    position_T = np.arange(len(ids_TLK))
    for layer, way in enumerate(ways):
        table = copies.candidates(placement, layer, tuple(nodes.size_N.tolist()))
        for home, way_M in zip(way.home_H, way.way_HM, strict=True):
            home_T = np.full(len(ids_TLK), home)
            slot_TK = table.slots_TK(ids_TLK[:, layer], home_T, position_T)
            device = slot_TK[slot_TK >= 0] // placement.slots_per_device
            hops_L[layer] += way_M[device].sum() / len(way.home_H)
            count_M = np.bincount(device, minlength=placement.num_devices)
            load_LM[layer] += count_M / len(way.home_H)
    return Counted(hops_L, load_LM)
