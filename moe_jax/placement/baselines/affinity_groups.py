"""Groups grown by co-activation: experts that tokens use together share a device.

Axes: L MoE layers, E experts, M devices, s = E / M slots per device. Layers by themselves; ties go
to the lower index. coactivation_LEE counts the tokens per pair of experts, symmetric, with a zero
diagonal.

- `cooccurrence`: what a TensorRT-LLM branch's load balancer does without copies. Device after
  device takes the heaviest expert that is left, then the ones used most with those it has, until
  the next would pass a share `alpha` of its slots or of the mean load; the others are packed, the
  heaviest first, each to the lightest device with room.
- `occult`: as Occult (ICML 2025) groups experts for fewer copies of a token, loads ignored. Its
  code was not read: here each group starts with the pair that is used together most among what is
  left, and takes in what is used most with it until it is full.
"""

import numpy as np

from moe_jax.placement.plan import check_divides

ALPHA = 0.8  # as published


def cooccurrence(
    load_LE: np.ndarray, coactivation_LEE: np.ndarray, num_devices: int, alpha: float = ALPHA
) -> np.ndarray:
    """int64 [L, E]: groups by co-occurrence up to `alpha`, the rest by load."""
    check_divides(load_LE.shape[1], num_devices)
    layers = zip(load_LE, coactivation_LEE, strict=True)
    return np.stack([_cooccurrence(load_E, EE, num_devices, alpha) for load_E, EE in layers])


def occult(coactivation_LEE: np.ndarray, num_devices: int) -> np.ndarray:
    """int64 [L, E]: equal groups by co-activation."""
    check_divides(coactivation_LEE.shape[1], num_devices)
    return np.stack([_occult(pairs_EE, num_devices) for pairs_EE in coactivation_LEE])


def _cooccurrence(
    load_E: np.ndarray, pairs_EE: np.ndarray, devices: int, alpha: float
) -> np.ndarray:
    experts = len(load_E)
    slots, mean = experts // devices, load_E.sum() / devices
    device_E = np.full(experts, -1)
    load_M, size_M = np.zeros(devices), np.zeros(devices, np.int64)
    for m in range(devices):
        wanted_E = load_E.astype(float)
        while size_M[m] + 1 <= slots * alpha:
            e = int(np.where(device_E < 0, wanted_E, -np.inf).argmax())
            if load_M[m] + load_E[e] > mean * alpha:
                break
            device_E[e] = m
            load_M[m] += load_E[e]
            size_M[m] += 1
            wanted_E = pairs_EE[device_E == m].sum(axis=0)
    for e in np.argsort(-load_E, kind="stable"):
        if device_E[e] < 0:
            m = int(np.where(size_M < slots, load_M, np.inf).argmin())
            device_E[e] = m
            load_M[m] += load_E[e]
            size_M[m] += 1
    return device_E


def _occult(pairs_EE: np.ndarray, devices: int) -> np.ndarray:
    experts = len(pairs_EE)
    off_EE = np.where(np.eye(experts, dtype=bool), -np.inf, pairs_EE)
    device_E = np.full(experts, -1)
    for m in range(devices):
        free_E = device_E < 0
        most_E = np.where(free_E[:, None] & free_E[None, :], off_EE, -np.inf).max(axis=1)
        # the last one, free alone, has no pair at all
        device_E[np.flatnonzero(free_E)[most_E[free_E].argmax()]] = m
        for _ in range(experts // devices - 1):
            wanted_E = pairs_EE[device_E == m].sum(axis=0)
            device_E[int(np.where(device_E < 0, wanted_E, -np.inf).argmax())] = m
    return device_E
