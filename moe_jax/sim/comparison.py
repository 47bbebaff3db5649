"""The held-out table of `python -m moe_jax.placement compare --json`, ready to print.

Tolerant on purpose: the table is a guest in the report, so keys that are missing give a hyphen and
a file without any method, or of another command, gives a note and no table. Only a file that is not
JSON is refused. A method is any object with `rows` in it or one level below (`held_out`); a figure
is a number or `{value, low, high}`.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from moe_jax.errors import Refused, plain
from moe_jax.placement import tables

_NAMES = ("name", "method", "solver", "placement")

# where a figure may stand inside a method
_ROWS = (("rows", "exchange"),)
_LOAD_MEAN = (("load_mean",), ("load_max_over_mean", "mean"))
_LOAD_WORST = (("load_worst",), ("load_max_over_mean", "worst"))
_HEAD = ("", "objective", "rows, exchange", "change", "load max / mean", "worst layer")

_NOTE = (
    "Per token and layer, on sequences that the plans were not made on, with 95 % intervals over "
    "sequences where they are known. Rows are those of an exchange that sends one row per device "
    "out and back, with tokens spread evenly over the devices: compare methods with one another "
    "(changes are from the first), not with the measured rows above."
)
_UNKNOWN = (
    "The file given as --compare holds no method that this page knows: it is no answer of "
    "`python -m moe_jax.placement compare --json`."
)


@dataclasses.dataclass(frozen=True)
class Table:
    """Text, ready to print: one row per method, the first entry being its name."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
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
    methods = list(_methods(printed))
    if not any(_is_known(entry, figures) for _, entry, figures in methods):
        return Table(_HEAD, [], (_UNKNOWN,))
    first = _number(_at(methods[0][2], _ROWS))
    rows = [
        (
            name,
            _objective(entry),
            _text(_at(figures, _ROWS)),
            _change(_number(_at(figures, _ROWS)), first),
            _text(_at(figures, _LOAD_MEAN)),
            _text(_at(figures, _LOAD_WORST)),
        )
        for name, entry, figures in methods
    ]
    return Table(_HEAD, rows, (*_aim(printed), _NOTE))


def _aim(printed: Any) -> tuple[str, ...]:
    """What the plans were made for: a plan is only as good as it can be at that."""
    aim = {
        key: printed.get(key) if isinstance(printed, dict) else None
        for key in ("objective_name", "unit", "dispatch", "planned_on")
    }
    if not isinstance(aim["objective_name"], str):
        return ()
    text = f"Planned for the objective '{plain(aim['objective_name'])}'"
    for key, before, after in (
        ("unit", " (", ")"),
        ("dispatch", ", dispatch ", ""),
        ("planned_on", ", on ", ""),
    ):
        if isinstance(value := aim[key], str):
            text += f"{before}{plain(value)}{after}"
    return (text + "; other columns may get worse where that one gets better.",)


def _is_known(entry: dict, figures: dict) -> bool:
    """It has one of the figures at least: answers of other commands have `rows`, too."""
    places = (_ROWS, _LOAD_MEAN, _LOAD_WORST)
    return "held_out_objective" in entry or any(_at(figures, one) is not None for one in places)


def _objective(entry: dict) -> str:
    number = _number(entry.get("held_out_objective"))
    return "-" if number is None else tables.number(number, 4)


def _methods(printed: Any) -> Iterator[tuple[str, dict, dict]]:
    """(name, entry, figures) of every method in the first container that holds any."""
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
        methods = [(_name(key, entry), entry, figures) for key, entry, figures in found if figures]
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
    return plain(named[0] if named else key)


def _at(figures: dict, places: tuple[tuple[str, ...], ...]) -> Any:
    """The figure at the first of `places` that exists."""
    for place in places:
        value: Any = figures
        for key in place:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def _number(figure: Any) -> float | None:
    """A number, or the middle of `{value, low, high}`."""
    if isinstance(figure, dict):
        figure = figure.get("value", figure.get("mean"))
    is_number = isinstance(figure, int | float) and not isinstance(figure, bool)
    try:
        return float(figure) if is_number else None
    except OverflowError:  # a whole number of hundreds of digits
        return None


def _text(figure: Any) -> str:
    middle = _number(figure)
    if middle is None:
        return "-"
    ends = [_number(figure.get(end)) for end in ("low", "high")] if isinstance(figure, dict) else []
    if not ends or None in ends:
        return f"{middle:.3f}"
    return f"{middle:.3f} [{ends[0]:.2f}, {ends[1]:.2f}]"


def _change(number: float | None, first: float | None) -> str:
    """Relative to the first method."""
    return f"{100 * (number - first) / first:+.1f} %" if number is not None and first else "-"
