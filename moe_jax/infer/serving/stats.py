"""What an engine has done, as numbers that only grow, and what of it under the plan in use.

Plain Python and NumPy.
"""

import bisect
import collections
import dataclasses

import numpy as np

# Upper bounds in seconds, for times to the first token and between tokens.
BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """Counts by upper bound, as Prometheus has them."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds


@dataclasses.dataclass(frozen=True)
class Mark:
    """What had been counted when experts were last at other places, all of them.

    Attributes:
      digest: of the plan that came into use then.
      tokens, moved_LMM, computed_LP: until then; as in `Stats`, rows of both ways together.
    """

    digest: str
    tokens: int = 0
    moved_LMM: np.ndarray | int = 0
    computed_LP: np.ndarray | int = 0


@dataclasses.dataclass
class Stats:
    """Attributes:
    requests: by how they ended.
    prompt_tokens, new_tokens: of requests that arrived; that were made.
    steps, tokens: run; tokens include those computed again after a preemption.
    preempted: how often a request had to leave.
    host_seconds: planning, packing, delivering. device_seconds: waiting for the program.
    first_token, next_token: seconds from arrival to the first token, and between tokens.
    dispatch_LMM, combine_LMM, computed_LP: rows, see `Traffic`; None before any were read.
    mark: of the newest change of plans; None = experts are where they were at the start. While
      experts move, rows still count as those of the plan before.
    """

    requests: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    num_arrived: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    tokens: int = 0
    preempted: int = 0
    host_seconds: float = 0.0
    device_seconds: float = 0.0
    first_token: Histogram = dataclasses.field(default_factory=Histogram)
    next_token: Histogram = dataclasses.field(default_factory=Histogram)
    dispatch_LMM: np.ndarray | None = None
    combine_LMM: np.ndarray | None = None
    computed_LP: np.ndarray | None = None
    mark: Mark | None = None

    @property
    def moved(self) -> int:
        """Rows, both ways, all layers, as far as they were read."""
        parts = (self.dispatch_LMM, self.combine_LMM)
        return sum(int(part.sum()) for part in parts if part is not None)

    def arrived(self, prompt_len: int) -> None:
        self.num_arrived += 1
        self.prompt_tokens += prompt_len

    def finished(self, finish: str) -> None:
        self.requests[finish] += 1

    def spoke(self, seconds: float, first: bool) -> None:
        (self.first_token if first else self.next_token).add(seconds)

    def step(
        self, num_tokens: int, num_new: int, preempted: int, host: float, device: float
    ) -> None:
        self.steps += 1
        self.tokens += num_tokens
        self.new_tokens += num_new
        self.preempted += preempted
        self.host_seconds += host
        self.device_seconds += device

    def rows(self, dispatch: np.ndarray, combine: np.ndarray, computed: np.ndarray) -> None:
        new = (dispatch, combine, computed)
        old = (self.dispatch_LMM, self.combine_LMM, self.computed_LP)
        added = [n if o is None else o + n for o, n in zip(old, new, strict=True)]
        self.dispatch_LMM, self.combine_LMM, self.computed_LP = added

    def plan_changed(self, digest: str) -> None:
        """All experts are where this plan has them; the rows until now were read."""
        if self.dispatch_LMM is None or self.combine_LMM is None or self.computed_LP is None:
            self.mark = Mark(digest, self.tokens)
            return
        moved_LMM = self.dispatch_LMM + self.combine_LMM
        self.mark = Mark(digest, self.tokens, moved_LMM, self.computed_LP)

    @property
    def plan_tokens(self) -> int:
        """Run since the mark, or the start."""
        return self.tokens - self._then.tokens

    @property
    def moved_LMM(self) -> np.ndarray:
        """Rows between devices, out and home, since the mark; of some that were read."""
        assert self.dispatch_LMM is not None
        assert self.combine_LMM is not None
        return self.dispatch_LMM + self.combine_LMM - self._then.moved_LMM

    def load_LM(self, devices: int) -> np.ndarray:
        """Rows that each device computed since the mark over its layer's mean; 0 = none yet."""
        assert self.computed_LP is not None
        now_LP = self.computed_LP - self._then.computed_LP
        rows_LM = now_LP.reshape(len(now_LP), devices, -1).sum(axis=2).astype(float)
        mean_L1 = rows_LM.mean(axis=1, keepdims=True)
        return rows_LM / np.where(mean_L1 > 0, mean_L1, 1)

    @property
    def _then(self) -> Mark:
        return self.mark or Mark("")
