"""Means over rounds with 95 % intervals, and ratios of measurements that were made side by side.

Times are positive and their errors multiply, so everything is done on logarithms: geometric means,
Student's t over rounds, back again. A speed-up is paired: the ratio within every round first.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A geometric mean and its 95 % interval over rounds (no width for a single round)."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 3) -> str:
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def mean(values: Sequence[float]) -> Estimate:
    """Geometric mean of positive values, one per round."""
    logs = np.log(np.asarray(values, float))
    middle, half = float(logs.mean()), 0.0
    if len(logs) > 1:
        error = logs.std(ddof=1) / np.sqrt(len(logs))
        half = float(stats.t.ppf(0.975, len(logs) - 1) * error)
    return Estimate(*(float(np.exp(middle + d)) for d in (0.0, -half, half)))


def speed_up(seconds: Sequence[float], of_base: Sequence[float]) -> Estimate:
    """How many times faster than the base, from the seconds of the same rounds."""
    return mean(np.asarray(of_base, float) / np.asarray(seconds, float))
