"""Traces: round trips, halves, and every bad file answered with `Refused`."""

import io
import json
import struct
import time
import zipfile

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace


def small(**changes) -> Trace:
    ids = np.array([[[0, 1], [2, 3]], [[1, 2], [3, 0]], [[3, 0], [1, 255]]], np.uint8)
    fields = {
        "expert_ids_TLK": ids,
        "num_experts": 4,
        "seq_len": np.array([2, 1], np.int32),
        "expert_weights_TLK": np.full((3, 2, 2), 0.5, np.float16),
        "seq_name": ("a", "ü"),
        "seq_home": np.array([1, 0], np.int32),
        "token_ids_T": np.array([9, 0, 70_000], np.int32),
        "layer_ids": (3, 5),
        "model": "tiny",
        "corpus": "none",
    }
    return Trace(**(fields | changes))


def arrays(**changes) -> dict[str, np.ndarray]:
    """What a good file holds; None leaves an array out."""
    meta = {"format": "moe_jax.trace", "version": 1, "num_experts": 4, "layer_ids": [3, 5]}
    fields = {
        "expert_ids": small().expert_ids_TLK,
        "seq_len": np.array([2, 1], np.int32),
        "meta": np.array(json.dumps(meta)),
    }
    return {key: value for key, value in (fields | changes).items() if value is not None}


def test_round_trip(tmp_path):
    trace = small()
    trace_lib.save(trace, tmp_path / "deep" / "t.npz")
    again = trace_lib.load(tmp_path / "deep" / "t.npz")
    assert again.digest == trace.digest
    assert again.layer_ids == (3, 5)
    assert again.seq_name == ("a", "ü")
    assert (again.model, again.corpus) == ("tiny", "none")
    np.testing.assert_array_equal(again.expert_ids_TLK, trace.expert_ids_TLK)
    np.testing.assert_array_equal(again.expert_weights_TLK, trace.expert_weights_TLK)
    np.testing.assert_array_equal(again.home_T, [1, 1, 0])
    np.testing.assert_array_equal(again.token_ids_T, [9, 0, 70_000])
    np.testing.assert_array_equal(again.select(np.array([1])).token_ids_T, [70_000])


def test_round_trip_of_wide_ids(tmp_path):
    trace = synthetic.realistic(num_tokens=50, num_layers=2, num_experts=300, top_k=8, seed=0)
    assert trace.expert_ids_TLK.dtype == np.uint16
    trace_lib.save(trace, tmp_path / "t.npz")
    assert trace_lib.load(tmp_path / "t.npz").digest == trace.digest


def test_digest_sees_every_field():
    other_ids = small().expert_ids_TLK.copy()
    other_ids[0, 0] = [1, 0]
    changed = [
        small(expert_ids_TLK=other_ids),
        small(num_experts=5),
        small(seq_len=np.array([1, 2])),
        small(expert_weights_TLK=None),
        small(seq_name=("a", "b")),
        small(seq_home=np.array([0, 0])),
        small(token_ids_T=np.array([9, 0, 1])),
        small(token_ids_T=None),
        small(layer_ids=(3, 6)),
        small(model="other"),
    ]
    assert len({trace.digest for trace in [small(), *changed]}) == len(changed) + 1


def test_reads_a_file_without_meta(tmp_path):
    np.savez(tmp_path / "t.npz", **arrays(meta=None))
    assert trace_lib.load(tmp_path / "t.npz").num_experts == 4
    assert trace_lib.load(tmp_path / "t.npz", num_experts=16).num_experts == 16


def test_select_and_split():
    trace = synthetic.realistic(
        num_tokens=60, num_layers=2, num_experts=8, top_k=2, seed=0, num_sequences=7
    )
    picked = trace.select(np.array([4, 1]))
    start = np.cumsum([0, *trace.seq_len])
    expected = np.concatenate([trace.expert_ids_TLK[start[s] : start[s + 1]] for s in (4, 1)])
    np.testing.assert_array_equal(picked.expert_ids_TLK, expected)
    halves = trace_lib.split(trace, seed=3)
    assert (halves.plan_half.num_sequences, halves.judge_half.num_sequences) == (4, 3)
    assert halves.plan_half.num_tokens + halves.judge_half.num_tokens == 60
    assert trace_lib.split(trace, seed=3).plan_half.digest == halves.plan_half.digest
    assert trace_lib.split(trace, seed=4).plan_half.digest != halves.plan_half.digest


def test_arrays_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        small().expert_ids_TLK[0, 0, 0] = 1


def test_one_sequence_has_no_held_out_half():
    with pytest.raises(Refused, match="no held-out half"):
        trace_lib.split(small().select(np.array([0])), seed=0)


def test_large_trace_is_read_in_seconds(tmp_path):
    first = np.random.default_rng(0).integers(32, size=(215_000, 24, 1), dtype=np.uint8)
    ids = (first + np.array([0, 5, 11, 17], np.uint8)) % 32
    trace_lib.save(Trace(ids, 32, np.full(430, 500, np.int32)), tmp_path / "t.npz")
    started = time.monotonic()
    assert trace_lib.load(tmp_path / "t.npz").num_tokens == 215_000
    assert time.monotonic() - started < 5


def ids_with(*values: tuple[tuple[int, int, int], int]) -> np.ndarray:
    ids = small().expert_ids_TLK.copy()
    for place, value in values:
        ids[place] = value
    return ids


def meta(**fields) -> np.ndarray:
    return np.array(json.dumps({"format": "moe_jax.trace", "version": 1} | fields))


BAD_FILES = {
    "id out of range": (arrays(expert_ids=ids_with(((1, 0, 1), 4))), r"expert_ids\[1\]\[0\]\[1\]"),
    "expert twice": (arrays(expert_ids=ids_with(((2, 0, 1), 3))), r"expert_ids\[2\]\[0\]\[1\]"),
    "rank 2": (arrays(expert_ids=np.zeros((3, 2), np.uint8)), "expert_ids shape"),
    "rank 4": (arrays(expert_ids=np.zeros((3, 2, 1, 1), np.uint8)), "expert_ids shape"),
    "signed ids": (arrays(expert_ids=np.zeros((3, 2, 1), np.int64)), "expert_ids dtype"),
    "float ids": (arrays(expert_ids=np.zeros((3, 2, 1), np.float32)), "expert_ids dtype"),
    "no tokens": (arrays(expert_ids=np.zeros((0, 2, 1), np.uint8)), "empty trace"),
    "no layers": (arrays(expert_ids=np.zeros((3, 0, 1), np.uint8)), "empty trace"),
    "no ids": (arrays(expert_ids=None), "no such array"),
    "no seq_len": (arrays(seq_len=None), "no such array"),
    "lengths do not add up": (arrays(seq_len=np.array([2, 2], np.int32)), r"sum\(seq_len\)"),
    "empty sequence": (arrays(seq_len=np.array([3, 0], np.int32)), r"seq_len\[1\]"),
    "negative length": (arrays(seq_len=np.array([4, -1], np.int32)), "seq_len"),
    "float lengths": (arrays(seq_len=np.array([2.0, 1.0])), "seq_len"),
    "no sequences": (arrays(seq_len=np.array([], np.int32)), "seq_len"),
    "huge length": (arrays(seq_len=np.array([2**40, 1])), "seq_len"),
    "too few names": (arrays(seq_name=np.array(["a"])), "seq_name"),
    "names as bytes": (arrays(seq_name=np.array([b"a", b"b"])), "seq_name"),
    "too few homes": (arrays(seq_home=np.array([0], np.int32)), "seq_home"),
    "negative home": (arrays(seq_home=np.array([0, -1], np.int32)), "seq_home"),
    "too few tokens named": (arrays(token_ids=np.array([1, 2], np.int32)), "token_ids length"),
    "negative token": (arrays(token_ids=np.array([1, 2, -1], np.int32)), "token_ids"),
    "tokens as floats": (arrays(token_ids=np.ones(3)), "one whole number per token"),
    "weights of another shape": (arrays(expert_weights=np.zeros(3, np.float16)), "expert_weights"),
    "NaN weights": (arrays(expert_weights=np.full((3, 2, 2), np.nan, np.float16)), "finite"),
    "pickled ids": (arrays(expert_ids=np.array([[[0]], "x"], object)), "never loaded"),
    "pickled meta": (arrays(meta=np.array({"a": 1}, object)), "never loaded"),
    "meta of another program": (arrays(meta=np.array('{"format": "x"}')), "meta version"),
    "meta of another version": (arrays(meta=meta(version=2)), "meta version"),
    "meta is a list": (arrays(meta=np.array("[]")), "meta"),
    "meta is not JSON": (arrays(meta=np.array("{")), "meta"),
    "meta is a number": (arrays(meta=np.array(3)), "meta"),
    "num_experts too small": (arrays(meta=meta(num_experts=3)), r"expert_ids\[0\]\[1\]\[1\]"),
    "num_experts a string": (arrays(meta=meta(num_experts="4")), "num_experts"),
    "num_experts too large": (arrays(meta=meta(num_experts=256)), "num_experts"),
    "too few layer ids": (arrays(meta=meta(num_experts=4, layer_ids=[1])), "layer_ids"),
    "layer ids twice": (arrays(meta=meta(num_experts=4, layer_ids=[1, 1])), "layer_ids"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused(name, tmp_path):
    fields, message = BAD_FILES[name]
    np.savez(tmp_path / "t.npz", **fields)
    with pytest.raises(Refused, match=message):
        trace_lib.load(tmp_path / "t.npz")


def test_num_experts_that_contradicts_the_file_is_refused(tmp_path):
    trace_lib.save(small(), tmp_path / "t.npz")
    with pytest.raises(Refused, match="the trace says 4"):
        trace_lib.load(tmp_path / "t.npz", num_experts=8)


@pytest.mark.parametrize("content", [b"", b"PK", b"hello", b"\x93NUMPY\x01\x00", b"\x80\x04K\x01."])
def test_not_an_npz_is_refused(content, tmp_path):
    (tmp_path / "t.npz").write_bytes(content)
    with pytest.raises(Refused, match="not a whole"):
        trace_lib.load(tmp_path / "t.npz")


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(Refused, match="trace"):
            trace_lib.load(path)


def test_truncated_at_any_place_is_refused(tmp_path):
    trace_lib.save(small(), tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "t.npz").write_bytes(whole[:length])
        with pytest.raises(Refused):
            trace_lib.load(tmp_path / "t.npz")


def npy_with_shape(shape: str, data: bytes = b"\0" * 12) -> bytes:
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head = head.ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


@pytest.mark.parametrize(
    "shape",
    ["(1000000000, 1000, 1000)", "(3, 2, 3)", "(3, 2, 1)", "(-3, 2, 2)", "(2, 2)", "(2**9**9,)"],
)
def test_a_header_that_lies_is_refused_without_memory(shape, tmp_path):
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("expert_ids.npy", npy_with_shape(shape))
        lengths = io.BytesIO()
        np.save(lengths, np.array([3], np.int32))
        archive.writestr("seq_len.npy", lengths.getvalue())
    with pytest.raises(Refused):
        trace_lib.load(tmp_path / "t.npz")


def test_an_archive_directory_that_lies_is_refused(tmp_path):
    """Shape and directory agree on 1 TB; the packed bytes cannot hold it."""
    size = 10**12
    with zipfile.ZipFile(tmp_path / "t.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("expert_ids.npy", npy_with_shape(f"({size // 4}, 2, 2)"))
        archive.writestr("seq_len.npy", b"")
        archive.infolist()[0].file_size = size + 128
    with pytest.raises(Refused, match=r"packed ones can hold|not a whole"):
        trace_lib.load(tmp_path / "t.npz")


def test_mutated_files_are_refused_or_valid(tmp_path):
    """300 random mutations: a clear refusal or a valid trace, never another error."""
    trace_lib.save(small(), tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        mutated = bytearray(whole)
        for at in rng.integers(len(whole), size=rng.integers(1, 5)):
            mutated[at] = rng.integers(256)
        (tmp_path / "t.npz").write_bytes(bytes(mutated))
        try:
            assert trace_lib.load(tmp_path / "t.npz").num_tokens > 0
        except Refused:
            refused += 1
    assert refused > 150
