"""Untrusted text and JSON, read strictly: UTF-8, no key twice, tables of whole numbers.

Promise: whatever the bytes are, the answer is a checked value or `Refused`. A file is measured
before it is read, and nothing that a file claims about its own size is believed.
"""

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.errors import Refused

MAX_TEXT = 1 << 28  # bytes; a plan of 100 layers and 1,000 slots is a thousandth of it


def existing_file(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.is_file():
        rule = "is not a file" if path.exists() else "the file does not exist"
        raise Refused("in", str(path), rule, "Give the path of a plan, a trace or counts")
    return path


def read_text(path: str | os.PathLike) -> str:
    """The whole file as UTF-8 text."""
    path = existing_file(path)
    if (size := path.stat().st_size) > MAX_TEXT:
        raise Refused(
            "in", str(path), f"{size} bytes, at most {MAX_TEXT} are read", "Split it, or save .npz"
        )
    return decode(path.read_bytes(), str(path))


def decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(
            "in", where, f"not UTF-8 text (byte {error.start})", "Give a text file of this format"
        ) from error


def parse_json(text: str, where: str) -> Any:
    """JSON without NaN, Infinity (1e999 either) or a key that stands twice in one object."""
    try:
        return json.loads(
            text,
            parse_constant=_no_constant,
            parse_float=finite,
            object_pairs_hook=_no_key_twice,
        )
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:120]
        raise Refused(
            "in", where, f"not whole JSON ({why})", "Copy or write the file again"
        ) from error


def json_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused("in", where, "a JSON object is expected", "Give a file of a known format")
    return value


def whole_number(value: Any, field: str, least: int = 0) -> int:
    """A JSON or YAML number that is whole and fits into int32."""
    if type(value) is not int or not least <= value < 2**31:
        raise Refused(field, shown(value), f"a whole number from {least}", "Correct it")
    return value


def shown(value: Any) -> Any:
    """A value for an error message: lists and objects, which may be huge or deep, by their size."""
    if isinstance(value, (list, tuple, dict)):
        return f"{'object' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return value


def int_table(value: Any, field: str, axes: Sequence[str]) -> np.ndarray:
    """int64 array of nested lists, one level per axis; names the first entry that does not fit."""
    shape: list[int] = []
    entries = [value]
    for axis in axes:
        for at, entry in enumerate(entries):
            if not isinstance(entry, list) or not entry:
                raise Refused(
                    _name(field, at, shape),
                    shown(entry),
                    f"a list over {axis}, not empty",
                    "Correct it",
                )
            if len(entry) != len(entries[0]):
                raise Refused(
                    _name(field, at, shape),
                    f"{len(entry)} {axis}",
                    f"{_name(field, 0, shape)} has {len(entries[0])}",
                    "Give lists of equal length",
                )
        shape.append(len(entries[0]))
        entries = [inner for entry in entries for inner in entry]
    for at, entry in enumerate(entries):
        if type(entry) is not int or not -(2**31) <= entry < 2**31:
            raise Refused(
                _name(field, at, shape), shown(entry), "entries are whole numbers", "Correct it"
            )
    return np.array(entries, np.int64).reshape(shape)


def int_array(array: np.ndarray, field: str, axes: Sequence[str]) -> np.ndarray:
    """The same rules for an array: whole numbers, these axes, none of length zero; int64."""
    if array.ndim != len(axes) or 0 in array.shape or array.dtype.kind not in "iu":
        raise Refused(
            field,
            f"{array.dtype} {array.shape}",
            f"whole numbers [{', '.join(axes)}], none of the axes empty",
            "Save the array in this form",
        )
    if int(array.max()) >= 2**31 or int(array.min()) < -(2**31):
        raise Refused(field, "beyond int32", "entries are whole numbers of 32 bits", "Correct it")
    return array.astype(np.int64)


def int_saved(value: Any, field: str, axes: Sequence[str]) -> np.ndarray:
    """The same rules for what a file of `torch.save` holds: a tensor, or one list of numbers.

    Nested lists are refused: a pickle may name one list a thousand times inside another.
    """
    if len(axes) == 1 and isinstance(value, list):
        return int_table(value, field, axes)
    return int_array(tensor(value, field), field, axes)


def tensor(value: Any, field: str) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise Refused(field, shown(value), "a tensor", "Record it again")
    return value


def _name(field: str, at: int, shape: Sequence[int]) -> str:
    """`field[1][2]` of the entry number `at` in reading order."""
    index = np.unravel_index(at, tuple(shape)) if shape else ()
    return field + "".join(f"[{int(i)}]" for i in index)


def finite(text: str) -> float:
    """A JSON number; one too large for a float cannot be written again."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:40]!r} stands twice")
            seen.add(key)
    return fields
