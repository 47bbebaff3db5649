"""Search for MoETuner's objective: better than its two stages, which it starts from.

Axes: L MoE layers, E experts, M devices.

Starts: what the caller has, the most even groups under their best labels, and the two stages with
integer programs (baselines/moetuner.py). From the best of them the best swaps and labels of one
layer after another (moetuner_moves.py), exactly, until nothing helps; then the same from the best
so far with a few experts of a few layers shaken.
"""

from collections.abc import Iterator

import numpy as np

from moe_jax.placement import clock, moetuner_moves
from moe_jax.placement.baselines import moetuner as two_stages
from moe_jax.placement.moetuner import Tuner

STAGES_SHARE = 0.15  # of the time, for the two stages
WORTH = 0.05  # seconds a layer, below which they are left out: their programs need as much
PATIENCE = 60  # shakes in a row without gain, after which the search ends


def search(
    tuner: Tuner,
    start_LE: np.ndarray,
    even_LE: np.ndarray,
    rng: np.random.Generator,
    deadline: float,
) -> Iterator[np.ndarray]:
    """Yields better and better placements within the caps."""
    starts = [start_LE, labelled(tuner, even_LE)]
    share = STAGES_SHARE * clock.left(deadline)
    if share > WORTH * tuner.num_layers:
        starts.append(two_stages.two_stages(tuner, True, share).device_LE)
    else:
        clock.cut()
    best_LE, best = start_LE, np.inf
    for one_LE in starts:
        if not tuner.allowed(one_LE):
            continue
        if tuner.value(one_LE) < best:
            best_LE, best = one_LE, tuner.value(one_LE)
            yield best_LE
        done_LE = descended(tuner, one_LE, range(tuner.num_layers), deadline)
        if tuner.value(done_LE) < best:
            best_LE, best = done_LE, tuner.value(done_LE)
            yield best_LE
    idle = 0
    while idle < PATIENCE and not clock.late(deadline):
        shaken_LE, layers = shaken(tuner, best_LE, rng)
        idle += 1
        if shaken_LE is None:
            continue
        done_LE = descended(tuner, shaken_LE, layers, deadline)
        if tuner.allowed(done_LE) and tuner.value(done_LE) < best * (1 - 1e-9):
            idle, best_LE, best = 0, done_LE, tuner.value(done_LE)
            yield best_LE


def labelled(tuner: Tuner, part_LE: np.ndarray) -> np.ndarray:
    """Each layer's best labels given the one before it."""
    device_LE = part_LE.copy()
    for layer in range(1, tuner.num_layers):
        before = Tuner(
            tuner.work_LE[: layer + 1],
            tuner.flow_lEE[:layer],
            tuner.bandwidth_MM,
            tuner.cap_L[: layer + 1],
        )
        moetuner_moves.relabel(before, device_LE[: layer + 1], layer)
    return device_LE


def descended(tuner: Tuner, device_LE: np.ndarray, layers, deadline: float) -> np.ndarray:
    """Best swaps and labels, beginning with `layers`; a change wakes the layers beside it."""
    device_LE = device_LE.copy()
    waiting = dict.fromkeys(layers)
    while waiting and not clock.late(deadline):
        layer = next(iter(waiting))
        del waiting[layer]
        changed = moetuner_moves.relabel(tuner, device_LE, layer) > 0
        while not clock.late(deadline) and moetuner_moves.swap(tuner, device_LE, layer) > 0:
            changed = True
        if changed:
            beside = (layer - 1, layer, layer + 1)
            waiting |= dict.fromkeys(n for n in beside if 0 <= n < tuner.num_layers)
    return device_LE


def shaken(tuner: Tuner, device_LE: np.ndarray, rng) -> tuple[np.ndarray | None, list[int]]:
    """A few experts of one or two neighbouring layers change places; None if that breaks a cap."""
    device_LE = device_LE.copy()
    experts = device_LE.shape[1]
    first = int(rng.integers(tuner.num_layers))
    layers = list(range(first, min(first + int(rng.integers(1, 3)), tuner.num_layers)))
    for layer in layers:
        count = min(experts, int(rng.integers(2, max(4, experts // 6) + 1)))
        chosen = rng.choice(experts, size=count, replace=False)
        device_LE[layer, chosen] = device_LE[layer, rng.permutation(chosen)]
    return (device_LE if tuner.allowed(device_LE) else None), layers
