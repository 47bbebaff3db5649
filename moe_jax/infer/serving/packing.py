"""What the host tells a step, as one int32 array: one transfer instead of a dozen.

The array is [shards, words]; each shard reads its own row. Floats lie in it by their bits.

F tokens of a shard: first one for each seat (that of a request past its prompt), then those of the
chunk rows. Axes: R seats, P chunk rows, S tokens of a chunk, W blocks in a table.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from moe_jax.infer.serving.scheduler import Limits

FLOATS = ("temperature", "top_p")
TOP = 20  # most likely tokens that a step reports for each token that it makes


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each field lies.

    Attributes:
      limits: sizes of the engine.
      width: W.
      with_chunks: whether a step has chunk rows at all.
    """

    limits: Limits
    width: int
    with_chunks: bool

    @property
    def chunk_rows(self) -> int:
        return self.limits.chunk_rows if self.with_chunks else 0

    @property
    def num_tokens(self) -> int:
        """F."""
        return self.limits.seats + self.chunk_rows * self.limits.chunk

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The fields, of one shard, in order.

        token_F, position_F: -1 as a position: there is no token.
        record_F: where in the recorder's buffer its experts go; -1 = nowhere.
        table_RW: blocks of the request on each seat; 0 where there is none.
        seat_P: of the request in each chunk row.
        sample_R: the token (0..F-1) whose logits give the next token of each seat; -1 = none.
        draw_R: position of that next token; choice_R: number of the answer to one prompt.
        logprobs_R: how many of the most likely tokens are wanted; -1 = not even the chosen one's.
        """
        seats, tokens = (self.limits.seats,), (self.num_tokens,)
        return {
            "token": tokens,
            "position": tokens,
            "record": tokens,
            "table": (self.limits.seats, self.width),
            "seat": (self.chunk_rows,),
            **dict.fromkeys(("sample", "draw", "choice", "seed", "top_k", "logprobs"), seats),
            **dict.fromkeys(FLOATS, seats),
        }

    @property
    def num_words(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes().values())

    def empty(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The array of a step in which nobody runs, and views of its fields [shards, ...]."""
        packed = np.zeros((self.limits.shards, self.num_words), np.int32)
        views = self.unpack(packed)
        for name in FLOATS:
            views[name] = views[name].view(np.float32)
        for name in ("position", "record", "sample", "logprobs"):
            views[name][...] = -1
        views["top_p"][...] = 1
        return packed, views

    def unpack(self, packed: Any) -> dict[str, Any]:
        """The fields [shards, ...] of a NumPy or JAX array; floats still as their bits."""
        fields, start = {}, 0
        for name, shape in self.shapes().items():
            size = math.prod(shape)
            field = packed[:, start : start + size]
            fields[name] = field if len(shape) == 1 else field.reshape(-1, *shape)
            start += size
        return fields


OUT_WORDS = 2 + 2 * TOP


def read_out(out_SX: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(token, logprob, TOP most likely tokens, their logprobs) of every seat of every shard."""
    floats = out_SX.view(np.float32)
    return out_SX[:, 0], floats[:, 1], out_SX[:, 2 : 2 + TOP], floats[:, 2 + TOP :]
