"""Several processes as one server: the first has the requests and says what all of them run.

A message is the name of an operation (runner.py) and the arrays that it takes. It is broadcast over
the devices, so it needs nothing that the model does not need already: no port, no secret, no order
of its own. Its first word is its length, and every broadcast has the same size, so that one program
is compiled for all of them.

While it serves, nobody waits for long in a broadcast: where nothing is to be run the first process
sends a beat, so that a process that is gone is noticed, and one that was asked to end is heard.
"""

import io

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax import mesh as mesh_lib

BEAT_SECONDS = 1.0
BEAT, END = "beat", "end"  # messages that are no operations


class Broadcast:
    """From the first process of a server to the others; every one of them makes this."""

    def __init__(self, num_words: int):
        """Args: int32 `num_words` of a broadcast, the same in every process."""
        self._asked = False
        self._num_words = num_words

    @property
    def is_alone(self) -> bool:
        return jax.process_count() == 1

    # --- the first process ----------------------------------------------------------------

    def tell(self, name: str, *arrays: np.ndarray | int | bool) -> None:
        """From the first process: it does this now, and so do the others. In any other process,
        which does the same things because it heard of them, and where there is one: nothing."""
        if self.is_alone or jax.process_index():
            return
        message = io.BytesIO()
        for array in (name, len(arrays), *arrays):
            np.save(message, np.asarray(array), allow_pickle=False)
        data = message.getvalue()
        words = np.zeros(1 + (len(data) + 3) // 4, np.int32)
        words[0] = len(data)
        words[1:].view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
        for first in range(0, len(words), self._num_words):
            self._send(words[first : first + self._num_words])

    def beat(self) -> bool:
        """Whether one of the others was asked to end. The first calls this every `BEAT_SECONDS`."""
        self.tell(BEAT)
        return mesh_lib.in_any_process(False)

    # --- the others -----------------------------------------------------------------------

    def hear(self) -> tuple[str, list[np.ndarray]]:
        """The next message but beats: its name and its arrays."""
        while True:
            words = self._send(np.zeros(0, np.int32))
            size, data = int(words[0]), words[1:].tobytes()
            while len(data) < size:
                data += self._send(np.zeros(0, np.int32)).tobytes()
            message = io.BytesIO(data)
            name, count = (np.load(message, allow_pickle=False) for _ in range(2))
            arrays = [np.load(message, allow_pickle=False) for _ in range(int(count))]
            if str(name) != BEAT:
                return str(name), arrays
            mesh_lib.in_any_process(self._asked)

    def ask(self) -> None:
        """This process was asked to end: the first one hears of it at its next beat."""
        self._asked = True

    def _send(self, words: np.ndarray) -> np.ndarray:
        """What the first process gives, filled up; what the others give does not matter."""
        padded = np.pad(words, (0, self._num_words - len(words)))
        return np.asarray(multihost_utils.broadcast_one_to_all(padded))
