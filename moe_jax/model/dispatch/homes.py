"""Which device should hold which row, given where its experts were: equal numbers, in the program.

For dispatches that may choose (shuffled.py). Axes: X rows of all devices, K top_k, M devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def balanced(device_XK: Int[Array, "X K"], num_devices: int) -> Int[Array, " X"]:
    """int32 home of every row, X / M rows on each device; the same on every device that asks.

    A row's score for a device is the sum of K - k over its choices k there: the best expert counts
    most. In rounds, every row without a home wants the device with its best score among those with
    room (the first of equals); of the rows that want a device, those with the highest scores (the
    first of equals) get in. Rows without a score for any device with room fill what is left, rows
    and devices in order. A greedy rule: not the assignment with the largest total score.

    Args:
      device_XK: where the experts of a row were, best first; -1 = nowhere.
      num_devices: M; divides X.
    """
    num_rows, top_k = device_XK.shape
    assert num_rows % num_devices == 0
    room = num_rows // num_devices
    device_M = jnp.arange(num_devices, dtype=jnp.int32)
    worth_K = top_k - jnp.arange(top_k, dtype=jnp.int32)
    at_XKM = device_XK[:, :, None] == device_M[None, None]
    score_XM = jnp.where(at_XKM, worth_K[None, :, None], 0).sum(axis=1)
    most = top_k * (top_k + 1) // 2

    def open_XM(home_X, free_M):
        return jnp.where((home_X < 0)[:, None] & (free_M > 0)[None], score_XM, 0)

    def unfinished(state):
        return (open_XM(*state) > 0).any()

    def round_(state):
        home_X, free_M = state
        now_XM = open_XM(home_X, free_M)
        best_X, want_X = now_XM.max(axis=1), now_XM.argmax(axis=1).astype(jnp.int32)
        want_X = jnp.where(best_X > 0, want_X, num_devices)
        order_X = jnp.argsort(want_X * (most + 1) + most - best_X, stable=True)
        asked_M = (want_X[:, None] == device_M[None]).sum(axis=0, dtype=jnp.int32)
        start_M1 = jnp.pad(jnp.cumsum(asked_M), (1, 0)).astype(jnp.int32)
        place_X = jnp.zeros_like(want_X)
        place_X = place_X.at[order_X].set(jnp.arange(num_rows, dtype=jnp.int32))
        rank_X = place_X - start_M1[want_X]
        gets_X = rank_X < jnp.pad(free_M, (0, 1))[want_X]
        return jnp.where(gets_X, want_X, home_X), free_M - jnp.minimum(asked_M, free_M)

    nowhere_X = jnp.full_like(device_XK[:, 0], -1)
    free_M = jnp.full_like(score_XM[0], room)
    home_X, free_M = jax.lax.while_loop(unfinished, round_, (nowhere_X, free_M))
    left_X = jnp.cumsum(home_X < 0, dtype=jnp.int32) - 1
    filled_X = jnp.searchsorted(jnp.cumsum(free_M), left_X, side="right").astype(jnp.int32)
    return jnp.where(home_X < 0, filled_X, home_X)
