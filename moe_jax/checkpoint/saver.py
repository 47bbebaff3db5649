"""Writes steps of a run in the background, each whole or absent.

`start` returns as soon as the arrays may change; a thread waits for Orbax, and on the first process
adds the rest, the manifest last, and renames. Whatever kills the process in between leaves a
temporary folder and the steps that were there.

Several processes meet in `start` and in `wait` alone, on the main thread, where collectives have
their place: the thread uses none. What fails in one of them is refused by all.
"""

import contextlib
import logging
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from moe_jax import files
from moe_jax import mesh as mesh_lib
from moe_jax.checkpoint import contents as contents_lib
from moe_jax.checkpoint import integrity, late
from moe_jax.checkpoint.contents import Contents
from moe_jax.errors import Refused


class _Quiet(logging.Filter):
    """Drops what Orbax logs of a failed save, stack included: `Refused` says it in a line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


logging.getLogger("absl").addFilter(_Quiet())


class Saver:
    """One directory of steps, and at most one that is being written.

    Attributes:
      failed: the step that is being written could not be; `wait` will say why.
    """

    def __init__(
        self, directory: pathlib.Path, prune: Callable[[pathlib.Path], object] | None = None
    ):
        """Args: `directory`, made if missing; `prune`, called with it when a step was added."""
        self._directory, self._prune = directory.absolute(), prune
        self._final = self._directory
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def check(self) -> None:
        """Refuses a directory that cannot be written to; every process calls this."""
        with self._cleared(self._directory / ".0.tmp") as errors:
            if jax.process_index() == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self._directory):
                    pass
        self._agree(self._directory, errors)

    @property
    def failed(self) -> bool:
        return self._error is not None

    def start(
        self, step: int, arrays: Mapping[str, Any], finish: Callable[[pathlib.Path], None]
    ) -> None:
        """Begins to write `step`, after the one before is done; every process calls this.

        Args:
          step: its number, hence its folder's name.
          arrays: global arrays (or host arrays, in a single process), by name.
          finish: writes what else belongs into the folder that it is given.

        Raises:
          Refused: this step, or the one before, could not be written.
        """
        self.wait()
        final = self._directory / str(step)
        temporary = final.with_name(f".{step}.tmp")
        with self._cleared(temporary) as errors:
            if jax.process_index() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        self._agree(final, errors)
        checkpointer = _checkpointer()
        with self._cleared(temporary) as errors:
            checkpointer.save(temporary / "state", args=ocp.args.PyTreeSave(dict(arrays)))
        self._agree(final, errors)
        self._final = final
        self._thread = threading.Thread(
            target=self._write, args=(checkpointer, temporary, final, finish), name="saver"
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written; every process calls this. Raises `Refused`."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        self._agree(self._final, [error] if error else [])

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Waits; where another error is on its way, that one is more to the point."""
        if error is None:
            self.wait()
        elif self._thread:
            self._thread.join()

    def _write(
        self,
        checkpointer: ocp.AsyncCheckpointer,
        temporary: pathlib.Path,
        final: pathlib.Path,
        finish: Callable[[pathlib.Path], None],
    ) -> None:
        with self._cleared(temporary) as errors:
            checkpointer.wait_until_finished()
            checkpointer.close()
            if jax.process_index() == 0:
                finish(temporary)
                integrity.write(temporary)
                _replace(temporary, final)
        if not errors and self._prune and jax.process_index() == 0:
            try:
                self._prune(self._directory)
            except Exception as error:  # a reader on a network file system holds files, say
                print(f"{self._directory}: old steps stay ({error})", file=sys.stderr, flush=True)
        self._error = errors[0] if errors else None

    @contextlib.contextmanager
    def _cleared(self, temporary: pathlib.Path):
        """Keeps the error of its body in the list that it gives, and leaves no half step behind."""
        errors: list[Exception] = []
        try:
            yield errors
        except Exception as error:  # Orbax and tensorstore raise of every kind
            errors.append(error)
            if jax.process_index() == 0:
                _remove(temporary)

    def _agree(self, final: pathlib.Path, errors: list[Exception]) -> None:
        """Raises in every process if there is an error in any."""
        if not mesh_lib.in_any_process(bool(errors)):
            return
        why = " ".join(str(errors[0]).split())[-400:] if errors else "see the other processes"
        raise Refused(
            "checkpoint",
            str(final),
            f"could not be written: {why}",
            "make room or mend the place; the steps before are whole",
        ) from (errors[0] if errors else None)


def save(
    directory: str | os.PathLike, arrays: Mapping[str, jax.Array | np.ndarray], contents: Contents
) -> pathlib.Path:
    """Writes directory/STEP and returns when it is there; every process calls this.

    Args:
      directory: the run's `checkpoints` directory.
      arrays: global arrays (or host arrays, in a single process), by name.
      contents: what goes beside them; `contents.arrays` must describe `arrays`.

    Raises:
      Refused: it could not be written.
    """
    directory = pathlib.Path(directory).absolute()
    with Saver(directory) as saver:
        start_save(saver, arrays, contents)
    return directory / str(contents.step)


def start_save(
    saver: Saver, arrays: Mapping[str, jax.Array | np.ndarray], contents: Contents
) -> None:
    """`save` in the background: returns when the arrays may change."""
    saver.start(contents.step, arrays, lambda folder: contents_lib.write(folder, contents))


def _checkpointer() -> ocp.AsyncCheckpointer:
    """Orbax's, with each array written by those that hold its first replica.

    By default every replica writes a slice, for which a program is compiled for each shape: the
    first save of a small model on CPU devices then takes longer than a hundred of its steps.
    Nothing is compressed: trained float32 shrinks by a twelfth, and unpacking is half of what the
    processors do in a start.
    """
    late.silence()
    if jax.default_backend() == "tpu":
        return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False)),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    return ocp.AsyncCheckpointer(handler)


def _remove(temporary: pathlib.Path) -> None:
    """Removes a half step. Orbax's other writers go on after the first has failed: not one try."""
    for _ in range(100):
        shutil.rmtree(temporary, ignore_errors=True)
        time.sleep(0.05)
        if not temporary.exists():
            return


def _replace(temporary: pathlib.Path, final: pathlib.Path) -> None:
    """Gives a complete folder its name; one that has the name stays whole until then."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    temporary.rename(final)
    files.sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)
