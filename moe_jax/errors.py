"""The one error that users cause and users can mend, and how commands end.

Commands catch `Refused` at their entry point, print it on one line without a traceback and exit
with code 1, and so it is where the system refuses a file. Everything else is a bug and keeps its
traceback.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable

UNSAID = 3  # exit code of a command that did its work and could not say so


class Refused(ValueError):
    """Input that is refused before any work is done: field, value, rule and fix in one message.

    Attributes:
      field: the config field, file entry or flag, as the user wrote it (`model.top_k`).
      value: what it was.
      rule: what must hold, as a sentence without a full stop.
      fix: what to do about it, as a sentence without a full stop.
    """

    def __init__(self, field: str, value: object, rule: str, fix: str):
        self.field, self.value, self.rule, self.fix = field, value, rule, fix
        try:
            shown = repr(value)
        except RecursionError:
            shown = f"{type(value).__name__} too deep to be shown"
        if len(shown) > 200:
            shown = shown[:200] + "..."
        super().__init__(f"{plain(field)} = {shown}: {plain(rule)}. {fix}.")


def exit_code(command: Callable[[], str | None]) -> int:
    """Runs a command: 0, or, said on stderr, 1 where it or the system refuses, 130 at Ctrl-C.

    Text that it returns is its answer, and its work is done: see `say`. SIGTERM ends it as Ctrl-C
    does: what is half made is removed. 1 also where nobody reads stdout any more: what was still to
    be done is not.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        answer = command()
    except Refused as refused:
        print(f"refused: {refused}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        _print_nowhere()
        print("ended: nobody reads what is printed", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"refused: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0 if answer is None else say(answer)


def say(answer: str) -> int:
    """Prints an answer: 0; UNSAID where stdout takes no more, which stderr says.

    A reader that has gone (`| head`) has what it wanted: 0. What is left to print goes nowhere.
    """
    try:
        print(answer, flush=True)
        return 0
    except OSError as error:
        _print_nowhere()
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"done, but the answer is not printed: {error.strerror}", file=sys.stderr)
        return UNSAID


def _print_nowhere() -> None:
    """What stdout did not take is dropped: else Python tries again as it ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def plain(text: str) -> str:
    """One line of printable characters, not endless: names from files may stand in it."""
    text = text if len(text) <= 500 else text[:500] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
