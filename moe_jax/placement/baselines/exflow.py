"""ExFlow's staged solver (arXiv 2401.08383): nodes first, then devices, an integer program a pair.

Axes: L MoE layers, E experts, G groups. keep_LEE: the best expert's transitions [L - 1, E, E].

The paper minimises transitions that leave their group, exactly E / G experts per group and layer,
first for nodes as groups and then for the devices inside each. Its tokens are summed up to counts
here, which changes nothing. All layers in one program are out of reach (README.md), so each stage
goes pair by pair: layers 0 and 1 in one program under the time limit, then every layer given the
one before it; that program's relaxation is integral, so an assignment solver answers it.
"""

import dataclasses

import numpy as np

from moe_jax.placement import ilp


@dataclasses.dataclass(frozen=True, eq=False)
class Staged:
    """What the stages give.

    Attributes:
      device_LE: int64, the device of every expert.
      cut: the time limit ended a program before its proof.
    """

    device_LE: np.ndarray
    cut: bool


def staged(keep_LEE: np.ndarray, num_nodes: int, num_devices: int, seconds: float) -> Staged:
    """The device of every expert; `seconds` for all programs together."""
    layers, experts = len(keep_LEE) + 1, keep_LEE.shape[1]
    each = num_devices // num_nodes
    if num_nodes == 1:
        return pair_by_pair(keep_LEE, num_devices, seconds)
    nodes = pair_by_pair(keep_LEE, num_nodes, seconds / 2)
    device_LE, cut = np.empty((layers, experts), np.int64), nodes.cut
    row_L1 = np.arange(layers)[:, None]
    for node in range(num_nodes):
        inside_LS = np.nonzero(nodes.device_LE == node)[1].reshape(layers, -1)
        here_LSS = keep_LEE[row_L1[:-1, :, None], inside_LS[:-1, :, None], inside_LS[1:, None]]
        within = pair_by_pair(here_LSS, each, seconds / 2 / num_nodes)
        device_LE[row_L1, inside_LS] = node * each + within.device_LE
        cut |= within.cut
    return Staged(device_LE, cut)


def pair_by_pair(keep_LEE: np.ndarray, groups: int, seconds: float) -> Staged:
    """The first two layers together, then each given the one before it."""
    layers, experts = len(keep_LEE) + 1, keep_LEE.shape[1]
    if groups == 1:
        return Staged(np.zeros((layers, experts), np.int64), False)
    group_LE, cut = np.empty((layers, experts), np.int64), False
    group_LE[0] = np.arange(experts) * groups // experts
    if layers > 1:
        solved = ilp.whole_chain(keep_LEE[:1], groups, seconds)
        cut = solved is None
        if solved is not None:
            group_LE[:2] = solved.device
            cut = kept(keep_LEE[:1], group_LE[:2]) < solved.bound
    for layer in range(2 if not cut else 1, layers):
        stays_EG = keep_LEE[layer - 1].T @ np.eye(groups)[group_LE[layer - 1]]
        group_LE[layer] = ilp.assign(stays_EG)
    return Staged(group_LE, cut)


def kept(keep_LEE: np.ndarray, group_LE: np.ndarray) -> float:
    """Transitions that stay in their group."""
    same_LEE = group_LE[:-1, :, None] == group_LE[1:, None, :]
    return float((keep_LEE * same_LEE).sum())
