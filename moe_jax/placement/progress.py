"""Progress of a solve on stderr: a line every few seconds, whatever the solver is busy with."""

import sys
import threading
import time

from moe_jax.placement.solution import Progress

TICK = 5.0  # seconds between lines


class Ticker:
    """Says on stderr, every few seconds, where a running solve stands."""

    def __init__(self):
        self._last: Progress | None = None
        self._told_at = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def tell(self, progress: Progress) -> None:
        self._last, self._told_at = progress, time.monotonic()

    def __enter__(self) -> "Ticker":
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(TICK):
            if (p := self._last) is not None:
                spent = p.seconds + time.monotonic() - self._told_at
                print(
                    f"[{spent:5.0f} s] {p.stage}: objective {p.objective:.6g}, bound "
                    f"{p.bound:.6g}, gap {100 * p.gap:.1f} %, at most "
                    f"{max(p.time_limit - spent, 0):.0f} s to go",
                    file=sys.stderr,
                    flush=True,
                )
