"""Ctrl-C: the first one ends the work in order, the second one ends the process at once.

Python raises KeyboardInterrupt only between two of its own instructions, so a program inside a
solver's own code does not notice Ctrl-C until that code returns, which may take seconds. `Watch`
listens beside it: it answers the first one in words and, should the second one find the program
still busy GRACE seconds later, ends the process itself. Files are whole or absent even then
(files.py), but a temporary file may be left.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

from moe_jax.placement import start

EXIT_CODE = start.EXIT_CODE
GRACE = 0.5  # seconds that Python itself gets to end after the second Ctrl-C
ONCE_MORE = "stopping; Ctrl-C once more ends at once"


class Stopped(KeyboardInterrupt):
    """Ctrl-C that left something behind.

    Attributes:
      left: what, for stderr.
      answer: for stdout; empty: nothing.
    """

    def __init__(self, left: str, answer: str = ""):
        super().__init__(left)
        self.left, self.answer = left, answer


@contextlib.contextmanager
def leaving(left: str) -> Iterator[None]:
    """Ctrl-C within says what is left behind; "": nothing is."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not left:
            raise
        raise Stopped(left) from stop


class Watch:
    """Counts Ctrl-C, whatever the main thread is busy with; see the head of this file."""

    def __enter__(self) -> "Watch":
        self._done = threading.Event()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before: int | None = None
        # elsewhere Ctrl-C does not arrive, or is not Python's
        if threading.current_thread() is threading.main_thread():
            self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        if self._before is not None:
            signal.set_wakeup_fd(self._before)
        self._writer.close()  # ends the thread
        self._thread.join()
        self._reader.close()

    def _run(self) -> None:
        times = 0
        while numbers := self._reader.recv(64):
            new = numbers.count(int(signal.SIGINT))
            times += new
            if new and times == new:
                print(ONCE_MORE, file=sys.stderr, flush=True)
            if times >= 2 and not self._done.wait(GRACE):
                print("interrupted: ended at once", file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)
