"""Which steps of a run stay: the newest, every so many steps, and the best, by Orbax's policies."""

import dataclasses
import datetime
import math
import pathlib
from typing import Any

from orbax.checkpoint import checkpoint_managers

from moe_jax.checkpoint import integrity
from moe_jax.checkpoint.contents import ONLY
from moe_jax.checkpoint.folders import remove, steps
from moe_jax.errors import Refused

LOSS = "held_out_loss"  # in the `extra` of a step: nats a token, or absent


@dataclasses.dataclass(frozen=True)
class Kept:
    """A step stays if any of these holds, or if it is marked as `ONLY`.

    Attributes:
      newest: it is one of so many newest.
      every: its number is a multiple; 0 = none stays for this.
      best: it is one of so many with the lowest held-out loss; 0 = none stays for this.
    """

    newest: int
    every: int = 0
    best: int = 0

    def prune(self, directory: pathlib.Path) -> None:
        """Removes the steps that need not stay."""
        infos = [_Info.of(directory, step) for step in steps(directory)]
        for step in self.surplus(infos):
            remove(directory, step)

    def surplus(self, infos: list["_Info"]) -> list[int]:
        """The steps, of those given in ascending order, that need not stay."""
        policies: list[Any] = [checkpoint_managers.LatestN(self.newest)]
        if self.every:
            policies.append(checkpoint_managers.EveryNSteps(self.every))
        if self.best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[LOSS],
                    reverse=True,  # the last of the order stay: the lowest
                    n=self.best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        stay = checkpoint_managers.AnyPreservationPolicy(policies).should_preserve(
            infos, context=checkpoint_managers.PreservationContext()
        )
        return [
            info.step for info, kept in zip(infos, stay, strict=True) if not (kept or info.only)
        ]


@dataclasses.dataclass(frozen=True)
class _Info:
    """What Orbax's policies ask about a step, and whether it is marked as `ONLY`."""

    step: int
    metrics: dict[str, Any] | None
    time: datetime.datetime
    only: bool = False

    @classmethod
    def of(cls, directory: pathlib.Path, step: int) -> "_Info":
        folder = directory / str(step)
        written = datetime.datetime.fromtimestamp(folder.stat().st_mtime, datetime.UTC)
        try:
            extra = integrity.read_json(folder / "meta.json")["extra"]
            loss, only = extra.get(LOSS), ONLY in extra
        except (Refused, KeyError, TypeError, AttributeError):
            loss, only = None, step == 0  # which a run does not make itself
        compares = isinstance(loss, float) and math.isfinite(loss)
        return cls(step, {LOSS: loss} if compares else None, written, only)
