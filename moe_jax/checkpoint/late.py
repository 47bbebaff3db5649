"""Reads and writes that had begun when another failed: what they say afterwards is dropped.

Orbax awaits them in an event loop that it closes at the first failure. tensorstore's threads then
find it closed, and what awaited them is thrown away; Python prints a traceback for each of both,
pages of them, after the line that says what is wrong.
"""

import asyncio.base_events
import os
import sys
import types
from typing import Any

_ORBAX = f"{os.sep}orbax{os.sep}checkpoint{os.sep}"


class _Hook:
    def __init__(self, before: Any):
        self._before = before

    def __call__(self, unraisable: Any) -> None:
        if not _is_late(unraisable):
            self._before(unraisable)


def silence() -> None:
    """From now on, in this process. Everything else that nobody can catch is printed as before."""
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


def _is_late(unraisable: Any) -> bool:
    if isinstance(unraisable.object, types.CoroutineType):
        return _ORBAX in unraisable.object.cr_code.co_filename
    trace = unraisable.exc_traceback
    if unraisable.exc_type is not RuntimeError or trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    closed = str(unraisable.exc_value) == "Event loop is closed"
    return closed and trace.tb_frame.f_code.co_filename == asyncio.base_events.__file__
