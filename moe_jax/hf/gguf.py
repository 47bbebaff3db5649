"""The GGUF container (version 2 and 3, little-endian), read with every size checked first.

    "GGUF" version | n, k | k x (key, type, value) | n x (name, dimensions, type, offset) | arrays

An array is mapped and decoded when it is asked for. A count is compared with the bytes that are
left before anything is made of it, so memory follows the file and never what it says of itself.

Format: the specification of ggml (docs/gguf.md).
"""

import dataclasses
import itertools
import math
import os
import pathlib
import struct
from typing import Any, NoReturn

import numpy as np

from moe_jax.errors import Refused
from moe_jax.hf import gguf_types

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_RANK = 4
_REPAIR = "download the file again"
_TRUTH, _STRING, _ARRAY = 7, 8, 9
# type number -> NumPy's name
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Attributes:
    kind: how its values are written, in `gguf_types.KINDS`.
    shape: slowest axis first, as NumPy has it.
    start, stop: its bytes in the file.
    """

    kind: gguf_types.Kind
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class File:
    """Attributes:
    path: where it is.
    keys: numbers, truth values, strings, and lists of one of these.
    tensors: by name.
    """

    path: pathlib.Path
    keys: dict[str, Any]
    tensors: dict[str, Tensor]

    def array(self, name: str) -> np.ndarray:
        """Decoded, float32."""
        tensor = self.tensors[name]
        data = np.memmap(self.path, np.uint8, "r")[tensor.start : tensor.stop]
        return tensor.kind.decode(data).reshape(tensor.shape)


def refuse(path: pathlib.Path, what: str, value: object, rule: str, fix: str = _REPAIR) -> NoReturn:
    """Raises `Refused` with the file and the part of it."""
    raise Refused(f"{path}: {what}", value, rule, fix)


class _Cursor:
    """Reads forward; never beyond the end."""

    def __init__(self, path: pathlib.Path, data: np.ndarray):
        self.path, self.data, self.at, self.what = path, data, 0, "header"

    def left(self, size: int, count: int = 1) -> int:
        """Bytes of `count` things of at least `size`, if so many can still come."""
        if count * size > len(self.data) - self.at:
            rule = f"asks for {count:,} x {size} bytes at byte {self.at:,} of {len(self.data):,}"
            refuse(self.path, self.what, count, f"{rule}: the file is cut off, or it lies")
        return count * size

    def take(self, size: int) -> bytes:
        size = self.left(size)
        taken = self.data[self.at : self.at + size].tobytes()
        self.at += size
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("<Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            refuse(self.path, self.what, f"byte {self.at:,}", f"must be UTF-8 ({error})")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            of, count = self.number("<I"), self.number("<Q")
            if of == _STRING:
                self.left(8, count)
                return [self.string() for _ in range(count)]
            return self._numbers(of, count).tolist()
        return self._numbers(kind, 1).tolist()[0]

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            refuse(self.path, self.what, kind, "is no type of a number, a string or a list of them")
        size = self.left(np.dtype(_SCALARS[kind]).itemsize, count)
        taken = self.data[self.at : self.at + size]
        self.at += size
        return taken != 0 if kind == _TRUTH else taken.view(_SCALARS[kind])


def read(path: str | os.PathLike) -> File:
    """Keys and the places of all tensors.

    Raises:
      Refused: naming file, key or tensor, and rule.
    """
    path = pathlib.Path(path)
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:  # ValueError: an empty file
        refuse(path, "file", None, f"cannot be read ({error})", "give a GGUF file")
    cursor = _Cursor(path, data)
    if (magic := cursor.take(4)) != MAGIC:
        refuse(path, "magic", magic, "must be b'GGUF'", "give a GGUF file")
    if (version := cursor.number("<I")) not in VERSIONS:
        refuse(path, "version", version, f"must be one of {VERSIONS}, little-endian", "convert it")
    num_tensors, num_keys = cursor.number("<Q"), cursor.number("<Q")
    cursor.left(13, num_keys)  # a name's length, a type, a byte
    keys: dict[str, Any] = {}
    for _ in range(num_keys):
        cursor.what = "header"
        name = cursor.what = cursor.string()
        if name in keys:
            refuse(path, name, "twice", "must be there once")
        keys[name] = cursor.value(cursor.number("<I"))
    cursor.what = "tensors"
    cursor.left(24, num_tensors)  # a name's length, a rank, a type, an offset
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        cursor.what = "tensors"
        name = cursor.what = cursor.string()
        if name in found:
            refuse(path, name, "twice", "must be there once")
        if not 1 <= (rank := cursor.number("<I")) <= MAX_RANK:
            refuse(path, name, rank, f"must have 1 to {MAX_RANK} dimensions")
        shape = tuple(cursor.number("<Q") for _ in range(rank))[::-1]
        found[name] = shape, cursor.number("<I"), cursor.number("<Q")
    return File(path, keys, _placed(path, len(data), cursor.at, _alignment(path, keys), found))


def _alignment(path: pathlib.Path, keys: dict[str, Any]) -> int:
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        refuse(path, "general.alignment", alignment, "must be a power of two")
    return alignment


def _placed(
    path: pathlib.Path,
    size: int,
    at: int,
    alignment: int,
    found: dict[str, tuple[tuple[int, ...], int, int]],
) -> dict[str, Tensor]:
    """Tensors that lie in the file, aligned, none over another."""
    first, tensors = -(-at // alignment) * alignment, {}
    for name, (shape, number, offset) in found.items():
        kind = gguf_types.KINDS.get(number)
        if kind is None:
            known = ", ".join(kind.name for kind in gguf_types.KINDS.values())
            rule = f"is a type of weights that is not supported: one of {known}"
            refuse(path, name, f"type {number}", rule, "use a file in one of these types")
        count = math.prod(shape)
        if not count or shape[-1] % kind.values:
            rule = f"must be rows of {kind.values} values each and more than none ({kind.name})"
            refuse(path, name, shape, rule)
        start, stop = first + offset, first + offset + count // kind.values * kind.size
        if offset % alignment or stop > size:
            rule = f"must start at a multiple of {alignment} and end within {size:,} bytes"
            refuse(path, name, f"bytes {start:,} to {stop:,}", rule, f"it is cut off: {_REPAIR}")
        tensors[name] = Tensor(kind, shape, start, stop)
    in_order = sorted(tensors.items(), key=lambda item: item[1].start)
    for (before, low), (name, high) in itertools.pairwise(in_order):
        if high.start < low.stop:
            refuse(path, name, high.start, f"must not overlap {before}, to byte {low.stop:,}")
    return tensors
