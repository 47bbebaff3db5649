"""Exact integer programs, small enough to be solved many times inside a search.

Axes: E experts of one layer, M devices, s = E / M slots of a device, L layers, Q distinct expert
sets. The whole problem as one linearised program is hopeless (README.md), so each program here
fixes everything but one part:

- `assign`: one layer, given its neighbours: max sum benefit_EM[e, device e] with s experts on each
  device. A transportation problem: its linear relaxation is integral, so an assignment solver
  answers it exactly.
- `assign_capped`: the same with a cap on every device's load. No longer integral: HiGHS.
- `balance`: one layer, minimise the largest device load (MoETuner's stage 1 with equal sizes).
- `whole_chain`, `whole_layer`: everything at once, for sizes where it proves optimality in seconds.

HiGHS comes with SciPy (`scipy.optimize.milp`).
"""

import dataclasses

import numpy as np
from scipy import optimize, sparse

from moe_jax.placement import clock
from moe_jax.placement.bounds import whole_number_bound


@dataclasses.dataclass(frozen=True, eq=False)
class Solved:
    """What a program returned.

    Attributes:
      device: labels, [E] or [L, E].
      bound: proven limit of the objective, on the side that no solution can pass.
    """

    device: np.ndarray
    bound: float


def assign(benefit_EM: np.ndarray) -> np.ndarray:
    """int64 [E]: the best equal-sized assignment of experts to devices."""
    experts, devices = benefit_EM.shape
    slots = experts // devices
    _, column_E = optimize.linear_sum_assignment(np.repeat(benefit_EM, slots, axis=1), True)
    return column_E // slots


def assign_capped(
    benefit_EM: np.ndarray, load_E: np.ndarray, cap: float | np.ndarray, time_limit: float
) -> np.ndarray | None:
    """As `assign`, no device loaded above `cap` (one number, or one per device).

    None if no solution was found in time.
    """
    device_E = assign(benefit_EM)
    experts, devices = benefit_EM.shape
    if (np.bincount(device_E, weights=load_E, minlength=devices) <= cap).all():
        return device_E
    scale = max(float(np.abs(benefit_EM).max()), 1e-300)
    result = _milp(
        -benefit_EM.ravel() / scale,
        [_once(experts, devices), _equal(experts, devices), _loads(load_E, devices, cap)],
        time_limit,
        gap=1e-6,
    )
    if result.x is None:
        return None
    device_E = result.x.reshape(experts, devices).argmax(axis=1)
    return device_E if _keeps(device_E, load_E, devices, cap) else None


def fewest_capped(
    cost_EM: np.ndarray, load_E: np.ndarray, cap_M: np.ndarray, time_limit: float
) -> Solved | None:
    """Least sum of whole costs, equal groups, no device loaded above its cap, with proof.

    None if no solution was found in time.
    """
    experts, devices = cost_EM.shape
    scale = max(float(np.abs(cost_EM).max()), 1.0)
    limits = [_once(experts, devices), _equal(experts, devices), _loads(load_E, devices, cap_M)]
    result = _milp(cost_EM.ravel() / scale, limits, time_limit, gap=1e-6)
    if result.x is None:
        return None
    device_E = result.x.reshape(experts, devices).argmax(axis=1)
    if not _keeps(device_E, load_E, devices, cap_M):
        return None
    return Solved(device_E, whole_number_bound(result.mip_dual_bound * scale))


def balance(
    load_E: np.ndarray,
    devices: int,
    time_limit: float,
    speed_M: np.ndarray | None = None,
    extra: float = 0.0,
) -> np.ndarray | None:
    """int64 [E]: equal-sized groups of least maximal load; None if none was found in time.

    Every device has a load of `extra` besides, and a load counts over its device's speed (None:
    all are 1).
    """
    experts = len(load_E)
    order_E = np.argsort(-load_E, kind="stable")
    scale = max(float(load_E.sum()) / devices, 1e-300)
    size = experts * devices
    once, equal = _once(experts, devices, 1), _equal(experts, devices, 1)
    full_M1 = np.ones((devices, 1)) if speed_M is None else speed_M[:, None]
    rows_MN = sparse.hstack([_loads(load_E[order_E] / scale, devices, np.inf).A, -full_M1])
    under = optimize.LinearConstraint(rows_MN, -np.inf, -extra / scale)
    upper_EM = np.ones((experts, devices))
    if speed_M is None:  # devices are alike: the e-th heaviest expert is on one of the first e + 1
        upper_EM = (np.arange(devices)[None, :] <= np.arange(experts)[:, None]).astype(float)
    result = _milp(
        np.concatenate([np.zeros(size), [1.0]]),
        [once, equal, under],
        time_limit,
        gap=1e-7,
        upper=np.concatenate([upper_EM.ravel(), [np.inf]]),
        whole=np.concatenate([np.ones(size), [0]]),
    )
    if result.x is None:
        return None
    device_E = np.empty(experts, np.int64)
    device_E[order_E] = result.x[:size].reshape(experts, devices).argmax(axis=1)
    return device_E if _keeps(device_E, load_E, devices, np.inf) else None


def whole_chain(transition_LEE: np.ndarray, devices: int, time_limit: float) -> Solved | None:
    """All layers at once: the most transitions that can stay on their device, with proof.

    kept[l, e, f, m] <= x[l, e, m] and <= x[l + 1, f, m]: ExFlow's program (arXiv 2401.08383) with
    its tokens summed up to counts. Counts must be whole numbers.
    """
    layers, experts = len(transition_LEE) + 1, transition_LEE.shape[1]
    per_layer = experts * devices
    pair, e, f = np.nonzero(transition_LEE)
    count = np.repeat(transition_LEE[pair, e, f].astype(float), devices)
    kept = layers * per_layer + np.arange(len(count))
    device = np.tile(np.arange(devices), len(pair))
    here = np.repeat(pair * per_layer + e * devices, devices) + device
    there = np.repeat((pair + 1) * per_layer + f * devices, devices) + device
    size = layers * per_layer + len(count)
    limits = [_at_most(kept, here, size), _at_most(kept, there, size)]
    once = sparse.block_diag([_once(experts, devices).A] * layers)
    equal = sparse.block_diag([_equal(experts, devices).A] * layers)
    sides = [
        optimize.LinearConstraint(_widen(once, size), 1, 1),
        optimize.LinearConstraint(_widen(equal, size), experts // devices, experts // devices),
    ]
    result = _milp(
        np.concatenate([np.zeros(layers * per_layer), -count]),
        sides + limits,
        time_limit,
        gap=0.0,
        whole=np.concatenate([np.ones(layers * per_layer), np.zeros(len(count))]),
    )
    if result.x is None:
        return None
    device_LE = result.x[: layers * per_layer].reshape(layers, experts, devices).argmax(axis=2)
    return Solved(device_LE, -whole_number_bound(result.mip_dual_bound))


def whole_layer(
    member_QE: np.ndarray, count_Q: np.ndarray, devices: int, time_limit: float
) -> Solved | None:
    """One layer at once: the fewest (token, device) contacts, with proof.

    touched[q, m] >= x[e, m] for every expert e of set q: the connectivity metric of a hypergraph
    partition. member_QE is bool, count_Q the tokens with that set of experts.
    """
    experts = member_QE.shape[1]
    first = experts * devices
    q, e = np.nonzero(member_QE)
    device = np.tile(np.arange(devices), len(q))
    contact = first + np.repeat(q * devices, devices) + device
    expert = np.repeat(e * devices, devices) + device
    size = first + len(member_QE) * devices
    upper_EM = np.arange(devices)[None, :] <= np.arange(experts)[:, None]  # devices are alike
    result = _milp(
        np.concatenate([np.zeros(first), np.repeat(count_Q.astype(float), devices)]),
        [
            optimize.LinearConstraint(_widen(_once(experts, devices).A, size), 1, 1),
            optimize.LinearConstraint(
                _widen(_equal(experts, devices).A, size), experts // devices, experts // devices
            ),
            _at_most(expert, contact, size),
        ],
        time_limit,
        gap=0.0,
        upper=np.concatenate([upper_EM.ravel().astype(float), np.ones(size - first)]),
        whole=np.concatenate([np.ones(first), np.zeros(size - first)]),
    )
    if result.x is None:
        return None
    device_E = result.x[:first].reshape(experts, devices).argmax(axis=1)
    return Solved(device_E, whole_number_bound(result.mip_dual_bound))


def _milp(cost, constraints, time_limit: float, gap: float, upper=None, whole=None):
    result = optimize.milp(
        cost,
        constraints=constraints,
        bounds=optimize.Bounds(0, 1 if upper is None else upper),
        integrality=np.ones(len(cost)) if whole is None else whole,
        options={"time_limit": max(time_limit, 1e-3), "mip_rel_gap": gap},
    )
    return clock.checked(result)


def _once(experts: int, devices: int, extra: int = 0) -> optimize.LinearConstraint:
    """Every expert on one device."""
    rows = sparse.kron(sparse.eye(experts), np.ones((1, devices)))
    return optimize.LinearConstraint(_widen(rows, rows.shape[1] + extra), 1, 1)


def _equal(experts: int, devices: int, extra: int = 0) -> optimize.LinearConstraint:
    """Every device holds as many experts."""
    rows = sparse.kron(np.ones((1, experts)), sparse.eye(devices))
    slots = experts // devices
    return optimize.LinearConstraint(_widen(rows, rows.shape[1] + extra), slots, slots)


def _loads(load_E: np.ndarray, devices: int, cap: float | np.ndarray) -> optimize.LinearConstraint:
    rows = sparse.kron(load_E[None, :], sparse.eye(devices))
    return optimize.LinearConstraint(rows, -np.inf, cap)


def _at_most(small: np.ndarray, large: np.ndarray, size: int) -> optimize.LinearConstraint:
    """x[small] <= x[large], entry by entry."""
    row = np.arange(len(small))
    ones = np.ones(len(small))
    matrix = sparse.coo_matrix(
        (np.concatenate([ones, -ones]), (np.tile(row, 2), np.concatenate([small, large]))),
        shape=(len(small), size),
    )
    return optimize.LinearConstraint(matrix.tocsr(), -np.inf, 0.0)


def _widen(matrix, columns: int):
    matrix = sparse.csr_matrix(matrix)
    return sparse.csr_matrix(
        (matrix.data, matrix.indices, matrix.indptr), shape=(matrix.shape[0], columns)
    )


def _keeps(device_E: np.ndarray, load_E: np.ndarray, devices: int, cap: float | np.ndarray) -> bool:
    sizes_M = np.bincount(device_E, minlength=devices)
    load_M = np.bincount(device_E, weights=load_E, minlength=devices)
    kept_M = load_M <= np.asarray(cap) * (1 + 1e-9)
    return bool((sizes_M == len(load_E) // devices).all() and kept_M.all())
