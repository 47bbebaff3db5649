"""A published model's tokenizer: FOLDER/tokenizer.json through the `tokenizers` package.

The file is data that the package parses; nothing in it is run.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from moe_jax.errors import Refused

NAME, CONFIG = "tokenizer.json", "tokenizer_config.json"


class Tokenizer:
    """Text to tokens of a model's vocabulary, and back."""

    def __init__(self, folder: str | os.PathLike, vocab_size: int):
        """Raises `Refused` if the file is missing, damaged, or of a larger vocabulary."""
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
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= vocab_size:
            rule = f"has a token {largest}, and the model's vocabulary has {vocab_size} entries"
            raise Refused(str(path), largest, rule, "use the tokenizer that belongs to the model")

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the model expects around a text.

        Raises:
          Refused: a text with bytes that are not UTF-8 (kept as surrogates by the command line).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refused("--prompt", text, f"must be UTF-8 ({error})", "convert it") from None
        return list(self._tokenizer.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens are shown, so that an end of text is seen."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)
