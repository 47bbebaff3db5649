"""SIGTERM, which clusters send before they take a machine away, and what all processes know of it.

The first one asks the run to save where it is and end; the second ends the process at once.

Python runs a signal's handler between two instructions of the main thread, which may stand in a
collective for long. So a thread reads what the interpreter writes to a socket the moment a signal
arrives (`signal.set_wakeup_fd`).

Processes have to save the same step, and often only one of them is told. Each step they exchange
what each has noticed, and look at the answer a step later, when it has arrived by itself.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

EXIT_CODE = 128 + signal.SIGTERM  # of the second signal, as shells count


class Notice:
    """Whether SIGTERM came while this context was open. Outside the main thread: never.

    Attributes:
      given: it did.
    """

    def __init__(self) -> None:
        self.given = False
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> "Notice":
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        # A handler of Python's must be there for the number to be written; it has nothing to do.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=(reader,), name="SIGTERM", daemon=True)
        thread.start()

        def restore() -> None:
            signal.set_wakeup_fd(fd)
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
            writer.close()  # the thread reads the end
            thread.join()
            reader.close()

        self._restore.callback(restore)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._restore.close()

    def _listen(self, reader: socket.socket) -> None:
        while number := reader.recv(1):
            if number[0] != signal.SIGTERM:
                continue
            if self.given:
                os._exit(EXIT_CODE)
            self.given = True
            print(
                "SIGTERM: saving, then ending; again: ending at once", file=sys.stderr, flush=True
            )


class Agreement:
    """What any process has noticed, known to all of them at the same step.

    One process knows at once. Several exchange a few bytes in each call and read the answer in the
    next, so that nobody waits: what is noticed in one step is agreed in the one after the next.
    """

    def __init__(self, mesh: Mesh, names: tuple[str, ...]):
        """Args: `names` of what may be noticed, as for the calls."""
        self._mesh, self._names = mesh, names
        self._arriving: jax.Array | None = None
        whole = NamedSharding(mesh, PartitionSpec())
        self._any = jax.jit(lambda flag_MN: jnp.max(flag_MN, axis=0), out_shardings=whole)

    def __call__(self, **noticed: bool) -> dict[str, bool]:
        """Every process calls this once a step with what it has noticed, by name."""
        assert tuple(noticed) == self._names
        if jax.process_count() == 1:
            return noticed
        arrived, self._arriving = self._arriving, self._any(self._flags(list(noticed.values())))
        if arrived is None:
            return dict.fromkeys(self._names, False)
        flags = np.asarray(arrived.addressable_data(0)).tolist()
        return dict(zip(self._names, map(bool, flags), strict=True))

    def _flags(self, noticed: list[bool]) -> Any:
        """int32 [devices, names], a row for every device, filled by its own process."""
        shape = (self._mesh.size, len(noticed))
        split = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))

        def rows(index: Any) -> np.ndarray:
            return np.broadcast_to(
                np.asarray(noticed, np.int32), (len(range(shape[0])[index[0]]), shape[1])
            )

        return jax.make_array_from_callback(shape, split, rows)
