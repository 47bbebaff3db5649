"""The held-out table of `python -m moe_jax.placement compare --json`, ready to print.

Tolerant on purpose: the table is a guest in the report, so keys that are missing give a hyphen and
a file without any method gives a note. Only a file that is not JSON is refused. A method is any
object with `rows` in it or one level below (`held_out`); a figure is a number or
`{value, low, high}`.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

from moe_jax.errors import Refused

_NAMES = ("name", "method", "solver", "placement")

# column head -> where the figure may stand inside a method
_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "rows, exchange": (("rows", "exchange"),),
    "devices per token": (("distinct_devices",),),
    "best expert stays": (("top1",),),
    "load max / mean": (("load_mean",), ("load_max_over_mean", "mean")),
    "worst layer": (("load_worst",), ("load_max_over_mean", "worst")),
}

_NOTE = (
    "Per token and layer, on sequences that the plans were not made on, with 95 % intervals over "
    "sequences where they are known. Rows are those of an exchange that sends one row per device "
    "out and back, with tokens spread evenly over the devices: compare methods with one another, "
    "not with the measured rows above."
)


@dataclasses.dataclass(frozen=True)
class Table:
    """Text, ready to print: one row per method, the first entry being its name."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...]


def read(path: str | os.PathLike) -> Table:
    """Reads what `compare --json` printed."""
    try:
        with open(path, encoding="utf-8") as file:
            printed = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        fix = "Give what `python -m moe_jax.placement compare --json` printed"
        rule = f"cannot be read as JSON ({error})"
        raise Refused("--compare", os.fspath(path), rule, fix) from None
    rows = [
        (name, *(_figure(figures, places) for places in _COLUMNS.values()))
        for name, figures in _methods(printed)
    ]
    notes = (_NOTE,) if rows else ("The comparison holds no method that this page knows.",)
    return Table(("", *_COLUMNS), rows, notes)


def _methods(printed: Any) -> Iterator[tuple[str, dict]]:
    """(name, figures) of every method in the first container that holds any."""
    if isinstance(printed, dict):
        containers = [printed, *printed.values()]
    else:
        containers = [printed]
    for container in containers:
        if isinstance(container, dict):
            entries = list(container.items())
        elif isinstance(container, list):
            entries = [(str(number), entry) for number, entry in enumerate(container)]
        else:
            continue
        found = [(key, entry, _with_rows(entry)) for key, entry in entries]
        methods = [(_name(key, entry), figures) for key, entry, figures in found if figures]
        if methods:
            yield from methods
            return


def _with_rows(entry: Any) -> dict | None:
    """The object that holds `rows`: the entry itself, or one right inside it."""
    if not isinstance(entry, dict):
        return None
    for candidate in (entry, *entry.values()):
        if isinstance(candidate, dict) and isinstance(candidate.get("rows"), dict):
            return candidate
    return None


def _name(key: str, entry: dict) -> str:
    named = [entry[k] for k in _NAMES if isinstance(entry.get(k), str)]
    return named[0] if named else key


def _figure(figures: dict, places: tuple[tuple[str, ...], ...]) -> str:
    for place in places:
        value: Any = figures
        for key in place:
            value = value.get(key) if isinstance(value, dict) else None
        text = _text(value)
        if text:
            return text
    return "-"


def _text(value: Any) -> str | None:
    if isinstance(value, dict):
        centre = next((value[k] for k in ("value", "mean") if _is_number(value.get(k))), None)
        low, high = value.get("low"), value.get("high")
        if centre is not None and _is_number(low) and _is_number(high):
            return f"{centre:.3f} [{low:.3f}, {high:.3f}]"
        value = centre
    return f"{value:.3f}" if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
