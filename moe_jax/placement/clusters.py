"""Cuts the experts of one layer into equal groups so that experts used together share a device.

Axes: B starts that are improved side by side, E experts, M devices.

Maximise sum over pairs (e, f) of affinity_EE[e, f] * likeness_MM[device e, device f], where
likeness is 1 on one device, less on one node, 0 further away; the load of a device above `cap`
costs `penalty` per unit. Swaps of two experts keep the groups equal. Each step takes the best of
all E^2 swaps of every start (deltas in closed form from gain_BEM = affinity @ onehot @ likeness);
a start that has no improving swap is done. `improve` then repeats: shake a few experts of the best
start, descend, keep what is better.
"""

import dataclasses

import numpy as np

from moe_jax.placement import clock


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One layer's clustering problem.

    Attributes:
      affinity_EE: float64, symmetric, zero diagonal.
      load_E: float64, tokens per expert.
      likeness_MM: float64, symmetric, ones on the diagonal.
      cap: largest load of a device that is not penalised; one number, or one per device.
      bonus_EM: what an expert is worth on a device by itself (homes), or None.
    """

    affinity_EE: np.ndarray
    load_E: np.ndarray
    likeness_MM: np.ndarray
    cap: float | np.ndarray = np.inf
    bonus_EM: np.ndarray | None = None

    @property
    def penalty(self) -> float:
        """Per token above the cap: more than a token's pairs in the layer can ever be worth."""
        worth = self.affinity_EE.sum()
        if self.bonus_EM is not None:
            worth += np.abs(self.bonus_EM).max(axis=1).sum()
        pairs_per_load = worth / max(self.load_E.sum(), 1e-300)
        return 4.0 * (1.0 + pairs_per_load)

    def value(self, device_E: np.ndarray) -> float:
        """Affinity kept, each pair once, less the overload's penalty."""
        like_EE = self.likeness_MM[device_E[:, None], device_E[None, :]]
        kept = 0.5 * float((self.affinity_EE * like_EE).sum())
        if self.bonus_EM is not None:
            kept += float(self.bonus_EM[np.arange(len(device_E)), device_E].sum())
        return kept - self.penalty * self.overload(device_E)

    def overload(self, device_E: np.ndarray) -> float:
        load_M = np.bincount(device_E, weights=self.load_E, minlength=len(self.likeness_MM))
        return float(np.maximum(load_M - self.cap, 0.0).sum()) if self.capped else 0.0

    @property
    def capped(self) -> bool:
        return bool(np.isfinite(self.cap).any())


def descend(layer: Layer, device_BE: np.ndarray, deadline: float) -> np.ndarray:
    """Best-swap descent of every start; returns new labels."""
    device_BE = device_BE.copy()
    active_B = np.arange(len(device_BE))
    # on a flat machine swaps between other devices do not change a swap's gain
    flat = np.array_equal(layer.likeness_MM, np.eye(len(layer.likeness_MM)))
    at_once = max(1, len(layer.likeness_MM) // 2) if flat else 1
    least = 1e-9 * (1.0 + layer.affinity_EE.sum())
    while active_B.size and not clock.late(deadline):
        moved_BE = device_BE[active_B]
        gained_B = _swap(moved_BE, _deltas(layer, moved_BE), at_once, least)
        device_BE[active_B] = moved_BE
        active_B = active_B[gained_B]
    return device_BE


def _swap(device_BE: np.ndarray, delta_BEE: np.ndarray, at_once: int, least: float) -> np.ndarray:
    """Makes the best swaps in place, each on devices of its own; returns who gained, bool [B]."""
    starts, experts = device_BE.shape
    row_B = np.arange(starts)
    gained_B = np.zeros(starts, bool)
    before_BE = device_BE.copy()
    for _ in range(at_once):
        best_B = delta_BEE.reshape(starts, -1).argmax(axis=1)
        e_B, f_B = best_B // experts, best_B % experts
        better_B = delta_BEE[row_B, e_B, f_B] > least
        if not better_B.any():
            break
        gained_B |= better_B
        row, e, f = row_B[better_B], e_B[better_B], f_B[better_B]
        device_BE[row, e], device_BE[row, f] = device_BE[row, f], device_BE[row, e]
        a_B, b_B = before_BE[row_B, e_B], before_BE[row_B, f_B]
        used_BE = (before_BE == a_B[:, None]) | (before_BE == b_B[:, None])
        delta_BEE[used_BE] = 0.0
        delta_BEE.transpose(0, 2, 1)[used_BE] = 0.0
    return gained_B


def improve(
    layer: Layer, start_BE: np.ndarray, rng: np.random.Generator, rounds: int, deadline: float
) -> np.ndarray:
    """The best labels found by descent from every start and `rounds` shakes of the best."""
    found_BE = descend(layer, start_BE, deadline)
    best_E, best = _best(layer, found_BE)
    for _ in range(rounds):
        if clock.late(deadline):
            break
        found_BE = descend(layer, _shaken(best_E, len(start_BE), rng), deadline)
        next_E, value = _best(layer, found_BE)
        if value > best:
            best_E, best = next_E, value
    return best_E


def random_starts(experts: int, devices: int, starts: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [B, E]: equal groups at random."""
    equal_E = np.repeat(np.arange(devices), experts // devices)
    return np.stack([rng.permutation(equal_E) for _ in range(starts)])


def _deltas(layer: Layer, device_BE: np.ndarray) -> np.ndarray:
    """float64 [B, E, E]: what swapping e and f gains; 0 within a device."""
    like_MM, affinity_EE = layer.likeness_MM, layer.affinity_EE
    onehot_BEM = np.eye(len(like_MM))[device_BE]
    gain_BEM = (affinity_EE @ onehot_BEM) @ like_MM
    if layer.bonus_EM is not None:
        gain_BEM = gain_BEM + layer.bonus_EM
    # gain of e at the device of f, less its gain where it is
    own_BE = np.take_along_axis(gain_BEM, device_BE[:, :, None], 2)[:, :, 0]
    at_BEE = np.take_along_axis(
        gain_BEM, np.broadcast_to(device_BE[:, None, :], (*device_BE.shape, device_BE.shape[1])), 2
    )
    move_BEE = at_BEE - own_BE[:, :, None]
    like_BEE = like_MM[device_BE[:, :, None], device_BE[:, None, :]]
    delta_BEE = move_BEE + move_BEE.transpose(0, 2, 1) - 2.0 * affinity_EE * (1.0 - like_BEE)
    if layer.capped:
        delta_BEE -= layer.penalty * _overload_change(layer, device_BE, onehot_BEM)
    delta_BEE[device_BE[:, :, None] == device_BE[:, None, :]] = 0.0
    return delta_BEE


def _overload_change(layer: Layer, device_BE, onehot_BEM) -> np.ndarray:
    load_BM = layer.load_E @ onehot_BEM
    of_BE = np.take_along_axis(load_BM, device_BE, 1)
    shift_EE = layer.load_E[None, :] - layer.load_E[:, None]  # e's device gets f and loses e
    cap_BE = np.broadcast_to(layer.cap, onehot_BEM.shape[2])[device_BE]
    after_BEE = np.maximum(of_BE[:, :, None] + shift_EE - cap_BE[:, :, None], 0.0)
    before_BE = np.maximum(of_BE - cap_BE, 0.0)
    change_BEE = after_BEE - before_BE[:, :, None]
    return change_BEE + change_BEE.transpose(0, 2, 1)


def _best(layer: Layer, found_BE: np.ndarray) -> tuple[np.ndarray, float]:
    values = [layer.value(device_E) for device_E in found_BE]
    return found_BE[int(np.argmax(values))], max(values)


def _shaken(device_E: np.ndarray, starts: int, rng: np.random.Generator) -> np.ndarray:
    """Copies of a start with a few experts permuted among themselves."""
    shaken_BE = np.tile(device_E, (starts, 1))
    for row_E in shaken_BE:
        count = int(rng.integers(3, max(4, len(row_E) // 3) + 1))
        chosen = rng.choice(len(row_E), size=min(count, len(row_E)), replace=False)
        row_E[chosen] = row_E[rng.permutation(chosen)]
    return shaken_BE
