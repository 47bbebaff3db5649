"""A published model's tokenizer: FOLDER/tokenizer.json through the `tokenizers` package.

The file is data that the package parses; nothing in it is run. Which tokens stand around a text is
said there, and by `add_bos_token` and `add_eos_token` of FOLDER/tokenizer_config.json, which go
first: files of DeepSeek-V3 say it nowhere else.
"""

import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.errors import Refused
from moe_jax.hf import folder as folder_lib

NAME, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


class Tokenizer:
    """Text to tokens of a model's vocabulary, and back."""

    def __init__(self, folder: str | os.PathLike, vocab_size: int):
        """Raises `Refused` if the file is missing, damaged, or of a larger vocabulary, or if what
        tokenizer_config.json puts around a text is none of it."""
        path = pathlib.Path(folder) / NAME
        if not path.is_file():
            rule = "is missing: text cannot be made into this model's tokens"
            raise Refused(str(path), None, rule, "download it as well")
        try:
            import tokenizers
        except ImportError:
            rule = "is read by the package `tokenizers`, which is not installed"
            raise Refused(str(path), None, rule, "pip install 'moe_jax[hf]'") from None
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exceptions
            rule = f"is not a tokenizer ({error})"
            raise Refused(str(path), None, rule, "download it again") from None
        self._tokenizer.no_truncation()  # a file keeps how its last texts were cut and filled up
        self._tokenizer.no_padding()
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= vocab_size:
            rule = f"has a token {largest}, and the model's vocabulary has {vocab_size} entries"
            raise Refused(str(path), largest, rule, "use the tokenizer that belongs to the model")
        self._begin = _put_around(self._tokenizer, pathlib.Path(folder) / CONFIG)
        # Another object: what it does with special tokens is a setting of all its calls.
        written = self._tokenizer.to_str()
        self._plain: Any = tokenizers.Tokenizer.from_str(written)
        self._plain.encode_special_tokens = True
        self._added = frozenset(self._tokenizer.get_added_tokens_decoder())
        decoder = json.dumps(json.loads(written)["decoder"])
        self._byte_level, self._byte_fallback = (
            f'"type": "{kind}"' in decoder for kind in ("ByteLevel", "ByteFallback")
        )

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the model expects around a text.

        Where tokenizer_config.json asks for the token in front, a text that spells it itself
        (clients write chat templates out) has it once.

        Raises:
          Refused: a text with bytes that are not UTF-8 (kept as surrogates by the command line).
        """
        _check_text(text)
        ids = list(self._tokenizer.encode(text).ids)
        return ids[1:] if ids[:2] == [self._begin, self._begin] else ids

    def encode_plain(self, text: str, *, whole: bool = False) -> list[int]:
        """Of a text that may say nothing but itself: "</s>" in it is four characters, not an end.

        Args:
          whole: with the special tokens that the model expects around a text.

        Raises:
          Refused: as `encode`.
        """
        _check_text(text)
        return list(self._plain.encode(text, add_special_tokens=whole).ids)

    def control(self, word: str) -> int | None:
        """The number of a special token, None where there is no such one."""
        added = self._tokenizer.get_added_tokens_decoder()
        return next((n for n, one in added.items() if one.special and one.content == word), None)

    def corpus(self, text: np.ndarray, separator: int, ends: Sequence[int] = ()) -> np.ndarray:
        """The tokens of documents to learn from, int32, each with the model's end behind it.

        Args:
          text: uint8, UTF-8 but for what is replaced.
          separator: the byte behind each document.
          ends: the first of them ends a document; none = nothing does.
        """
        parts = text.tobytes().split(bytes([separator]))
        documents = [part.decode("utf-8", errors="replace") for part in parts if part]
        end = list(ends[:1])
        tokens = [
            np.array([*one.ids, *end], np.int32)
            for one in self._plain.encode_batch(documents, add_special_tokens=False)
        ]
        return np.concatenate(tokens) if tokens else np.zeros(0, np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens are shown, so that an end of text is seen."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def piece(self, token: int) -> bytes:
        """What a token adds inside a text: a space in front and parts of characters, too."""
        word = self._tokenizer.id_to_token(token)
        if word is None:
            return b""
        if token not in self._added:
            if self._byte_level and all(character in _BYTE_OF for character in word):
                return bytes(_BYTE_OF[character] for character in word)
            if self._byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", word):
                return bytes.fromhex(word[3:5])
        once = self.decode([token])
        return self.decode([token, token])[len(once) :].encode()


def _put_around(tokenizer: Any, path: pathlib.Path) -> int | None:
    """Puts around texts what tokenizer_config.json asks for, if it does; the token in front.

    One key that is there decides about both ends: the other one is then false. Where it does not
    say which token it means, tokenizer.json stays as it is.
    """
    said = folder_lib.json_object(path, "download it again") if path.is_file() else {}
    asked = {end: said.get(f"add_{end}_token") for end in ("bos", "eos")}
    for end, wanted in asked.items():
        if not isinstance(wanted, bool | None):
            raise Refused(f"{path}: add_{end}_token", wanted, "must be true or false", "correct it")
    if all(wanted is None for wanted in asked.values()):
        return None
    said = _named(path) | {key: value for key, value in said.items() if value is not None}
    if any(asked[end] and f"{end}_token" not in said for end in asked):
        return None
    from tokenizers import processors

    number_of = {end: _special(tokenizer, path, said, end) for end in asked if asked[end]}
    pieces = [*(["bos"] if asked["bos"] else []), "$A", *(["eos"] if asked["eos"] else [])]
    # Pieces are names of its own: a token may have characters that mean something in a template.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=pieces, special_tokens=list(number_of.items())
    )
    return number_of.get("bos")


def _named(path: pathlib.Path) -> dict[str, Any]:
    """The special tokens of older folders, which name them in a file of their own."""
    names = path.with_name("special_tokens_map.json")
    return folder_lib.json_object(names, "download it again") if names.is_file() else {}


def _special(tokenizer: Any, path: pathlib.Path, said: dict[str, Any], end: str) -> int:
    """The number of `bos_token` or `eos_token`: a word, or an object with it as "content"."""
    word = said.get(f"{end}_token")
    if isinstance(word, dict):
        word = word.get("content")
    number = tokenizer.token_to_id(word) if isinstance(word, str) else None
    if number is None:
        rule = f"must be a token of {NAME}, as add_{end}_token asks for it"
        fix = "download both files again"
        raise Refused(f"{path}: {end}_token", said.get(f"{end}_token"), rule, fix)
    return number


def _bytes_of_characters() -> dict[str, int]:
    """As GPT-2 writes bytes: printable ones as they are, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _bytes_of_characters()


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused("--prompt", text, f"must be UTF-8 ({error})", "convert it") from None
