"""A dense Llama upcycled: the same function at step 0, trained from there, in and out of text."""

import functools
import json
import math
import os
import shutil

import jax
import numpy as np
import pytest

from moe_jax import checkpoint, entry, metrics, permute
from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax.errors import Refused
from moe_jax.hf import config_json, folder, gguf_llama, layout, load
from moe_jax.infer import load as infer_load
from moe_jax.infer import run as infer_run
from moe_jax.model import transformer
from moe_jax.placement.plan import Placement
from moe_jax.train import inputs, loop, replay, resume
from moe_jax.train.bad_batch import BadBatch
from moe_jax.upcycle import __main__ as command
from moe_jax.upcycle import distance, make
from tests.hf import golden
from tests.hf.test_infer import request

# |difference| of upcycled and dense logits over the dense logits' range, both in float32: weights
# of the chosen sum to 1 within k units in the last place, 6e-8 each, in each of 2 layers.
BOUND = 1e-6
REAL_BOUND = 3e-6  # of 30 layers
TOKENS = np.random.default_rng(0).integers(0, 264, (2, 24), np.int32)


def config_of(workdir, texts, **changes):
    """What `train.py --config=WORKDIR/config.py` makes of overrides."""
    plain = entry.read_config(str(workdir / "config.py"))
    for group, values in ({"data": texts} | changes).items():
        plain[group].update(values)
    return config_lib.from_config_dict(plain)


def logits(model, config, num_slots_plan):
    mesh = mesh_lib.make()
    forward = jax.jit(transformer.build_forward(config, mesh))
    out = forward(model, TOKENS, permute.table(num_slots_plan))
    return np.asarray(out.logits_BSV)


@functools.cache
def dense_logits(dense):
    published = config_json.read(dense)
    tensors = folder.tensors(dense)
    found = layout.find(published.family, published.config.model, tensors)
    idle = Placement.contiguous(1, 1, 1)
    model = load.parameters(published.config.model, found, tensors, idle, mesh_lib.make())
    return logits(model, published.config.model, idle)


@pytest.mark.parametrize(("experts", "top_k", "first_dense"), [(8, 2, 0), (4, 3, 1), (2, 1, 0)])
def test_logits_are_those_of_the_dense_model(dense, experts, top_k, first_dense):
    wanted = make.Wanted(experts, top_k, first_dense, seed=3)
    config = make.config(config_json.read(dense).config, wanted)
    plan = Placement.contiguous(2 - first_dense, experts, 1)
    model = make.parameters(dense, config, mesh_lib.make(), plan, wanted.seed)
    expected = dense_logits(dense)
    found = logits(model, config.model, plan)
    assert np.abs(found - expected).max() <= BOUND * np.ptp(expected)
    assert len({*np.asarray(model.blocks.moe.router_DE[...]).std(axis=(1, 2))}) == 2 - first_dense


def test_experts_are_the_dense_weights_and_routers_are_seeded(dense):
    config = make.config(config_json.read(dense).config, make.Wanted(4, 2))
    plan, mesh = Placement.contiguous(2, 4, 1), mesh_lib.make()
    one, same, other = (
        checkpoint.flatten(make.parameters(dense, config, mesh, plan, seed)) for seed in (0, 0, 1)
    )
    weights = folder.tensors(dense)
    for layer in range(2):
        for expert in range(4):
            for name, stored in (("gate_PDF", "gate"), ("up_PDF", "up"), ("down_PFD", "down")):
                np.testing.assert_array_equal(
                    one[f"blocks.moe.{name}"][layer, expert],
                    weights.array(f"model.layers.{layer}.mlp.{stored}_proj.weight").T,
                )
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
        assert np.array_equal(one[name], other[name]) == (name != make.ROUTER)


def test_weights_of_16_bits_become_parameters_of_32(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "half")
    plain = json.loads((dense / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "half" / "config.json").write_text(json.dumps(plain))
    config = make.make(tmp_path / "half", tmp_path / "run", make.Wanted(4, 2))
    assert config.model.dtype == "bfloat16"
    found = checkpoint.newest_good(tmp_path / "run" / "checkpoints", print)
    assert {info.dtype for info in found[1].arrays.values()} == {"float32"}


def train(config, workdir):
    corpus, plan = inputs.prepare(config, workdir)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
        loop.train(config, workdir, corpus, plan)


def test_trains_from_there(upcycled, texts, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(upcycled, workdir)
    assert command.main(["--distance", f"--workdir={workdir}"]) == 0
    assert "median 0.000e+00, 0.000e+00 to 0.000e+00" in capsys.readouterr().out
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 1}
    settings = {"num_steps": 3, "eval_sequences": 2}
    how = {"mesh": {"expert": 2}, "optimizer": optimizer, "train": settings}
    train(config_of(workdir, texts, **how), workdir)
    rows = metrics.read(workdir / "metrics.jsonl")[1]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert command.main(["--distance", f"--workdir={workdir}"]) == 0
    assert "median 0.000e+00" not in capsys.readouterr().out
    with pytest.raises(Refused, match="holds a run of another config"):  # now it has been trained
        inputs.prepare(config_of(workdir, texts, optimizer={"learning_rate": 2e-3}), workdir)


def test_a_bad_step_is_run_again_from_the_upcycled_parameters(upcycled, texts, tmp_path):
    """They stay when no other step but the newest does."""
    workdir = tmp_path / "run"
    shutil.copytree(upcycled, workdir)
    settings = {"num_steps": 2, "checkpoint_every": 1, "eval_every": 1, "eval_sequences": 2}
    config = config_of(workdir, texts, train=settings | {"checkpoints_kept": 1})
    train(config, workdir)
    assert checkpoint.steps(workdir / "checkpoints") == [0, 2]
    corpus, plan = inputs.prepare(config, workdir)
    loss, norm = (metrics.read(workdir / "metrics.jsonl")[1][0][k] for k in ("loss", "grad_norm"))
    window_BS1 = next(loop.data.batches(corpus, config.data))
    first = BadBatch(1, window_BS1, loss, norm, math.inf)
    with jax.numpy_dtype_promotion("standard"):
        assert replay.replay(config, workdir, corpus, plan, first)


def test_a_run_of_parameters_alone_has_a_fresh_state(upcycled, texts):
    config = config_of(upcycled, texts, mesh={"data": 2, "expert": 2})
    mesh = mesh_lib.of_config(config.mesh)
    corpus, plan = inputs.prepare(config, upcycled)
    run, _ = resume.start_or_resume(config, mesh, upcycled, corpus, plan)
    assert run.step == 0
    fresh = checkpoint.flatten(loop.step_lib.initial_state(config, mesh))
    state = checkpoint.flatten(run.state)
    assert state.keys() == fresh.keys()
    for name, array in state.items():
        assert array.sharding == fresh[name].sharding
        if not name.startswith("model."):
            np.testing.assert_array_equal(array, fresh[name])


@pytest.mark.parametrize("kind", ["unmarked", "with the optimizer's", "of a later step", "unknown"])
def test_only_what_says_so_begins_with_parameters_alone(upcycled, texts, tmp_path, kind):
    """A step without optimizer state that does not say that it is one is refused, or damaged."""
    root = tmp_path / "run"
    shutil.copytree(upcycled, root)
    folder_, contents = checkpoint.newest_good(root / "checkpoints", print)
    arrays = checkpoint.restore_numpy(folder_, contents)
    extra = dict(contents.extra)
    step = 3 if kind == "of a later step" else 0
    if kind == "unmarked":
        del extra[resume.ONLY]
    if kind == "unknown":
        extra[resume.ONLY] = "experts"
    infos = dict(contents.arrays)
    if kind == "with the optimizer's":
        arrays["key"] = np.zeros(2, np.uint32)
        infos["key"] = checkpoint.ArrayInfo((2,), "uint32", ("",))
    shutil.rmtree(root / "checkpoints")
    checkpoint.save(
        root / "checkpoints", arrays, checkpoint.Contents(step, infos, contents.plan, extra)
    )
    config = config_of(root, texts)
    (root / "config.json").write_text(config_lib.to_json(config))
    corpus, plan = inputs.prepare(config, root)
    with pytest.raises(Refused) as refused:
        resume.start_or_resume(config, mesh_lib.make(), root, corpus, plan)
    damaged = kind != "unmarked"
    assert refused.value.field == ("checkpoints" if damaged else "checkpoint arrays")


def test_other_weights_or_tokens_are_another_run(upcycled, texts):
    for group, values in (
        ("model", {"top_k": 1}),
        ("model", {"norm_eps": 1e-3}),
        ("data", {**texts, "tokenizer": ""}),
    ):
        with pytest.raises(Refused, match="holds a run of another config"):
            inputs.prepare(config_of(upcycled, texts, **{group: values}), upcycled)
    settings = {"model": {"load_balance_coef": 0.5}, "train": {"num_steps": 7}}
    inputs.prepare(config_of(upcycled, texts, **settings), upcycled)


def test_training_reads_the_tokens_of_the_model(upcycled, texts):
    config = config_of(upcycled, texts)
    corpus, _ = inputs.prepare(config, upcycled)
    text = infer_load.find(str(upcycled), None).text
    assert corpus.train.dtype == np.int32
    raw = loop.data.load_corpus(config.data)
    said = text.join([], corpus.held_out.tolist())  # up to the first end
    first = bytes(raw.held_out).split(b"\0")[0].decode()
    assert said == first + "<|im_end|>"
    np.testing.assert_array_equal(text.corpus(raw.held_out), corpus.held_out)
    assert (corpus.train == 2).sum() == (raw.train == loop.data.SEPARATOR).sum()


def test_a_corpus_of_too_few_tokens(upcycled, texts):
    short = {**texts, "seq_len": 100, "max_bytes": 250, "held_out_fraction": 0.5}
    with pytest.raises(Refused, match=r"tokens of .* text: a window has 101"):
        inputs.prepare(config_of(upcycled, short), upcycled)


def test_answers_text(upcycled, capsysbinary):
    how = {"workdir": str(upcycled), "hf": None, "devices": None, "max_new_tokens": 2}
    asked = request("", **how, prompts=["in the 12"], chat=True)
    infer_run.run(asked)
    said = capsysbinary.readouterr().out.decode()
    turns = ("system\nYou are tiny", "user\nin the 12")
    assert "\n".join(f"<|im_start|>{turn}<|im_end|>" for turn in turns) in said


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ([], "--gguf"),
        (["--hf=nowhere"], "--hf"),
        (["--hf=DENSE", "--gguf=FILE"], "--gguf"),
        (["--hf=DENSE", "--first-dense=2"], "--first-dense"),
        (["--hf=DENSE", "--first-dense=-1"], "--first-dense"),
        (["--hf=DENSE", "--top-k=9"], "--top-k"),
        (["--hf=DENSE", "--top-k=0"], "--top-k"),
        (["--hf=DENSE", "--num-experts=1", "--top-k=1"], "--num-experts"),
        (["--hf=DENSE", "--num-experts=32769"], "--num-experts = 32769: must be at most 32,768"),
        (["--hf=MIXTRAL"], "--hf"),
        (["--hf=DENSE", "--seed=-1"], "--seed"),
        (["--gguf=FILE", f"--seed={2**31}"], "--seed"),
        (["--gguf=FILE", "--top-k=9"], "--top-k"),
        (["--distance", "--loss"], "--loss = True: asks for something else than --distance"),
        (["--loss", "--export=x"], "--export = 'x': asks for something else than --loss"),
        (["--loss", "--gguf=x"], "--gguf = 'x': is only read to make a model"),
        (["--export=x", "--hf=x"], "--hf = 'x': is only read with --loss and to make a model"),
        (["--distance", "--num-experts=8"], "--num-experts = 8: is only read to make a model"),
        (["--hf=DENSE", "--sequences=2"], "--sequences = 2: is only read with --loss"),
        (["--export="], "--export = ''"),
    ],
)
def test_refused_and_nothing_left(dense, tmp_path, capsys, flags, field):
    places = {"DENSE": dense, "FILE": dense.parent / "tiny.gguf"}
    places["MIXTRAL"] = golden.ROOT / "mixtral"
    for word, place in places.items():
        flags = [flag.replace(word, str(place)) for flag in flags]
    assert command.main([*flags, f"--workdir={tmp_path / 'new' / 'run'}"]) == 1
    assert capsys.readouterr().err.startswith(f"refused: {field}")
    assert not [*tmp_path.iterdir()]


def test_distance():
    rng = np.random.default_rng(0)
    shapes = {"gate_PDF": (2, 3, 4, 5), "up_PDF": (2, 3, 4, 5), "down_PFD": (2, 3, 5, 4)}
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    found_L = distance.relative_L(arrays)
    for layer in range(2):
        experts_PN = np.concatenate([a[layer].reshape(3, -1) for a in arrays.values()], axis=1)
        mean_N = experts_PN.mean(axis=0)
        apart_P = np.linalg.norm(experts_PN - mean_N, axis=1)
        expected = np.sqrt((apart_P**2).mean()) / np.linalg.norm(mean_N)
        np.testing.assert_allclose(found_L[layer], expected, rtol=1e-12)


@pytest.mark.slow
def test_the_real_file(tmp_path):
    """SmolLM2-135M-Instruct: `MOE_JAX_SMOLLM2=FILE.gguf pytest -s -m slow tests/upcycle`."""
    file = os.environ.get("MOE_JAX_SMOLLM2")
    if not file:
        pytest.skip("MOE_JAX_SMOLLM2 does not name the GGUF file")
    gguf_llama.convert(file, tmp_path / "dense")
    published = config_json.read(tmp_path / "dense")
    wanted = make.Wanted(8, 2)
    config = make.config(published.config, wanted)
    plan = Placement.contiguous(30, 8, 1)
    model = make.parameters(tmp_path / "dense", config, mesh_lib.make(), plan, 0)
    found = logits(model, config.model, plan)
    expected = dense_logits(tmp_path / "dense")
    off = np.abs(found - expected).max() / np.ptp(expected)
    print(f"largest difference of logits: {off:.2e} of their range")
    assert off <= REAL_BOUND


def test_an_upcycled_model_is_published_as_a_mixtral(upcycled, tmp_path, capsys):
    """Bit for bit, experts in logical order, with its tokenizer and its ends."""
    out = tmp_path / "out"
    assert command.main([f"--workdir={upcycled}", f"--export={out}"]) == 0
    published = config_json.read(out)
    assert published.family.model_type == "mixtral"
    assert published.ends == config_json.ends(upcycled / "tokenizer", 264)
    tensors = folder.tensors(out)
    found = layout.find(published.family, published.config.model, tensors)
    mesh, plan = mesh_lib.make(), Placement.contiguous(2, 4, 1)
    again = checkpoint.flatten(load.parameters(published.config.model, found, tensors, plan, mesh))
    source = infer_load.find(str(upcycled), None)
    stored = checkpoint.flatten(infer_load.parameters(source, mesh))
    assert again.keys() == stored.keys()
    for name in stored:
        np.testing.assert_array_equal(again[name], stored[name], name)
    assert command.main([f"--workdir={upcycled}", f"--export={out}"]) == 1
    assert f"refused: --export = {str(out)!r}: exists already" in capsys.readouterr().err
    assert command.main([f"--workdir={upcycled}", f"--hf={out}"]) == 1
    assert f"refused: --workdir = {str(upcycled)!r}: exists already" in capsys.readouterr().err


def test_a_model_that_names_no_end(dense, tmp_path):
    """An empty list of ends is no value that other programs expect."""
    shutil.copytree(dense, tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    plain = json.loads(path.read_text())
    assert plain.pop("eos_token_id") is not None
    path.write_text(json.dumps(plain))
    make.make(tmp_path / "llama", tmp_path / "run", make.Wanted(2, 1))
    said = (tmp_path / "run" / "tokenizer" / "generation_config.json").read_text()
    assert json.loads(said) == {}
    assert command.main([f"--workdir={tmp_path / 'run'}", f"--export={tmp_path / 'out'}"]) == 0
    assert config_json.read(tmp_path / "out").ends == ()


def test_stretched_positions_are_published(dense, tmp_path):
    """Those of Llama 3.1 and later."""
    llama, workdir, out = tmp_path / "llama", tmp_path / "run", tmp_path / "out"
    shutil.copytree(dense, llama)
    plain = json.loads((llama / "config.json").read_text())
    plain["rope_scaling"] = {
        **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    }
    (llama / "config.json").write_text(json.dumps(plain))
    made = make.make(llama, workdir, make.Wanted(2, 1))
    assert made.model.rope.kind == "llama3"
    assert command.main([f"--workdir={workdir}", f"--export={out}"]) == 0
    assert config_json.read(out).config.model.rope == made.model.rope
    assert json.loads((out / "config.json").read_text())["rope_scaling"] == plain["rope_scaling"]


def test_what_a_mixtral_does_not_have_is_not_published(dense, tmp_path, capsys):
    """It is said when the model is made, too."""
    biased = tmp_path / "biased"
    shutil.copytree(dense, biased)
    plain = json.loads((dense / "config.json").read_text()) | {"attention_bias": True}
    (biased / "config.json").write_text(json.dumps(plain))
    read = folder.tensors(dense)
    arrays = {name: read.array(name) for name in read.file_of}
    for layer in range(2):
        for name, rows in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            bias = f"model.layers.{layer}.self_attn.{name}_proj.bias"
            arrays[bias] = np.ones(rows, np.float32)
    golden.write(biased, arrays, codes="")
    for source, first_dense, says in (
        (dense, 1, "model.num_dense_layers = 1: must be 0"),
        (biased, 0, "model.attention_bias = 'qkvo': must be ''"),
    ):
        workdir, out = tmp_path / f"run {first_dense}", tmp_path / "out"
        make.make(source, workdir, make.Wanted(2, 1, first_dense=first_dense))
        assert f"cannot be published with --export: {says}" in capsys.readouterr().err
        assert command.main([f"--workdir={workdir}", f"--export={out}"]) == 1
        assert f"refused: {says}" in capsys.readouterr().err
        assert not out.exists()


@pytest.mark.parametrize("mesh", [{}, {"expert": 2}])
def test_held_out_loss_is_that_of_the_dense_model_at_step_0(dense, texts, tmp_path, capsys, mesh):
    """On one device, and where a batch is split over several."""
    workdir = tmp_path / "run"
    config = make.make(dense, workdir, make.Wanted(4, 2))
    plain = json.loads(config_lib.to_json(config))
    plain["data"].update(texts)
    plain["mesh"].update(mesh)
    (workdir / "config.json").write_text(json.dumps(plain))
    asked = [f"--workdir={workdir}", f"--hf={dense}", "--loss", "--sequences=3"]
    assert command.main(asked) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "nats" in line]
    step_0, of_dense = (float(line.split(": ")[1].split()[0]) for line in lines)
    assert abs(step_0 - of_dense) < 1e-4
    if not mesh:  # one window has no error
        assert command.main([*asked[:-1], "--sequences=1"]) == 0
        told = capsys.readouterr().out
        assert "windows" in told
        assert "+-" not in told


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (None, "'mixtral': is not a dense model"),
        ({"vocab_size": 300}, "must be the run's model.vocab_size = 264"),
        ({"max_position_embeddings": 8}, "must be at least the run's data.seq_len = 128"),
    ],
)
def test_held_out_loss_of_another_model(dense, upcycled, tmp_path, capsys, changes, says):
    other = tmp_path / "other"
    shutil.copytree(golden.ROOT / "mixtral" if changes is None else dense, other)
    plain = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(plain | (changes or {})))
    assert command.main([f"--workdir={upcycled}", f"--hf={other}", "--loss"]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("refused: --hf")
    assert says in told.err
    assert "nats" not in told.out


def test_an_export_without_a_place_reads_no_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command.main([f"--workdir={tmp_path}", f"--export={tmp_path / 'file' / 'out'}"]) == 1
    assert "cannot be written below" in capsys.readouterr().err
