"""Load caps: the largest load that a device may have in any layer, in one of three measures.

- `1.1`: over the mean load of the layer.
- `1.1x`: over the smallest largest load that is reachable in the layer.
- `9000rows`: rows that a device computes in a step of `batch_tokens` tokens.
"""

import dataclasses
import time

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement import ilp

SECONDS = 5.0  # of exact programs: of a layer that a cap asks for more of; of a refusal
RULE = (
    "a factor of at least 1, as 1.1 (over the mean) or 1.1x (over what is reachable), or rows of a "
    "device and step as 9000rows"
)


@dataclasses.dataclass(frozen=True)
class LoadCap:
    """Largest device load of a layer.

    Attributes:
      factor: over the mean, or what it is counted in otherwise.
      relative: over the best that is reachable.
      rows: `factor` counts rows of a device and step.
    """

    factor: float
    relative: bool = False
    rows: bool = False

    @classmethod
    def parse(cls, text: str) -> "LoadCap":
        """`1.1`, `1.1x` or `9000rows`."""
        relative, rows = text.endswith("x"), text.endswith("rows")
        try:
            factor = float(text.removesuffix("rows") if rows else text.removesuffix("x"))
        except ValueError:
            factor = float("nan")
        if not (1e-9 if rows else 1.0) <= factor < float("inf"):
            raise Refused("load_cap", text, RULE, "Use 1.1x if in doubt")
        return cls(factor, relative, rows)

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
        else:
            cap_L = self.factor * (reachable_L if self.relative else mean_L)
        return np.where(mean_L > 0, cap_L, np.inf)

    def advice(self, load: float, mean: float, rows_per_step: float) -> str:
        """The smallest cap of this measure that allows a load, as one types it."""
        least = f"{np.ceil(load / max(mean, 1e-300) * 1e4) / 1e4:.4f}"
        if self.rows:
            least = f"{np.ceil(load * rows_per_step):.0f}rows"
        return f"Use {least} or more, or a relative cap as 1.1x"

    def __str__(self) -> str:
        return f"{self.factor:g}" + ("rows" if self.rows else "x" * self.relative)


def met(
    load_LE: np.ndarray, device_LE: np.ndarray, cap_L: np.ndarray, speed_M: np.ndarray
) -> np.ndarray:
    """int64 [L, E]: the labels, those of a layer above its cap replaced by an exact program's.

    The worst layer first; after one for which nothing is found in time, the others are left.
    """
    device_LE, devices = device_LE.copy(), len(speed_M)
    rows = zip(load_LE, device_LE, strict=True)
    load_LM = np.stack([np.bincount(device_E, load_E, devices) for load_E, device_E in rows])
    excess_L = (load_LM / speed_M).max(axis=1) / np.maximum(cap_L, 1e-300)
    for layer in np.argsort(-excess_L, kind="stable"):
        if excess_L[layer] <= 1 + 1e-9:
            break
        anywhere_EM = np.zeros((load_LE.shape[1], devices))
        found_E = ilp.assign_capped(anywhere_EM, load_LE[layer], cap_L[layer] * speed_M, SECONDS)
        if found_E is None:
            break
        device_LE[layer] = found_E
    return device_LE


def evened_L(
    load_LE: np.ndarray, reachable_L: np.ndarray, mean_L: np.ndarray, speed_M: np.ndarray
) -> np.ndarray:
    """float64 [L]: smallest largest loads that are reachable, by exact programs where they decide.

    The layer of the largest one over its mean decides which cap can be kept, until a program has
    made it as small as it gets; then maybe another one does.
    """
    reachable_L, tried = reachable_L.copy(), set()
    deadline = time.monotonic() + SECONDS
    while (left := deadline - time.monotonic()) > 0:
        layer = int((reachable_L / np.maximum(mean_L, 1e-300)).argmax())
        if layer in tried:
            break
        tried.add(layer)
        found_E = ilp.balance(load_LE[layer], len(speed_M), left, speed_M)
        if found_E is not None:
            load_M = np.bincount(found_E, load_LE[layer], len(speed_M)) / speed_M
            reachable_L[layer] = min(reachable_L[layer], load_M.max())
    return reachable_L
