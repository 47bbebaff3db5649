"""Notices a run that stands still, and writes down where.

A step that never ends (a collective that one process never entered, a file system that does not
answer) says nothing by itself. After so many seconds without a finished step, the stacks of all
threads, the last metrics and the memory of the devices go to stderr and to hang.txt in the work
directory (hang.N.txt of process N); the run may then end, for whoever started it to start it again.

A save has ten times as long: a run whose saves take longer than a step may would be ended at every
start, and one whose file system never answers would stand for ever.
"""

import contextlib
import io
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import TracebackType

import jax

EXIT_CODE = 75  # "temporary failure" of <sysexits.h>
FIRST_STEP = 10  # times as long may pass before the first beat: the step is compiled
SAVE = 10  # times as long may a save take


class Watchdog:
    """Watches over the body of a `with`; `beat` says that it moves."""

    def __init__(self, seconds: float, workdir: pathlib.Path, *, exit_after: bool = False):
        """Args: `seconds` without a beat until it speaks, 0 = never; `exit_after` that."""
        process = jax.process_index()
        name = f"hang.{process}.txt" if process else "hang.txt"
        self._seconds, self._path, self._exit = seconds, workdir / name, exit_after
        self._told = "nothing yet"
        self._wait(FIRST_STEP * seconds, "step")
        self._spoken = False
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, told: str) -> None:
        """The run moves; `told` is the last thing that it said of itself."""
        if self._spoken:
            print(f"it goes on: {told}", file=sys.stderr, flush=True)
        self._told, self._spoken = told, False
        self._wait(self._seconds, "step")

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """The body may take `SAVE` times as long as a step."""
        self.waits_for_saves()
        try:
            yield
        finally:
            self._wait(self._seconds, "step")

    def waits_for_saves(self) -> None:
        """From now on: what is being written may take `SAVE` times as long as a step."""
        self._wait(SAVE * self._seconds, "save")

    def _wait(self, seconds: float, what: str) -> None:
        self._limit, self._what = seconds, what
        self._deadline = time.monotonic() + seconds

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() > self._deadline and not self._spoken:
                self._spoken = True
                self._speak()
                if self._exit:
                    os._exit(EXIT_CODE)

    def _speak(self) -> None:
        text = io.StringIO()
        print(f"no {self._what} has ended for {self._limit:g} s. Last: {self._told}", file=text)
        print(_stacks(), file=text)
        print(text.getvalue(), file=sys.stderr, flush=True)
        # Last, and apart: a runtime that hangs may not answer this either.
        for device in jax.local_devices():
            print(f"{device}: {device.memory_stats() or 'no figures'}", file=text)
        try:
            self._path.write_text(text.getvalue(), encoding="utf-8")
        except OSError as error:
            print(f"{self._path}: {error}", file=sys.stderr, flush=True)


def _stacks() -> str:
    """The Python stacks of all threads, by name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    )
