"""What a search returns: a placement, how it came about, and where a running one stands."""

import dataclasses
from typing import Any, NamedTuple

from moe_jax.placement.plan import Placement

INTERRUPTED = "interrupted: the best so far"
CUT = "the search or a part of it was cut short for lack of time"
NO_TIME = "time limit 0: this is where the search would have begun"


def cut_by(time_limit: float) -> str:
    """What a reader of a report that has not finished is told; `time_limit` in seconds."""
    return CUT if time_limit else NO_TIME


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a running solve stands."""

    stage: str
    seconds: float
    time_limit: float
    objective: float
    bound: float

    @property
    def gap(self) -> float:
        return _gap(self.objective, self.bound)


@dataclasses.dataclass(frozen=True)
class Report:
    """How a placement came about.

    Attributes:
      objective_name, dispatch, unit: what was minimised.
      objective: its value on the trace that was planned on.
      bound: proven; no placement has less.
      greedy: value of the greedy start; with replicas, of the plan made for balance alone.
      seconds: wall time.
      finished: the search ended by itself: neither the time limit, nor a part's share of it, nor an
        estimate of what would fit ended, shortened or left out anything that the plan depends on.
        Then seed and problem give the same plan on any machine. The bound may depend on the time.
      history: (seconds, objective, bound) after every improvement of either.
      note: what a reader has to know, in words.
      interrupted: Ctrl-C ended the search.
      tradeoff: (moves, least objective found with so many), where there is a plan in use.
    """

    objective_name: str
    dispatch: str
    unit: str
    objective: float
    bound: float
    greedy: float
    seconds: float
    finished: bool
    history: tuple[tuple[float, float, float], ...]
    note: str = ""
    interrupted: bool = False
    tradeoff: tuple[tuple[int, float], ...] = ()

    @property
    def gap(self) -> float:
        return _gap(self.objective, self.bound)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "gap": self.gap}


class Solution(NamedTuple):
    """A placement and its report."""

    placement: Placement
    report: Report


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a search that had a placement already.

    Attributes:
      solution: the best so far, its report marked as interrupted.
    """

    def __init__(self, solution: Solution):
        super().__init__("interrupted")
        note = "; ".join(filter(None, [solution.report.note, INTERRUPTED]))
        report = dataclasses.replace(solution.report, finished=False, interrupted=True, note=note)
        self.solution = Solution(solution.placement, report)


def _gap(objective: float, bound: float) -> float:
    return (objective - bound) / objective if objective > 0 else 0.0
