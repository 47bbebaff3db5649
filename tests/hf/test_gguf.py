"""GGUF files: values of codes, order of rows, tokenizer; damaged and lying files are refused."""

import json
import struct

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.hf import __main__ as hf_main
from moe_jax.hf import config_json, gguf, gguf_llama, gguf_types
from moe_jax.hf import folder as folder_lib
from moe_jax.hf.tokens import Tokenizer
from tests.hf import tiny_gguf


def of_block(name, block):
    """The 32 values of a block, one by one, by the format's formulas."""
    half = lambda at: float(np.frombuffer(block[at : at + 2], "<f2")[0])  # noqa: E731
    scale, values = np.float32(half(0)), []
    if name == "Q8_0":
        return [scale * np.float32(code) for code in struct.unpack("<32b", block[2:])]
    least = np.float32(half(2)) if name.endswith("1") else np.float32(0)
    at = 4 if name.endswith("1") else 2
    fifth = struct.unpack("<I", block[at : at + 4])[0] if name.startswith("Q5") else 0
    zero = {"Q4_0": 8, "Q5_0": 16}.get(name, 0)
    for i in range(32):
        byte = block[-16:][i % 16]
        code = (byte >> 4 if i >= 16 else byte & 15) + 16 * (fifth >> i & 1)
        values.append(scale * np.float32(code - zero) + least)
    return values


@pytest.mark.parametrize("kind", [k for k in gguf_types.KINDS.values() if k.values > 1])
def test_values_of_codes(kind):
    rng = np.random.default_rng(0)
    block_NX = rng.integers(0, 256, (40, kind.size), dtype=np.uint8)
    for at in (1, 3) if kind.name.endswith("1") else (1,):
        block_NX[:, at] &= 0x3F  # no scale is NaN
    expected = [of_block(kind.name, block.tobytes()) for block in block_NX]
    np.testing.assert_array_equal(kind.decode(block_NX.reshape(-1)), np.concatenate(expected))


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_becomes_the_published_folder(tied, tmp_path, capsys):
    """Rows of queries and keys go back to where the published order has them."""
    weights = tiny_gguf.weights(tied=tied)
    path = tiny_gguf.write(tmp_path / "m.gguf", of_tensors=tiny_gguf.tensors(weights))
    assert hf_main.main(["from-gguf", str(path), str(tmp_path / "out")]) == 0
    written = folder_lib.tensors(tmp_path / "out")
    assert written.file_of.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(written.array(name), values)
    plain = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (plain["rms_norm_eps"], plain["eos_token_id"]) == (1e-5, 2)
    assert plain["tie_word_embeddings"] is tied
    assert hf_main.main(["check", str(tmp_path / "out")]) == 0
    with pytest.raises(Refused, match="exists already"):
        gguf_llama.convert(path, tmp_path / "out")


def test_the_end_of_a_turn_ends_a_text(tmp_path):
    """Chat models name it beside the end of a text, which documents to learn from end with."""

    def ends_of(name, **ends):
        named = {f"tokenizer.ggml.{end}_token_id": token for end, token in ends.items()}
        path = tiny_gguf.write(tmp_path / "m.gguf", tiny_gguf.keys(**named))
        gguf_llama.convert(path, tmp_path / name)
        return config_json.read(tmp_path / name).ends

    assert ends_of("three", eos=0, eot=2, eom=1) == (0, 2, 1)
    assert ends_of("one", eos=2, eot=2) == (2,)
    assert ends_of("no eos", eos=None, eot=2) == (2,)
    assert ends_of("none", eos=None) == ()
    for token in (264, [2], 2.0):
        with pytest.raises(Refused, match=r"eot_token_id = .* 0 to 263"):
            ends_of("bad", eot=token)


def test_the_tokenizer_merges_and_keeps_digits_apart(tmp_path):
    gguf_llama.convert(tiny_gguf.write(tmp_path / "m.gguf"), tmp_path / "out")
    tokenizer, words = Tokenizer(tmp_path / "out", 264), tiny_gguf.keys()["tokenizer.ggml.tokens"]
    ids = tokenizer.encode("in the 12<|im_end|>é")
    shown = ["in", "Ġth", "e", "Ġ", "1", "2", "<|im_end|>", "Ã", "©"]
    assert [words[token] for token in ids] == shown
    assert tokenizer.decode(ids) == "in the 12<|im_end|>é"
    plain = tiny_gguf.keys(**{"tokenizer.ggml.pre": "gpt-2"})
    gguf_llama.convert(tiny_gguf.write(tmp_path / "m.gguf", plain), tmp_path / "gpt2")
    ids = Tokenizer(tmp_path / "gpt2", 264).encode("12")
    assert [words[token] for token in ids] == ["12"]


def test_tokens_that_stand_around_a_text(tmp_path):
    words = tiny_gguf.keys()["tokenizer.ggml.tokens"]
    asked = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 1}
    gguf_llama.convert(
        tiny_gguf.write(tmp_path / "m.gguf", tiny_gguf.keys(**asked)), tmp_path / "a"
    )
    ids = Tokenizer(tmp_path / "a", 264).encode("in")
    assert [words[token] for token in ids] == [words[1], "in"]
    asked["tokenizer.ggml.add_bos_token"] = False
    gguf_llama.convert(
        tiny_gguf.write(tmp_path / "m.gguf", tiny_gguf.keys(**asked)), tmp_path / "b"
    )
    assert [words[token] for token in Tokenizer(tmp_path / "b", 264).encode("in")] == ["in"]


HEADS, EPSILON = "llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer.ggml.add_bos_token": True},
            "must be a token, as tokenizer.ggml.add_bos_token",
        ),
        ({"general.architecture": "mamba"}, "must be 'llama'"),
        ({"llama.attention.sliding_window": 8}, "would be ignored"),
        ({"llama.block_count": 1000}, "number of layers with weights"),
        ({"llama.block_count": 1}, "not a part of this model"),
        ({"llama.embedding_length": 64}, "must be|divide"),
        ({"llama.rope.dimension_count": 4}, "width of a head"),
        ({"tokenizer.ggml.model": "llama"}, "a tokenizer that is not read"),
        ({"tokenizer.ggml.pre": "qwen2"}, "a tokenizer that is not read"),
        ({"tokenizer.ggml.merges": ["q qq"]}, "both together a third"),
        ({"tokenizer.ggml.tokens": None}, "must be a list of str"),
        ({"general.alignment": 48}, "power of two"),
        ({"llama.context_length": None}, r"m\.gguf: llama\.context_length = None: is required"),
        ({"llama.context_length": 2**30}, r"m\.gguf: llama\.context_length = .* 1 to 16,777,216"),
        ({"llama.context_length": 128.0}, r"m\.gguf: llama\.context_length = .*a whole number"),
        ({"llama.feed_forward_length": None}, r"m\.gguf: llama\.feed_forward_length = None: is"),
        ({EPSILON: None}, rf"m\.gguf: {EPSILON} = None: is required"),
        ({EPSILON: float("inf")}, rf"m\.gguf: {EPSILON} = inf: must be a number above 0, of 32"),
        ({HEADS: 3}, rf"m\.gguf: {HEADS}_kv = 2: must divide {HEADS} = 3"),
        (
            {HEADS: 3, f"{HEADS}_kv": 1, "llama.embedding_length": 27},
            rf"m\.gguf: {HEADS} = 3: makes heads 9 wide: must be even",
        ),
        ({"llama.attention.key_length": 7}, r"m\.gguf: llama\.attention\.key_length = 7: .* even"),
        ({"tokenizer.ggml.bos_token_id": 999}, "bos_token_id = 999: must be a token of the voca"),
        ({"tokenizer.ggml.bos_token_id": "x"}, "bos_token_id = 'x': must be a token of the voca"),
    ],
)
def test_what_is_not_supported_is_named(changes, message, tmp_path):
    path = tiny_gguf.write(tmp_path / "m.gguf", tiny_gguf.keys(**changes))
    with pytest.raises(Refused, match=message):
        gguf_llama.convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_large_base_of_positions(tmp_path):
    keys = tiny_gguf.keys(**{"llama.rope.freq_base": 3e9})
    gguf_llama.convert(tiny_gguf.write(tmp_path / "m.gguf", keys), tmp_path / "out")
    assert config_json.read(tmp_path / "out").config.model.rope_theta == 3e9


def test_quantised_types_that_are_not_read_are_named(tmp_path):
    tensors = tiny_gguf.tensors()
    tensors[3] = (tensors[3][0], 12, tensors[3][2])  # Q4_K
    with pytest.raises(Refused, match="one of F32, F16, BF16, Q4_0"):
        gguf.read(tiny_gguf.write(tmp_path / "m.gguf", of_tensors=tensors))


def lying(count):
    """A list of numbers that is said to be longer than any memory."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    return head + struct.pack("<IIQ", 9, 0, count) + b"abc"


def without_dimensions(kind):
    """A tensor of rank 0."""
    head = b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"w"
    return head + struct.pack("<IIQ", 0, kind, 0) + b"\0" * 99


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"GGUF", b"PK\3\4" * 9, lying(2**62), lying(4)),
        *(b"GGUF" + struct.pack("<IQQ", 3, *counts) for counts in ((2**63, 0), (0, 2**63))),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60),
        *(without_dimensions(kind) for kind in (0, 2)),
    ],
)
def test_memory_never_follows_a_header(data, tmp_path):
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(Refused):
        gguf.read(tmp_path / "m.gguf")


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_are_read_or_refused(seed, tmp_path):
    """Bytes of the header changed, or the file cut off: a value, or `Refused`; nothing else."""
    rng = np.random.default_rng(seed)
    path = tiny_gguf.write(tmp_path / "m.gguf")
    whole = path.read_bytes()
    first = min(tensor.start for tensor in gguf.read(path).tensors.values())
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(0, first, rng.integers(1, 4)):
            data[at] = rng.integers(0, 256)
        if rng.random() < 0.2:
            data = data[: rng.integers(0, len(data))]
        path.write_bytes(bytes(data))
        try:
            file = gguf.read(path)
            gguf_llama.config(file)
            for name in file.tensors:
                file.array(name)
        except Refused:
            refused += 1
    assert refused > 50


@pytest.mark.slow
def test_mutated_files_are_converted_or_refused(tmp_path):
    rng = np.random.default_rng(9)
    path = tiny_gguf.write(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for number in range(150):
        data = bytearray(whole)
        for at in rng.integers(0, 12_000, rng.integers(1, 3)):
            data[at] = rng.integers(0, 256)
        path.write_bytes(bytes(data))
        try:
            gguf_llama.convert(path, tmp_path / str(number))
        except Refused:
            assert not (tmp_path / str(number)).exists()
