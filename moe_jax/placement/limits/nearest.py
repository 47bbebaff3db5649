"""Labels of one layer that keep pins, a load cap and a number of moves: exact programs (HiGHS).

Axes: E experts, M devices.
"""

import dataclasses

import numpy as np
from scipy import optimize, sparse

from moe_jax.placement import clock, ilp

STATUS_INFEASIBLE = 2  # of scipy.optimize.milp


@dataclasses.dataclass(frozen=True, eq=False)
class Within:
    """What labels of a layer must keep.

    Attributes:
      pin_E: the device an expert has to be on, -1 where it is free.
      load_E: of every expert.
      cap: largest load of a device, one number or one per device; inf without one.
      devices: M.
    """

    pin_E: np.ndarray
    load_E: np.ndarray
    cap: float | np.ndarray
    devices: int

    def kept(self, device_E: np.ndarray) -> bool:
        load_M = np.bincount(device_E, weights=self.load_E, minlength=self.devices)
        pinned = ((self.pin_E < 0) | (self.pin_E == device_E)).all()
        return bool(pinned and (load_M <= np.asarray(self.cap) * (1 + 1e-9)).all())

    @property
    def open_EM(self) -> np.ndarray:
        """bool: no pin forbids this expert on this device."""
        devices_1M = np.arange(self.devices)[None, :]
        return (self.pin_E[:, None] < 0) | (self.pin_E[:, None] == devices_1M)


@dataclasses.dataclass(frozen=True, eq=False)
class Nearest:
    """The labels that change fewest experts, None if none were found; proven: none exist."""

    device_E: np.ndarray | None
    none_exist: bool = False


def nearest(near_E: np.ndarray, within: Within, time_limit: float) -> Nearest:
    """The labels that keep all and differ from `near_E` in fewest experts."""
    if within.kept(near_E):
        return Nearest(near_E)
    stays_EM = (near_E[:, None] == np.arange(within.devices)[None, :]).astype(float)
    # one pin outweighs everything that may stay
    device_E = ilp.assign(stays_EM - (len(near_E) + 1) * ~within.open_EM)
    if within.kept(device_E):
        return Nearest(device_E)
    return best(stays_EM, within, near_E, len(near_E), time_limit)


def best(
    benefit_EM: np.ndarray, within: Within, old_E: np.ndarray, moves: int, time_limit: float
) -> Nearest:
    """The labels with most benefit that keep all, at most `moves` experts away from `old_E`."""
    experts, devices = benefit_EM.shape
    scale = max(float(np.abs(benefit_EM).max()), 1e-300)
    changed_EM = old_E[:, None] != np.arange(devices)[None, :]
    once = sparse.kron(sparse.eye(experts), np.ones((1, devices)))
    equal = sparse.kron(np.ones((1, experts)), sparse.eye(devices))
    limits = [
        optimize.LinearConstraint(once, 1, 1),
        optimize.LinearConstraint(equal, experts // devices, experts // devices),
        optimize.LinearConstraint(changed_EM.astype(float).ravel()[None, :], -np.inf, moves),
    ]
    if np.isfinite(within.cap).all():
        most = max(float(np.max(within.cap)), 1e-300)
        loads = sparse.kron(within.load_E[None, :] / most, sparse.eye(devices))
        limits.append(optimize.LinearConstraint(loads, 0, np.asarray(within.cap) / most))
    result = optimize.milp(
        -benefit_EM.ravel() / scale,
        constraints=limits,
        bounds=optimize.Bounds(0, within.open_EM.astype(float).ravel()),
        integrality=np.ones(experts * devices),
        options={"time_limit": max(time_limit, 1e-3), "mip_rel_gap": 1e-6},
    )
    if clock.checked(result).x is None:
        return Nearest(None, result.status == STATUS_INFEASIBLE)
    device_E = result.x.reshape(experts, devices).argmax(axis=1)
    moved = int((device_E != old_E).sum())
    even = (np.bincount(device_E, minlength=devices) == experts // devices).all()
    return Nearest(device_E if even and moved <= moves and within.kept(device_E) else None)
