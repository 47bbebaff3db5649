"""The safetensors container: a JSON header and raw arrays, read through a memory map.

    8 bytes  N, the size of the header, little-endian
    N bytes  {"name": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [0, 16]}, ...}
    rest     the arrays, without holes; offsets count from here

Nothing that the header says is believed: sizes and offsets are compared with the file before
anything is mapped, so memory never follows a header, and no code is ever run. Format:
huggingface/safetensors, README.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from moe_jax import files
from moe_jax.errors import Refused

MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_RANK = 16
# bits of an element
BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4},
    **{"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32},
    **{"U64": 64, "I64": 64, "F64": 64, "C64": 64},
}
WEIGHTS: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_REPAIR = "download the file again, or write it again"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What the header says of one array; `start` and `stop` are bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class File:
    """A file whose header holds: every array lies inside it, none overlaps another."""

    path: pathlib.Path
    tensors: dict[str, Tensor]
    bytes_: np.ndarray  # the mapped file

    def array(self, name: str) -> np.ndarray:
        """The array, read-only, still in the file. Raises `Refused`, see `check_weight`."""
        self.check_weight(name)
        tensor = self.tensors[name]
        raw = self.bytes_[tensor.start : tensor.stop]
        return raw.view(WEIGHTS[tensor.dtype]).reshape(tensor.shape)

    def codes(self, name: str) -> np.ndarray:
        """A part of a quantised weight, read-only, still in the file: bytes, or numbers."""
        tensor = self.tensors[name]
        if tensor.dtype in WEIGHTS:
            return self.array(name)
        return self.bytes_[tensor.start : tensor.stop].reshape(tensor.shape)

    def check_codes(self, name: str, dtypes: tuple[str, ...]) -> None:
        """Raises `Refused` where the array is not of one of these dtypes."""
        if (dtype := self.tensors[name].dtype) not in dtypes:
            rule = f"is not read as codes of quantised weights here: must be {' or '.join(dtypes)}"
            refuse(self.path, name, dtype, rule, _REPAIR)

    def check_weight(self, name: str) -> None:
        """Raises `Refused` where the array is of a dtype that is not read as a weight."""
        dtype = self.tensors[name].dtype
        if dtype not in WEIGHTS:
            refuse(
                self.path,
                name,
                dtype,
                f"is not read as a weight; those that are: {', '.join(WEIGHTS)}",
                "convert the checkpoint to one of them (no quantised weights are read from it)",
            )


def refuse(path: pathlib.Path, tensor: str, value: object, rule: str, fix: str) -> NoReturn:
    """Raises `Refused` for a file, or for one tensor of it."""
    field = f"{path}: {tensor}" if tensor else str(path)
    raise Refused(field, value, rule, fix)


def read(path: str | os.PathLike) -> File:
    """Checks the header and maps the file. Raises `Refused` naming file, tensor and rule."""
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            lead = file.read(8)
            length = int.from_bytes(lead, "little")
            if len(lead) < 8 or length > size - 8:
                rule = f"must start with the size of a header inside the file of {size:,} bytes"
                refuse(path, "", length, rule, _REPAIR)
            if length > MAX_HEADER:
                refuse(path, "", length, f"header must have at most {MAX_HEADER:,} bytes", _REPAIR)
            text = file.read(length)
    except OSError as error:
        refuse(path, "", None, f"cannot be read ({error.strerror})", "correct the path")
    tensors = _tensors(path, _header(path, text), first=8 + length, size=size)
    return File(path, tensors, np.asarray(np.memmap(path, np.uint8, "r")))


def _header(path: pathlib.Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                refuse(path, name, "twice", "header may name an entry only once", _REPAIR)
            found[name] = value
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except Refused:
        raise
    except (ValueError, RecursionError) as error:
        refuse(path, "", text[:40], f"header must be JSON ({type(error).__name__})", _REPAIR)
    if not isinstance(header, dict):
        refuse(path, "", type(header).__name__, "header must be a JSON object", _REPAIR)
    header.pop("__metadata__", None)  # free text: {"format": "pt"}
    return header


def _tensors(
    path: pathlib.Path, header: dict[str, Any], first: int, size: int
) -> dict[str, Tensor]:
    tensors = {name: _tensor(path, name, entry, first) for name, entry in header.items()}
    end, before = first, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        where = [tensor.start - first, tensor.stop - first]
        if tensor.stop > size:
            rule = f"data_offsets must lie inside the {size - first:,} bytes of data that are there"
            refuse(path, name, where, rule, f"the file is cut short or its header lies: {_REPAIR}")
        if tensor.start != end:
            what = "overlap" if tensor.start < end else "leave a hole after"
            rule = f"data_offsets must not {what} {before}, which ends at {end - first:,}"
            refuse(path, name, where, rule, _REPAIR)
        end, before = tensor.stop, name
    if end != size:
        rule = f"must end where its last array ends, at byte {end:,} of {size:,}"
        refuse(path, "", size, rule, _REPAIR)
    return tensors


def _tensor(path: pathlib.Path, name: str, entry: Any, first: int) -> Tensor:
    """One entry; everything about it that needs no other entry."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        refuse(path, name, entry, "must have dtype, shape and data_offsets", _REPAIR)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        refuse(path, name, dtype, f"dtype must be one of {', '.join(BITS)}", _REPAIR)
    if not _whole_numbers(shape) or len(shape) > MAX_RANK:
        rule = f"shape must be a list of at most {MAX_RANK} whole numbers from 0"
        refuse(path, name, shape, rule, _REPAIR)
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(path, name, offsets, "data_offsets must be [first, end], first <= end", _REPAIR)
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (end - begin):
        rule = f"{dtype} of shape {shape} takes {bits / 8:,.0f} bytes, not {end - begin:,}"
        refuse(path, name, offsets, rule, f"the header lies: {_REPAIR}")
    return Tensor(dtype, tuple(shape), first + begin, first + end)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value
    )


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    array: Callable[[str], np.ndarray],
) -> None:
    """Writes a file, one array at a time.

    Args:
      tensors: dtype and shape of every array, in the order in which they are written.
      array: called once for each name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays start at a multiple of 8
    with files.atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in tensors.items():
            # No name for the array: it would live until the next one is made.
            file.write(_bytes(array(name), name, dtype, shape))


def _bytes(array: np.ndarray, name: str, dtype: str, shape: tuple[int, ...]) -> memoryview | bytes:
    """An array as it is written."""
    values = np.ascontiguousarray(array)
    assert values.dtype == WEIGHTS.get(dtype, np.uint8), (name, values.dtype, dtype)
    assert values.shape == shape, (name, values.shape, shape)
    return values.view(np.uint8).data if values.size else b""
