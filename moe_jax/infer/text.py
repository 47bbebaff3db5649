"""Text to tokens and back: bytes, or the tokenizer of a published model."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from moe_jax import data
from moe_jax.config import Config
from moe_jax.hf import config_json
from moe_jax.hf import folder as folder_lib
from moe_jax.hf import tokens as tokens_lib
from moe_jax.hf.tokens import Tokenizer
from moe_jax.infer import chat

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

    def chat(self, messages: chat.Messages) -> list[int]:
        """The tokens of a prompt that an assistant's answer follows."""

    def join(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """A prompt and what followed, as text."""

    def piece(self, token: int) -> bytes:
        """What one token adds to a text; a character may be cut off."""

    def stream(
        self, prompt: Sequence[int], write: Callable[[bytes], object], *, ignore_end: bool = False
    ) -> "Stream":
        """Writes the prompt; the result is called with every token that follows, None at the end.

        What follows a token of `ends` is written only with `ignore_end`.
        """

    def corpus(self, text: np.ndarray) -> np.ndarray:
        """The tokens of a text in uint8."""


Stream = Callable[[int | None], None]


class Bytes:
    """Every byte is a token. Tokens beyond the bytes mean nothing, and are shown as U+FFFD."""

    ends: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        # What came as bytes that are no UTF-8 (arguments of a command do) goes as these bytes.
        return list(text.encode("utf-8", "surrogateescape"))

    def chat(self, messages: chat.Messages) -> list[int]:
        return self.encode(chat.plain(messages))

    def join(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, (*prompt, *tokens))).decode("utf-8", errors="replace")

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else _UNFINISHED.encode()

    def stream(
        self, prompt: Sequence[int], write: Callable[[bytes], object], *, ignore_end: bool = False
    ) -> Stream:
        write(b"".join(map(self.piece, prompt)))

        def follow(token: int | None) -> None:
            if token is not None:
                write(self.piece(token))

        return follow

    def corpus(self, text: np.ndarray) -> np.ndarray:
        return text


class Tokens:
    """The tokens of a published model's own tokenizer.

    Args:
      ends: tokens that end a text: they are shown, what the model makes after one is not,
        unless that is asked for.
      form: of a chat; None = `chat.plain`.
    """

    def __init__(
        self, tokenizer: Tokenizer, ends: Sequence[int] = (), form: chat.ChatML | None = None
    ):
        self._tokenizer, self._ends_in_order, self._form = tokenizer, tuple(ends), form
        self._ends = frozenset(ends)

    @property
    def ends(self) -> frozenset[int]:
        return self._ends

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def chat(self, messages: chat.Messages) -> list[int]:
        if self._form is None:
            return self._tokenizer.encode_plain(chat.plain(messages), whole=True)
        made: list[int] = []
        for part in self._form.parts(messages):
            if part.control:
                number = self._tokenizer.control(part.text)
                assert number is not None, part.text  # by `of_folder`
                made.append(number)
            else:
                made += self._tokenizer.encode_plain(part.text)
        return made

    def join(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        end = next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        return self._tokenizer.decode([*prompt, *tokens[: end + 1]])

    def piece(self, token: int) -> bytes:
        return self._tokenizer.piece(token)

    def stream(
        self, prompt: Sequence[int], write: Callable[[bytes], object], *, ignore_end: bool = False
    ) -> Stream:
        """A character may take several tokens: it is written when it is whole, or at the end.

        What is new is decoded after the tokens written last, which may decide about a space in
        front, and not after the whole text, which would take longer with every token. Of a
        character that a prompt ends in, the first token that makes it whole writes all.

        What is written stays: where a decoder shows none of a run of bytes that never ends as a
        character, `join` has U+FFFD also for the characters before it in the run.
        """
        before, new, ended = self._last(prompt), [], False
        write(self._tokenizer.decode(prompt).encode())

        def follow(token: int | None) -> None:
            nonlocal before, new, ended
            if ended:
                return
            if token is not None:
                ended = token in self._ends and not ignore_end
                new.append(token)
            text = self._tokenizer.decode([*before, *new])
            if text.endswith(_UNFINISHED) and token is not None:
                return
            known = self._tokenizer.decode(before)
            if text.startswith(known):
                start, before = len(known), new
            else:  # the last character of `before` was cut off
                start, before = self._common(before, text), [*before, *new]
            write(text[start:].encode())
            new = []

        return follow

    def _last(self, prompt: Sequence[int]) -> list[int]:
        """The end of a prompt, from a whole character on: some decoders show none of a run of
        bytes in which one is cut off."""
        length, decode = _CONTEXT, self._tokenizer.decode
        while length < len(prompt) and decode(prompt[-length:]).startswith(_UNFINISHED):
            length *= 2
        return list(prompt[-length:])

    def _common(self, before: Sequence[int], text: str) -> int:
        """Characters that a text has in common with what tokens, or all but up to three, show.

        A character is cut off in so many, and some decoders hide those before it.
        """
        shown = [self._tokenizer.decode(before[: max(len(before) - n, 0)]) for n in range(4)]
        return max(len(os.path.commonprefix([text, one])) for one in shown)  # noqa: RUF071

    def corpus(self, text: np.ndarray) -> np.ndarray:
        return self._tokenizer.corpus(text, data.SEPARATOR, self._ends_in_order)


def of_run(root: pathlib.Path, config: Config) -> Text:
    """Of a run: bytes, or the tokenizer that its config names, in its work directory.

    Raises:
      Refused: as `of_folder`.
    """
    if not config.data.tokenizer:
        return Bytes()
    kept, size = root / config.data.tokenizer, config.model.vocab_size
    return of_folder(kept, size, config_json.ends(kept, size))


def of_folder(folder: str | os.PathLike, vocab_size: int, ends: Sequence[int]) -> Tokens:
    """Of a published model's folder: tokenizer.json, and the chat template if there is one.

    Raises:
      Refused: a tokenizer that is missing, damaged, or of a larger vocabulary.
    """
    tokenizer = Tokenizer(folder, vocab_size)
    form = chat.known(_template(pathlib.Path(folder)))
    if form is not None and None in map(tokenizer.control, (form.begin, form.end)):
        form = None  # its marks are no tokens of this model
    return Tokens(tokenizer, ends, form)


def _template(folder: pathlib.Path) -> object:
    alone = folder / tokens_lib.TEMPLATE
    if alone.is_file():
        return alone.read_text(encoding="utf-8", errors="replace")
    said = folder / tokens_lib.CONFIG
    if not said.is_file():
        return None
    return folder_lib.json_object(said, "download it again").get("chat_template")
