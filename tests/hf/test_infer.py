"""python infer.py --hf=DIR from the command line to a plan, and counts of published configs."""

import dataclasses
import pathlib
import runpy
import shutil

import numpy as np
import pytest
import tokenizers

from moe_jax import auto, data
from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax.hf import __main__ as hf_main
from moe_jax.hf import folder, safetensors
from moe_jax.hf.tokens import Tokenizer
from moe_jax.infer import published, run
from moe_jax.infer.engine import Engine
from moe_jax.infer.server import run as server_run
from moe_jax.infer.server.settings import Settings
from moe_jax.infer.serving.request import Answer, Options
from moe_jax.infer.text import Tokens
from moe_jax.placement import __main__ as placement_main
from moe_jax.placement import shares
from moe_jax.placement.plan import Placement, Plan
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace
from tests.hf import golden

ROOT = pathlib.Path(__file__).parents[2]


def request(family, **how):
    plain = {
        "workdir": None,
        "hf": str(golden.ROOT / family),
        "devices": "2",
        "placement": None,
        "dispatch": None,
        "topology": "",
        "trace": "",
        "prompts": [],
        "held_out": 4,
        "held_out_start": 0,
        "max_new_tokens": 8,
        "sampling": golden.GREEDY,
        "record": None,
        "measure": None,
        "benchmark": False,
    }
    return run.Request(**{**plain, **how})


@pytest.fixture(autouse=True)
def devices_are_there(monkeypatch):
    monkeypatch.setattr(mesh_lib, "initialize", lambda *_: None)


@pytest.mark.parametrize(
    ("family", "top_k"),
    [
        ("olmoe", 3),
        pytest.param("mixtral", 2, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", 2, marks=pytest.mark.slow),
        pytest.param("qwen2_moe", 4, marks=pytest.mark.slow),
        pytest.param("gpt_oss", 2, marks=pytest.mark.slow),
        pytest.param("granitemoe", 3, marks=pytest.mark.slow),
        pytest.param("phimoe", 2, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", 3, marks=pytest.mark.slow),
        pytest.param("deepseek_v2", 3, marks=pytest.mark.slow),
        pytest.param("deepseek_v2_lite", 3, marks=pytest.mark.slow),
    ],
)
def test_record_plan_and_run_under_the_plan(family, top_k, tmp_path, monkeypatch, capsys):
    """One way through: the routing of an imported model is planned, and its answers keep bits."""
    prompts = ["def main(", "import os\n", "the expert", "x"]
    monkeypatch.setattr(run.data, "load_corpus", few_of(data.load_corpus))
    run.run(request(family, record=str(tmp_path / "trace.npz")))
    trace = trace_lib.load(tmp_path / "trace.npz")
    assert (trace.num_layers, trace.top_k, trace.num_experts) == (2, top_k, 8)
    assert trace.seq_len.tolist() == [64] * 4  # of the tokenizer's tokens
    model = golden.config(family, 2).model
    layers = tuple(range(model.num_dense_layers, model.num_layers))  # numbers of the whole model
    assert trace.layer_ids == layers

    plan = tmp_path / "plan.json"
    solve = ["solve", str(tmp_path / "trace.npz"), "--devices=2", f"--out={plan}"]
    assert placement_main.main([*solve, "--objective=rows", "--time-limit=5"]) == 0
    assert Plan.read(plan).layer_ids == layers
    assert Plan.read(plan).digest != Plan(golden.contiguous(family, 2)).digest

    answered = with_logits(monkeypatch)
    said = []
    for where in ({"devices": "2"}, {"devices": None, "placement": str(plan)}):
        capsys.readouterr()
        run.run(request(family, prompts=prompts, **where))
        said.append([line for line in capsys.readouterr().out.splitlines() if "plan" not in line])
    np.testing.assert_array_equal(answered[0].logits_BSV, answered[1].logits_BSV)
    assert answered[0].tokens == answered[1].tokens
    assert said[0][:-1] == said[1][:-1]  # all but the rows moved
    assert any(line.startswith("<s>def main(") for line in said[0])


def test_a_benchmark_says_what_it_ran(monkeypatch, capsys):
    monkeypatch.setattr(run.data, "load_corpus", few_of(data.load_corpus))
    how = {"benchmark": True, "max_new_tokens": 2}
    run.run(request("olmoe", prompts=["x", "def main("], **how))
    # "<s>" and a token for each character
    assert "\n2 sequences of 2 to 10 + 2 tokens: prefill " in capsys.readouterr().out
    run.run(request("olmoe", held_out=33, **how))
    out, progress = capsys.readouterr()
    assert "\n32 of 33 sequences of 64 + 2 tokens: prefill " in out
    assert "33 sequences" not in progress  # nothing is answered but what is timed


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2_lite"])
def test_a_published_model_answers_on_any_mesh(family, monkeypatch):
    """The same tokens, by logits within rounding: bits are promised on one mesh."""
    answered = with_logits(monkeypatch)
    for devices in ("1", "data=2,node=2,expert=2", "fsdp=2,expert=2,tensor=2"):
        run.run(request(family, prompts=["def main(", "x"], devices=devices))
    one, *others = [np.asarray(each.logits_BSV)[:2] for each in answered]
    assert one.shape[-1] == golden.config(family).model.vocab_size
    for other in others:
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-5 * np.ptp(one))
    assert len({tuple(map(tuple, each.tokens)) for each in answered}) == 1


def test_auto_chooses_what_the_server_takes(tmp_path, monkeypatch, capsys):
    """Where every token's experts are on one device, coherent would be the fastest."""
    device_T11 = np.random.default_rng(0).integers(0, 2, (4096, 1, 1))
    ids_TLK = np.broadcast_to(4 * device_T11 + np.arange(2), (4096, 2, 2)).astype(np.uint8)
    trace_lib.save(Trace(ids_TLK, 8, np.array([4096], np.int32)), tmp_path / "trace.npz")
    served = []
    monkeypatch.setattr(run.serve_load, "run", lambda source, *_: served.append(source))
    monkeypatch.setattr(server_run, "serve", lambda source, *_: served.append(source))
    plain = {"host": "127.0.0.1", "port": 0, "max_queue": 1}
    plain |= dict.fromkeys(("context", "seats", "cache_tokens", "bearer_token_file", "record"))
    for how in ({"benchmark": True, "serve_load": True}, {"serve": Settings(**plain)}):
        made = {"dispatch": "auto", "trace": str(tmp_path / "trace.npz"), **how}
        run.run(request("mixtral", **made))
        source = served.pop()
        assert source.config.model.dispatch == "exchange"
        assert "not coherent: model.dispatch = 'coherent' is not served" in capsys.readouterr().out
    asked = dataclasses.replace(source.config, trace=str(tmp_path / "trace.npz"))
    free, _ = auto.resolve(config_lib.with_dispatch(asked, "auto"), source.plan.placement)
    assert free.model.dispatch == "coherent"


def test_processes_compare_what_a_model_holds(tmp_path):
    """A sample of its bytes, whatever files they are in."""
    shutil.copytree(golden.ROOT / "mixtral", tmp_path / "one")
    source = published.find(str(golden.ROOT / "mixtral"), None)
    assert published.find(str(tmp_path / "one"), None).version == source.version
    file = safetensors.read(tmp_path / "one" / folder.SINGLE)
    entry, base = file.tensors["lm_head.weight"], len(file.bytes_)
    whole = (tmp_path / "one" / folder.SINGLE).read_bytes()
    at = len(whole) - base + (entry.start + entry.stop) // 2
    changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    (tmp_path / "one" / folder.SINGLE).write_bytes(changed)
    assert published.find(str(tmp_path / "one"), None).version != source.version


def test_shares_of_copies_say_how_many_nodes_there_are(tmp_path):
    slots_LP = np.tile(np.arange(12, dtype=np.int32) % 8, (2, 1))
    share_LXP = np.stack([shares.quantised(np.ones((3, 12)), row_P) for row_P in slots_LP])
    Plan(Placement(slots_LP, 8, 4, share_LXP)).write(tmp_path / "plan.json")
    found = published.find(str(golden.ROOT / "mixtral"), str(tmp_path / "plan.json"))
    assert str(found.config.mesh) == "node 2 x expert 2"


def with_logits(monkeypatch):
    """A list of all that is generated from now on, logits included."""
    generated, generate = [], Engine.generate

    def kept(*args, **named):
        generated.append(generate(*args, **{**named, "all_logits": True}))
        return generated[-1]

    monkeypatch.setattr(Engine, "generate", kept)
    return generated


def few_of(load_corpus):
    return lambda config: load_corpus(dataclasses.replace(config, max_bytes=100_000))


def test_text_streams_in_whole_characters():
    tokens = Tokens(Tokenizer(golden.ROOT / "mixtral", 264))
    prompt = tokens.encode("né")
    written = []
    follow = tokens.stream(prompt, written.append)
    followed = tokens.encode("ü→z")[1:]  # without <s>
    for token in followed:
        follow(token)
    assert written == ["<s>né".encode(), "ü".encode(), "→".encode(), b"z"]
    assert tokens.join(prompt, followed) == "<s>néü→z"
    end = 257  # </s>
    tokens, ended = Tokens(Tokenizer(golden.ROOT / "mixtral", 264), [end]), []
    assert tokens.join(prompt, [*followed, end, *followed]) == "<s>néü→z</s>"
    follow = tokens.stream(prompt, ended.append)
    for token in (*followed, end, *followed):
        follow(token)
    assert b"".join(ended).decode() == "<s>néü→z</s>"
    ignored = Answer(tokens, prompt, Options(max_tokens=99, ignore_end=True))
    parts = [ignored.add(token)[0] for token in (*followed, end, *followed)]
    assert "".join(parts) == "ü→z</s>ü→z"
    text = np.frombuffer("né\0né</s>\0".encode(), np.uint8)  # documents, each with its end
    said = tokens.corpus(text)
    np.testing.assert_array_equal(said[: len(prompt)], [*prompt[1:], end])
    assert (said == end).sum() == 2  # what a document spells is text


def test_what_is_held_back_is_shown_at_the_end():
    plain = Tokens(Tokenizer(golden.ROOT / "mixtral", 264), [257])
    cut = plain.encode("→")[1:-1]
    for last, options in ((cut[-1], {"max_tokens": len(cut)}), (257, {"max_tokens": 99})):
        answer = Answer(plain, plain.encode("né"), Options(**options))
        tokens = cut if last == cut[-1] else [*cut, last]
        parts = [answer.add(token) for token in tokens]
        assert parts[-1] == ("\ufffd", "length" if last == cut[-1] else "stop")
        assert all(part == ("", None) for part in parts[:-1])
    written = []
    follow = plain.stream([], written.append)
    for token in (*cut, None):
        follow(token)
    assert b"".join(written).decode() == "\ufffd"


def fallback(folder):
    """A tokenizer of bytes and one word, with the decoder of SentencePiece models."""
    words = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581a": 256}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    decoders = tokenizers.decoders
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    made.save(str(folder / "tokenizer.json"))
    return Tokens(Tokenizer(folder, 257))


@pytest.mark.parametrize("before", [[], [256] * 9])
def test_a_text_begins_after_many_bytes(before, tmp_path):
    """They are decoded together or not at all."""
    tokens, written = fallback(tmp_path), []
    follow = tokens.stream([*before, *"漢字漢字漢字".encode()], written.append)
    for token in (*"字".encode(), 256):
        follow(token)
    assert b"".join(written[1:]).decode() == "字 a"


def byte_level(folder):
    """A tokenizer of bytes, and of a space with the first byte of a longer character behind it."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {character: number for number, character in enumerate([*alphabet, "\u0120\xe2"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(words, [("\u0120", "\xe2")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    return Tokens(Tokenizer(folder, 257))


@pytest.mark.parametrize("of_bytes", [False, True])
def test_an_answer_begins_with_the_character_that_a_prompt_is_cut_off_in(of_bytes, tmp_path):
    said = "\xe9\xe9\u20ac5 \u20ac!"
    if of_bytes:
        tokens, ids, another = fallback(tmp_path), list(said.encode()), (256, " a")
    else:
        tokens = byte_level(tmp_path)
        ids = tokens.encode(said)
        another = ids[-1], "!"
    pieces = [tokens.piece(token) for token in ids]
    assert b"".join(pieces).decode() == said
    for cut in range(1, len(ids)):
        whole = b"".join(pieces[:cut]).decode(errors="ignore")
        answer = Answer(tokens, ids[:cut], Options(max_tokens=len(ids) - cut))
        assert "".join(answer.add(token)[0] for token in ids[cut:]) == said[len(whole) :]
        # what no token makes whole is the prompt's
        answer = Answer(tokens, ids[:cut], Options(max_tokens=1))
        assert answer.add(another[0]) == (another[1], "length")
    answer = Answer(tokens, ids[:5], Options(max_tokens=9, stop=("\u20ac",)))
    assert [answer.add(token) for token in ids[5:7]] == [("", None), ("", "stop")]


def test_pieces_are_bytes(tmp_path):
    plain = Tokens(Tokenizer(golden.ROOT / "mixtral", 264))
    said = "a né → \n\x7f漢\xad"
    pieces = [plain.piece(token) for token in plain.encode(said)]
    assert b"".join(pieces).decode() == "<s>" + said
    assert max(map(len, pieces[1:])) < 3 <= len("漢".encode())
    tokens = fallback(tmp_path)
    assert [tokens.piece(token) for token in (0xC3, 65, 256)] == [b"\xc3", b"A", b" a"]
    assert tokens.piece(999) == b""


def test_a_streamed_word_keeps_the_space_in_front(tmp_path):
    """Of tokenizers that mark words by a space in front, which none has at the start of a text."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"\u2581a": 0, "\u2581b": 1}))
    words.decoder = tokenizers.decoders.Metaspace()
    words.save(str(tmp_path / "tokenizer.json"))
    tokens, written = Tokens(Tokenizer(tmp_path, 2)), []
    follow = tokens.stream([0] * 20, written.append)
    for token in (1, 0, 0):
        follow(token)
    assert written == [b"a" + b" a" * 19, b" b", b" a", b" a"]


def test_published_counts(capsys):
    names = (
        *("mixtral_8x7b", "olmoe_1b_7b", "qwen3_30b_a3b", "qwen1_5_moe_a2_7b"),
        *("phi_3_5_moe", "granite_3_0_3b_a800m"),
    )
    assert hf_main.main(["counts", *(str(ROOT / "configs" / f"{name}.py") for name in names)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    for name, line in zip(names, lines, strict=True):
        total, active = (int(word.replace(",", "")) for word in line.split()[1:3])
        theirs = hf_main.PUBLISHED[name]
        assert abs(total / 1e9 / theirs[0] - 1) < 0.005
        if "without the embedding" in line:
            active = int(line.split("active of ")[1].split()[0].replace(",", ""))
        assert abs(active / 1e9 - theirs[1]) < 0.06  # published to one decimal


def test_published_counts_of_gpt_oss(capsys):
    """Within 0.5 % of the published ones, the active ones by their way of counting."""
    names = ("gpt_oss_20b", "gpt_oss_120b")
    paths = [str(ROOT / "configs" / f"{name}.py") for name in names]
    assert hf_main.main(["counts", *paths]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    for name, line in zip(names, lines, strict=True):
        total, active = hf_main.PUBLISHED[name]
        found = [word.replace(",", "") for word in line.replace("of ", "").split()]
        assert abs(int(found[1]) / 1e9 / total - 1) < 0.005
        without = next(int(word) for word in found[3:] if word.isdigit() and len(word) > 9)
        assert abs(without / 1e9 / active - 1) < 0.005


@pytest.mark.parametrize(
    ("name", "digit"), [("deepseek_v2_lite", 0.1), ("deepseek_v2", 1.0), ("deepseek_v3", 1.0)]
)
def test_published_counts_of_deepseek(name, digit, capsys):
    """Their active parameters leave out the embedding of tokens, and are rounded."""
    assert hf_main.main(["counts", str(ROOT / "configs" / f"{name}.py")]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    total, active = (int(word.replace(",", "")) for word in line.split()[1:3])
    config = config_lib.from_config_dict(
        runpy.run_path(ROOT / "configs" / f"{name}.py")["get_config"]()
    )
    multiplied = active - config.model.vocab_size * config.model.d_model
    theirs = hf_main.PUBLISHED[name]
    assert abs(total / 1e9 / theirs[0] - 1) < 0.005
    assert abs(multiplied / 1e9 - theirs[1]) < 0.55 * digit
    assert f"active of {multiplied:,} without the embedding" in line


def test_counts_refuses_a_file_that_is_no_config(tmp_path, capsys):
    (tmp_path / "x.py").write_text("get = 1\n")
    assert hf_main.main(["counts", str(tmp_path / "x.py")]) == 1
    assert "has no get_config" in capsys.readouterr().err


def test_check_says_that_every_tensor_is_there(capsys):
    assert hf_main.main(["check", str(golden.ROOT / "qwen2_moe")]) == 0
    assert "all there, none left over" in capsys.readouterr().out
    assert hf_main.main(["check", str(golden.ROOT)]) == 1
    assert "config.json" in capsys.readouterr().err
