"""Deadlines of a search, and whether one of them has cut something.

A plan is the same on any machine as long as no deadline ended, shortened or left out a part of what
it came from. So whatever a plan depends on asks here whether its time is over, and an answer that
stops it is remembered: for the solve that watches, and for those that this one is a part of. A part
may have a share of the time only, so the end of the whole says nothing.

Ask before a piece of work, not after the last one: who is late with nothing left to do was not cut.
Code of which a bound alone depends, or what is told of a search, reads time.monotonic() by itself.
"""

import contextlib
import contextvars
import dataclasses
import time
from collections.abc import Iterator

from scipy import optimize

TIME_LIMIT = 1  # status of a program that HiGHS did not end by itself


@dataclasses.dataclass(eq=False)
class Watch:
    """What is remembered of a part of a search.

    Attributes:
      cut: time has ended, shortened or left out some of it.
    """

    cut: bool = False


_watch: contextvars.ContextVar[Watch | None] = contextvars.ContextVar("watch", default=None)


def late(deadline: float) -> bool:
    """The time is over, for work that would be done now; `deadline` is of time.monotonic()."""
    over = time.monotonic() >= deadline
    if over:
        cut()
    return over


def left(deadline: float) -> float:
    """Seconds for work that is left out if there are none; at least 0."""
    seconds = max(deadline - time.monotonic(), 0.0)
    if not seconds:
        cut()
    return seconds


def share(deadline: float, part: float) -> float:
    """The deadline of a part of the time that is left; in the past where nothing is."""
    now = time.monotonic()
    return now + part * (deadline - now)


def cut() -> None:
    """Remembers that something was ended, shortened or left out for lack of time."""
    if (watch := _watch.get()) is not None:
        watch.cut = True


def checked(program: optimize.OptimizeResult) -> optimize.OptimizeResult:
    """What HiGHS returned; remembers it if its time limit ended it."""
    if program.status == TIME_LIMIT:
        cut()
    return program


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    """Everything inside is watched; a cut counts for those who watch this, too."""
    watch = Watch()
    try:
        with _watching(watch):
            yield watch
    finally:
        if watch.cut:
            cut()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Cuts inside count for nobody: for what may turn out not to be needed."""
    with _watching(Watch()):
        yield


@contextlib.contextmanager
def _watching(watch: Watch) -> Iterator[None]:
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
