"""SGLang's `.pt` dumps: read without torch, and nothing in them is ever run."""

import os
import pathlib
import pickle
import tracemalloc

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement.formats import convert as convert_lib
from moe_jax.placement.formats import torchfile
from moe_jax.placement.formats.counts import Counts
from moe_jax.placement.formats.hints import Hints
from moe_jax.placement.plan import Plan
from moe_jax.routing.trace import Trace
from tests import torch_bytes as tb

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def read(tmp_path, content: bytes, hints: Hints | None = None):
    path = tmp_path / "dump.pt"
    path.write_bytes(content)
    return convert_lib.read(path, hints or Hints()).value


# What torch itself wrote (tests/golden/make_sglang_dumps.py).


def test_a_real_dump_per_token():
    hints = Hints()
    trace = convert_lib.read(GOLDEN / "sglang_per_token.pt", hints).value
    assert isinstance(trace, Trace)
    # slots of layers 1 and 2 through rows 1 and 2 of the map, by hand
    prefill = [[[0, 3], [1, 0]], [[2, 1], [4, 2]], [[3, 2], [3, 4]]]
    assert trace.expert_ids_TLK.tolist() == prefill + prefill[:2]
    assert trace.seq_len.tolist() == [1, 2, 2]
    assert (trace.layer_ids, trace.top_k) == ((1, 2), 2)
    for words in ("top-2: the other 6 columns", "passes without extend_seq_lens"):
        assert any(words in note for note in hints.notes)


def test_real_counts():
    counts = convert_lib.read(GOLDEN / "sglang_stat.pt", Hints()).value
    assert isinstance(counts, Counts)
    np.testing.assert_array_equal(counts.count_SLE, np.arange(24).reshape(2, 3, 4))


def test_a_folder_of_counts_is_read_as_its_files(tmp_path):
    """Rank 0 writes one file a dump: a later one goes on with the steps."""
    content = (GOLDEN / "sglang_stat.pt").read_bytes()
    wanted = convert_lib.read(GOLDEN / "sglang_stat.pt", Hints()).value.count_SLE
    for name in ("1700000000.5", "1700000060.25"):
        (tmp_path / f"expert_distribution_recorder_{name}.pt").write_bytes(content)
        counts = convert_lib.read(tmp_path, Hints()).value
        assert isinstance(counts, Counts)
        np.testing.assert_array_equal(counts.count_SLE[-2:], wanted)
    assert len(counts.count_SLE) == 4
    for more, message in [
        (tb.dict_of(records=b"]"), r"no logical_count': as in .*000\.5\.pt"),
        (tb.dict_of(logical_count=tb.whole(SIX.reshape(1, 3, 2), "0")), "as in .*000.5.pt"),
    ]:
        (tmp_path / "expert_distribution_recorder_18.pt").write_bytes(tb.archive(more, SIX))
        with pytest.raises(Refused, match=f"expert_distribution_recorder_18.pt.*{message}"):
            convert_lib.read(tmp_path, Hints())


def test_everything_plain_survives(tmp_path):
    pickled = tb.dict_of(
        a=tb.list_of(tb.number(-7), tb.number(2**40), b"K\x05", b"M\x00\x01"),
        b=tb.tuple_of(b"N", b"\x88", b"\x89", b"G" + b"\x3f\xe0" + bytes(6)),
        c=b"K\x01K\x02\x86",
        d=b"]K\x03a",
        e=b"}" + tb.text("x") + b"K\x04s",
        f=b")",
    )
    path = tmp_path / "a.pt"
    path.write_bytes(tb.archive(pickled))
    assert torchfile.read(path) == {
        "a": [-7, 2**40, 5, 256],
        "b": (None, True, False, 0.5),
        "c": (1, 2),
        "d": [3],
        "e": {"x": 4},
        "f": (),
    }


@pytest.mark.parametrize("kind", ["<i8", "<i4", "<f4", "|u1"])
def test_tensors_are_views_with_their_strides(kind, tmp_path):
    values = np.arange(24).astype(kind)
    storage = tb.STORAGES[values.dtype.str[1:]]
    path = tmp_path / "a.pt"
    for shape, strides, offset in [((2, 3), (3, 1), 4), ((3, 2), (1, 3), 0), ((2, 0), (1, 1), 0)]:
        path.write_bytes(tb.archive(tb.tensor(storage, "0", 24, shape, strides, offset), values))
        found = torchfile.read(path)
        assert (found.dtype, found.shape) == (np.dtype(kind), shape)
        for index in np.ndindex(*shape):
            assert found[index] == values[offset + np.dot(index, strides)]


def test_a_map_is_a_plan(tmp_path):
    map_LP = np.array([[1, 0, 2, 3], [3, 2, 1, 0]])
    content = tb.archive(tb.dict_of(physical_to_logical_map=tb.whole(map_LP, "0")), map_LP)
    plan = read(tmp_path, content, Hints(devices=2))
    assert isinstance(plan, Plan)
    assert plan.placement.physical_to_logical_LP.tolist() == map_LP.tolist()


# What must not be: name -> (content, part of the message).

IDS = np.array([[[0, 1]]], np.int32)
SIX = np.arange(6)


class Evil:
    """Unpickling it would run a program."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def evil() -> bytes:
    return pickle.dumps(Evil(), protocol=2)[2:-1]


def shared() -> bytes:
    """One tensor that a thousand records name."""
    first = tb.dict_of(topk_ids_of_layer=tb.whole(IDS, "0")) + b"q\x07"
    return tb.archive(tb.dict_of(records=tb.list_of(first, *[b"h\x07"] * 1000)), IDS)


def laughs() -> bytes:
    """Every list holds the one before ten times: 10**40 entries if anyone walked them."""
    pickled = b"]K\x01a"
    for at in range(40):
        pickled = tb.list_of(pickled + b"q" + bytes([at]), *[b"h" + bytes([at])] * 9)
    return tb.archive(tb.dict_of(topk_ids_of_layer=pickled))


BAD = {
    "a program": (tb.archive(evil()), "mkdir"),
    "a name of numpy": (tb.archive(tb.name("numpy", "ndarray") + b")R"), "numpy ndarray"),
    "an instance": (tb.archive(tb.name("collections", "OrderedDict") + b")\x81"), "NEWOBJ"),
    "attributes": (tb.archive(tb.name("collections", "OrderedDict") + b"}b"), "BUILD"),
    "a storage called": (tb.archive(tb.name("torch", "IntStorage") + b")R"), "only tensors"),
    "the name itself called with a list": (
        tb.archive(tb.name("collections", "OrderedDict") + b"]R"), "with a tuple"
    ),
    "a packed member": (tb.archive(tb.dict_of(), packed=True), "unpacked"),
    "big endian": (tb.archive(tb.dict_of(), byteorder=b"big"), "little-endian"),
    "no pickle": (tb.archive(b"}").replace(b"data.pkl", b"data.pkx"), "one member"),
    "not a zip": (b"\x00\x02}.", "not a whole file"),
    "a pickle by itself": (b"\x80\x02}.", "never read"),
    "truncated": (tb.archive(tb.dict_of())[:-9], "not a whole file"),
    "a stack that is empty": (tb.archive(b"0"), "only plain data"),
    "more taken than there is": (tb.archive(b"\x85"), "more than it has"),
    "taken from before a mark": (tb.archive(b"K\x01(\x85"), "more than it has"),
    "two values": (tb.archive(b"NN"), "not a whole file"),
    "memo that was never put": (tb.archive(b"h\x05"), "not a whole file"),
    "key twice": (
        tb.archive(b"}(" + (tb.text("a") + b"N") * 2 + b"u"), "the key 'a' stands twice"
    ),
    "key that is a list": (tb.archive(b"}(]Nu"), "keys are texts"),
    "items of a list": (tb.archive(b"](" + tb.text("a") + b"Nu"), "dict expected"),
    "a bit was flipped": (
        tb.archive(tb.dict_of(topk_ids_of_layer=tb.whole(IDS, "0")), IDS).replace(
            IDS.tobytes(), np.array([0, 3], np.int32).tobytes()
        ),
        "CRC",
    ),
    "storage missing": (tb.archive(tb.whole(SIX, "0")), "not a whole file"),
    "storage shorter than said": (
        tb.archive(tb.tensor("LongStorage", "0", 7, (1,), (1,)), SIX), "its length"
    ),
    "storage of half a value": (tb.archive(tb.whole(SIX, "0"), b"\0" * 47), "not a whole file"),
    "tensor beyond its storage": (
        tb.archive(tb.tensor("LongStorage", "0", 6, (2, 3), (4, 1)), SIX), "6 values"
    ),
    "offset beyond its storage": (
        tb.archive(tb.tensor("LongStorage", "0", 6, (2, 3), (3, 1), 1), SIX), "6 values"
    ),
    "a terabyte by strides of zero": (
        tb.archive(tb.tensor("LongStorage", "0", 6, (2**20, 2**20), (0, 0)), SIX), "6 values"
    ),
    "negative stride": (
        tb.archive(tb.tensor("LongStorage", "0", 6, (2, 3), (-3, 1), 3), SIX), "shape and strides"
    ),
    "more strides than axes": (
        tb.archive(tb.tensor("LongStorage", "0", 6, (2,), (3, 1)), SIX), "not a whole file"
    ),
    "one tensor in a thousand records": (shared(), "stands in a record before"),
    "lists of lists of lists": (laughs(), "a tensor"),
    "ids as a list": (
        tb.archive(tb.dict_of(topk_ids_of_layer=tb.list_of(tb.list_of(tb.list_of(b"K\x01"))))),
        "a tensor",
    ),
    "counts as a list": (tb.archive(tb.dict_of(logical_count=tb.list_of(b"K\x01"))), "a tensor"),
    "map as a list": (
        tb.archive(tb.dict_of(physical_to_logical_map=tb.list_of(b"K\x01"))), "a tensor"
    ),
    "nothing known": (tb.archive(tb.dict_of(a=b"N")), "is needed"),
    "not a dictionary": (tb.archive(b"]"), "JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused_in_one_line_without_running_or_filling_memory(name, tmp_path, monkeypatch):
    content, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(Refused) as refused:
            read(tmp_path, content, Hints(devices=1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()
    assert peak < 50 * len(content) + 1_000_000


def test_the_program_would_have_run(tmp_path, monkeypatch):
    """The hostile pickle of the test above is a real one."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(b"\x80\x02" + evil() + b".")
    assert (tmp_path / "ran").exists()
