"""Large pages for large buffers: a program starts itself again with glibc told to ask for them.

The CPU backend allocates what a step computes in, and frees it, in every step; from 64 MiB on glibc
takes it from the system and gives it back each time (in threads, whatever `mallopt` says), and the
system clears and maps it again, 4 KiB at a time unless it is asked for more. glibc (2.35 and later)
asks if GLIBC_TUNABLES says so when a process begins, hence the second start; results are the same.
"""

import contextlib
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

_MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_NAME, _VALUE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
_AGAIN = "MOE_JAX_STARTED_AGAIN"  # glibc takes its own variable from programs with privileges


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to a process's environment: nothing where it would change nothing.

    Linux gives large pages always, never, or to who asks ("madvise"); only the last is for us.
    Whoever has set GLIBC_TUNABLES, to `glibc.malloc.hugetlb=0` for instance, is left alone.
    """
    try:
        on_demand = "[madvise]" in _MODE.read_text("ascii")
    except (OSError, ValueError):
        on_demand = False
    return {_NAME: _VALUE} if on_demand and _NAME not in environment else {}


def start_again() -> None:
    """Replaces this process by the same command with `variables`, if there are any.

    To be called before anything is done that a second start would repeat. Nothing happens under a
    debugger, which would lose its program, and where the process began as something else (a test,
    a coverage tool, a program from a pipe).
    """
    added = variables(os.environ)
    own = _began_as_this(sys.orig_argv, sys.argv) and not _debugged()
    if added and own and _AGAIN not in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            command = [sys.executable, *sys.orig_argv[1:]]
            os.execve(sys.executable, command, {**os.environ, **added, _AGAIN: "1"})


def _debugged() -> bool:
    monitoring = getattr(sys, "monitoring", None)  # Python 3.12 and later
    watched = monitoring and monitoring.get_tool(monitoring.DEBUGGER_ID)
    return bool(watched) or sys.gettrace() is not None


def _began_as_this(command: Sequence[str], arguments: Sequence[str]) -> bool:
    """Whether an interpreter's command line, its options apart, is the program of `sys.argv`."""
    words = list(command[1:])
    while words and words[0].startswith("-") and words[0] not in ("-", "-m", "-c"):
        del words[: 2 if words[0] in ("-X", "-W") else 1]
    program, file = list(arguments), pathlib.Path(arguments[0])
    if words[:1] == ["-m"] and len(words) > 1:
        place = file.with_suffix("").as_posix().removesuffix("/__main__")
        return words[2:] == program[1:] and place.endswith(f"/{words[1].replace('.', '/')}")
    return words == program and file.is_file()
