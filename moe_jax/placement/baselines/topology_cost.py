"""Swaps that bring experts near the devices whose tokens want them (SGLang pull request 37923).

Axes: L MoE layers, E experts, M devices, S = M sources. traffic_SLE counts the tokens of every
source device per expert, price_MM what a token costs from a device to another (zero diagonal).

Starts from a placement of even nodes, makes the best swap of two experts while one lowers the sum
of traffic x price and leaves the fullest device at most SPARE above where it started, at most E
swaps a layer. Nothing between experts enters: neither co-activation nor transitions. Where every
device sends the same, as with uniform homes, all placements cost the same and nothing is swapped.
"""

import numpy as np

SPARE = 0.05  # share of load that the fullest device may gain


def swapped(
    traffic_SLE: np.ndarray,
    price_MM: np.ndarray,
    start_LE: np.ndarray,
    spare: float = SPARE,
) -> np.ndarray:
    """int64 [L, E]: the start after its swaps; never dearer than it."""
    return np.stack(
        [_layer(traffic_SLE[:, n], price_MM, start_E, spare) for n, start_E in enumerate(start_LE)]
    )


def cost_EM(traffic_SE: np.ndarray, price_MM: np.ndarray) -> np.ndarray:
    """What the tokens of an expert cost on every device."""
    return traffic_SE.T @ price_MM


def _layer(
    traffic_SE: np.ndarray, price_MM: np.ndarray, start_E: np.ndarray, spare: float
) -> np.ndarray:
    price_EM, load_E = cost_EM(traffic_SE, price_MM), traffic_SE.sum(axis=0)
    device_E, devices = start_E.astype(np.int64), len(price_MM)
    experts = np.arange(len(device_E))
    cap = (1 + spare) * np.bincount(device_E, weights=load_E, minlength=devices).max()
    least = 1e-12 * max(price_EM.max(initial=0.0), 1e-300)
    for _ in experts:
        load_M = np.bincount(device_E, weights=load_E, minlength=devices)
        at_EE = price_EM[:, device_E]  # of e where f is
        now_E = price_EM[experts, device_E]
        gain_EE = now_E[:, None] + now_E[None, :] - at_EE - at_EE.T
        more_EE = load_E[None, :] - load_E[:, None]  # what e's device gains
        after_EE = np.maximum(load_M[device_E][:, None] + more_EE, load_M[device_E] - more_EE)
        gain_EE = np.where(after_EE <= cap * (1 + 1e-12), gain_EE, 0.0)
        e, f = np.unravel_index(int(gain_EE.argmax()), gain_EE.shape)
        if not gain_EE[e, f] > least:
            break
        device_E[e], device_E[f] = device_E[f], device_E[e]
    return device_E


def traffic_SLE(
    expert_ids_TLK: np.ndarray, home_T: np.ndarray, num_devices: int, num_experts: int
) -> np.ndarray:
    """int64: tokens of every source device per layer and expert."""
    layers, side = expert_ids_TLK.shape[1], num_experts + 1
    counts_SLE = np.empty((num_devices, layers, num_experts), np.int64)
    for layer in range(layers):
        ids_TK = np.minimum(expert_ids_TLK[:, layer].astype(np.int64), num_experts)
        bins = (home_T[:, None] * side + ids_TK).ravel()
        counts = np.bincount(bins, minlength=num_devices * side)
        counts_SLE[:, layer] = counts.reshape(num_devices, side)[:, :num_experts]
    return counts_SLE
