"""The first second of the command line, in which Python imports NumPy and SciPy.

Ctrl-C there would end in a traceback of whatever is being imported. `guard` ends the process with
one line instead, and `ready` hands Ctrl-C back to Python once the program can answer it. Nothing
heavy is imported here.
"""

import os
import signal

EXIT_CODE = 130


def main() -> int:
    """What `moe-place` runs."""
    guard()
    from moe_jax.placement import __main__ as command_line

    return command_line.main()


def guard() -> None:
    """From now on Ctrl-C ends the process; where it is ignored (background jobs), it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def ready() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, if `guard` had taken it."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_) -> None:
    os.write(2, b"interrupted: nothing written\n")
    os._exit(EXIT_CODE)
