"""How a benchmark ends: one line where something is wrong, and nothing left in the machine."""

import signal
import sys
from collections.abc import Callable

from benchmarks.box.hosts import Failed
from moe_jax.errors import Refused


def run(program: str, work: Callable[[], None]) -> int:
    """Does the work; returns the exit code: 0 done, 1 refused or a host failed, 130 interrupted.

    SIGTERM ends like an exit (143), so that what is open is closed.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        work()
    except (Refused, Failed) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0
