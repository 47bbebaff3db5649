"""TensorBoard event files, written where they are asked for.

tensorboardX's own SummaryWriter hands events to a thread; when the disk is full that thread dies,
its queue fills, and training stands still for ever. Its records and its `EventsWriter` are used
here without that thread.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable

FLUSH_SECONDS = 30


class Board:
    """Scalars of one run; gives up with a word when they cannot be written."""

    def __init__(self, folder: pathlib.Path, first_step: int, warn: Callable[[str], None]):
        """Args: `first_step`: TensorBoard forgets what an earlier start said of it and later."""
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2

        self._folder, self._warn = folder, warn
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = event_file_writer.EventsWriter(str(folder / "events"))
        self._flushed = 0.0
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, step: int, values: dict[str, float]) -> None:
        """A point per value."""
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2

        for name, value in values.items():
            point = summary.scalar(name, value)
            self._add(event_pb2.Event(wall_time=time.time(), step=step, summary=point))

    def close(self) -> None:
        if self._writer:
            self._guarded(self._writer.close)

    def _add(self, event) -> None:
        if self._writer:
            self._guarded(lambda: self._writer.write_event(event))
        if self._writer and time.monotonic() > self._flushed + FLUSH_SECONDS:
            self._flushed = time.monotonic()
            self._guarded(self._writer.flush)

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            writer, self._writer = self._writer, None
            with contextlib.suppress(OSError):
                writer.close()
            self._warn(f"{self._folder}: {error}; nothing more is written there by this start")
