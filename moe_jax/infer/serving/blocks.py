"""Blocks of cache positions on one shard: who holds which, and which can be used again.

A block is `block_size` positions of keys and values of all layers. A request holds blocks in the
order of its positions. A full block can be found again by its key, which stands for its tokens and
for all tokens before them; it may then be held by several requests, and nobody writes to it: writes
go to positions behind, and so to blocks that are not full and were never given a key.

A block that nobody holds is free, or idle: it has a key and waits to be found. Idle blocks are
given away when there is no free one, the one idle for longest first.
"""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np

NO_KEY = b""


def keys_of(
    tokens: Sequence[int],
    block_size: int,
    before: Sequence[bytes] = (),
    first: bytes = NO_KEY,
) -> list[bytes]:
    """The keys of all full blocks of a text.

    Args:
      tokens: the whole text.
      before: keys of its first blocks that are known already.
      first: what the keys of a text depend on besides its tokens.
    """
    keys = list(before)
    for block in range(len(keys), len(tokens) // block_size):
        here = np.asarray(tokens[block * block_size : (block + 1) * block_size], np.int32)
        last = keys[-1] if keys else first
        keys.append(hashlib.blake2b(last + here.tobytes(), digest_size=16).digest())
    return keys


class Blocks:
    """The blocks of one shard."""

    def __init__(self, num_blocks: int):
        self._free = list(range(num_blocks))[::-1]
        self._holders = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def num_blocks(self) -> int:
        return len(self._holders)

    @property
    def available(self) -> int:
        """Blocks that `take` can give."""
        return len(self._free) + len(self._idle)

    @property
    def num_free(self) -> int:
        """Those of them whose taking makes nothing impossible to find."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.available

    def holders(self, block: int) -> int:
        """Requests that hold a block."""
        return self._holders[block]

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks with the first of these keys, as far as there are such."""
        found = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of these nobody holds: holding them makes as many fewer available."""
        return sum(block in self._idle for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """One more request reads these, found by their keys."""
        for block in blocks:
            self._holders[block] += 1
            self._idle.pop(block, None)

    def take(self, count: int) -> list[int]:
        """Blocks to write to, held by one request. There must be as many available."""
        assert count <= self.available
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            self._holders[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """A request is done with these, given in the order of its positions.

        The last becomes idle first and so goes first: a block is of no use without those before it.
        """
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0
            if self._holders[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def name(self, block: int, key: bytes) -> None:
        """A held block is full: it can be found by its key, unless another one is already."""
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block], self._block_of[key] = key, block

    def forget(self) -> None:
        """Nothing is found by its key any more; blocks that are held stay so."""
        self._free += self._idle
        self._idle.clear()
        self._key_of.clear()
        self._block_of.clear()
