"""The tokenizer and the chat template of a GGUF file, as a published folder has them.

Byte-level BPE (`tokenizer.ggml.model` = "gpt2") of the pre-tokenizers below. The template is
copied as text and never run.
"""

import json
import pathlib
from typing import Any

from moe_jax import files
from moe_jax.errors import Refused
from moe_jax.hf import gguf, tokens

CONTROL, USER_DEFINED = 3, 4
# `tokenizer.ggml.pre` -> whether digits stand alone before the rules of GPT-2 split a text
_PRE = {"smollm": True, "gpt-2": False}
_KEY = "tokenizer.ggml."
_LISTS = (("tokens", str), ("merges", str), ("token_type", int))


def write(file: gguf.File, out: pathlib.Path, vocab_size: int) -> None:
    """Writes OUT/tokenizer.json and tokenizer_config.json.

    Raises:
      Refused: no tokenizer, one of another kind, or one that does not hold together.
    """
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        rule = "is made by the package `tokenizers`, which is not installed"
        raise Refused(f"{file.path}: tokenizer", None, rule, "pip install 'moe_jax[hf]'") from None
    words, merges, kinds = (_list(file, name, of) for name, of in _LISTS)
    for name, known in (("model", ("gpt2",)), ("pre", tuple(_PRE))):
        if (found := file.keys.get(_KEY + name)) not in known:
            rule = f"is a tokenizer that is not read here: must be one of {known}"
            gguf.refuse(file.path, _KEY + name, found, rule, "use another model")
    if len(set(words)) != len(words) or len(words) > vocab_size or len(kinds) != len(words):
        rule = f"must be distinct, at most {vocab_size}, each with a kind"
        gguf.refuse(file.path, _KEY + "tokens", len(words), rule)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {word: number for number, word in enumerate(words)}
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            rule = "must be two tokens, and both together a third"
            gguf.refuse(file.path, _KEY + "merges", merge, rule)
    try:
        made: Any = Tokenizer(models.BPE(vocabulary, pairs))
    except Exception as error:  # the package raises plain Exceptions
        gguf.refuse(file.path, "tokenizer", None, f"is refused by its package ({error})")
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = (
        [pre_tokenizers.Digits(individual_digits=True)] if _PRE[file.keys[_KEY + "pre"]] else []
    )
    made.pre_tokenizer = pre_tokenizers.Sequence([*digits, split])
    made.decoder = decoders.ByteLevel()
    of_kind = {
        kind: [word for word, number in zip(words, kinds, strict=True) if number == kind]
        for kind in (CONTROL, USER_DEFINED)
    }
    made.add_special_tokens(
        [AddedToken(w, special=True, normalized=False) for w in of_kind[CONTROL]]
    )
    made.add_tokens([AddedToken(word, normalized=False) for word in of_kind[USER_DEFINED]])
    made.save(str(out / tokens.NAME), pretty=False)
    said = _around(file, words)
    if isinstance(template := file.keys.get("tokenizer.chat_template"), str):
        said["chat_template"] = template
    with files.atomic_write(out / tokens.CONFIG, "w") as text:
        json.dump(said, text, indent=1)


def _around(file: gguf.File, words: list[str]) -> dict[str, Any]:
    """What stands around a text, as tokenizer_config.json says it; nothing where nothing does."""
    said: dict[str, Any] = {}
    for end in ("bos", "eos"):
        if file.keys.get(f"{_KEY}add_{end}_token") is not True:
            continue
        number = file.keys.get(f"{_KEY}{end}_token_id")
        if type(number) is not int or not 0 <= number < len(words):
            rule = f"must be a token, as {_KEY}add_{end}_token asks for it"
            gguf.refuse(file.path, f"{_KEY}{end}_token_id", number, rule)
        said |= {f"add_{end}_token": True, f"{end}_token": words[number]}
    return said


def _list(file: gguf.File, name: str, of: type) -> list[Any]:
    found = file.keys.get(_KEY + name)
    if not isinstance(found, list) or not all(type(one) is of for one in found):
        what = type(found).__name__
        gguf.refuse(file.path, _KEY + name, what, f"must be a list of {of.__name__}")
    return found
