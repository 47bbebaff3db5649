"""A plan for balance by replicas where devices differ in speed: its copies on other devices.

Axes: L MoE layers, E experts, P slots, M devices. A load counts over its device's speed, which is 1
on average; copies of an expert share its load evenly.

From two starts, the plan and its copies dealt anew (heaviest first, each to the device that would
be done first), two kinds of steps go on while they make the fullest device less full: its copies
change places with others, and a copy gives its slot to another expert (how many copies make loads
even depends on the speeds of the devices that have room). Each layer takes the better end. Not
proven to be best.
"""

import numpy as np
from jaxtyping import Float, Int, Num

from moe_jax.placement.plan import Placement


def dealt_anew(
    plan: Placement, load_LE: Num[np.ndarray, "L E"], speed_M: Float[np.ndarray, " M"]
) -> Placement:
    """The plan with its copies moved, no layer's fullest device fuller than before."""
    rows = [
        _layer(expert_P, load_E, speed_M)
        for expert_P, load_E in zip(
            plan.physical_to_logical_LP.astype(np.int64), load_LE.astype(float), strict=True
        )
    ]
    return Placement(np.stack(rows), plan.num_experts, plan.num_devices)


def _layer(expert_P: np.ndarray, load_E: np.ndarray, speed_M: np.ndarray) -> Int[np.ndarray, " P"]:
    ends = []
    dealt_P = _dealt(expert_P, _share_E(expert_P, load_E), speed_M)
    for start_P in (expert_P.copy(), dealt_P):
        while _relieve(start_P, _share_E(start_P, load_E), speed_M) or _replace(
            start_P, load_E, speed_M
        ):
            pass
        ends.append(start_P)
    return min(ends, key=lambda end_P: _over_speed_M(end_P, _share_E(end_P, load_E), speed_M).max())


def _share_E(expert_P: np.ndarray, load_E: np.ndarray) -> Float[np.ndarray, " E"]:
    """Of each copy."""
    return load_E / np.bincount(expert_P, minlength=len(load_E))


def _over_speed_M(expert_P, share_E, speed_M) -> Float[np.ndarray, " M"]:
    return share_E[expert_P].reshape(len(speed_M), -1).sum(axis=1) / speed_M


def _dealt(expert_P: np.ndarray, share_E: np.ndarray, speed_M: np.ndarray) -> Int[np.ndarray, " P"]:
    """Heaviest copy first; `expert_P` itself where one finds no device with room and without it."""
    slots = len(expert_P) // len(speed_M)
    on_M: list[list[int]] = [[] for _ in speed_M]
    load_M = np.zeros(len(speed_M))
    for e in expert_P[np.argsort(-share_E[expert_P], kind="stable")].tolist():
        full_M = np.array([len(here) == slots or e in here for here in on_M])
        if full_M.all():
            return expert_P.copy()
        m = int(np.where(full_M, np.inf, (load_M + share_E[e]) / speed_M).argmin())
        on_M[m].append(e)
        load_M[m] += share_E[e]
    return np.array(on_M).ravel()


def _relieve(expert_P: np.ndarray, share_E: np.ndarray, speed_M: np.ndarray) -> bool:
    """The swap, in place, that lowers the fullest device most; False if none does."""
    slots = len(expert_P) // len(speed_M)
    device_P = np.arange(len(expert_P)) // slots
    over_M = _over_speed_M(expert_P, share_E, speed_M)
    full = int(over_M.argmax())
    mine_S = np.arange(slots) + full * slots
    less_SP = share_E[expert_P[mine_S]][:, None] - share_E[expert_P][None, :]
    after_SP = over_M[device_P] + less_SP / speed_M[device_P]
    after_SP = np.maximum(after_SP, over_M[full] - less_SP / speed_M[full])
    holds_EM = np.zeros((len(share_E), len(speed_M)), bool)
    holds_EM[expert_P, device_P] = True
    after_SP[holds_EM[expert_P[mine_S]][:, device_P]] = np.inf  # its own device is among them
    after_SP[:, holds_EM[expert_P, full]] = np.inf
    s, p = np.unravel_index(int(after_SP.argmin()), after_SP.shape)
    if not after_SP[s, p] < over_M[full] * (1 - 1e-12):
        return False
    expert_P[[mine_S[s], p]] = expert_P[[p, mine_S[s]]]
    return True


def _replace(expert_P: np.ndarray, load_E: np.ndarray, speed_M: np.ndarray) -> bool:
    """The expert that gets the slot of another's copy, in place, so that the fullest device has
    least; False if none makes it less full.

    Only what changes the fullest device can help: its own slots, or one more copy of what it has.
    Axis N: (slot, expert that gets it).
    """
    devices, experts = len(speed_M), len(load_E)
    device_P = np.arange(len(expert_P)) // (len(expert_P) // devices)
    count_E, share_E = np.bincount(expert_P, minlength=experts), _share_E(expert_P, load_E)
    over_M = _over_speed_M(expert_P, share_E, speed_M)
    full = int(over_M.argmax())
    holds_EM = np.zeros((experts, devices), bool)
    holds_EM[expert_P, device_P] = True
    may_PE = (count_E[expert_P] > 1)[:, None] & ~holds_EM[:, device_P].T
    may_PE &= (device_P == full)[:, None] | holds_EM[:, full][None]
    slot_N, new_N = np.nonzero(may_PE)
    if not len(slot_N):
        return False
    old_N, at_N = expert_P[slot_N], device_P[slot_N]
    fewer_N, more_N = load_E[old_N] / (count_E[old_N] - 1), load_E[new_N] / (count_E[new_N] + 1)
    after_NM = over_M * speed_M
    after_NM = after_NM + holds_EM[old_N] * (fewer_N - share_E[old_N])[:, None]
    after_NM += holds_EM[new_N] * (more_N - share_E[new_N])[:, None]
    after_NM[np.arange(len(slot_N)), at_N] += more_N - fewer_N
    fullest_N = (after_NM / speed_M).max(axis=1)
    best = int(fullest_N.argmin())
    if not fullest_N[best] < over_M[full] * (1 - 1e-12):
        return False
    expert_P[slot_N[best]] = new_N[best]
    return True
