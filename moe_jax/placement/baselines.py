"""What a plan has to beat: placements that use no search, most of them no affinity either.

Axes: L MoE layers, E experts, M devices. Each returns int64 device_LE with equal groups.

`lpt` is what EPLB-style packing does when there are no spare slots: heaviest expert first, each to
the lightest device that still has room (Graham's longest-processing-time rule).
"""

import numpy as np

from moe_jax.placement.plan import check_divides


def contiguous(num_layers: int, num_experts: int, num_devices: int) -> np.ndarray:
    """Neighbouring ids together: what programs do when nobody planned."""
    check_divides(num_experts, num_devices)
    return np.tile(np.arange(num_experts) // (num_experts // num_devices), (num_layers, 1))


def round_robin(num_layers: int, num_experts: int, num_devices: int) -> np.ndarray:
    """Expert e on device e mod M."""
    check_divides(num_experts, num_devices)
    return np.tile(np.arange(num_experts) % num_devices, (num_layers, 1))


def random(num_layers: int, num_experts: int, num_devices: int, seed: int) -> np.ndarray:
    """Equal groups at random, drawn anew for every layer."""
    rng = np.random.default_rng(seed)
    return rng.permuted(contiguous(num_layers, num_experts, num_devices), axis=1)


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
