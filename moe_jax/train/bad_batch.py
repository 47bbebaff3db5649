"""The batch of a step that changed nothing, as a file: bad_steps/STEP.npz in a work directory."""

import dataclasses
import math
import pathlib

import numpy as np

from moe_jax import files
from moe_jax.errors import Refused
from moe_jax.routing import npz

MOST = 100  # files of one run


@dataclasses.dataclass(frozen=True)
class BadBatch:
    """What a bad step computed with, and what came of it.

    Attributes:
      step: its number.
      window_BS1: int32, its tokens.
      loss, grad_norm: float32 values as floats.
      loss_limit: a loss above it is a spike.
    """

    step: int
    window_BS1: np.ndarray
    loss: float
    grad_norm: float
    loss_limit: float

    def why(self) -> str:
        """In words."""
        if math.isfinite(self.loss) and math.isfinite(self.grad_norm):
            if self.loss > self.loss_limit:
                return f"loss {self.loss:.4f} is a spike, above {self.loss_limit:.4f}"
            return "an auxiliary loss is not finite"
        return f"loss {self.loss:.4f}, grad norm {self.grad_norm:.4f}"

    def write(self, workdir: pathlib.Path) -> pathlib.Path | None:
        """The file; None if there are too many, or it could not be written."""
        folder = workdir / "bad_steps"
        path = folder / f"{self.step}.npz"
        if folder.is_dir() and len(list(folder.iterdir())) >= MOST and not path.exists():
            return None
        try:
            with files.atomic_write(path) as file:
                np.savez(file, **dataclasses.asdict(self))
        except OSError:
            return None
        return path

    @classmethod
    def read(cls, path: pathlib.Path, shape: tuple[int, int], vocab_size: int) -> "BadBatch":
        """Reads and checks a file for a run with batches of this shape. Raises `Refused`."""

        def refused(rule: str) -> Refused:
            return Refused("--replay", str(path), rule, "give a file of bad_steps/ of this run")

        names = tuple(field.name for field in dataclasses.fields(cls))
        try:
            arrays = npz.read_npz(path, names)
            window_BS1 = arrays.pop("window_BS1")
            step, loss, norm, limit = (arrays[name].item() for name in names if name in arrays)
            numbers = int(step), float(loss), float(norm), float(limit)
        except Refused as error:  # the reader speaks of traces
            raise refused(f"is not a bad step ({error.rule})") from None
        except npz.BROKEN as error:
            raise refused(f"is not a bad step ({type(error).__name__}: {error})") from None
        if window_BS1.shape != shape or window_BS1.dtype != np.int32:
            found = f"{window_BS1.dtype}{list(window_BS1.shape)}"
            raise refused(f"must hold a batch int32{list(shape)}, not {found}")
        if window_BS1.min() < 0 or window_BS1.max() >= vocab_size or numbers[0] < 1:
            raise refused(f"must hold tokens in [0, {vocab_size}) and a step from 1")
        return cls(numbers[0], window_BS1, *numbers[1:])
