"""The stream of batches: its position goes on with any number of threads, nothing twice."""

import dataclasses
import json

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


def test_no_thread_is_refused():
    with pytest.raises(Refused) as refused:
        tiny.config(data={"seq_len": 16, "global_batch": 8, "read_threads": 0})
    assert refused.value.field == "data.read_threads"


def test_a_run_is_the_same_with_another_number_of_threads():
    digests = [
        config_lib.digest(tiny.config(data={"seq_len": 16, "global_batch": 8, "read_threads": n}))
        for n in (1, 4)
    ]
    assert digests[0] == digests[1]
