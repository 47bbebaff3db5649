"""Groups of uneven but bounded size by co-activation, in the style of GRACE-MoE (arXiv 2509.25041).

Axes: E experts, G groups, s = E / G experts of a mean group.

Spectral clustering of the co-activation graph (Ng, Jordan and Weiss: the G leading eigenvectors of
its normalised form, rows of length 1, k-means), then sizes between s (1 - r) and s (1 + r): the
assignment to the centres that keeps these sizes and has the smallest sum of squared distances,
exactly. On several nodes, nodes first and then the devices of each, r for both together. The
paper's replicas and its routing are left out; what is known of its grouping is the idea, not the
code. Loads do not enter: such groups are uneven in load as well.
"""

import math

import numpy as np
from scipy import optimize
from scipy.cluster import vq

RATIO = 0.5  # how far the size of a group may be from the mean one
STARTS = 8  # of k-means


def bounded_groups(
    coactivation_LEE: np.ndarray, num_nodes: int, num_devices: int, seed: int, ratio: float = RATIO
) -> np.ndarray:
    """int64 [L, E]: the device of every expert; groups are uneven, and none is empty."""
    each = num_devices // num_nodes
    rng = np.random.default_rng(seed)
    return np.stack([_placed(EE, num_nodes, each, ratio, rng) for EE in coactivation_LEE])


def _placed(pairs_EE: np.ndarray, nodes: int, each: int, ratio: float, rng) -> np.ndarray:
    slots = len(pairs_EE) / (nodes * each)
    least, most = max(1, math.ceil(slots * (1 - ratio))), math.floor(slots * (1 + ratio))
    if nodes == 1:
        return grouped(pairs_EE, each, least, most, rng)
    node_E = grouped(pairs_EE, nodes, least * each, most * each, rng)
    device_E = np.empty(len(pairs_EE), np.int64)
    for node in range(nodes):
        inside = np.flatnonzero(node_E == node)
        group_e = grouped(pairs_EE[np.ix_(inside, inside)], each, least, most, rng)
        device_E[inside] = node * each + group_e
    return device_E


def grouped(pairs_EE: np.ndarray, groups: int, least: int, most: int, rng) -> np.ndarray:
    """int64 [E]: groups of `least` to `most` experts near the centres of spectral clustering."""
    if groups == 1:
        return np.zeros(len(pairs_EE), np.int64)
    point_EG = embedded(pairs_EE, groups)
    best_GG, best = point_EG[:groups], np.inf
    for _ in range(STARTS):
        with np.errstate(all="ignore"):
            centre_GG, _ = vq.kmeans2(point_EG, groups, minit="++", rng=rng, missing="warn")
        error = _squares(point_EG, centre_GG).min(axis=1).sum()
        if error < best:
            best_GG, best = centre_GG, error
    return nearest(_squares(point_EG, best_GG), least, most)


def embedded(pairs_EE: np.ndarray, groups: int) -> np.ndarray:
    """float64 [E, G]: rows of the leading eigenvectors of D^-1/2 W D^-1/2, of length 1.

    An expert that is together with no other has no degree, and a row of zeros in W.
    """
    degree_E = pairs_EE.sum(axis=1)
    root_E = np.sqrt(np.where(degree_E > 0, degree_E, 1.0))
    scaled_EE = pairs_EE / (root_E[:, None] * root_E[None, :])
    _, vector_EE = np.linalg.eigh(scaled_EE)
    point_EG = vector_EE[:, -groups:]
    return point_EG / np.maximum(np.linalg.norm(point_EG, axis=1, keepdims=True), 1e-12)


def nearest(cost_EG: np.ndarray, least: int, most: int) -> np.ndarray:
    """int64 [E]: the cheapest groups of `least` to `most` members (an assignment problem).

    A group has `most` places. The first `least` of them are made so cheap that all are taken.
    """
    must = 1.0 + 2.0 * float(np.abs(cost_EG).sum())
    place_GS = np.where(np.arange(most) < least, -must, 0.0)
    cost_EGS = cost_EG[:, :, None] + place_GS
    _, column_E = optimize.linear_sum_assignment(cost_EGS.reshape(len(cost_EG), -1))
    return column_E // most


def _squares(point_EG: np.ndarray, centre_GG: np.ndarray) -> np.ndarray:
    return ((point_EG[:, None, :] - centre_GG[None, :, :]) ** 2).sum(axis=2)
