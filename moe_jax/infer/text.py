"""Text to tokens and back: bytes for models trained here, a tokenizer for published ones."""

import os
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from moe_jax.hf.tokens import Tokenizer

_UNFINISHED = "\ufffd"  # what a character looks like whose last bytes are still to come
_CONTEXT = 8  # tokens of the prompt that what follows is decoded after


@runtime_checkable
class Text(Protocol):
    """What stands between people and a model."""

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""

    def join(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """A prompt and what followed, as text."""

    def stream(self, prompt: Sequence[int], write: Callable[[bytes], object]) -> "Stream":
        """Writes the prompt; the result is called with every token that follows."""

    def corpus(self, text: np.ndarray) -> np.ndarray:
        """The tokens of a text in uint8."""


Stream = Callable[[int], None]


class Bytes:
    """Every byte is a token."""

    ends: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        return list(os.fsencode(text))

    def join(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        return bytes([*prompt, *tokens]).decode("utf-8", errors="replace")

    def stream(self, prompt: Sequence[int], write: Callable[[bytes], object]) -> Stream:
        write(bytes(prompt))

        def follow(token: int) -> None:
            write(bytes([token & 255]))

        return follow

    def corpus(self, text: np.ndarray) -> np.ndarray:
        return text


class Tokens:
    """The tokens of a published model's own tokenizer.

    Args:
      ends: tokens that end a text: they are shown, what the model makes after one is not.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int] = ()):
        self._tokenizer, self._ends = tokenizer, frozenset(ends)

    @property
    def ends(self) -> frozenset[int]:
        return self._ends

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def join(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        end = next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        return self._tokenizer.decode([*prompt, *tokens[: end + 1]])

    def stream(self, prompt: Sequence[int], write: Callable[[bytes], object]) -> Stream:
        """A character may take several tokens: it is written when it is whole.

        What is new is decoded after the tokens written last, which may decide about a space in
        front, and not after the whole text, which would take longer with every token.
        """
        before, new, ended = list(prompt)[-_CONTEXT:], [], False
        write(self._tokenizer.decode(prompt).encode())

        def follow(token: int) -> None:
            nonlocal before, new, ended
            if ended:
                return
            ended = token in self._ends
            new.append(token)
            text = self._tokenizer.decode([*before, *new])
            if text.endswith(_UNFINISHED):
                return
            write(text[len(self._tokenizer.decode(before)) :].encode())
            before, new = new, []

        return follow

    def corpus(self, text: np.ndarray) -> np.ndarray:
        tokens = self._tokenizer.encode(text.tobytes().decode("utf-8", errors="replace"))
        return np.array(tokens, np.int32)
