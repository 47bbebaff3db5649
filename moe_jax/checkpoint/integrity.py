"""A folder of files whose manifest says what each of them must be.

`integrity.json` lists size and SHA-256 of every other file below the folder. It is written last,
so a folder without one was never finished; a file that is missing, changed, surplus or no plain
file is refused by name. The folder is untrusted: links are not followed, devices and pipes are not
opened, and nothing is read whole that is larger than it may be.
"""

import concurrent.futures
import json
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any

from moe_jax import files
from moe_jax.errors import Refused

MANIFEST = "integrity.json"
MAX_JSON_BYTES = 64 * 2**20  # of a manifest and the like, before it is read into memory
MAX_FILES = 1_000_000
HASHERS = 4  # threads: hashing releases the interpreter


def damaged(path: pathlib.Path, rule: str) -> Refused:
    """The refusal of one file of a checkpoint."""
    return Refused("checkpoint file", str(path), rule, "use another step, or restore the file")


def write(folder: pathlib.Path) -> None:
    """Writes the manifest of what lies in `folder` now."""
    manifest = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in _hashed(_listed(folder))
    }
    with files.atomic_write(folder / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)


def check(folder: pathlib.Path) -> None:
    """Every file listed, none more, each with its size and digest. Raises `Refused` by name."""
    listed = _read_manifest(folder)
    present = {path.relative_to(folder).as_posix(): path for path in _listed(folder)}
    for name in sorted(listed.keys() ^ present.keys()):
        verb = "is missing" if name in listed else "does not belong there"
        raise damaged(folder / name, verb)
    for name, path in present.items():
        if path.stat().st_size != listed[name][0]:
            raise damaged(path, f"must be a file of {listed[name][0]} bytes")
    for path, digest in _hashed(list(present.values())):
        if digest != listed[path.relative_to(folder).as_posix()][1]:
            raise damaged(path, f"has another SHA-256 than {MANIFEST} says")


def _listed(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in plain_files(folder) if path != folder / MANIFEST)


def _read_manifest(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
    try:
        manifest = read_json(folder / MANIFEST)
        return {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except (KeyError, TypeError, AttributeError) as error:
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
    """Every file below `folder`. Raises `Refused` at a link, a device, or one file too many."""
    if folder.is_symlink():
        raise damaged(folder, "is a link: a step must lie where it is named")
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
