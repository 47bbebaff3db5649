"""A published model's folder: one safetensors file, or several and an index.

    config.json                    sizes and parts, see config_json.py
    model.safetensors              or, in parts:
    model.safetensors.index.json   {"weight_map": {tensor: file}}; never of other files beside it
    model-00001-of-00002.safetensors ...
    tokenizer.json                 see tokens.py

Only these are read. Pickles (.bin, .pt, .pth) are never opened, nor is any code.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_jax.errors import Refused
from moe_jax.hf import safetensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SAMPLED, SAMPLED_BYTES = 256, 4096  # arrays at most, and of each, for `sampled_digest`
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of writing, not reading


def check_new(out: str | os.PathLike, field: str = "OUT") -> pathlib.Path:
    """The absolute path of a folder to write, whose name a finished one can take; makes nothing.

    Args:
      field: what it is called in a refusal.

    Raises:
      Refused: it is there and not empty, is one that cannot be replaced, or has no place.
    """
    given, out = str(out), pathlib.Path(out)
    if out.is_symlink():
        rule = "is a link, and the finished folder takes the name"
        raise Refused(field, given, rule, "name the folder itself, or a new one")
    out = pathlib.Path(os.path.realpath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(field, given, "exists already", "name a new folder")
    if os.path.ismount(out):
        rule = "is a mount point, which the finished folder cannot replace"
        raise Refused(field, given, rule, "name a new folder in it")
    if out == pathlib.Path.cwd():  # a shell in it would be left in a folder without a name
        rule = "is the folder that this runs in, which the finished one would replace"
        raise Refused(field, given, rule, "name a new folder in it")
    above = next(folder for folder in out.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise Refused(field, given, f"cannot be written below {above}", "name another place")
    return out


@contextlib.contextmanager
def new(out: str | os.PathLike, field: str = "OUT") -> Iterator[pathlib.Path]:
    """A folder to write to, under another name beside it; whole, it takes the name, or is gone.

    Args: as for `check_new`.

    Raises:
      Refused: see `check_new`; or the disk takes no more.
      OSError: what is read meanwhile cannot be read; or another process writes there.
    """
    given, out = str(out), check_new(out, field)
    above = [folder for folder in out.parents if not folder.exists()]
    beside, made = out.with_name(f".{out.name}.{os.getpid()}.tmp"), False
    try:
        beside.mkdir(parents=True)
        made = True  # not by a process of the same number, elsewhere on a shared disk
        yield beside
        os.replace(beside, out)
    except BaseException as error:
        if made:
            shutil.rmtree(beside, ignore_errors=True)
        with contextlib.suppress(OSError):  # one that is not there, or that others wrote to
            for folder in above:
                folder.rmdir()
        if not isinstance(error, OSError) or error.errno not in _DISK_ERRORS:
            raise
        rule, fix = f"could not be written ({error})", "make room or name another place"
        raise Refused(field, given, rule, fix) from None


@dataclasses.dataclass(frozen=True)
class Tensors:
    """All arrays of a folder.

    Attributes:
      folder: where they are.
      file_of: the file of each array.
    """

    folder: pathlib.Path
    file_of: dict[str, safetensors.File]

    def array(self, name: str) -> np.ndarray:
        """Read-only, still in the file."""
        return self.file_of[name].array(name)

    def codes(self, name: str) -> np.ndarray:
        """Of quantised weights: bytes or scales, read-only, still in the file."""
        return self.file_of[name].codes(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file_of[name].tensors[name].shape

    def dtype(self, name: str) -> str:
        """As the container names it: "BF16"."""
        return self.file_of[name].tensors[name].dtype

    @property
    def num_bytes(self) -> int:
        return sum(
            file.tensors[name].stop - file.tensors[name].start
            for name, file in self.file_of.items()
        )

    def sampled_digest(self) -> str:
        """Hex SHA-256 of all names, types and shapes, and of a few bytes of some arrays.

        It tells two models of one shape apart, in the time of some reads; not one changed number.
        """
        names, digest = sorted(self.file_of), hashlib.sha256()
        for name in names:
            digest.update(f"{name} {self.dtype(name)} {self.shape(name)}\n".encode())
        for name in names[:: -(-len(names) // SAMPLED) or 1]:
            file = self.file_of[name]
            start, stop = file.tensors[name].start, file.tensors[name].stop
            middle = (start + stop) // 2
            digest.update(file.bytes_[middle : min(middle + SAMPLED_BYTES, stop)].tobytes())
        return digest.hexdigest()


def json_object(path: pathlib.Path, fix: str) -> dict[str, Any]:
    """A JSON object from a file. Raises `Refused`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(str(path), None, f"cannot be read ({error.strerror})", fix) from None
    except (ValueError, RecursionError) as error:
        rule = f"must be JSON ({type(error).__name__}: {error})"
        raise Refused(str(path), "", rule, "download it again") from None
    if not isinstance(found, dict):
        raise Refused(str(path), type(found).__name__, "must be a JSON object", "download it again")
    return found


def tensors(folder: str | os.PathLike) -> Tensors:
    """Reads the headers of all files of a published model's folder.

    Raises:
      Refused: naming file, tensor and rule; a folder with pickles only, or with two models.
    """
    folder = pathlib.Path(folder)
    index = folder / INDEX
    if index.is_file():
        return _indexed(folder, index)
    single = folder / SINGLE
    if not single.is_file():
        rule = f"must hold {SINGLE} or {INDEX}"
        if pickles := [p.name for p in sorted(folder.glob("*")) if p.suffix in _PICKLES]:
            rule += f"; {pickles[0]} is a pickle, which could run code and is never opened"
        fix = "download the safetensors files, or convert the checkpoint with its own tools"
        raise Refused("--hf", str(folder), rule, fix)
    file = safetensors.read(single)
    return Tensors(folder, dict.fromkeys(file.tensors, file))


def _indexed(folder: pathlib.Path, index: pathlib.Path) -> Tensors:
    listed = json_object(index, "download it again").get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
        rule = "needs weight_map: {tensor: file}"
        raise Refused(str(index), type(listed).__name__, rule, "download it again")
    read: dict[str, safetensors.File] = {}
    for name in sorted(set(listed.values())):
        plain = name == pathlib.PurePosixPath(name).name and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            rule = "must name .safetensors files beside it, without folders"
            raise Refused(str(index), name, rule, "download it again")
        if not (folder / name).is_file():
            rule = f"is named in {INDEX} and is not there"
            raise Refused(str(folder / name), None, rule, "download this shard as well")
        read[name] = safetensors.read(folder / name)
    if (folder / SINGLE).is_file() and SINGLE not in read:
        rule = f"is there as well, and {INDEX} names other files: one of both is an older model"
        fix = "move away what is not meant, the index with its files or this one"
        raise Refused(str(folder / SINGLE), None, rule, fix)
    for tensor, name in listed.items():
        if tensor not in read[name].tensors:
            rule = f"does not hold it, though {INDEX} says so"
            safetensors.refuse(folder / name, tensor, "absent", rule, "download both again")
    for name, file in read.items():
        for tensor in file.tensors:
            if listed.get(tensor) != name:
                rule = f"{INDEX} says {listed.get(tensor) or 'nothing of it'}"
                safetensors.refuse(folder / name, tensor, name, rule, "download both again")
    return Tensors(folder, {tensor: read[name] for tensor, name in listed.items()})
