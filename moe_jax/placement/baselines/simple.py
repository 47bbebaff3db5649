"""Placements that look at nothing: by number, in turn, at random.

Axes: L MoE layers, E experts, M devices. Each returns int64 device_LE with equal groups.
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
