"""The loss curves of a training run, read from its `metrics.jsonl`.

A row is one JSON object per step. Missing keys leave gaps, steps that were run again after a
restart count once (the last time), and a last line that a crash cut off is passed over; any other
line that is not an object is refused with its number.
"""

import dataclasses
import json
import math
import os

from moe_jax.errors import Refused


@dataclasses.dataclass(frozen=True)
class Curves:
    """Loss in nats per token by step; `unigram` is the loss of a model that knows only counts."""

    train: dict[int, float]
    heldout: dict[int, float]
    unigram: float | None

    @property
    def last_heldout(self) -> float | None:
        """The held-out loss of the last step that has one."""
        return self.heldout[max(self.heldout)] if self.heldout else None


def read(path: str | os.PathLike) -> Curves:
    """Reads the curves; a file in which no step has a loss is refused."""
    train: dict[int, float] = {}
    heldout: dict[int, float] = {}
    unigram = None
    for row in _rows(os.fspath(path)):
        if _is_number(row.get("unigram_loss")):
            unigram = float(row["unigram_loss"])
        step = row.get("step")
        if row.get("header") or not isinstance(step, int) or not _is_number(step):
            continue
        for curve, key in ((train, "loss"), (heldout, "heldout_loss")):
            if _is_number(row.get(key)):
                curve[step] = float(row[key])
    if not train:
        raise Refused("--metrics", os.fspath(path), "no step in it has a loss", "Train first")
    return Curves(dict(sorted(train.items())), dict(sorted(heldout.items())), unigram)


def _rows(path: str) -> list[dict]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fix = "Give the metrics.jsonl of the training run"
        raise Refused("--metrics", path, f"cannot be read ({error})", fix) from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):  # no line end: the writer was stopped within this line
                continue
            row = None
        if not isinstance(row, dict):
            fix = "Remove the line, or train again"
            raise Refused(f"{path}: line {number}", line, "must be a JSON object", fix)
        rows.append(row)
    return rows


def _is_number(value: object) -> bool:
    """True for a finite number; a NaN or null is a gap in the curve, as is what is no float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False
