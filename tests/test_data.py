"""The stream of batches: its position goes on with any number of threads, nothing twice."""

import dataclasses
import hashlib
import json
import os
import pathlib

import grain
import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax import data
from moe_jax.errors import Refused
from tests import tiny


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i} green bottles hanging on the wall\n" * 20)
    config = tiny.config(data={"seq_len": 16, "global_batch": 8, "path": str(folder)}).data
    return data.load_corpus(config), config


@pytest.mark.parametrize(("first", "then"), [(1, 4), (4, 1), (2, 16)])
def test_a_stream_goes_on_with_another_number_of_threads(first, then, corpus):
    """From the state that a checkpoint holds, as JSON; over the end of an epoch."""
    text, config = corpus
    windows = (len(text.train) - 1) // 16
    steps = windows // 8 + 20
    whole = data.batches(text, config)
    expected = [next(whole) for _ in range(steps)]
    begun = data.batches(text, dataclasses.replace(config, read_threads=first))
    seen = [next(begun) for _ in range(7)]
    state = json.loads(json.dumps(begun.get_state()))
    again = data.batches(text, dataclasses.replace(config, read_threads=then))
    again.set_state(state)
    seen += [next(again) for _ in range(steps - 7)]
    np.testing.assert_array_equal(np.stack(seen), np.stack(expected))
    epoch = np.concatenate(seen)[:windows]
    assert {row.tobytes() for row in epoch} == {
        data._Windows(text.train, 16)[i].tobytes() for i in range(windows)
    }  # none is left out


def test_names_in_any_encoding_are_read(tmp_path):
    """A folder of a Latin-1 system, and one of UTF-8 in the same order as ever."""
    for i in range(40):
        name = f"caf\xe9 {i}.txt"
        for folder, coded in (("latin", name.encode("latin-1")), ("utf", name.encode())):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / os.fsdecode(coded)).write_text(f"{i} green bottles\n" * 20)
    fields = {"seq_len": 16, "global_batch": 8, "held_out_fraction": 0.5}
    found = {
        folder: data.load_corpus(tiny.config(data={**fields, "path": str(tmp_path / folder)}).data)
        for folder in ("latin", "utf")
    }
    sizes = {len(one.train) + len(one.held_out) for one in found.values()}
    assert len(sizes) == 1
    digest = hashlib.sha256("caf\xe9 1.txt".encode()).digest()
    assert data._share("caf\xe9 1.txt") == int.from_bytes(digest[:8], "big") / 2**64


def test_of_few_files_the_ends_are_held_out(tmp_path):
    """The usual folder of a newcomer: one text. Nothing stands in both splits."""
    text = "".join(f"{i} green bottles\n" for i in range(1000))
    (tmp_path / "input.txt").write_text(text)
    fields = {"seq_len": 16, "global_batch": 8, "path": str(tmp_path)}
    found = data.load_corpus(tiny.config(data={**fields, "max_bytes": 10**6}).data)
    cut = len(text) - len(text) // 10
    assert found.train.tobytes() == text[:cut].encode() + b"\0"
    assert found.held_out.tobytes() == text[cut:].encode() + b"\0"
    small = data.load_corpus(tiny.config(data={**fields, "max_bytes": 1000}).data)
    assert (small.train.size, small.held_out.size) == (901, 101)  # with what ends a file
    with pytest.raises(Refused, match=r"for the held-out split, at least data\.seq_len"):
        data.load_corpus(tiny.config(data={**fields, "max_bytes": 100}).data)


def test_no_more_of_a_file_is_read_than_is_asked_for(tmp_path, monkeypatch):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text("more than enough text\n" * 100)
    read, asked = data._read, []

    def counted(path, limit):
        asked.append(len(read(path, limit)))
        return read(path, limit)

    monkeypatch.setattr(data, "_read", counted)
    fields = {"seq_len": 16, "global_batch": 8, "path": str(tmp_path)}
    data.load_corpus(tiny.config(data={**fields, "max_bytes": 3000}).data)
    assert sum(asked) <= 3000


def test_digests_tell_texts_apart(tmp_path):
    one = data.Corpus(np.arange(5, dtype=np.uint8), np.arange(3, dtype=np.uint8), "a")
    same = data.Corpus(np.arange(5, dtype=np.uint8), np.arange(3, dtype=np.uint8), "b")
    moved = data.Corpus(np.arange(6, dtype=np.uint8), np.arange(2, dtype=np.uint8), "a")
    wider = data.Corpus(np.arange(5, dtype=np.int32), np.arange(3, dtype=np.int32), "a")
    assert one.digest == same.digest
    assert len({one.digest, moved.digest, wider.digest}) == 3


def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("gone before it is read\n" * 20)
    monkeypatch.setattr(pathlib.Path, "is_file", lambda self: True)
    (tmp_path / "b.txt").symlink_to("nowhere")
    config = tiny.config(data={"seq_len": 16, "global_batch": 8, "path": str(tmp_path)}).data
    with pytest.raises(Refused, match=r"data\.path = .*b\.txt': cannot be read \(No such file"):
        data.load_corpus(config)


@pytest.mark.parametrize("threads", [0, 257])
def test_no_thread_or_too_many_are_refused(threads):
    with pytest.raises(Refused) as refused:
        tiny.config(data={"seq_len": 16, "global_batch": 8, "read_threads": threads})
    assert refused.value.field == "data.read_threads"


def test_every_thread_has_a_window_to_read(corpus, monkeypatch):
    """No more are read at once than may wait to be taken."""
    made, options = [], grain.ReadOptions
    monkeypatch.setattr(grain, "ReadOptions", lambda **kw: made.append(kw) or options(**kw))
    text, config = corpus
    for threads, waiting in ((1, 4), (16, 16)):
        data.batches(text, dataclasses.replace(config, read_threads=threads))
        assert made.pop()["prefetch_buffer_size"] == waiting


def test_a_run_is_the_same_with_another_number_of_threads():
    digests = [
        config_lib.digest(tiny.config(data={"seq_len": 16, "global_batch": 8, "read_threads": n}))
        for n in (1, 4)
    ]
    assert digests[0] == digests[1]
