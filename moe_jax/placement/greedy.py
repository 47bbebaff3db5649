"""Construction without search: one pass, milliseconds. Every solver starts from here.

Axes: L MoE layers, E experts, M devices, s slots per device.

- `balanced`: longest-processing-time packing, then swaps between the fullest device and others.
- `grown`: one layer; experts in descending load join the open group they are used with most.
- transitions: chain.sweep.
"""

import numpy as np

from moe_jax.placement import baselines
from moe_jax.placement.clusters import Layer


def balanced(
    load_LE: np.ndarray, num_devices: int, speed_M: np.ndarray | None = None
) -> np.ndarray:
    """int64 [L, E]: the largest device load as small as packing and swaps get it.

    A load counts over its device's speed; None: all are 1.
    """
    if speed_M is None:
        speed_M = np.ones(num_devices)
        device_LE = baselines.lpt(load_LE, num_devices)
    else:
        device_LE = np.stack([_packed(load_E, speed_M) for load_E in load_LE])
    for load_E, device_E in zip(load_LE, device_LE, strict=True):
        while _relieve(load_E, device_E, speed_M):
            pass
    return device_LE


def grown(layer: Layer, slots: int) -> np.ndarray:
    """int64 [E]: groups by co-activation; a group that would pass the cap is closed if any is not.

    The value of joining a group counts what the expert shares with it, less what it shares with an
    average group of that size, so that the first experts spread out unless they belong together.
    """
    devices, experts = len(layer.likeness_MM), len(layer.load_E)
    device_E = np.full(experts, -1)
    size_M, load_M = np.zeros(devices, np.int64), np.zeros(devices)
    gain_EM = np.zeros((experts, devices))
    for e in np.argsort(-layer.load_E, kind="stable"):
        value_M = gain_EM[e] - gain_EM[e].sum() * size_M / max(size_M.sum(), 1)
        over_M = np.maximum(load_M + layer.load_E[e] - layer.cap, 0.0)
        value_M = value_M - layer.penalty * np.where(np.isfinite(over_M), over_M, 0.0)
        m = int(np.where(size_M < slots, value_M, -np.inf).argmax())
        device_E[e] = m
        size_M[m] += 1
        load_M[m] += layer.load_E[e]
        gain_EM += layer.affinity_EE[:, e : e + 1] * layer.likeness_MM[m]
    return device_E


def _packed(load_E: np.ndarray, speed_M: np.ndarray) -> np.ndarray:
    """int64 [E]: heaviest first, to the device with room that would be done first."""
    devices, device_E = len(speed_M), np.empty(len(load_E), np.int64)
    load_M, size_M = np.zeros(devices), np.zeros(devices, np.int64)
    for e in np.argsort(-load_E, kind="stable"):
        done_M = (load_M + load_E[e]) / speed_M
        m = int(np.where(size_M < len(load_E) // devices, done_M, np.inf).argmin())
        device_E[e] = m
        load_M[m] += load_E[e]
        size_M[m] += 1
    return device_E


def _relieve(load_E: np.ndarray, device_E: np.ndarray, speed_M: np.ndarray) -> bool:
    """One swap, in place, that lowers the fullest device most; False if none does."""
    load_M = np.bincount(device_E, weights=load_E, minlength=len(speed_M))
    full = int((load_M / speed_M).argmax())
    inside, outside = np.flatnonzero(device_E == full), np.flatnonzero(device_E != full)
    if not outside.size:
        return False
    less = load_E[inside][:, None] - load_E[outside][None, :]
    there = device_E[outside]
    after = np.maximum(
        (load_M[full] - less) / speed_M[full], (load_M[there] + less) / speed_M[there]
    )
    i, j = np.unravel_index(int(after.argmin()), after.shape)
    if not after[i, j] < load_M[full] / speed_M[full] * (1 - 1e-12):
        return False
    e, f = inside[i], outside[j]
    device_E[e], device_E[f] = device_E[f], device_E[e]
    return True
