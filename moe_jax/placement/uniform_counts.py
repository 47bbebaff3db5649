"""Rows of plans with copies where every token returns home and homes are uniform, in few walks.

Axes: T tokens, L MoE layers, K experts per token, E experts, M devices, N nodes, R copies, H the
devices of one node, at most BITS of them at a time: which of them hold something is one number.

cost.py serves all tokens from every home. But a home that does not hold an expert takes the copy
that any other such home of its node takes, so tokens are served once for each node, as if no home
held anything; then every home leaves out the rows whose experts it holds all itself. Whole numbers
until the end: what comes out is what cost.py counts (tests/placement/test_cost.py).

For exchange and hierarchical dispatch under the rule `local`.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from moe_jax.placement import cost
from moe_jax.placement.limits.previous import holds_LEM
from moe_jax.placement.nodes import Nodes
from moe_jax.placement.plan import Placement

DISPATCHES = ("exchange", "hierarchical")
ENTRIES = 2**20  # assignments that are looked at at once
BITS = 62  # of a number


def rows(
    expert_ids_TLK: Integer[np.ndarray, "T L K"],
    placement: Placement,
    dispatch: str,
    nodes: Nodes,
) -> cost.Rows:
    """Expected rows on the wire, one row per device (`partial`).

    Args:
      expert_ids_TLK: experts of every token; ids outside 0..E-1 mean "no expert".
      placement: with copies, under the rule `local`.
      dispatch: one of DISPATCHES.
      nodes: of the machine; they matter to the copy rule in `exchange`, too.
    """
    tokens, _, top_k = expert_ids_TLK.shape
    each = max(ENTRIES // top_k, 1)
    out_LMM = np.zeros((placement.num_layers, nodes.devices, nodes.devices))
    for layer, holds_EM in enumerate(holds_LEM(placement)):
        for start in range(0, tokens, each):
            ids_TK = expert_ids_TLK[start : start + each, layer].astype(np.int64)
            ids_TK = np.where((ids_TK >= 0) & (ids_TK < len(holds_EM)), ids_TK, -1)
            position_T = np.arange(start, start + len(ids_TK))
            for node in range(nodes.count):
                served = _Served(ids_TK, position_T, holds_EM, nodes, node)
                out_LMM[layer] += served.rows_MM(dispatch)
    out_LMM /= nodes.devices
    return cost.Rows(out_LMM, out_LMM.transpose(0, 2, 1).copy())


class _Served:
    """Tokens of one layer, served for the homes of one node."""

    def __init__(self, ids_TK, position_T, holds_EM, nodes: Nodes, node: int):
        self._nodes, self._node = nodes, node
        self._device_TK = _elsewhere(ids_TK, position_T, holds_EM, nodes.inside(node))
        self._first_TK = cost.first_of(self._device_TK)
        holds_EH = np.concatenate([holds_EM, np.zeros_like(holds_EM[:1])])[:, nodes.inside(node)]
        homes = holds_EH.shape[1]
        parts = [self._held(ids_TK, holds_EH[:, n : n + BITS]) for n in range(0, homes, BITS)]
        self._left_MH = np.concatenate(parts, axis=1)

    def rows_MM(self, dispatch: str) -> Float[np.ndarray, "M M"]:
        """Rows from all homes of the node together, each with all tokens; no diagonal."""
        nodes, inside = self._nodes, self._nodes.inside(self._node)
        to_M = np.bincount(self._device_TK[self._first_TK], minlength=nodes.devices).astype(float)
        out_MM = np.zeros((nodes.devices, nodes.devices))
        out_MM[inside] = to_M - self._left_MH.T
        if dispatch == "hierarchical":
            far_M = nodes.node_M != self._node
            out_MM[inside, far_M] = 0.0
            node_TK = nodes.node_of(self._device_TK)
            to_N = np.bincount(node_TK[cost.first_of(node_TK)], minlength=nodes.count)
            for home in range(nodes.devices)[inside]:
                for other in range(nodes.count):
                    if other == self._node:
                        continue
                    entry = int(nodes.relay(home, other))
                    out_MM[home, entry] += to_N[other]
                    out_MM[entry, nodes.inside(other)] += to_M[nodes.inside(other)]
        np.fill_diagonal(out_MM, 0.0)
        return out_MM

    def _held(self, ids_TK, holds_EH: Bool[np.ndarray, "E1 H"]) -> Int[np.ndarray, "M H"]:
        """Rows to each device that each home saves, as it holds all of their experts.

        Args:
          ids_TK: experts, -1 where there is none.
          holds_EH: the homes that hold an expert; of no expert, none, at the end.
        """
        device_TK, first_TK = self._device_TK, self._first_TK
        devices, homes = self._nodes.devices, holds_EH.shape[1]
        here_TK = (holds_EH @ (1 << np.arange(homes)))[ids_TK]
        for k in range(device_TK.shape[1]):
            for j in range(k + 1, device_TK.shape[1]):
                apart_T = device_TK[:, k] != device_TK[:, j]
                here_TK[:, k] &= here_TK[:, j] | -apart_T.astype(np.int64)  # -1: all bits
        some_TK = first_TK & (here_TK != 0)
        here_X, device_X = here_TK[some_TK], device_TK[some_TK]
        counts = np.zeros(devices * homes, np.int64)
        while here_X.size:
            lowest_X = here_X & -here_X
            home_X = np.frexp(lowest_X.astype(float))[1] - 1  # exact for powers of 2
            counts += np.bincount(device_X * homes + home_X, minlength=devices * homes)
            here_X = here_X ^ lowest_X
            here_X, device_X = here_X[here_X != 0], device_X[here_X != 0]
        return counts.reshape(devices, homes)


def _elsewhere(ids_TK, position_T, holds_EM, inside: slice) -> Int[np.ndarray, "T K"]:
    """The device of every assignment for a home in the node that does not hold the expert; -1.

    Where all devices of the node hold it, some device of the node.
    """
    near_EM = np.zeros_like(holds_EM)
    near_EM[:, inside] = holds_EM[:, inside]
    from_EM = np.where(near_EM.any(axis=1, keepdims=True), near_EM, holds_EM)
    count_E = from_EM.sum(axis=1).astype(np.int32)
    device_ER = np.argsort(~from_EM, axis=1, kind="stable")[:, : int(count_E.max())]
    turn_TK = (position_T[:, None] + np.arange(ids_TK.shape[1])).astype(np.int32)
    safe_TK = np.maximum(ids_TK, 0)
    turn_TK %= count_E.take(safe_TK)
    device_TK = device_ER.take(safe_TK * device_ER.shape[1] + turn_TK)
    return np.where(ids_TK >= 0, device_TK, cost.UNKNOWN)
