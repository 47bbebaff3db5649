"""Load caps: the largest load that a device may have in any layer, in one of four measures.

- `1.1`: over the mean load of the layer.
- `1.1x`: over the smallest largest load that is reachable in the layer.
- `1.1held`: over the mean, as expected on other sequences, mean over layers (unseen.py).
- `9000rows`: rows that a device computes in a step of `batch_tokens` tokens.
"""

import dataclasses
import time

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement import clock, ilp

SECONDS = 5.0  # of exact programs of all layers: to meet a cap, and again to say which can be met
TRY = 0.5  # of what is left of it, for one cap
CLOSE = 1e-5  # of a cap: what is smaller by less is not looked for
SLACK = 1e-9  # of a cap: loads are sums of rounded numbers, and so much above it is within it
MEASURES = ("x", "rows", "held")  # that a number may end in
RULE = (
    "a factor of at least 1, as 1.1 (over the mean), 1.1x (over what is reachable) or 1.1held "
    "(over the mean, on other sequences), or rows of a device and step as 9000rows"
)


@dataclasses.dataclass(frozen=True)
class LoadCap:
    """Largest device load of a layer.

    Attributes:
      factor: over the mean, or what it is counted in otherwise.
      relative: over the best that is reachable.
      rows: `factor` counts rows of a device and step.
      held: `factor` is expected on other sequences.
      unseen: what these add to it, over the mean; None: not known yet (unseen.resolved).
    """

    factor: float
    relative: bool = False
    rows: bool = False
    held: bool = False
    unseen: float | None = None

    @property
    def planned(self) -> "LoadCap":
        """The cap on the sequences that are planned on."""
        return LoadCap(self.factor - (self.unseen or 0.0)) if self.held else self

    @classmethod
    def parse(cls, text: str) -> "LoadCap":
        """`1.1`, `1.1x`, `1.1held` or `9000rows`."""
        measure = next((one for one in MEASURES if text.endswith(one)), "")
        try:
            factor = float(text.removesuffix(measure))
        except ValueError:
            factor = float("nan")
        if not (1e-9 if measure == "rows" else 1.0) <= factor < float("inf"):
            raise Refused("load_cap", text, RULE, "Use 1.1x if in doubt")
        return cls(factor, measure == "x", measure == "rows", measure == "held")

    def largest_L(
        self, mean_L: np.ndarray, reachable_L: np.ndarray, rows_per_step: float
    ) -> np.ndarray:
        """float64 [L]: the largest load that is allowed, in rows of the trace; inf: any.

        A layer without load needs no cap, and shares of a cap of 0 say nothing.

        Args:
          mean_L: load of a layer over the devices.
          reachable_L: the smallest largest load that is known.
          rows_per_step: rows of a step for each row of the trace.
        """
        if self.rows:
            cap_L = np.full(len(mean_L), self.factor / rows_per_step)
        elif self.held:
            assert self.unseen is not None, "unseen.resolved comes first"
            cap_L = (self.factor - self.unseen) * mean_L
        else:
            cap_L = self.factor * (reachable_L if self.relative else mean_L)
        return np.where(mean_L > 0, cap_L, np.inf)

    def advice(self, load: float, mean: float, rows_per_step: float) -> str:
        """The smallest cap of this measure that allows a load, as one types it."""
        least = np.ceil((load / max(mean, 1e-300) + (self.unseen or 0.0)) * 1e4) / 1e4
        typed = f"{least:.4f}" + "held" * self.held
        if self.rows:
            typed = f"{np.ceil(load * rows_per_step):.0f}rows"
        return f"Use {typed} or more, or a relative cap as 1.1x"

    def __str__(self) -> str:
        return f"{self.factor:g}" + "rows" * self.rows + "x" * self.relative + "held" * self.held


def largest_L(load_LE: np.ndarray, device_LE: np.ndarray, speed_M: np.ndarray) -> np.ndarray:
    """float64 [L]: the largest load of a device over its speed.

    Args:
      load_LE: rows of every expert.
      device_LE: labels.
      speed_M: of devices, 1 on average.
    """
    layers = zip(load_LE, device_LE, strict=True)
    load_LM = [np.bincount(device_E, load_E, len(speed_M)) for load_E, device_E in layers]
    return (np.stack(load_LM) / speed_M).max(axis=1)


def met(
    load_LE: np.ndarray,
    device_LE: np.ndarray,
    cap_L: np.ndarray,
    speed_M: np.ndarray,
    seconds: float = SECONDS,
) -> np.ndarray:
    """int64 [L, E]: the labels, those of a layer above its cap replaced by an exact program's.

    The worst layer first; after one for which nothing is found in time, the others are left.

    Args:
      load_LE, device_LE, speed_M: as for `largest_L`; labels in groups of one size.
      cap_L: the largest load over its device's speed that is allowed.
      seconds: of all programs together.
    """
    deadline = time.monotonic() + seconds
    over_L = largest_L(load_LE, device_LE, speed_M) / np.maximum(cap_L, 1e-300)
    device_LE, anywhere_EM = device_LE.copy(), np.zeros((load_LE.shape[1], len(speed_M)))
    for layer in np.argsort(-over_L, kind="stable"):
        if over_L[layer] <= 1 + 1e-9 or not (left := clock.left(deadline)):
            break
        cap_M = cap_L[layer] * speed_M
        found_E = ilp.assign_capped(anywhere_EM, load_LE[layer], cap_M, left)
        if found_E is None:
            break
        device_LE[layer] = found_E
    return device_LE


def evened(
    load_LE: np.ndarray, device_LE: np.ndarray, least: float, speed_M: np.ndarray
) -> np.ndarray:
    """int64 [L, E]: labels that keep the smallest cap over the mean that is found in SECONDS.

    Caps between what is proven and what is reached are tried by `met`, halfway each time. Where its
    programs come to their ends, none smaller is kept but for `CLOSE`.

    Args:
      load_LE, device_LE, speed_M: as for `met`; the labels to begin with.
      least: proven: no cap below can be kept.
    """
    mean_L = np.maximum(load_LE.sum(axis=1) / len(speed_M), 1e-300)
    most = float((largest_L(load_LE, device_LE, speed_M) / mean_L).max())
    deadline = time.monotonic() + SECONDS
    while most > least * (1 + CLOSE) and (left := deadline - time.monotonic()) > 0:
        cap = (least + most) / 2
        device_LE = met(load_LE, device_LE, cap * mean_L, speed_M, TRY * left)
        most = float((largest_L(load_LE, device_LE, speed_M) / mean_L).max())
        if most > cap * (1 + 1e-9):  # but for layers that were found all the same
            least = cap
    return device_LE
