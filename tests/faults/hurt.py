"""train.py with something in it that tests need: python tests/faults/hurt.py KIND ARGUMENT...

`stands`: the ninth batch never comes. `moves`: every plan made on the way is another one, and is
taken as worth its move.
"""

import pathlib
import runpy
import sys
import threading
from typing import Any

import grain

from moe_jax import data, replan
from moe_jax.placement.plan import Plan
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAST = 8  # batches that come


class Stands(grain.DatasetIterator):
    """Batches, then nothing."""

    def __init__(self, batches: grain.DatasetIterator):
        super().__init__()
        self._batches, self._left = batches, LAST

    def __next__(self) -> Any:
        if not self._left:
            threading.Event().wait()
        self._left -= 1
        return next(self._batches)

    def get_state(self) -> Any:
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state)


def stands() -> None:
    """The data stops."""
    batches = data.batches
    data.batches = lambda *args: Stands(batches(*args))


def moves() -> None:
    """Plans are drawn, and not waited for."""
    decide, start = replan.decide, replan.Background.start

    def adopted(
        setting: Any, before: Any, recorded: Any, seed: int = 0, progress: Any = None
    ) -> Any:
        found = decide(setting, before, recorded, seed, progress)
        other = tiny.random_placement(
            seed, before.num_devices, layers=before.num_layers, experts=before.num_experts
        )
        return replan.Decision(**{**vars(found), "adopt": True, "plan": Plan(other)})

    def waited(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self._thread.join()

    replan.decide = adopted
    replan.Background.start = waited


if __name__ == "__main__":
    {"stands": stands, "moves": moves}[sys.argv[1]]()
    sys.argv = [str(ROOT / "train.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
