"""One run in a work directory at a time.

Two would clear away each other's half-written steps and write one curve over the other: a double
start, a job that is started again while the old one still saves. The lock ends with its process,
however that ends. Where a file system knows no locks, there is none.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.errors import Refused

NAME = ".lock"


@contextlib.contextmanager
def only_run(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the work directory; every process calls this. Raises `Refused` in all of them."""
    handle, taken = None, False
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        handle, taken = _lock(workdir / NAME)
    try:
        if _in_any_process(taken):
            raise Refused(
                "--workdir",
                str(workdir),
                "another run is going on in it",
                "wait for its end, stop it, or use another --workdir",
            )
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(path: pathlib.Path) -> tuple[int | None, bool]:
    """(what holds the lock until it is closed, whether another process does)."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return None, False
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:  # the first save will say what is wrong
        return None, False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None, True
    except OSError:  # no locks here
        pass
    return handle, False


def _in_any_process(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())
