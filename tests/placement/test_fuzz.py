"""Files that were damaged or made to harm: a clear refusal or a valid object, and little memory.

FEW mutations of each format in the default run (every second one under a foreign suffix as well,
where its content has to say the same), MANY with

    python -m pytest -m slow tests/placement/test_fuzz.py

Mutations: bits flipped, bytes replaced, cut, doubled, swapped; numbers made huge, negative, broken;
values nested a thousand deep; keys doubled; members of archives renamed, packed, lied about.
"""

import io
import json
import re
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import __main__ as command_line
from moe_jax.placement import topology
from moe_jax.placement.formats import convert as convert_lib
from moe_jax.placement.formats.counts import Counts
from moe_jax.placement.formats.hints import Hints
from moe_jax.placement.homes.file import HomeRules
from moe_jax.placement.homes.rules import TokenRule
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.topology import Topology
from moe_jax.routing import npz as npz_lib
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace
from tests import torch_bytes as tb

FEW, MANY = 200, 2000
BASE, TIMES = 3_000_000, 250  # bytes of memory: at most BASE + TIMES the file
SECONDS = 5.0  # of processor time for one file
EVERY = 20  # so often the command line reads the file as well
RATIO = 12  # of the deflated seeds: what is unpacked counts as the file's


def ids_LTK() -> np.ndarray:
    trace = synthetic.realistic(num_tokens=24, num_layers=3, num_experts=8, top_k=2, seed=0)
    return np.ascontiguousarray(trace.expert_ids_TLK.transpose(1, 0, 2), np.int32)


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def plan_file(name: str, form: str):
    def make(folder) -> bytes:
        rng = np.random.default_rng(0)
        device_LE = rng.permuted(np.tile(np.arange(8) % 4, (3, 1)), axis=1)
        made = Plan(Placement.from_device_LE(device_LE, 4), (1, 2, 4), {"a": [1]}, {"b": 0.5})
        made.write(folder / "ours.json")
        convert_lib.convert(folder / "ours.json", folder / name, form, Hints())
        return (folder / name).read_bytes()

    return make


def own_trace(folder) -> bytes:
    trace = synthetic.realistic(
        num_tokens=60, num_layers=2, num_experts=8, top_k=2, seed=0, num_sequences=4
    )
    weights = np.full(trace.expert_ids_TLK.shape, 0.5, np.float16)
    made = Trace(
        *(trace.expert_ids_TLK, 8, trace.seq_len, weights, ("a", "b/c", "d", "é"), np.arange(4)),
        token_ids_T=np.arange(60),
    )
    trace_lib.save(made, folder / "own.npz")
    return (folder / "own.npz").read_bytes()


def megatron(_) -> bytes:
    lines = [
        {
            "step": step,
            "block": "decoder",
            "layer": layer,
            "rank": rank,
            "num_tokens": 6,
            "topk": 2,
            "top_indices": ids_LTK()[layer % 3, 6 * step : 6 * step + 6].tolist(),
        }
        for step in (0, 1)
        for rank, layers in ((0, (0, 1)), (1, (2, 3)))
        for layer in layers
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def torch_dump(_) -> bytes:
    record = tb.dict_of(
        forward_pass_id=tb.number(3),
        extend_seq_lens=tb.list_of(tb.number(20), tb.number(4)),
        input_ids=tb.list_of(*map(tb.number, range(24))),
        topk_ids_of_layer=tb.whole(ids_LTK(), "0"),
        misc_objects=b"]",
    )
    map_LP = np.tile(np.arange(8), (3, 1))
    pickled = tb.dict_of(
        records=tb.list_of(record), last_physical_to_logical_map=tb.whole(map_LP, "1")
    )
    return tb.archive(pickled, ids_LTK(), map_LP)


def torch_counts(_) -> bytes:
    count_SLE = np.arange(24).reshape(2, 3, 4)
    return tb.archive(tb.dict_of(logical_count=tb.whole(count_SLE, "0")), count_SLE)


def safetensors(_) -> bytes:
    header = {
        "5_3": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]},
        "5_4": {"dtype": "U8", "shape": [2], "data_offsets": [8, 10]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + struct.pack("<2i2B", 7, 8, 9, 1)


def dump_json(_) -> bytes:
    record = {"topk_ids_of_layer": ids_LTK().tolist(), "extend_seq_lens": [20, 4]}
    named = {**record, "input_ids": list(range(24))}
    return json.dumps({"records": [named, named]}).encode()


def homes_file(_) -> bytes:
    tokens = TokenRule(4, np.arange(0, 30, 10), np.arange(12.0).reshape(3, 4), np.ones(4))
    rules = HomeRules("0" * 64, 4, 3, 8, "exchange", None, (tokens,), (), {"seed": 0})
    return json.dumps({**rules._fields(), "digest": rules.digest}).encode()


def topology_file(_) -> bytes:
    return json.dumps(topology.nodes_by_devices(2, 8).to_json()).encode()


# name: extension -> contents of a valid file
SEEDS = {
    "own.json": plan_file("p.json", "own"),
    "sglang.json": plan_file("p.json", "sglang"),
    "vllm.json": plan_file("p.json", "vllm"),
    "tensorrt-llm.yaml": plan_file("p.yaml", "tensorrt-llm"),
    "exflow.csv": plan_file("p.csv", "exflow"),
    "sglang-jax.npy": plan_file("p.npy", "sglang-jax"),
    "own.npz": own_trace,
    "dump.npz": lambda _: npz(topk_ids_of_layer=ids_LTK(), extend_seq_lens=np.array([20, 4])),
    "dump.npy": lambda _: npy(ids_LTK()),
    "dump.json": dump_json,
    "dump.pt": torch_dump,
    "counts.pt": torch_counts,
    "counts.json": lambda _: b'{"logical_count": [[[1, 2], [3, 4]]]}',
    "counts.safetensors": safetensors,
    "megatron.jsonl": megatron,
    "exflow-trace.npy": lambda _: npy(np.array([[0, 1], [3, 2], [3, 3]])),
    "homes.json": homes_file,
    "topology.json": topology_file,
}
SUFFIXES = ("", ".dat", ".json", ".jsonl", ".yaml", ".csv", ".npy", ".npz", ".pt", ".safetensors")
OWN_READERS = ("homes.json", "topology.json")  # not of `convert`
HINTS = {"exflow.csv": {"num_experts": 8}, "own.json": {}, "own.npz": {}, "vllm.json": {}}


def read(name: str, path):
    """The object in a file of this format."""
    if name == "homes.json":
        return HomeRules.read(path)
    if name == "topology.json":
        return topology.preset(str(path))
    hints = Hints(**HINTS.get(name, {"devices": 4}))
    return convert_lib.read(path, hints, wants_trace=name == "exflow-trace.npy").value


# Mutations.


def flip(data: bytearray, rng) -> bytearray:
    for at in rng.integers(len(data), size=rng.integers(1, 9)):
        data[at] ^= 1 << int(rng.integers(8))
    return data


def replace(data: bytearray, rng) -> bytearray:
    for at in rng.integers(len(data), size=rng.integers(1, 4)):
        data[at] = int(rng.choice([0, 255, int(rng.integers(256))]))
    return data


def span(data: bytearray, rng) -> slice:
    at = int(rng.integers(len(data)))
    return slice(at, at + int(rng.integers(1, 1 + max(len(data) // 4, 8))))


def cut(data: bytearray, rng) -> bytearray:
    del data[span(data, rng)]
    return data


def truncate(data: bytearray, rng) -> bytearray:
    return data[: int(rng.integers(len(data)))]


def double(data: bytearray, rng) -> bytearray:
    part = span(data, rng)
    data[part.start : part.start] = data[part]
    return data


def swap(data: bytearray, rng) -> bytearray:
    at, size = sorted(rng.integers(len(data), size=2)), int(rng.integers(1, 17))
    first, second = data[at[0] : at[0] + size], data[at[1] : at[1] + size]
    data[at[1] : at[1] + size], data[at[0] : at[0] + size] = first, second
    return data


NUMBERS = (
    b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"1.5", b"true", b"null", b'"7"', b"[]", b"{}",
    b"2147483648", b"4294967296", b"99999999999999999999", b"9" * 5000, b"1_0", b"0x10", b"",
    b"[" * 1000 + b"]" * 1000, b"[[[[1]]]]", b"\xff", "\u0663".encode(),
)  # fmt: skip


def number(data: bytearray, rng) -> bytearray:
    """A number of the text, or digits in any bytes, become something else."""
    found = list(re.finditer(rb"-?\d+", bytes(data)))
    if not found:
        return flip(data, rng)
    one = found[int(rng.integers(len(found)))]
    data[one.start() : one.end()] = NUMBERS[int(rng.integers(len(NUMBERS)))]
    return data


def key(data: bytearray, rng) -> bytearray:
    """A key stands twice, or is another's, or is gone."""
    found = list(re.finditer(rb'"[\w./-]+": ?', bytes(data)))
    if not found:
        return double(data, rng)
    one, other = (found[int(i)] for i in rng.integers(len(found), size=2))
    what = [one.group() + b"0, " + one.group(), other.group(), b"", b'"x": ', one.group()[:-2]]
    data[one.start() : one.end()] = what[int(rng.integers(len(what)))]
    return data


def member(data: bytearray, rng) -> bytearray:
    """One member of an archive: other bytes with a right checksum, another name, packed, twice."""
    try:
        with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except npz_lib.BROKEN:
        return swap(data, rng)  # damaged already
    at, kind = int(rng.integers(len(members))), int(rng.integers(5))
    name, inside = members[at]
    if kind <= 2 and inside:
        way = BYTES[int(rng.integers(len(BYTES)))]
        members[at] = name, bytes(way(bytearray(inside), rng))
    elif kind == 3:
        other = members[int(rng.integers(len(members)))][0]
        members[at] = other + "x" * int(rng.integers(2)), inside
    else:
        del members[at]
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.2 else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, inside in members:
            if name not in archive.namelist():
                archive.writestr(name, inside)
    return bytearray(out.getvalue())


BYTES = (flip, replace, cut, truncate, double, swap, number)


def mutate(whole: bytes, name: str, rng) -> bytes:
    """One mutation, sometimes two."""
    ways = list(BYTES)
    ways += [number, number, key, key] if name.endswith(("json", "jsonl", "yaml")) else []
    ways += [member] * 5 if name.endswith(("npz", "pt")) else []
    ways += [number] * 3 if name.endswith(("csv", "npy")) else []
    data = bytearray(whole)
    for _ in range(1 + int(rng.random() < 0.25)):
        if data:
            data = ways[int(rng.integers(len(ways)))](data, rng)
    return bytes(data)


# Checks.


def check_memory(name: str, path, content: bytes):
    """Reads the file; what it answered, or the refusal. No other exception, little memory."""
    justified = len(content) * (RATIO if name.endswith("npz") else 1)
    answer, peak = measured(name, path)
    if peak >= BASE + TIMES * justified:  # the process's table of interned strings may have grown,
        answer, peak = measured(name, path)  # 3.8 MB at once, which it does not do twice
    assert peak < BASE + TIMES * justified, (name, peak, len(content))
    if isinstance(answer, Refused):
        assert "\n" not in str(answer)
        assert len(str(answer)) < 1000
    else:
        assert isinstance(answer, (Plan, Trace, Counts, HomeRules, Topology))
    return answer


def measured(name: str, path) -> tuple[object, int]:
    """The answer, and the most memory on the way to it."""
    tracemalloc.reset_peak()
    before, started = tracemalloc.get_traced_memory()[0], time.process_time()
    try:
        answer = read(name, path)
    except Refused as refused:
        answer = refused
    peak = tracemalloc.get_traced_memory()[1] - before
    assert time.process_time() - started < SECONDS
    return answer, peak


def same(one, other) -> bool:
    """Two answers of `check_memory` hold the same; all refusals are alike."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Counts):
        return one.layer_ids == other.layer_ids and np.array_equal(one.count_SLE, other.count_SLE)
    return isinstance(one, Refused) or (
        (one.digest, one.layer_ids) == (other.digest, other.layer_ids)
    )


@pytest.mark.parametrize("name", [name for name in SEEDS if name not in OWN_READERS])
def test_a_file_is_what_it_holds_whatever_its_name(name, tmp_path):
    whole = SEEDS[name](tmp_path)
    (tmp_path / name).write_bytes(whole)
    answer = read(name, tmp_path / name)
    for suffix in SUFFIXES:
        foreign = (tmp_path / f"x{name}").with_suffix(suffix)
        foreign.write_bytes(whole)
        assert same(read(name, foreign), answer), suffix


def check_command(name: str, path, folder, capsys) -> None:
    """The command line says in one line what is wrong, or does its work."""
    option = {"exflow.csv": ["--num-experts=8"], "own.json": [], "own.npz": [], "vllm.json": []}
    for target in ("o.json", "o.npz"):
        words = ["convert", str(path), str(folder / target), *option.get(name, ["--devices=4"])]
        code = command_line.main(words)
        captured = capsys.readouterr()
        assert code in (0, 1)
        assert code == 0 or re.fullmatch(r"refused: .*\n", captured.err)


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SEEDS)
def test_mutated_files_are_refused_or_valid(name, count, tmp_path, capsys):
    whole = SEEDS[name](tmp_path)
    rng = np.random.default_rng(count)
    path, refused = tmp_path / name, 0
    tracemalloc.start()
    try:
        path.write_bytes(whole)
        answer = check_memory(name, path, whole)
        assert not isinstance(answer, Refused), answer
        for at in range(count):
            content = mutate(whole, name, rng)
            path.write_bytes(content)
            answer = check_memory(name, path, content)
            refused += isinstance(answer, Refused)
            if at % 2 and name not in OWN_READERS:
                foreign = path.with_suffix(SUFFIXES[at // 2 % len(SUFFIXES)])
                foreign.write_bytes(content)
                assert same(check_memory(name, foreign, content), answer), (foreign, content)
            if at % EVERY == 0 and name not in OWN_READERS:
                check_command(name, path, tmp_path, capsys)
    finally:
        tracemalloc.stop()
    assert refused > count // 3  # mutations bite


# Made to fill memory.


def bomb(size: int, name: str = "expert_ids.npy") -> bytes:
    """A true array of zeros: a thousandth of its size in the file."""
    header = io.BytesIO()
    shape = (size // 2, 1, 2)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(name, "w") as file:
            file.write(header.getvalue())
            for _ in range(size // 2**20):
                file.write(bytes(2**20))
        archive.writestr("seq_len.npy", npy(np.array([shape[0]])))
    return out.getvalue()


def overlapping(content: bytes) -> bytes:
    """A thousand names for one member."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("dump/data.pkl", b"\x80\x02}.")
        archive.writestr("dump/data/0", content)
        info = archive.getinfo("dump/data/0")
        for n in range(1, 1000):
            twin = zipfile.ZipInfo(f"dump/data/{n}")
            twin.header_offset, twin.CRC = info.header_offset, info.CRC
            twin.file_size = twin.compress_size = len(content)
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
    return out.getvalue()


def lying(content: bytes, field: int, name: bytes) -> bytes:
    """A directory entry whose packed (field 20) or unpacked (24) size is two gigabytes."""
    at = content.rindex(b"PK\x01\x02", 0, content.rindex(name))
    data = bytearray(content)
    data[at + field : at + field + 4] = struct.pack("<I", 2**31 - 1)
    return bytes(data)


def long_header(content: bytes) -> bytes:
    """An npy array, version 2, whose header claims to be four gigabytes long."""
    return content[:6] + b"\x02\x00" + b"\xff" * 4 + content[10:]


BOMBS = {
    "packed-size.pt": lying(torch_counts(None), 20, b"dump/data/0"),
    "unpacked-size.pt": lying(torch_counts(None), 24, b"dump/data.pkl"),
    "packed-size.npz": lying(npz(expert_ids=ids_LTK()), 20, b"expert_ids.npy"),
    "unpacked-size.npz": lying(npz(expert_ids=ids_LTK()), 24, b"expert_ids.npy"),
    "header.npy": long_header(npy(ids_LTK())),
    "text.pt": tb.archive(b"X\xff\xff\xff\x7f"),
    "memo.pt": tb.archive(b"Nr\xff\xff\xff\x7f" * 10 + b"]"),
    "zeros.npz": bomb(2**28),
    "zeros-of-sglang.npz": bomb(2**28, "topk_ids_of_layer.npy"),
    "overlapping.pt": overlapping(bytes(50_000)),
    "deep.json": b"[" * 500_000,
    "deep-objects.json": b'{"records":' * 100_000,
    "wide.json": b'{"records": [' + b"[]," * 100_000 + b"[]]}",
    "long-number.json": b'{"logical_count": [[' + b"9" * 1_000_000 + b"]]}",
    "long-line.yaml": b"num_slots: 4\ninitial_global_assignments:\n  3: [" + b"1, " * 200_000,
    "many-lines.csv": b"Expert,Node\n" + b"0,0\n" * 200_000,
    "header.safetensors": struct.pack("<Q", 2**40) + b"{}" * 1000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_do_not_go_off(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(BOMBS[name])
    tracemalloc.start()
    try:
        answer = check_memory(name if name.endswith("json") else "x", path, BOMBS[name])
    finally:
        tracemalloc.stop()
    assert isinstance(answer, Refused)


@pytest.mark.parametrize("name", ["own.json", "homes.json"])
def test_numbers_beyond_floats_are_refused(name, tmp_path):
    """They would be read as infinite, and could not be written again."""
    content = SEEDS[name](tmp_path).replace(b'"seed": 0', b'"seed": 1e999')
    (tmp_path / name).write_bytes(content.replace(b'"b": 0.5', b'"b": 1e999'))
    with pytest.raises(Refused, match="1e999 is too large"):
        read(name, tmp_path / name)
    if name == "own.json":
        with pytest.raises(Refused, match="1e999 is too large"):
            Plan.read(tmp_path / name)


HOSTILE = "\x1b[31m\nrefused: nothing\r" + "x" * 10_000
NAMED = {
    "a.safetensors": lambda: safetensors_of({HOSTILE: {"dtype": "F8"}}),
    "a.json": lambda: json.dumps({HOSTILE: 1, "name": "x"}).encode(),
    "topology.json": lambda: json.dumps({HOSTILE: 1}).encode(),
    "a.yaml": lambda: HOSTILE.encode(),
    "a.csv": lambda: b"Expert,Node\n" + HOSTILE.encode(),
    "a.pt": lambda: tb.archive(tb.name("os", HOSTILE.replace("\n", " "))),
    "a.jsonl": lambda: json.dumps({"step": HOSTILE}).encode(),
}


def safetensors_of(header: dict) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("name", NAMED)
def test_names_in_files_cannot_write_to_the_terminal(name, tmp_path):
    """No control characters, no second line, no endless line."""
    (tmp_path / name).write_bytes(NAMED[name]())
    with pytest.raises(Refused) as refused:
        read(name, tmp_path / name)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 2000


def test_a_recording_that_packs_well_is_read(tmp_path):
    """Below the limit a true array of zeros is data like any other."""
    (tmp_path / "t.npz").write_bytes(bomb(2**21))
    with pytest.raises(Refused, match="once per layer"):  # its tokens choose expert 0 twice
        trace_lib.load(tmp_path / "t.npz", 2)
