"""Safetensors files of whole numbers: 8 bytes of header length, a JSON header, the data.

Promise: the header's length, shapes and offsets are held against the size of the file before an
array is made; the tensors have to tile the data exactly, without holes or overlaps.
"""

import json
import math
import os
import struct
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.errors import Refused
from moe_jax.placement.formats import raw

DTYPES = {
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "<u1",
}
_FIX = "Copy the file again: it is truncated, damaged or of another format"


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors by name."""
    path = raw.existing_file(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, raw.MAX_TEXT):
            raise Refused("header length", length, f"the file has {size} bytes in all", _FIX)
        text = raw.decode(file.read(length), f"header of {path.name}")
        header = raw.json_object(raw.parse_json(text, f"header of {path.name}"), path.name)
        header.pop("__metadata__", None)
        spans = sorted((_span(name, entry) for name, entry in header.items()), key=lambda s: s[1])
        _check_tiling(spans, size - 8 - length)
        return {
            name: np.frombuffer(_exactly(file, end - begin, name), dtype).reshape(shape)
            for name, begin, end, dtype, shape in spans
        }


def write(path: str | os.PathLike, tensors: dict[str, np.ndarray]) -> None:
    """int64 tensors, whole or not at all."""
    header: dict[str, Any] = {}
    at = 0
    for name, array in tensors.items():
        end = at + 8 * array.size
        header[name] = {"dtype": "I64", "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with files.atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(array.astype("<i8").tobytes())


def _span(name: str, entry: Any) -> tuple[str, int, int, str, tuple[int, ...]]:
    """(name, begin, end, dtype, shape) of one header entry, consistent in itself."""
    entry = raw.json_object(entry, name)
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Refused(
            f"{name} dtype", raw.shown(dtype), "whole numbers: I64, I32, ..., U8", "Convert it"
        )
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise Refused(name, raw.shown(shape), "has a shape and two data_offsets", _FIX)
    if not all(type(n) is int and 0 <= n < 2**62 for n in shape + offsets):
        raise Refused(name, raw.shown(shape), "shape and data_offsets are whole numbers", _FIX)
    claimed = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if claimed != offsets[1] - offsets[0]:
        raise Refused(f"{name} shape", shape, f"{claimed} bytes, data_offsets are {offsets}", _FIX)
    return name, offsets[0], offsets[1], DTYPES[dtype], tuple(shape)


def _check_tiling(spans: list, size: int) -> None:
    at = 0
    for name, begin, end, _, _ in spans:
        if begin != at:
            raise Refused(f"{name} data_offsets", begin, f"the one before ends at {at}", _FIX)
        at = end
    if at != size:
        raise Refused("data", f"{at} bytes claimed", f"{size} present", _FIX)


def _exactly(file, size: int, name: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise Refused(name, f"{len(data)} bytes", f"{size} are claimed", _FIX)
    return data
