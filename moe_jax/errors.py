"""The one error that users cause and users can mend.

Commands catch `Refused` at their entry point, print it on one line without a traceback and exit
with code 1. Everything else is a bug and keeps its traceback.
"""

import sys
from collections.abc import Callable


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


def exit_code(command: Callable[[], object]) -> int:
    """Runs a command: 0, or 1 where it refuses, which it says on stderr."""
    try:
        command()
    except Refused as refused:
        print(f"refused: {refused}", file=sys.stderr)
        return 1
    return 0


def plain(text: str) -> str:
    """One line of printable characters, not endless: names from files may stand in it."""
    text = text if len(text) <= 500 else text[:500] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
