"""Where rows go in shuffled dispatch, slowly: one row after the other."""

import numpy as np


def balanced(device_XK, num_devices):
    """list[int]: the rule of model/dispatch/homes.py and placement/row_homes.py, X / M on each."""
    num_rows, top_k = device_XK.shape
    free, home = [num_rows // num_devices] * num_devices, [-1] * num_rows
    score = [[0] * num_devices for _ in range(num_rows)]
    for x, devices in enumerate(device_XK.tolist()):
        for k, device in enumerate(devices):
            if device >= 0:
                score[x][device] += top_k - k
    while True:
        wants = {m: [] for m in range(num_devices)}
        for x in range(num_rows):
            options = [m for m in range(num_devices) if free[m] > 0 and score[x][m] > 0]
            if home[x] < 0 and options:
                best = max(options, key=lambda m: (score[x][m], -m))
                wants[best].append((-score[x][best], x))
        if not any(wants.values()):
            break
        for m, asked in wants.items():
            for _, x in sorted(asked)[: free[m]]:
                home[x] = m
            free[m] -= min(free[m], len(asked))
    for x in range(num_rows):
        if home[x] < 0:
            home[x] = next(m for m in range(num_devices) if free[m] > 0)
            free[home[x]] -= 1
    return home


def of_layers(device_LTK, num_devices, step_tokens):
    """list [L][T]: homes of every token before every layer, step by step, padded where short.

    Args:
      device_LTK: of the first copy of every expert, -1 = none.
    """
    tokens, top_k = len(device_LTK[0]), len(device_LTK[0][0])
    nowhere_TK = np.full((tokens, top_k), -1)
    homes_LT = []
    for before_TK in [nowhere_TK, *device_LTK[:-1]]:
        home_T = []
        for start in range(0, tokens, step_tokens):
            step_nK = np.asarray(before_TK[start : start + step_tokens])
            missing = -len(step_nK) % num_devices
            padded_XK = np.concatenate([step_nK, np.full((missing, top_k), -1)])
            home_T += balanced(padded_XK, num_devices)[: len(step_nK)]
        homes_LT.append(home_T)
    return homes_LT
