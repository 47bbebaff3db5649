"""Swap after swap along the chain of layers: away from the plan in use, and back from a better one.

Axes: L layers, E experts, M devices.

With a layer's neighbours fixed, what all its E^2 swaps gain is known in closed form: the experts of
one layer do not meet. `away` takes the swap with most gain per move, `back` the one with least loss
per move saved; swaps that gain without a move come first. Both yield the plans on their way, of
large models every so many.
"""

from collections.abc import Iterator

import numpy as np

from moe_jax.placement import clock
from moe_jax.placement.chain import Chain
from moe_jax.placement.problem import Problem

STEPS = 1024  # experts, over all layers, up to which every plan on the way is yielded
FIRST = 1e15  # above every gain per move: what costs no move


def gains_EE(problem: Problem, chain: Chain, device_LE: np.ndarray, layer: int) -> np.ndarray:
    """float64: what swapping two experts of a layer gains; -inf for a broken pin or cap."""
    benefit_EM = chain.benefit_EM(device_LE, layer, before=True, after=True)
    device_E, load_E = device_LE[layer], chain.load_LE[layer]
    own_E = benefit_EM[np.arange(len(device_E)), device_E]
    move_EE = benefit_EM[:, device_E] - own_E[:, None]
    allowed_EE = device_E[:, None] != device_E[None, :]
    if np.isfinite(chain.cap_L[layer]):
        cap_E = chain.cap_LM[layer, device_E] * (1 + 1e-9)
        load_M = np.bincount(device_E, weights=load_E, minlength=chain.num_devices)
        shift_EE = load_E[None, :] - load_E[:, None]  # the device of e gets f and loses e
        over_EE = load_M[device_E][:, None] + shift_EE > cap_E[:, None]
        allowed_EE &= ~over_EE & ~over_EE.T
    if problem.pins is not None:
        free_E = problem.pins.device_LE[layer] < 0
        allowed_EE &= free_E[:, None] & free_E[None, :]
    return np.where(allowed_EE, move_EE + move_EE.T, -np.inf)


def away(
    problem: Problem, chain: Chain, old_LE: np.ndarray, device_LE: np.ndarray, deadline: float
) -> Iterator[np.ndarray]:
    """Towards more value, until no swap gains."""
    return _walk(problem, chain, old_LE, device_LE, deadline, forward=True)


def back(
    problem: Problem, chain: Chain, old_LE: np.ndarray, device_LE: np.ndarray, deadline: float
) -> Iterator[np.ndarray]:
    """Towards fewer moves, until no swap saves one."""
    return _walk(problem, chain, old_LE, device_LE, deadline, forward=False)


def _walk(
    problem, chain, old_LE, device_LE, deadline: float, forward: bool
) -> Iterator[np.ndarray]:
    device_LE = device_LE.copy()
    layers = chain.num_layers
    rate_L, swap_LP = np.full(layers, -np.inf), np.zeros((layers, 2), np.int64)
    stale, steps, stride = range(layers), 0, max(1, device_LE.size // STEPS)
    while not clock.late(deadline):
        for layer in stale:
            gain_EE = gains_EE(problem, chain, device_LE, layer)
            rate_EE = _rates(gain_EE, _more_EE(device_LE[layer], old_LE[layer]), forward)
            e, f = np.unravel_index(int(rate_EE.argmax()), rate_EE.shape)
            rate_L[layer], swap_LP[layer] = rate_EE[e, f], (e, f)
        layer = int(rate_L.argmax())
        if not np.isfinite(rate_L[layer]):
            return
        e, f = swap_LP[layer]
        device_LE[layer, [e, f]] = device_LE[layer, [f, e]]
        if (steps := steps + 1) % stride == 0:
            yield device_LE.copy()
        stale = range(max(layer - 1, 0), min(layer + 2, layers))


def _more_EE(device_E: np.ndarray, old_E: np.ndarray) -> np.ndarray:
    """int64: moves that a swap adds."""
    away_E = (device_E != old_E).astype(int)
    there_EE = (old_E[:, None] != device_E[None, :]).astype(int)
    return there_EE + there_EE.T - away_E[:, None] - away_E[None, :]


def _rates(gain_EE: np.ndarray, more_EE: np.ndarray, forward: bool) -> np.ndarray:
    """How good a swap is; -inf where it leads the wrong way."""
    least = 1e-9 * (1.0 + np.abs(gain_EE[np.isfinite(gain_EE)]).max(initial=0.0))
    better_EE = gain_EE > least
    free_EE = better_EE & (more_EE <= 0)
    if forward:
        rate_EE = np.where(better_EE, gain_EE / np.maximum(more_EE, 1), -np.inf)
    else:
        rate_EE = np.where(more_EE < 0, gain_EE / np.maximum(-more_EE, 1), -np.inf)
    return np.where(free_EE, gain_EE + FIRST, rate_EE)
