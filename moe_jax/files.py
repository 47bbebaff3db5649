"""Files that are whole or absent: write to a temporary name in the same folder, then rename."""

import contextlib
import errno
import hashlib
import os
import pathlib
import stat
import tempfile
from collections.abc import Iterator
from typing import IO


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Opens a temporary file beside `path`; on success it takes the name, on error it is removed.

    Args:
      path: the final name, see `check_regular`; missing parent folders are made.
      mode: "wb" or "w" (UTF-8, "\\n" line ends).
    """
    path = pathlib.Path(path)
    check_regular(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def check_regular(path: str | os.PathLike) -> None:
    """Raises OSError where something else than a regular file, or a link to one, has the name.

    A rename would put a file in the place of a device. A link that has the name is replaced, not
    followed: one in a work directory that comes from elsewhere would say which file of this machine
    is written. Folders that are links are followed.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "is no regular file", os.fspath(path))


def sync_folder(path: str | os.PathLike) -> None:
    """Makes renames in a folder last through a loss of power, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_file(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as file:
        # The interpreter is let go for each piece: few of them, where other threads want it too.
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()
