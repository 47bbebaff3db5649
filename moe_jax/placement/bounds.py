"""Lower bounds that are proven: each by a named argument, none by a heuristic or a solver's word.

Axes: E experts, M devices, s = E / M slots per device, n = b E rows of b stacked layers.

**Spectral partition bound** (Donath and Hoffman 1973, Rendl and Wolkowicz 1995; the dual of the
semidefinite relaxation). Let Z [n, M] be the 0/1 labels of b layers with s experts of each layer
on each device; f(Z) = sum_m z_m' W z_m is the affinity that is kept. For every vector d and matrix
N >= 0 with W' = W + N - Diag(d): f(Z) <= sum(d) + sum_m z_m' W' z_m, as z_i^2 sums to 1 over
devices and N can only add. Z splits into its layer means, which are the same for all placements
and add (s / E) 1' W' 1, and a part Y orthogonal to them with Y'Y = b s (I - 11'/M), so that part
adds at most b s times the sum of the M - 1 largest eigenvalues of W' on the complement of the
layer indicators.
This holds for *every* d and N; a subgradient search only makes it small. Eigenvalues carry a
rounding error of at most a few n eps norm(W'); ten times that is added, so the bound is safe.

**Contacts from pairs.** A token with its K experts on devices in parts of sizes p_1, p_2, ... has
d = number of parts and sum C(p_i, 2) pairs together. For every slope b >= 0, d >= a(b) - b pairs,
where a(b) is the minimum of d + b pairs over all partitions of K into parts of at most s. Hence
contacts >= sum_t a(b) - b * (most pairs that can be kept), the latter by the spectral bound.

**Load.** No placement has a largest device load below the mean, nor below the hottest expert with
the s - 1 coldest others, nor below what a pigeonhole forces: of the j M + 1 hottest experts, j + 1
share a device.
"""

import functools
import math
import time

import numpy as np


def whole_number_bound(bound: float) -> float:
    """The smallest whole number that a minimum can have, given a solver's bound on it.

    A solver's tolerance may lift its bound by about 1e-6 of the value; a whole objective lets us
    give that back and round up again.
    """
    return float(math.ceil(bound - 1e-3 - 1e-6 * abs(bound)))


def partition_upper(
    weight_nn: np.ndarray, blocks: int, devices: int, deadline: float, steps: int = 300
) -> float:
    """An upper limit of sum_m z_m' W z_m; see the head of this file.

    Args:
      weight_nn: W, symmetric [blocks * E, blocks * E].
      blocks: layers stacked in W.
      devices: M.
      deadline: time.monotonic() after which the search for d and N stops (one step is always done).
      steps: most steps of the search.
    """
    size = len(weight_nn)
    experts = size // blocks
    total = float(np.abs(weight_nn).sum())
    if devices == 1 or total == 0:
        return float(weight_nn.sum())
    scale = total / size
    weight_nn = weight_nn / scale
    basis = _complement(experts, blocks)
    slots = experts // devices
    d_n, slack_nn = np.zeros(size), np.zeros((size, size))
    best, target_gap, stalled = np.inf, 0.05, 0
    best_d, best_slack = d_n, slack_nn
    for step in range(steps):
        if step and time.monotonic() >= deadline:
            break
        value, primal_nn = _bound(weight_nn, d_n, slack_nn, basis, devices, slots, blocks)
        if value < best:
            stalled = 0 if value < best * (1 - 1e-4) else stalled + 1
            best, best_d, best_slack = value, d_n, slack_nn
        else:
            stalled += 1
        if stalled > 8:
            target_gap, stalled = target_gap / 2, 0
            d_n, slack_nn = best_d, best_slack
            if target_gap < 1e-4:
                break
            continue
        slope_n = 1.0 - np.diag(primal_nn)
        slope_nn = primal_nn - np.diag(np.diag(primal_nn))
        slope_nn = np.where((slack_nn <= 0) & (slope_nn > 0), 0.0, slope_nn)
        square = float((slope_n**2).sum() + (slope_nn**2).sum())
        if square < 1e-18:
            break
        length = (value - best * (1 - target_gap)) / square
        d_n = d_n - length * slope_n
        slack_nn = np.maximum(slack_nn - length * slope_nn, 0.0)
    return min(best * scale, float(np.maximum(weight_nn, 0).sum() * scale))


def _bound(weight_nn, d_n, slack_nn, basis, devices, slots, blocks):
    """The bound for (d, N), and the matrix whose entries are its slopes."""
    size = len(weight_nn)
    experts = size // blocks
    shifted_nn = weight_nn + slack_nn - np.diag(d_n)
    inside = basis.T @ shifted_nn @ basis
    value_n, vector = np.linalg.eigh(inside)
    top = devices - 1
    vectors = basis @ vector[:, -top:]
    rounding = 10 * size * np.finfo(float).eps * float(np.abs(shifted_nn).sum())
    level = blocks * slots
    fixed = slots / experts * float(shifted_nn.sum())
    value = float(d_n.sum()) + fixed + level * (float(value_n[-top:].sum()) + top * rounding)
    return value, slots / experts + level * (vectors @ vectors.T)


@functools.lru_cache(maxsize=8)
def _complement(experts: int, blocks: int) -> np.ndarray:
    """Orthonormal columns that span what is orthogonal to every layer's indicator."""
    ones = np.ones((experts, 1)) / math.sqrt(experts)
    full, _ = np.linalg.qr(np.concatenate([ones, np.eye(experts)[:, : experts - 1]], axis=1))
    return np.kron(np.eye(blocks), full[:, 1:])


def stays_upper(keep_EE: np.ndarray, devices: int, deadline: float, steps: int = 300) -> float:
    """Most transitions between two layers that any placement keeps on their device."""
    experts = len(keep_EE)
    weight_nn = np.zeros((2 * experts, 2 * experts))
    weight_nn[:experts, experts:] = keep_EE / 2
    weight_nn[experts:, :experts] = keep_EE.T / 2
    slots = experts // devices
    by_row = float(np.sort(keep_EE, axis=1)[:, -slots:].sum())
    by_column = float(np.sort(keep_EE, axis=0)[-slots:].sum())
    return min(partition_upper(weight_nn, 2, devices, deadline, steps), by_row, by_column)


def contacts_lower(
    coactivation_EE: np.ndarray,
    tokens_of_size: np.ndarray,
    devices: int,
    deadline: float,
    steps: int = 300,
) -> float:
    """Fewest (token, device) contacts of one layer under any placement.

    Args:
      coactivation_EE: tokens per pair of experts, symmetric, zero diagonal.
      tokens_of_size: [K + 1], tokens with that many experts in the layer.
      devices: M.
      deadline, steps: as for partition_upper.
    """
    slots = len(coactivation_EE) // devices
    pairs = partition_upper(coactivation_EE / 2, 1, devices, deadline, steps)
    shapes = [_shapes(size, slots, devices) for size in range(len(tokens_of_size))]
    slopes = {0.0}
    for points in shapes:
        for d1, p1 in points:
            slopes |= {(d1 - d2) / (p2 - p1) for d2, p2 in points if p2 > p1 and d1 > d2}
    best = 0.0
    for slope in slopes:
        level = sum(
            count * min(d + slope * p for d, p in points)
            for count, points in zip(tokens_of_size, shapes, strict=True)
        )
        best = max(best, level - slope * pairs)
    return best


def load_lower(load_E: np.ndarray, devices: int) -> float:
    """Smallest possible load of the most loaded device of one layer."""
    slots = len(load_E) // devices
    descending_E = np.sort(load_E)[::-1].astype(float)
    best = max(float(load_E.sum()) / devices, 0.0)
    for together in range(1, slots + 1):
        hottest = (together - 1) * devices + 1  # so many experts: some device has `together`
        shared = descending_E[hottest - together : hottest].sum()
        rest = np.concatenate([descending_E[: hottest - together], descending_E[hottest:]])
        best = max(best, shared + np.sort(rest)[: slots - together].sum())
    return best


@functools.lru_cache(maxsize=256)
def _shapes(size: int, slots: int, devices: int) -> tuple[tuple[int, int], ...]:
    """(parts, pairs together) of all partitions of `size` into at most `devices` parts <= slots."""

    def parts(left: int, largest: int):
        if left == 0:
            yield (0, 0)
            return
        for part in range(min(left, largest), 0, -1):
            for count, pairs in parts(left - part, part):
                yield (count + 1, pairs + part * (part - 1) // 2)

    return tuple(sorted({shape for shape in parts(size, slots) if shape[0] <= devices}))
