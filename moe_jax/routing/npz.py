"""Reads arrays of `.npz` and `.npy` files that may be truncated, hostile or something else.

Promise: nothing is unpickled, no memory is touched beyond the data that really is in the file, and
everything wrong ends in `Refused`. A header may claim any shape: the claim is held against the
size in the archive's directory and against what deflate can pack before an array is made, and the
array is then filled piece by piece, so that pages are only touched by bytes that arrived.
"""

import io
import math
import os
import pathlib
import struct
import tokenize
import warnings
import zipfile
import zlib
from typing import IO, Any

import numpy as np

from moe_jax.errors import Refused

MAX_DEFLATE_RATIO = 1040  # deflate packs at most 1032 : 1
FREE = 1 << 26  # bytes that are unpacked whatever the ratio
LIKELY_RATIO = 200  # beyond FREE: no recording packs better
_PIECE = 1 << 20
BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    SyntaxError,
    tokenize.TokenError,  # numpy cleans headers of Python 2 with a tokenizer
    EOFError,
    KeyError,
    OSError,
    NotImplementedError,
    RuntimeError,
    RecursionError,
    OverflowError,
    MemoryError,
    TypeError,
    AttributeError,
    IndexError,
)


def read_npz(path: str | os.PathLike, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of `path` whose names are in `wanted`; absent ones are absent from the result."""
    path = pathlib.Path(path)
    if not path.is_file():
        rule = "must be a file" if path.exists() else "the file does not exist"
        raise Refused("trace", str(path), rule, "Give the path of a trace .npz")
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            return {
                name: _read_member(archive, f"{name}.npy", path)
                for name in wanted
                if f"{name}.npy" in names
            }
    except Refused:
        raise
    except BROKEN as error:
        raise Refused(
            "trace",
            str(path),
            f"not a whole .npz file ({type(error).__name__}: {_one_line(error)})",
            "Record it again, or copy it again: it is truncated, damaged or of another format",
        ) from error


def _read_member(archive: zipfile.ZipFile, name: str, path: pathlib.Path) -> np.ndarray:
    info = archive.getinfo(name)
    room = info.compress_size * MAX_DEFLATE_RATIO + 1024
    if info.compress_size > path.stat().st_size or info.file_size > room:
        raise Refused(
            name,
            info.file_size,
            f"more bytes than {info.compress_size} packed ones can hold",
            "Record the trace again: the archive's directory is damaged",
        )
    if info.file_size > max(FREE, info.compress_size * LIKELY_RATIO):
        raise Refused(
            name,
            info.file_size,
            f"bytes out of {info.compress_size} packed ones: no recording packs so well",
            "If it is real, save the array unpacked (numpy.savez)",
        )
    with archive.open(info) as file:
        array = _read_array(file, name, info.file_size)
        file.read(1)  # reaches the end, where zipfile compares the checksum
    return array


def read_npy(path: str | os.PathLike) -> np.ndarray:
    """The array of a `.npy` file."""
    path = pathlib.Path(path)
    if not path.is_file():
        rule = "an array is a file" if path.exists() else "the file does not exist"
        raise Refused("array", str(path), rule, "Give the path of a .npy file")
    try:
        with path.open("rb") as file:
            return _read_array(file, path.name, path.stat().st_size)
    except Refused:
        raise
    except BROKEN as error:
        raise Refused(
            "array",
            str(path),
            f"not a whole .npy file ({type(error).__name__}: {_one_line(error)})",
            "Save it again with numpy.save: it is truncated, damaged or of another format",
        ) from error


class _Within:
    """A file that is never asked for more than is left of it: a read allocates what it asks for."""

    def __init__(self, file: IO[bytes] | io.BufferedIOBase, size: int):
        self._file, self.left = file, size

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self.left))
        self.left -= len(data)
        return data


def _read_array(whole: IO[bytes] | io.BufferedIOBase, name: str, file_size: int) -> np.ndarray:
    """One npy array of `file_size` bytes, its header included."""
    file: Any = _Within(whole, file_size)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise Refused(name, version, "npy version 1 or 2 is read", "Save it with numpy.savez")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers of old programs: they are checked below
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise Refused(
            name,
            str(dtype),
            "pickled objects are never loaded",
            "Save plain integer, float or string arrays",
        )
    size = math.prod(shape) * dtype.itemsize
    if any(n < 0 for n in shape) or size != file.left:
        raise Refused(
            f"{name} shape",
            shape,
            f"{size} bytes claimed, {file.left} present",
            "Record the trace again: the file is truncated or its header is damaged",
        )
    data = np.empty(size, np.uint8)
    at = 0
    while at < size:
        piece = file.read(min(_PIECE, size - at))
        if not piece:
            raise EOFError(f"{name} ends after {at} of {size} bytes")
        data[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    if size == 0:
        return np.empty(shape, dtype)
    return data.view(dtype).reshape(shape, order="F" if fortran_order else "C")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
