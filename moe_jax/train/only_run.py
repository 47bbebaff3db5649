"""One run in a work directory at a time.

Two would clear away each other's half-written steps and write one curve over the other: a double
start, a job that is started again while the old one still saves. The lock ends with its process,
on a network file system when the server gives up the process's host. Whoever comes meanwhile waits
for `WAIT` seconds. Where a file system knows no locks, or somebody else's lock file cannot be
opened, there is none, and a line says so.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Iterator

import jax

from moe_jax import mesh as mesh_lib
from moe_jax import metrics
from moe_jax.errors import Refused

NAME = ".lock"
WAIT = 120.0  # seconds: a run that was told to end may still be saving
_AGAIN = 1.0  # seconds until it is tried again


@contextlib.contextmanager
def only_run(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the work directory, made if missing; every process calls this.

    Raises:
      Refused: another run is in it, or it cannot be made; in all processes.
    """
    first = jax.process_index() == 0
    _made(workdir)
    handle, end, told = None, time.monotonic() + WAIT, False
    try:
        while True:
            free = True
            if first:
                handle, free = _lock(workdir / NAME)
            if not mesh_lib.in_any_process(not free):
                break
            # All processes wait in turns of a second: an exchange that takes long is given up.
            if mesh_lib.in_any_process(first and time.monotonic() >= end):
                fix = "wait for its end, stop it, or use another --workdir"
                raise Refused("--workdir", str(workdir), "another run is going on in it", fix)
            if not told:
                metrics.say(
                    f"{workdir}: another run is in it; waiting up to {WAIT:g} s for its end"
                )
                told = True
            time.sleep(_AGAIN)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _made(workdir: pathlib.Path) -> None:
    why = ""
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"could not be made ({error.strerror})"
    if mesh_lib.in_any_process(bool(why)):
        rule = why or "could not be made by process 0"
        raise Refused("--workdir", str(workdir), rule, "free space, or name another place")


def _lock(path: pathlib.Path) -> tuple[int | None, bool]:
    try:
        import fcntl
    except ImportError:  # not on this system
        return None, True
    handle = None
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        assert handle is not None
        os.close(handle)
        return None, False
    except OSError as error:
        metrics.fail(f"{path}: no lock ({error.strerror}): nothing keeps another run away")
    return handle, True
