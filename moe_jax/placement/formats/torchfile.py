"""Files of `torch.save`, read without torch and without running anything that they say.

Such a file is a zip archive: `NAME/data.pkl` is a pickle (protocol 2), `NAME/data/0`, `1`, ... are
the bytes of its storages. A pickle is a program: this module is an interpreter of its own for the
few instructions that plain data needs. It knows dict, list, tuple, str, int, float, bool, None and
tensors; the names that it accepts are compared, never imported. Everything else is refused.

Promise: memory stays within a small multiple of the file. Members have to be stored, not packed;
the bytes of all storages together, and of all tensors together, are at most the file's.
"""

import dataclasses
import math
import os
import pathlib
import pickletools
import zipfile
from typing import Any

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement.formats import raw
from moe_jax.routing import npz

_FIX = "Save its arrays where it was made: numpy.savez(out, topk_ids_of_layer=...)"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_HOOKS = "collections OrderedDict"  # every tensor carries an empty one
_DTYPES = {
    "torch LongStorage": "<i8",
    "torch IntStorage": "<i4",
    "torch ShortStorage": "<i2",
    "torch CharStorage": "|i1",
    "torch ByteStorage": "|u1",
    "torch BoolStorage": "|b1",
    "torch HalfStorage": "<f2",
    "torch FloatStorage": "<f4",
    "torch DoubleStorage": "<f8",
}
_NAMES = {_TENSOR, _HOOKS, *_DTYPES}
_PUSHED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read(path: str | os.PathLike) -> Any:
    """What was saved; tensors as arrays, wherever they lived."""
    path = raw.existing_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _Machine(_Archive(archive, path.stat().st_size)).run()
    except Refused:
        raise
    except npz.BROKEN as error:
        why = " ".join(str(error).split())[:120]
        raise Refused(
            "in",
            str(path),
            f"not a whole file of torch.save ({type(error).__name__}: {why})",
            "Copy it again; files of torch before 1.6 are not read",
        ) from error


class _Archive:
    """Members of the archive, and how many bytes may still be asked for."""

    def __init__(self, archive: zipfile.ZipFile, size: int):
        self._archive, self.left, self.tensors_left = archive, size, size
        heads = [name for name in archive.namelist() if name.count("/") == 1]
        pickles = [name for name in heads if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused("in", pickles, "one member NAME/data.pkl", "Give a file of torch.save")
        self._folder = pathlib.PurePosixPath(pickles[0]).parent
        if f"{self._folder}/byteorder" in heads and self.member("byteorder") != b"little":
            raise Refused("byteorder", "not little", "little-endian files are read", _FIX)

    def member(self, name: str) -> bytes:
        info = self._archive.getinfo(f"{self._folder}/{name}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise Refused(name, "packed", "torch.save stores its members unpacked", _FIX)
        if info.compress_size != info.file_size:  # zipfile would ask for as much
            raise Refused(name, info.compress_size, f"{info.file_size} bytes unpacked", _FIX)
        if info.file_size > self.left:
            raise Refused(name, info.file_size, f"{self.left} bytes of the file are left", _FIX)
        self.left -= info.file_size
        return self._archive.read(info)


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name in the pickle: compared, never looked up."""

    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """One-dimensional values of one type."""

    values: np.ndarray


class _Machine:
    """A stack, a memo, and one method per kind of instruction."""

    def __init__(self, archive: _Archive):
        self._archive = archive
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[tuple[str, str], _Storage] = {}

    def run(self) -> Any:
        for operation, argument, at in pickletools.genops(self._archive.member("data.pkl")):
            if operation.name == "STOP":
                break
            self._step(operation.name, argument, at)
        (value,) = self._stack
        return value

    def _step(self, name: str, argument: Any, at: int | None) -> None:
        stack = self._stack
        if name in _NUMBERS:
            stack.append(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in _PUSHED:
            stack.append(_PUSHED[name])
        elif name in _TUPLES:
            stack.append(tuple(self._pop() for _ in range(_TUPLES[name]))[::-1])
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("APPEND", "APPENDS"):
            new = [self._pop()] if name == "APPEND" else self._since_mark()
            self._top(list).extend(new)
        elif name in ("SETITEM", "SETITEMS"):
            new = [self._pop(), self._pop()][::-1] if name == "SETITEM" else self._since_mark()
            _fill(self._top(dict), new)
        elif name == "GLOBAL":
            stack.append(_accepted(argument))
        elif name == "BINPERSID":
            stack.append(self._storage(self._pop()))
        elif name == "REDUCE":
            arguments, function = self._pop(), self._pop()
            stack.append(self._called(function, arguments))
        elif name != "PROTO":
            raise Refused(f"byte {at} of data.pkl", name, "only plain data and tensors", _FIX)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("the pickle takes more than it has")
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise ValueError(f"{kind.__name__} expected")
        return self._stack[-1]

    def _storage(self, name: Any) -> _Storage:
        """A storage, read once: ("storage", type, key, where it lived, length)."""
        if not isinstance(name, tuple) or len(name) != 5 or name[0] != "storage":
            raise ValueError("a storage is named by five values")
        _, kind, key, _, length = name
        if not isinstance(kind, _Name) or kind.text not in _DTYPES or type(key) is not str:
            raise ValueError("a storage has a type and a key")
        dtype = np.dtype(_DTYPES[kind.text])
        if (kind.text, key) not in self._storages:
            values = np.frombuffer(self._archive.member(f"data/{key}"), dtype)
            self._storages[kind.text, key] = _Storage(values)
        storage = self._storages[kind.text, key]
        if type(length) is not int or length != len(storage.values):
            raise Refused(f"data/{key}", len(storage.values), "its length is another", _FIX)
        return storage

    def _called(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise ValueError("a name is called with a tuple")
        if function.text == _HOOKS and not arguments:
            return None
        if function.text == _TENSOR and len(arguments) in (6, 7):
            return self._tensor(*arguments[:4])
        raise Refused("data.pkl", function.text, "only tensors are made, from six values", _FIX)

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray:
        """A view of its storage, no larger than that."""
        if not isinstance(storage, _Storage) or not _whole((offset,), shape, strides):
            raise ValueError("a tensor has a storage, an offset, a shape and strides")
        count = math.prod(shape)
        values = storage.values
        self._archive.tensors_left -= count * values.itemsize
        last = offset + sum(
            (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
        )
        if count and (last >= len(values) or self._archive.tensors_left < 0):
            raise Refused("tensor shape", shape, f"its storage has {len(values)} values", _FIX)
        if not count:
            return np.empty(shape, values.dtype)
        steps = [stride * values.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)


def _whole(*groups: Any) -> bool:
    """Tuples of at most eight whole numbers, none negative."""
    return all(
        isinstance(group, tuple)
        and len(group) <= 8
        and all(type(n) is int and 0 <= n < 2**40 for n in group)
        for group in groups
    )


def _fill(target: dict, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            raise ValueError("keys are texts")
        if key in target:
            raise ValueError(f"the key {key[:40]!r} stands twice")
        target[key] = value


def _accepted(argument: Any) -> _Name:
    if argument not in _NAMES:
        raise Refused("data.pkl", str(argument)[:80], "only plain data and tensors are read", _FIX)
    return _Name(argument)
