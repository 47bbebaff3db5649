"""Tokenizers of published folders: what they put around a text, and what they leave off."""

import json

import pytest
import tokenizers

from moe_jax.errors import Refused
from moe_jax.hf.tokens import Tokenizer
from moe_jax.infer import text

BOS, EOS, A, B = 0, 1, 2, 3
BEGIN = "<｜begin▁of▁sentence｜>"


def write(folder, *, around=None, **said):
    """Words a and b, between the tokens of DeepSeek-V3, whose file puts nothing around a text."""
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({BEGIN: BOS, "$A:1": EOS, "a": A, "b": B}, unk_token="b")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = around or tokenizers.processors.ByteLevel(trim_offsets=False)
    made.add_special_tokens([BEGIN, "$A:1"])
    made.save(str(folder / "tokenizer.json"))
    if said:
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def llama(bos="<s>"):
    return tokenizers.processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, BOS)])


@pytest.mark.parametrize(
    ("said", "ids"),
    [
        ({"add_bos_token": True}, [BOS, A]),
        ({"add_bos_token": True, "add_eos_token": False}, [BOS, A]),
        ({"add_bos_token": True, "bos_token": BEGIN}, [BOS, A]),
        ({"add_bos_token": True, "add_eos_token": True}, [BOS, A, EOS]),
        ({"add_eos_token": True}, [A, EOS]),
        ({"add_bos_token": False}, [A]),
        ({"add_bos_token": None}, [A]),
        ({}, [A]),
    ],
)
def test_tokens_that_tokenizer_config_asks_for(said, ids, tmp_path):
    named = {"bos_token": {"__type": "AddedToken", "content": BEGIN}, "eos_token": "$A:1"}
    tokenizer = Tokenizer(write(tmp_path, **{**named, **said}), 4)
    assert tokenizer.encode("a") == tokenizer.encode_plain("a", whole=True) == ids
    assert tokenizer.encode_plain("a") == [A]


@pytest.mark.parametrize(
    ("said", "ids"),
    [
        ({"add_bos_token": False}, [A]),
        ({"add_eos_token": False}, [A]),
        ({"add_bos_token": True}, [BOS, A]),
        ({"add_bos_token": None}, [BOS, A]),
        ({}, [BOS, A]),
    ],
)
def test_they_take_the_place_of_those_of_the_tokenizer(said, ids, tmp_path):
    folder = write(tmp_path, around=llama(), bos_token=BEGIN, **said)
    assert Tokenizer(folder, 4).encode("a") == ids


def test_a_text_that_spells_the_first_token_has_it_once(tmp_path):
    tokenizer = Tokenizer(write(tmp_path, add_bos_token=True, bos_token=BEGIN), 4)
    assert tokenizer.encode(f"{BEGIN}a") == [BOS, A]
    assert tokenizer.encode(f"a{BEGIN}") == [BOS, A, BOS]
    assert tokenizer.encode("") == [BOS]


def test_older_folders_name_their_tokens_in_a_file_of_their_own(tmp_path):
    folder = write(tmp_path, add_bos_token=True, bos_token=None)
    assert Tokenizer(folder, 4).encode("a") == [A]  # nothing says which one
    names = tmp_path / "special_tokens_map.json"
    names.write_text(json.dumps({"bos_token": {"content": BEGIN}, "eos_token": "$A:1"}))
    assert Tokenizer(folder, 4).encode("a") == [BOS, A]


def test_tokens_without_a_name_leave_the_tokenizer_as_it_is(tmp_path):
    folder = write(tmp_path, around=llama(), add_bos_token=True)
    assert Tokenizer(folder, 4).encode("a") == [BOS, A]


def test_a_chat_without_a_known_form_begins_with_it(tmp_path):
    folder = write(tmp_path, add_bos_token=True, bos_token=BEGIN)
    made = text.of_folder(folder, 4, [EOS]).chat([{"role": "a", "content": BEGIN}])
    assert made[0] == BOS
    assert BOS not in made[1:]  # what people spell is text


def test_texts_are_neither_cut_nor_filled_up(tmp_path):
    """Settings that tokenizer.json keeps from the last use of whoever saved it."""
    path = write(tmp_path) / "tokenizer.json"
    made = tokenizers.Tokenizer.from_file(str(path))
    made.enable_truncation(2)
    made.enable_padding(length=4)
    made.save(str(path))
    tokenizer = Tokenizer(tmp_path, 4)
    for said in ([A], [A, B, A]):
        words = " ".join("ab"[token - A] for token in said)
        assert tokenizer.encode(words) == tokenizer.encode_plain(words) == said


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"add_bos_token": "yes"}, "add_bos_token"),
        ({"add_eos_token": 1}, "add_eos_token"),
        ({"add_bos_token": True, "bos_token": "<s>"}, "bos_token"),
        ({"add_bos_token": True, "bos_token": 3}, "bos_token"),
        ({"add_eos_token": True, "eos_token": {"content": [1]}}, "eos_token"),
    ],
)
def test_bad_settings_are_named(said, field, tmp_path):
    with pytest.raises(Refused, match=rf"tokenizer_config\.json: {field} = "):
        Tokenizer(write(tmp_path, **said), 4)
