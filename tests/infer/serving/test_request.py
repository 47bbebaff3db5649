"""Text of an answer: whole characters, stop strings in pieces, ends; options that are refused."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import Refused
from moe_jax.infer.serving.request import Answer, Options
from moe_jax.infer.text import Bytes


class Ends(Bytes):
    ends = frozenset({0})


def say(tokens, text=None, **options):
    """(the texts of all parts, why it ended, tokens used)"""
    answer = Answer(text or Bytes(), b"prompt", Options(**{"max_tokens": 99, **options}))
    parts, finish = [], None
    for token in tokens:
        part, finish = answer.add(token)
        parts.append(part)
        if finish:
            break
    return parts, finish, answer.tokens


def test_characters_are_whole():
    parts, finish, _ = say("aé€😀".encode(), max_tokens=10)
    assert finish == "length"
    assert parts == ["a", "", "é", "", "", "€", "", "", "", "😀"]


def test_a_character_cut_off_is_shown_as_such():
    parts, finish, _ = say("a€".encode()[:2], max_tokens=2)
    assert (parts, finish) == (["a", "\ufffd"], "length")


def test_tokens_beyond_the_bytes_are_shown_as_no_character():
    answer = Answer(Bytes(), [97, 300], Options(max_tokens=4))
    assert [answer.add(token)[0] for token in (98, 256, 50_000, 99)] == ["b", *"\ufffd\ufffd", "c"]
    assert Bytes().join([97, 300], [256, 98]) == "a\ufffd\ufffdb"


def test_stop_strings():
    assert say(b"hello STOP more", stop=("STOP",))[:2] == ([*"hello ", "", "", "", ""], "stop")
    parts, finish, tokens = say(b"ab STabc STOPx", stop=("STOP",))
    assert ("".join(parts), finish, len(tokens)) == ("ab STabc ", "stop", 13)
    parts, finish, _ = say(b"an ST", stop=("STOP",), max_tokens=5)
    assert ("".join(parts), finish) == ("an ST", "length")


@settings(max_examples=200, deadline=None)
@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_as_if_the_text_were_whole(text, stops):
    parts, finish, used = say(text.encode(), stop=tuple(stops), max_tokens=max(1, len(text)))
    for length, stop in itertools.product(range(len(text) + 1), stops):
        if stop in text[:length]:
            cut = min(text[:length].find(s) for s in stops if s in text[:length])
            assert ("".join(parts), finish, len(used)) == (text[:cut], "stop", length)
            return
    assert "".join(parts) == text


def test_end_of_text():
    assert say([65, 66, 0, 67], Ends())[:2] == (["A", "B", ""], "stop")
    parts, finish, _ = say([65, 0, 66], Ends(), ignore_end=True, max_tokens=3)
    assert ("".join(parts), finish) == ("A\0B", "length")
    assert "".join(say([83, 0], Ends(), stop=("STOP",))[0]) == "S"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_tokens", v) for v in (0, -1)),
        *(("temperature", v) for v in (-1.0, float("nan"), float("inf"), 1e9)),
        *(("top_p", v) for v in (0.0, -0.5, 1.5, float("nan"))),
        *(("top_k", v) for v in (-1, 2**40)),
        *(("seed", v) for v in (-1, 2**31)),
        *(("logprobs", v) for v in (-1, 21)),
        *(("stop", v) for v in (("",), ("x" * 300,), ("a",) * 20)),
    ],
)
def test_refused_options(field, value):
    with pytest.raises(Refused) as error:
        Options(**{field: value})
    assert error.value.field == field
