"""What the host tells a step, as one int32 array: one transfer instead of a dozen.

The array is [shards, words]; each shard reads its own row. Floats lie in it by their bits.

Every request of a step has a row on its shard. F tokens of a shard: first one for each row (that of
a request past its prompt), then those of the chunks. Axes: R rows, P chunks, S tokens of a chunk, W
blocks in a table.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from moe_jax.infer.serving.scheduler import Limits

FLOATS = ("temperature", "top_p")
_FEW_ROWS, _FEW_CHUNKS = 16, 4
TOP = 20  # most likely tokens that a step reports for each token that it makes


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each field lies.

    Attributes:
      limits: sizes of the engine.
      width: W.
      rows, chunk_rows: R and P, at most those of `limits`.
    """

    limits: Limits
    width: int
    rows: int
    chunk_rows: int

    @property
    def num_tokens(self) -> int:
        """F."""
        return self.rows + self.chunk_rows * self.limits.chunk

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The fields, of one shard, in order.

        token_F, position_F: -1 as a position: there is no token.
        long_F: 1 = of a text with the long factors of LongRoPE; not of models without.
        record_F: where in the recorder's buffer its experts go; -1 = nowhere.
        table_RW: blocks of the request in each row; 0 where there is none.
        row_P: of the request that each chunk is from.
        sample_R: the token (0..F-1) whose logits give the next token of each row; -1 = none.
        draw_R: position of that next token; choice_R: number of the answer to one prompt.
        logprobs_R: how many of the most likely tokens are wanted; -1 = not even the chosen one's.
        """
        rows, tokens = (self.rows,), (self.num_tokens,)
        return {
            "token": tokens,
            "position": tokens,
            "record": tokens,
            **({} if self.limits.long_from is None else {"long": tokens}),
            "table": (self.rows, self.width),
            "row": (self.chunk_rows,),
            **dict.fromkeys(("sample", "draw", "choice", "seed", "top_k", "logprobs"), rows),
            **dict.fromkeys(FLOATS, rows),
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


def layouts(limits: Limits, width: int) -> list[Layout]:
    """Shapes of a step, the cheapest first: few rows or all, without chunks and with them."""
    few = min(_FEW_ROWS, limits.seats)
    some = min(_FEW_CHUNKS, limits.chunk_rows)
    shapes = [(few, 0), (limits.seats, 0), (few, some), (limits.seats, limits.chunk_rows)]
    if few == limits.seats:
        shapes = shapes[1::2]
    return [Layout(limits, width, *shape) for shape in shapes]


OUT_WORDS = 2 + 2 * TOP


def read_out(out_SX: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(token, logprob, TOP most likely tokens, their logprobs) of every row of every shard."""
    floats = out_SX.view(np.float32)
    return out_SX[:, 0], floats[:, 1], out_SX[:, 2 : 2 + TOP], floats[:, 2 + TOP :]
