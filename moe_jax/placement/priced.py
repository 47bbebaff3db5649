"""One layer re-assigned under load caps where the integer program is too large: prices on load.

Axes: E experts, M devices, S slots of a device, T other experts, P swaps.

The assignment of experts to devices that gains most is exact and fast without caps (ilp.assign).
With a price p[m] on load, sum benefit[e, m] - p[m] load[e] is such an assignment again (the
Lagrangian of the caps); prices rise where a device is too full. Prices alone seldom end within the
caps, so swaps mend the rest, the cheapest per load first, and then swaps within the caps gain what
there is to gain. Not proven to be best; tests/placement/test_priced.py holds it to HiGHS.
"""

import numpy as np
from scipy import optimize

ROUNDS = 10  # of prices
STEPS = 400  # of mending, and of gaining, at most


def assign(benefit_EM: np.ndarray, load_E: np.ndarray, cap_M: np.ndarray) -> np.ndarray | None:
    """int64 [E]: equal groups, none loaded above its cap; None if swaps find no such groups."""
    experts, devices = benefit_EM.shape
    slots = experts // devices
    unit = np.abs(benefit_EM).max(axis=1).sum() / max(float(load_E.sum()), 1e-300)
    price_M = np.zeros(devices)
    best_E, best, seen = None, -np.inf, set()
    for number in range(ROUNDS):
        wide = np.repeat(benefit_EM - load_E[:, None] * price_M, slots, axis=1)
        device_E = optimize.linear_sum_assignment(wide, True)[1] // slots
        over_M = np.bincount(device_E, weights=load_E, minlength=devices) / cap_M - 1
        new = device_E.tobytes() not in seen
        if new and (number >= ROUNDS // 2 or over_M.max() <= 1e-9):
            seen.add(device_E.tobytes())
            mended_E = _mended(benefit_EM, load_E, cap_M, device_E)
            if mended_E is not None and (value := _value(benefit_EM, mended_E)) > best:
                best_E, best = mended_E, value
            if over_M.max() <= 1e-9:
                break
        price_M = np.maximum(price_M + unit * over_M / (1 + number / 4), 0.0).astype(float)
    return None if best_E is None else _gained(benefit_EM, load_E, cap_M, best_E)


def _value(benefit_EM: np.ndarray, device_E: np.ndarray) -> float:
    return float(benefit_EM[np.arange(len(device_E)), device_E].sum())


def _mended(benefit_EM, load_E, cap_M, device_E) -> np.ndarray | None:
    """Swaps out of the fullest device, each with the least loss per load above the caps."""
    device_E, devices = device_E.copy(), len(cap_M)
    experts = np.arange(len(device_E))
    for _ in range(STEPS):
        over_M = np.bincount(device_E, weights=load_E, minlength=devices) - cap_M
        full = int(over_M.argmax())
        if over_M[full] <= 1e-9 * cap_M[full]:
            return device_E
        is_here_E = device_E == full
        here_S, there_T = is_here_E.nonzero()[0], (~is_here_E).nonzero()[0]
        b_T, own_E = device_E[there_T], benefit_EM[experts, device_E]
        shift_ST = load_E[here_S, None] - load_E[there_T]
        other_T, benefit_SM = over_M[b_T], benefit_EM[here_S]
        less_ST = over_M[full] - np.maximum(over_M[full] - shift_ST, 0)
        less_ST -= np.maximum(other_T + shift_ST, 0) - np.maximum(other_T, 0)
        loss_ST = own_E[here_S, None] - benefit_SM[:, b_T]
        loss_ST += own_E[there_T] - benefit_EM[there_T, full]
        useful_ST = less_ST > 1e-9 * cap_M[full]
        if not useful_ST.any():
            return None
        span = np.abs(loss_ST).max() + 1e-300
        positive_ST = loss_ST / np.maximum(less_ST, 1e-300)
        rate_ST = np.where(loss_ST > 0, positive_ST, loss_ST / span - 1.0)
        best = int(np.where(useful_ST, rate_ST, np.inf).argmin())
        e, f = here_S[best // len(there_T)], there_T[best % len(there_T)]
        device_E[e], device_E[f] = device_E[f], device_E[e]
    return None


def _gained(benefit_EM, load_E, cap_M, device_E) -> np.ndarray:
    """Best swaps within the caps until none gains."""
    device_E = device_E.copy()
    e_P, f_P = np.triu_indices(len(device_E), 1)
    least = 1e-9 * (1.0 + np.abs(benefit_EM).sum())
    for _ in range(STEPS):
        load_M = np.bincount(device_E, weights=load_E, minlength=len(cap_M))
        a_P, b_P, shift_P = device_E[e_P], device_E[f_P], load_E[e_P] - load_E[f_P]
        fits_P = (load_M[a_P] - shift_P <= cap_M[a_P]) & (load_M[b_P] + shift_P <= cap_M[b_P])
        gain_P = np.where(fits_P & (a_P != b_P), _gain(benefit_EM, device_E, e_P, f_P), 0.0)
        best = int(gain_P.argmax())
        if gain_P[best] <= least:
            return device_E
        e, f = e_P[best], f_P[best]
        device_E[e], device_E[f] = device_E[f], device_E[e]
    return device_E


def _gain(benefit_EM, device_E, e_P, f_P) -> np.ndarray:
    own_E = benefit_EM[np.arange(len(device_E)), device_E]
    return benefit_EM[e_P, device_E[f_P]] + benefit_EM[f_P, device_E[e_P]] - own_E[e_P] - own_E[f_P]
