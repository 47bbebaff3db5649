"""Reads the arrays of an `.npz` that may be truncated, hostile or simply something else.

Promise: nothing is unpickled, no memory is touched beyond the data that really is in the file, and
everything wrong ends in `Refused`. A header may claim any shape: the claim is held against the
size in the archive's directory and against what deflate can pack before an array is made, and the
array is then filled piece by piece, so that pages are only touched by bytes that arrived.
"""

import math
import os
import pathlib
import struct
import zipfile
import zlib

import numpy as np

from moe_jax.errors import Refused

MAX_DEFLATE_RATIO = 1040  # deflate packs at most 1032 : 1
_PIECE = 1 << 20
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    SyntaxError,
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
        rule = "a trace is a file" if path.exists() else "the file does not exist"
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
    except _BROKEN as error:
        raise Refused(
            "trace",
            str(path),
            f"not a whole .npz file ({type(error).__name__}: {_one_line(error)})",
            "Record it again, or copy it again: it is truncated, damaged or of another format",
        ) from error


def _read_member(archive: zipfile.ZipFile, name: str, path: pathlib.Path) -> np.ndarray:
    info = archive.getinfo(name)
    room = min(info.compress_size, path.stat().st_size) * MAX_DEFLATE_RATIO + 1024
    if info.file_size > room:
        raise Refused(
            name,
            info.file_size,
            f"more bytes than {info.compress_size} packed ones can hold",
            "Record the trace again: the archive's directory is damaged",
        )
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            header = np.lib.format.read_array_header_2_0(file)
        else:
            raise Refused(name, version, "npy version 1 or 2 is read", "Save it with numpy.savez")
        shape, fortran_order, dtype = header
        if dtype.hasobject:
            raise Refused(
                name,
                str(dtype),
                "pickled objects are never loaded",
                "Save plain integer, float or string arrays",
            )
        size = math.prod(shape) * dtype.itemsize
        if any(n < 0 for n in shape) or size != info.file_size - file.tell():
            raise Refused(
                f"{name} shape",
                shape,
                f"{size} bytes claimed, {info.file_size - file.tell()} present",
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
        file.read(1)  # reaches the end, where zipfile compares the checksum
    if size == 0:
        return np.empty(shape, dtype)
    return data.view(dtype).reshape(shape, order="F" if fortran_order else "C")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
