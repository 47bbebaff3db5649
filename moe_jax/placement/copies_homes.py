"""Rows of plans with copies, set by set of experts: what the relaxation of copies_relax.py bounds.

Axes: L MoE layers, E experts, M devices, Q distinct sets of a layer, K nodes of a set, n = E nodes.

Homes are uniform. A token with the experts S of a layer uses d devices, or one less than that where
home is one of them; Z_ij counts the devices with both i and j, r_i the copies of i.
- d is at least what contact_bound.py says, X_ij = min(1, Z_ij) being 1 where one device *can* serve
  i and j: whatever the copy rule, those that it serves together are among them.
- Home is one of the devices only if it holds an expert of S. Of the M homes those are at most
  sum over S of r_i  -  sum of Z_ij over the edges of any tree on S  (Hunter 1976), and at most M.
Every choice per set makes rows >= level - gain (copies_relax.Gain), so any mixture of choices is a
bound. Those that are best at the present Z are mixed into those so far, as in contact_bound.py.
"""

import time

import numpy as np

from moe_jax.placement import bounds, contact_bound, copies_relax
from moe_jax.placement.contact_bound import TokenSets
from moe_jax.placement.copies_relax import Gain, Relaxation
from moe_jax.placement.layout import Layout
from moe_jax.placement.problem import Problem


def fewest_L(problem: Problem, homes: bool, deadline: float) -> np.ndarray | None:
    """float64 [L]: fewest devices of all tokens, summed up; None where there is no time for it.

    Args:
      problem: with its replicas.
      homes: home's own device counts for nothing, homes being uniform.
      deadline: of time.monotonic().
    """
    assert problem.num_slots is not None
    if problem.num_devices == 1 or time.monotonic() >= deadline:
        return None
    layout = Layout(problem.trace.num_layers, problem.trace.num_experts)
    gain = Gain.of_together(layout, np.zeros(layout.size))
    run = Relaxation(layout, problem.num_devices, problem.num_slots, gain)
    sets = [TokenSets(one.expert_QK, one.count_Q) for one in problem.sets]
    slots, devices = problem.num_slots // problem.num_devices, problem.num_devices
    lines = [bounds.contact_lines(size, slots, devices) for size in range(problem.trace.top_k + 1)]

    def choose(run: Relaxation) -> tuple[np.ndarray, Gain]:
        x_Lnn = run.clique_Cnn()
        together_Lnn, apart_Lnn = np.zeros_like(x_Lnn), np.zeros_like(x_Lnn)
        level_L, copies_LE = np.zeros(len(x_Lnn)), np.zeros(x_Lnn.shape[:2])
        for layer, (one, x_nn) in enumerate(zip(sets, x_Lnn, strict=True)):
            most_nn = np.minimum(x_nn, 1.0)
            level_L[layer] = contact_bound.chosen(one, most_nn, lines, together_Lnn[layer])
            if homes:
                own = _at_home(one, x_nn, devices, apart_Lnn[layer], copies_LE[layer])
                level_L[layer] -= own
        flat = layout.collected
        return level_L, Gain(flat(together_Lnn) / 2, flat(apart_Lnn) / 2, copies_LE)

    found_L = copies_relax.least(run, choose, deadline)
    if found_L is None:
        return None
    return found_L - copies_relax.ROUNDING * np.array([one.weight_Q.sum() for one in sets])


def _at_home(
    one: TokenSets, x_nn: np.ndarray, devices: int, apart_nn: np.ndarray, copies_n: np.ndarray
) -> float:
    """Adds what bounds the tokens at home to the last two; returns those of whom all may be.

    Args:
      one: the sets of a layer.
      x_nn: Z at present.
      devices: M.
      apart_nn: of pairs, on (i, j) and (j, i).
      copies_n: of copies.
    """
    node_QK, size = one.node_QK, len(x_nn)
    real_QK = node_QK < size
    padded_nn = np.pad(x_nn, (0, 1))
    edges, tree_Q = _trees(padded_nn, node_QK, real_QK)
    copies_Q = (np.diag(padded_nn)[node_QK] * real_QK).sum(axis=1)
    few_Q = copies_Q - tree_Q < devices
    weight_Q = one.weight_Q * few_Q / devices
    weight_QK = weight_Q[:, None] * real_QK
    copies_n += np.bincount(node_QK.ravel(), weight_QK.ravel(), size + 1)[:size]
    for a_Q, b_Q in edges:
        cells = np.bincount(a_Q * (size + 1) + b_Q, weight_Q, (size + 1) ** 2)
        pairs_nn = cells.reshape(size + 1, size + 1)[:size, :size]
        apart_nn += pairs_nn + pairs_nn.T
    return float(one.weight_Q[~few_Q].sum())


def _trees(padded_nn: np.ndarray, node_QK: np.ndarray, real_QK: np.ndarray):
    """The heaviest tree of every set (Prim): its edges, step by step, and its weight.

    Sets that are complete already get an edge to the node `none`, which counts nothing.
    """
    row_Q, none = np.arange(len(node_QK)), len(padded_nn) - 1
    left_QK = real_QK.copy()
    left_QK[:, 0] = False  # ascending: the first one is real
    near_QK = padded_nn[node_QK[:, :1], node_QK]
    parent_QK = np.broadcast_to(node_QK[:, :1], node_QK.shape).copy()
    edges, weight_Q = [], np.zeros(len(node_QK))
    for _ in range(node_QK.shape[1] - 1):
        best_Q = np.where(left_QK, near_QK, -np.inf).argmax(axis=1)
        some_Q = left_QK[row_Q, best_Q]
        new_Q = np.where(some_Q, node_QK[row_Q, best_Q], none)
        edges.append((np.where(some_Q, parent_QK[row_Q, best_Q], none), new_Q))
        weight_Q += np.where(some_Q, near_QK[row_Q, best_Q], 0.0)
        left_QK[row_Q, best_Q] = False
        to_QK = padded_nn[new_Q[:, None], node_QK]
        closer_QK = to_QK > near_QK
        near_QK = np.where(closer_QK, to_QK, near_QK)
        parent_QK = np.where(closer_QK, new_Q[:, None], parent_QK)
    return edges, weight_Q
