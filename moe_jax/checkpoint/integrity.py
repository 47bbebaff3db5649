"""A folder of files whose manifest says what each of them must be.

`integrity.json` lists size and SHA-256 of every other file below the folder. It is written last,
so a folder without one was never finished; a file that is missing, changed, surplus or no plain
file is refused by name. The folder is untrusted: links are not followed, devices and pipes are not
opened, and nothing is read whole that is larger than it may be.

Names, sizes and small files are checked before anything is made of what they say; the digests of
the others are computed while they are being read (`Digests`).
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import queue
import stat
import threading
from collections.abc import Iterator
from typing import Any, TypeAlias

from moe_jax import files
from moe_jax.errors import Refused

MANIFEST = "integrity.json"
MAX_JSON_BYTES = 64 * 2**20  # of a manifest and the like, before it is read into memory
MAX_FILES = 1_000_000
SMALL_BYTES = 2**16  # files up to here are verified before others are read
HASHERS = 4  # threads: hashing releases the interpreter
_Waiting: TypeAlias = "queue.SimpleQueue[tuple[concurrent.futures.Future[bool], pathlib.Path, str]]"


class Damaged(Refused):
    """A file of a checkpoint is not what was saved."""


def damaged(path: pathlib.Path, rule: str) -> Damaged:
    """The refusal of one file of a checkpoint."""
    return Damaged("checkpoint file", str(path), rule, "use another step, or restore the file")


def write(folder: pathlib.Path) -> None:
    """Writes the manifest of what lies in `folder` now."""
    manifest = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in _hashed(_listed(folder))
    }
    with files.atomic_write(folder / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)


def check(folder: pathlib.Path) -> None:
    """Every file listed, none more, each with its size and digest. Raises `Damaged` by name."""
    check_listed(folder)
    Digests(folder).check()


def check_listed(folder: pathlib.Path, *, digests: bool = True) -> None:
    """Every file listed, none more, each with its size; and the digests of the small ones.

    Raises:
      Damaged: the first that is not.
    """
    listed = _read_manifest(folder)
    present = {path.relative_to(folder).as_posix(): path for path in _listed(folder)}
    for name in sorted(listed.keys() ^ present.keys()):
        verb = "is missing" if name in listed else "does not belong there"
        raise damaged(folder / name, verb)
    for name, path in present.items():
        if _size(path) != listed[name][0]:
            raise damaged(path, f"must be a file of {listed[name][0]} bytes")
    small = {name: digest for name, (size, digest) in listed.items() if size <= SMALL_BYTES}
    with concurrent.futures.ThreadPoolExecutor(HASHERS) as pool:
        equal = pool.map(lambda name: _has(folder / name, small[name]), small if digests else ())
        for name, same in zip(small, equal, strict=digests):
            if not same:
                raise _other_digest(folder / name)


class Digests:
    """The digests of the large files of a folder, computed in threads from now on.

    Several processes take a share each: all number the files alike, as the manifest lists them. The
    threads keep no process alive: who is refused for another reason does not wait for them.

    Attributes:
      folder: as `check_listed` found it.
      share: which one, of how many.
    """

    def __init__(
        self, folder: pathlib.Path, share: tuple[int, int] = (0, 1), threads: int = HASHERS
    ):
        """Args: as the attributes; `threads`: that hash, at most."""
        self.folder, self.share = folder, share
        self._large = [
            (name, digest)
            for name, (size, digest) in sorted(_read_manifest(folder).items())
            if size > SMALL_BYTES
        ]
        index, count = share
        self._equal: dict[int, concurrent.futures.Future[bool]] = {}
        waiting: _Waiting = queue.SimpleQueue()
        for number, (name, digest) in list(enumerate(self._large))[index::count]:
            self._equal[number] = concurrent.futures.Future()
            waiting.put((self._equal[number], folder / name, digest))
        for _ in range(min(threads, len(self._equal))):
            threading.Thread(target=_compare, args=(waiting,), daemon=True).start()

    def first_wrong(self) -> int | None:
        """Number of a file of this share that is not what the manifest says, when all are known."""
        wrong = [number for number, equal in self._equal.items() if not equal.result()]
        return min(wrong, default=None)

    def refusal(self, number: int) -> Damaged:
        """Of the file of this number, whosever share it is in."""
        return _other_digest(self.folder / self._large[number][0])

    def check(self) -> None:
        """Raises `Damaged` if there is one."""
        if (number := self.first_wrong()) is not None:
            raise self.refusal(number)


def digests(
    folder: pathlib.Path, share: tuple[int, int] = (0, 1), *, begun: Digests | None
) -> Digests:
    """Those that have begun, if they are of this folder and share; else new ones.

    Args:
      folder, share: as of `Digests`.
      begun: digests of this or of another step; None: none have begun.
    """
    same = begun is not None and (begun.folder, begun.share) == (folder, share)
    return begun if begun and same else Digests(folder, share)


def _compare(waiting: _Waiting) -> None:
    """Answers what waits, until nothing does."""
    with contextlib.suppress(queue.Empty):
        while True:
            equal, path, digest = waiting.get_nowait()
            try:
                equal.set_result(_has(path, digest))
            except BaseException as error:  # else somebody would wait for ever
                equal.set_exception(error)


def _has(path: pathlib.Path, digest: str) -> bool:
    try:
        return files.sha256_file(path) == digest
    except OSError:
        return False


def _other_digest(path: pathlib.Path) -> Damaged:
    return damaged(path, f"has another SHA-256 than {MANIFEST} says, or cannot be read")


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: pathlib.Path, error: OSError) -> Damaged:
    return damaged(path, f"cannot be read ({error.strerror})")


def _listed(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in plain_files(folder) if path != folder / MANIFEST)


def _read_manifest(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
    try:
        manifest = read_json(folder / MANIFEST)
        return {name: (int(entry["size"]), entry["sha256"]) for name, entry in manifest.items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, Refused):
            raise
        raise damaged(folder / MANIFEST, f"is not a manifest ({error!r})") from None


def read_json(path: pathlib.Path) -> Any:
    """The JSON value in a plain file of bounded size."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise damaged(path, "must be a plain file")
        if found.st_size > MAX_JSON_BYTES:
            raise damaged(path, f"must have at most {MAX_JSON_BYTES} bytes, not {found.st_size}")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, Refused):
            raise
        raise damaged(path, f"is missing or unreadable ({error})") from None


def plain_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Every file below `folder`. Raises `Damaged` at what is no plain file or cannot be read."""
    if folder.is_symlink():
        raise damaged(folder, "is a link: a step must lie where it is named")
    try:
        yield from _below(folder)
    except OSError as error:
        raise _unreadable(pathlib.Path(error.filename or folder), error) from None


def _below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    waiting, count = [folder], 0
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                path, count = pathlib.Path(entry.path), count + 1
                if count > MAX_FILES:
                    raise damaged(folder, f"holds more than {MAX_FILES} files")
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                elif entry.is_file(follow_symlinks=False):
                    yield path
                else:
                    raise damaged(path, "must be a plain file: links are not followed")


def _hashed(paths: list[pathlib.Path]) -> Iterator[tuple[pathlib.Path, str]]:
    with concurrent.futures.ThreadPoolExecutor(HASHERS) as pool:
        yield from zip(paths, pool.map(files.sha256_file, paths), strict=True)
