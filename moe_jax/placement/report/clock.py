"""Where the time of a layer goes on its devices: compute, exchange, waiting.

Axes: L MoE layers, M devices. The seconds of a layer (seconds.py) are those of its slowest device
and its slowest link, phase after phase. Of them
- compute is the mean over devices of the time each needs for its own rows;
- exchange is the mean over devices of the time each needs to send and receive its own rows on the
  way out and back (and what attention sends in coherent and shuffled dispatch);
- waiting is the rest: the mean over devices of the time each waits, in every phase, for the
  slowest one.
They add up to the seconds of the layer exactly. A perfectly even layer has no waiting.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Num

from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.cost import Rows
from moe_jax.placement.seconds import Work
from moe_jax.placement.topology import Topology


@dataclasses.dataclass(frozen=True, eq=False)
class Clock:
    """Seconds of every layer of one step."""

    compute_L: Float[np.ndarray, " L"]
    exchange_L: Float[np.ndarray, " L"]
    waiting_L: Float[np.ndarray, " L"]

    @property
    def total_L(self) -> Float[np.ndarray, " L"]:
        return self.compute_L + self.exchange_L + self.waiting_L


def clock(
    rows: Rows,
    computed_LM: Num[np.ndarray, "L M"],
    topology: Topology,
    work: Work,
    dispatch: str,
    num_tokens: int,
) -> Clock:
    """The parts of seconds.seconds of the same arguments."""
    whole = seconds_lib.seconds(rows, computed_LM, topology, work, dispatch, num_tokens)
    compute_LM = seconds_lib.compute_seconds(computed_LM, topology, work, num_tokens)
    to_bytes = work.batch_tokens / num_tokens * work.row_bytes
    exchange_LM = own_seconds(rows.dispatch_LMM * to_bytes, topology, dispatch)
    exchange_LM = exchange_LM + own_seconds(rows.combine_LMM * to_bytes, topology, dispatch)
    exchange_LM = exchange_LM + seconds_lib.attention_seconds(topology, work, dispatch)  # on each
    compute_L, exchange_L = compute_LM.mean(axis=1), exchange_LM.mean(axis=1)
    waiting_L = np.maximum(whole.total_L - compute_L - exchange_L, 0.0)  # rounding
    return Clock(compute_L, exchange_L, waiting_L)


def own_seconds(
    bytes_LMM: Num[np.ndarray, "L M M"], topology: Topology, dispatch: str
) -> Float[np.ndarray, "L M"]:
    """What each device needs for its own bytes: the slower tier, or both in turn."""
    fast_LM, slow_LM = seconds_lib.tier_seconds(bytes_LMM, topology, dispatch == "gathered")
    return fast_LM + slow_LM if dispatch == "hierarchical" else np.maximum(fast_LM, slow_LM)
