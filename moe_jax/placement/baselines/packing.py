"""Placements by load alone: heaviest first.

Axes: L MoE layers, E experts, M devices. Each returns int64 device_LE with equal groups.

- `lpt`: to the lightest device that still has room (Graham's longest-processing-time rule). EPLB's
  packing does this when there are no spare slots.
- `zigzag`: dealt out in turn, forth and back: devices 0..M-1, M-1..0, 0..M-1, ...
- `smartmoe`: `lpt` that leaves an expert where it is if its device is among the lightest, and
  leaves a whole layer as it is unless its fullest device gets less (SmartMoE, ATC 2023; the greedy
  of its published artifact).
"""

import numpy as np

from moe_jax.placement.plan import check_divides


def lpt(load_LE: np.ndarray, num_devices: int) -> np.ndarray:
    """Heaviest first, to the lightest device with room."""
    layers, experts = load_LE.shape
    check_divides(experts, num_devices)
    slots = experts // num_devices
    rows_L = np.arange(layers)
    order_LE = np.argsort(-load_LE, axis=1, kind="stable")
    load_LM = np.zeros((layers, num_devices))
    size_LM = np.zeros((layers, num_devices), np.int64)
    device_LE = np.empty((layers, experts), np.int64)
    for expert_L in order_LE.T:
        device_L = np.where(size_LM < slots, load_LM, np.inf).argmin(axis=1)
        device_LE[rows_L, expert_L] = device_L
        load_LM[rows_L, device_L] += load_LE[rows_L, expert_L]
        size_LM[rows_L, device_L] += 1
    return device_LE


def zigzag(load_LE: np.ndarray, num_devices: int) -> np.ndarray:
    """Heaviest first, dealt out forth and back."""
    layers, experts = load_LE.shape
    check_divides(experts, num_devices)
    turn_E, place_E = np.divmod(np.arange(experts), num_devices)
    dealt_E = np.where(turn_E % 2 == 0, place_E, num_devices - 1 - place_E)
    order_LE = np.argsort(-load_LE, axis=1, kind="stable")
    device_LE = np.empty((layers, experts), np.int64)
    np.put_along_axis(device_LE, order_LE, np.tile(dealt_E, (layers, 1)), axis=1)
    return device_LE


def smartmoe(load_LE: np.ndarray, before_LE: np.ndarray, num_devices: int) -> np.ndarray:
    """Heaviest first, at home if that is no worse; a layer that gains nothing stays."""
    check_divides(load_LE.shape[1], num_devices)
    rows = zip(load_LE, before_LE, strict=True)
    return np.stack([_rebalanced(load_E, before_E, num_devices) for load_E, before_E in rows])


def _rebalanced(load_E: np.ndarray, before_E: np.ndarray, devices: int) -> np.ndarray:
    slots = len(load_E) // devices
    load_M, size_M = np.zeros(devices), np.zeros(devices, np.int64)
    device_E = np.empty(len(load_E), np.int64)
    for e in np.argsort(-load_E, kind="stable"):
        free_M = np.where(size_M < slots, load_M, np.inf)
        home = before_E[e]
        m = home if free_M[home] == free_M.min() else free_M.argmin()
        device_E[e] = m
        load_M[m] += load_E[e]
        size_M[m] += 1
    fullest = np.bincount(before_E, weights=load_E, minlength=devices).max()
    return device_E if load_M.max() < fullest else before_E.astype(np.int64)
