"""Which device holds which row in shuffled dispatch: T / M rows each, near the experts before.

Axes: T tokens, K experts per token, M devices, S steps.

Attention that is split by heads ends in a reduce-scatter, which may put every row on any device, as
long as each gets equally many. The run time puts it where its experts of the layer before were, by
the greedy rule of model/dispatch/homes.py; here is the same rule without JAX, for many steps at
once (tests/model/test_shuffled.py holds the two to one slow rule, and counted rows to each other).

Who gets in depends on who else is in the step. Tokens are cut into steps of `step_tokens` in the
order given; None: all of them are one step. A last step that is not full is filled with tokens that
have no expert, and so is one that M does not divide, as the run time pads its batches.
"""

import numpy as np
from jaxtyping import Int, Integer


def first(num_tokens: int, num_devices: int, step_tokens: int | None) -> Int[np.ndarray, " T"]:
    """int64: the home of every token before the first layer; nothing is known of its experts."""
    nowhere_T1 = np.full((num_tokens, 1), -1)
    return balanced(nowhere_T1, num_devices, step_tokens)


def balanced(
    device_TK: Integer[np.ndarray, "T K"], num_devices: int, step_tokens: int | None
) -> Int[np.ndarray, " T"]:
    """int64: the home of every token.

    A token's score for a device is the sum of K - k over its choices k there. In rounds, every
    token without a home wants the device with its best score among those with room (the first of
    equals); of those that want a device, the highest scores (the first of equals) get in. Tokens
    without a score for any device with room fill what is left, tokens and devices in order.

    Args:
      device_TK: where the experts of a token were, best first; -1 = nowhere.
      num_devices: M.
      step_tokens: of a step; None: all.
    """
    size = step_tokens or max(len(device_TK), 1)
    step_T = np.arange(len(device_TK)) // size
    room_S = -(-np.bincount(step_T) // num_devices)
    free_X = np.repeat(room_S, num_devices)  # X: steps and devices
    device_KT = np.ascontiguousarray(device_TK.T, np.int64)
    home_T = np.full(len(device_TK), -1, np.int64)
    # of the tokens that have no home yet: n
    open_n, key_Kn = np.arange(len(device_TK)), _keys(device_KT, num_devices)
    at_Kn = step_T * num_devices + np.maximum(device_KT, 0)
    while True:
        best_n = key_Kn.max(axis=0)
        score_n, place_n = np.divmod(best_n, num_devices)
        at_n = step_T[open_n] * num_devices + (num_devices - 1 - place_n)
        in_n = _admitted(at_n, score_n, free_X)
        home_T[open_n[in_n]] = at_n[in_n] % num_devices
        free_X -= np.bincount(at_n[in_n], minlength=len(free_X))
        more_n = (score_n > 0) & ~in_n
        if not more_n.any():
            break
        open_n, at_Kn = open_n[more_n], at_Kn[:, more_n]
        key_Kn = np.where(free_X[at_Kn] > 0, key_Kn[:, more_n], 0)
    left_n = np.flatnonzero(home_T < 0)
    home_T[left_n] = _filled(step_T[left_n], free_X.reshape(-1, num_devices))
    return home_T


def _keys(device_KT: np.ndarray, num_devices: int) -> np.ndarray:
    """int32 [K, T]: score * M + M - 1 - device of every choice, the largest first; 0 if nowhere."""
    top_k, narrow_KT = len(device_KT), device_KT.astype(np.int16)
    score_KT = np.zeros(device_KT.shape, np.int32)
    for k, j in np.ndindex(top_k, top_k):
        score_KT[k] += (narrow_KT[k] == narrow_KT[j]) * np.int32(top_k - j)
    key_KT = score_KT * np.int32(num_devices) + (num_devices - 1 - device_KT.astype(np.int32))
    return np.where(narrow_KT >= 0, key_KT, 0)


def _admitted(at_n: np.ndarray, score_n: np.ndarray, free_X: np.ndarray) -> np.ndarray:
    """bool [n]: who gets in where they want to, highest scores first, the first of equals.

    Args:
      at_n: the place that each wants.
      score_n: its score there; who has none wants nothing.
      free_X: room of every place.
    """
    wants_n, most = score_n > 0, int(score_n.max(initial=0))
    asked_X = np.bincount(at_n[wants_n], minlength=len(free_X))
    in_n = wants_n & (asked_X <= free_X)[at_n]
    crowd_c = np.flatnonzero(wants_n & ~in_n)
    code_c = at_n[crowd_c] * (most + 1) + most - score_n[crowd_c]
    if len(free_X) * (most + 1) < 2**16:
        code_c = code_c.astype(np.uint16)  # sorted by digits, in a fraction of the time
    order_c = crowd_c[np.argsort(code_c, kind="stable")]
    in_n[order_c] = _rank(at_n[order_c]) < free_X[at_n[order_c]]
    return in_n


def _filled(step_n: np.ndarray, free_SM: np.ndarray) -> np.ndarray:
    """int64 [n]: devices with room, in order, for the tokens of every step, in order."""
    room_SM = np.cumsum(free_SM, axis=1)
    return (room_SM[step_n] <= _rank(step_n)[:, None]).sum(axis=1)


def _rank(group_n: np.ndarray) -> np.ndarray:
    """int64 [n]: how many of the same group stand before; groups stand together."""
    place_n = np.arange(len(group_n))
    starts_n = np.diff(group_n, prepend=-1) != 0
    return place_n - np.maximum.accumulate(np.where(starts_n, place_n, 0))
