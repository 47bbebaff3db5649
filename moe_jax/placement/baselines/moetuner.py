"""MoETuner's two stages with their own solver (arXiv 2502.06643), HiGHS in the place of Gurobi.

Axes: L MoE layers, E experts, M devices (as many clusters).

1. Layer by layer: clusters of least sum of abs(T - mean T). As printed the program lets experts be
   dropped or doubled; here each is in one cluster. `equal` sizes are what static shapes can hold
   without padding; otherwise clusters only are not empty, and what all devices need in memory is
   the largest cluster (the paper wants equal totals over all layers instead).
2. Clusters to devices: least sum over l of the slowest pair of devices, C / B. One program for all
   layers where it is small (products of two assignments as unknowns of their own), else layer after
   layer given the one before it. Optimal within GAP, the paper's.
"""

import dataclasses
import time

import numpy as np
from scipy import optimize, sparse

from moe_jax.placement import clock
from moe_jax.placement.moetuner import Tuner

GAP = 0.025  # of the solver
FIRST_SHARE = 0.7  # of the time, for stage 1
LEAST = 0.05  # seconds for a layer given the one before it
WHOLE = 600  # products up to which stage 2 is one program


@dataclasses.dataclass(frozen=True, eq=False)
class TwoStages:
    """What the stages give.

    Attributes:
      device_LE: int64; groups are uneven unless `equal` was asked for.
      cut: the time limit ended a program.
    """

    device_LE: np.ndarray
    cut: bool


def two_stages(tuner: Tuner, equal: bool, seconds: float) -> TwoStages:
    """Clusters, then devices; `seconds` for all programs together."""
    share, cut = FIRST_SHARE * seconds / tuner.num_layers, False
    cluster_LE = np.empty(tuner.work_LE.shape, np.int64)
    for layer, work_E in enumerate(tuner.work_LE):
        found_E, done = clusters(work_E, tuner.num_devices, equal, share)
        cluster_LE[layer], cut = found_E, cut or not done
    found_LE, done = devices(tuner, cluster_LE, (1 - FIRST_SHARE) * seconds)
    return TwoStages(found_LE, cut or not done)


def clusters(
    work_E: np.ndarray, devices: int, equal: bool, seconds: float
) -> tuple[np.ndarray, bool]:
    """int64 [E] of least sum of deviations, and whether the program ended by itself."""
    experts = len(work_E)
    order_E = np.argsort(-work_E, kind="stable")
    mean = max(float(work_E.sum()) / devices, 1e-300)
    work_ME = sparse.kron((work_E[order_E] / mean)[None, :], sparse.eye(devices))
    once = sparse.kron(sparse.eye(experts), np.ones((1, devices)))
    sizes = sparse.kron(np.ones((1, experts)), sparse.eye(devices))
    none, eye = sparse.csr_matrix((experts, devices)), sparse.eye(devices)
    slots = experts // devices
    low, high = (slots, slots) if equal else (1, experts)
    limits = [
        optimize.LinearConstraint(sparse.hstack([once, none]), 1, 1),
        optimize.LinearConstraint(sparse.hstack([sizes, 0 * eye]), low, high),
        optimize.LinearConstraint(sparse.hstack([work_ME, -eye]), -np.inf, 1),
        optimize.LinearConstraint(sparse.hstack([work_ME, eye]), 1, np.inf),
    ]
    # clusters are alike: the e-th heaviest expert is in one of the first e + 1
    first_EM = np.arange(devices)[None, :] <= np.arange(experts)[:, None]
    result = optimize.milp(
        np.concatenate([np.zeros(experts * devices), np.ones(devices)]),
        constraints=limits,
        bounds=optimize.Bounds(0, np.concatenate([first_EM.ravel(), np.full(devices, np.inf)])),
        integrality=np.concatenate([np.ones(experts * devices), np.zeros(devices)]),
        options={"time_limit": max(seconds, 1e-3), "mip_rel_gap": GAP},
    )
    packed_E = packed(work_E, devices, equal)
    if clock.checked(result).x is None:
        return packed_E, False
    cluster_E = np.empty(experts, np.int64)
    cluster_E[order_E] = result.x[: experts * devices].reshape(experts, devices).argmax(axis=1)
    return min(cluster_E, packed_E, key=lambda one_E: _deviation(work_E, one_E)), result.status == 0


def _deviation(work_E: np.ndarray, cluster_E: np.ndarray) -> float:
    work_M = np.bincount(cluster_E, weights=work_E)
    return float(np.abs(work_M - work_M.mean()).sum())


def packed(work_E: np.ndarray, devices: int, equal: bool) -> np.ndarray:
    """Heaviest first, to the lightest cluster with room: in the place of a warm start, which HiGHS
    does not take through SciPy, it counts where the program is cut and has nothing better.
    """
    room = len(work_E) // devices if equal else len(work_E)
    cluster_E = np.empty(len(work_E), np.int64)
    work_M, size_M = np.zeros(devices), np.zeros(devices, np.int64)
    for e in np.argsort(-work_E, kind="stable"):
        m = int(np.lexsort((size_M, np.where(size_M < room, work_M, np.inf)))[0])
        cluster_E[e] = m
        work_M[m] += work_E[e]
        size_M[m] += 1
    return cluster_E


def devices(tuner: Tuner, cluster_LE: np.ndarray, seconds: float) -> tuple[np.ndarray, bool]:
    """int64 [L, E]: the device of every expert, and whether all programs ended by themselves."""
    layers, count = tuner.num_layers, tuner.num_devices
    if layers == 1:
        return cluster_LE, True
    deadline = time.monotonic() + seconds
    onehot_LEM = np.eye(count)[cluster_LE]
    flow_lMM = onehot_LEM[:-1].transpose(0, 2, 1) @ tuner.flow_lEE @ onehot_LEM[1:]
    done = True
    if count**4 * (layers - 1) <= WHOLE:
        device_LM, done = _together(flow_lMM, tuner.bandwidth_MM, seconds / 2)
        if device_LM is not None:
            return np.take_along_axis(device_LM, cluster_LE, axis=1), done
    device_LM = np.tile(np.arange(count), (layers, 1))
    for layer in range(1, layers):
        left = max((deadline - time.monotonic()) / (layers - layer), LEAST)
        device_LM[layer], ended = _next(
            flow_lMM[layer - 1], device_LM[layer - 1], tuner.bandwidth_MM, left
        )
        done = done and ended
    return np.take_along_axis(device_LM, cluster_LE, axis=1), done


def _next(
    flow_MM: np.ndarray, before_M: np.ndarray, bandwidth_MM: np.ndarray, seconds: float
) -> tuple[np.ndarray, bool]:
    """The devices of a layer's clusters given those of the layer before it."""
    count = len(flow_MM)
    from_MM = np.empty_like(flow_MM)
    from_MM[before_M] = flow_MM  # [device before, cluster]
    worst_MM = (from_MM[:, :, None] / bandwidth_MM[:, None, :]).max(axis=0)  # cluster, device
    scale = max(float(worst_MM.max()), 1e-300)
    rows = sparse.hstack([sparse.diags((worst_MM / scale).ravel()), -np.ones((count**2, 1))])
    limits = [
        optimize.LinearConstraint(_wide(_bijection(count), 1), 1, 1),
        optimize.LinearConstraint(rows, -np.inf, 0),
    ]
    result = optimize.milp(
        np.concatenate([np.zeros(count**2), [1.0]]),
        constraints=limits,
        bounds=optimize.Bounds(0, 1),
        integrality=np.concatenate([np.ones(count**2), [0]]),
        options={"time_limit": max(seconds, 1e-3), "mip_rel_gap": GAP},
    )
    if clock.checked(result).x is None:
        return np.arange(count), False
    return result.x[: count**2].reshape(count, count).argmax(axis=1), result.status == 0


def _together(
    flow_lMM: np.ndarray, bandwidth_MM: np.ndarray, seconds: float
) -> tuple[np.ndarray | None, bool]:
    """int64 [L, M]: the devices of all clusters by one program; None if it found nothing.

    Unknowns: y[l, c, g], then the products p[l, c, g, d, h] = y[l, c, g] y[l + 1, d, h], whose sums
    over h (over g) are y[l, c, g] (y[l + 1, d, h]), then z[l], at least every pair's seconds.
    """
    pairs, count = len(flow_lMM), len(bandwidth_MM)
    first, products = (pairs + 1) * count**2, pairs * count**4
    size = first + products + pairs
    scale = max(float(flow_lMM.max() / bandwidth_MM.min()), 1e-300)
    eye, ones = sparse.eye(count), np.ones((1, count))
    over_h = sparse.kron(sparse.eye(count**3), ones)  # rows (c, g, d)
    over_g = sparse.kron(sparse.kron(eye, ones), sparse.eye(count**2))  # rows (c, d, h)
    same_cg = sparse.kron(sparse.eye(count**2), np.ones((count, 1)))
    same_dh = sparse.kron(np.ones((count, 1)), sparse.eye(count**2))
    blocks, least = [], []
    for pair in range(pairs):
        at = [pair * count**2, (pair + 1) * count**2, first + pair * count**4]
        for left, block, y in ((over_h, same_cg, at[0]), (over_g, same_dh, at[1])):
            blocks.append(_placed(size, [(left, at[2]), (-block, y)]))
        seconds_gh = _pair_rows(flow_lMM[pair], bandwidth_MM) / scale
        z = -np.ones((count**2, 1))
        least.append(_placed(size, [(seconds_gh, at[2]), (z, first + products + pair)]))
    once = _wide(sparse.block_diag([_bijection(count)] * (pairs + 1)), products + pairs)
    result = optimize.milp(
        np.concatenate([np.zeros(first + products), np.ones(pairs)]),
        constraints=[
            optimize.LinearConstraint(once, 1, 1),
            optimize.LinearConstraint(sparse.vstack(blocks).tocsr(), 0, 0),
            optimize.LinearConstraint(sparse.vstack(least).tocsr(), -np.inf, 0),
        ],
        bounds=optimize.Bounds(0, np.where(np.arange(size) < first + products, 1, np.inf)),
        integrality=(np.arange(size) < first).astype(int),
        options={"time_limit": max(seconds, 1e-3), "mip_rel_gap": GAP},
    )
    if clock.checked(result).x is None:
        return None, False
    device_LM = result.x[:first].reshape(pairs + 1, count, count).argmax(axis=2)
    return device_LM, result.status == 0


def _pair_rows(flow_MM: np.ndarray, bandwidth_MM: np.ndarray) -> sparse.csr_matrix:
    """[(g, h), (c, g, d, h)]: seconds of the pair g, h."""
    count = len(flow_MM)
    c, g, d, h = (axis.ravel() for axis in np.indices((count,) * 4))
    value = flow_MM[c, d] / bandwidth_MM[g, h]
    return sparse.csr_matrix((value, (g * count + h, np.arange(count**4))))


def _bijection(count: int) -> sparse.csr_matrix:
    """Every cluster on one device, every device with one cluster."""
    eye, ones = sparse.eye(count), np.ones((1, count))
    return sparse.vstack([sparse.kron(eye, ones), sparse.kron(ones, eye)]).tocsr()


def _placed(size: int, blocks) -> sparse.csr_matrix:
    """One row of blocks, each beginning at its column."""
    parts = [sparse.coo_matrix(block) for block, _ in blocks]
    columns = [part.col + start for part, (_, start) in zip(parts, blocks, strict=True)]
    return sparse.csr_matrix(
        (
            np.concatenate([part.data for part in parts]),
            (np.concatenate([part.row for part in parts]), np.concatenate(columns)),
        ),
        shape=(parts[0].shape[0], size),
    )


def _wide(matrix, more: int) -> sparse.csr_matrix:
    """The matrix with `more` empty columns after it."""
    return _placed(matrix.shape[1] + more, [(matrix, 0)])
