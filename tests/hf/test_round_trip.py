"""Import, then export: the same bytes for every tensor, whatever the layout and the placement."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import checkpoint
from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax.errors import Refused
from moe_jax.hf import __main__ as hf_main
from moe_jax.hf import config_json, folder, layout, load, safetensors, save
from moe_jax.model.parameter import logical_axes
from moe_jax.placement.plan import Plan
from tests import tiny
from tests.hf import golden


def mesh(**sizes):
    return mesh_lib.make(**sizes)


def export(family, model, placement, out, found=None, **how):
    read = golden.tensors(family)
    how = {"dtypes": {name: read.dtype(name) for name in read.file_of}, **how}
    arrays = checkpoint.flatten(model)
    found = found or golden.found_layout(family)
    return save.export(arrays, found, placement, out, like=golden.ROOT / family, **how)


def assert_same_bytes(one: folder.Tensors, other: folder.Tensors) -> None:
    assert one.file_of.keys() == other.file_of.keys()
    for name in one.file_of:
        assert one.dtype(name) == other.dtype(name)
        assert one.array(name).tobytes() == other.array(name).tobytes(), name


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_byte_identical(family, tmp_path):
    placement = golden.random_placement(family, seed=2)
    model = golden.model(family, placement, mesh(fsdp=2, expert=4))
    written = export(family, model, placement, tmp_path / "out")
    assert [path.name for path in written] == [folder.SINGLE]
    assert_same_bytes(folder.tensors(tmp_path / "out"), golden.tensors(family))
    assert config_json.read(tmp_path / "out") == config_json.read(golden.ROOT / family)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_fused_names_and_several_files(family, tmp_path):
    published = config_json.read(golden.ROOT / family)
    fused = layout.of_family(published.family, "fused", published.config.model)
    placement = golden.contiguous(family)
    model = golden.model(family, placement, mesh(expert=4))
    written = export(
        family, model, placement, tmp_path / "f", fused, dtypes="BF16", shard_bytes=30_000
    )
    assert len(written) > 2
    there = folder.tensors(tmp_path / "f")
    found = layout.find(published.family, published.config.model, there)
    assert found.name == "fused"
    again = load.parameters(
        published.config.model, found, there, placement, mesh(expert=4), say=lambda line: None
    )
    export(family, again, placement, tmp_path / "back")
    assert_same_bytes(folder.tensors(tmp_path / "back"), golden.tensors(family))


def test_replicated_experts_are_written_once(tmp_path):
    family = "mixtral"
    placement = tiny.replicated_placement(1)
    model = golden.model(family, placement, mesh(expert=4))
    assert model.blocks.moe.gate_PDF.shape[1] == placement.num_slots
    export(family, model, placement, tmp_path / "out")
    assert_same_bytes(folder.tensors(tmp_path / "out"), golden.tensors(family))


def test_bfloat16_models_hold_bfloat16(tmp_path):
    family = "olmoe"
    sizes = config_json.read(golden.ROOT / family).config.model
    sizes = dataclasses.replace(sizes, dtype="bfloat16")
    placement = golden.contiguous(family)
    model = load.parameters(
        sizes,
        golden.found_layout(family),
        golden.tensors(family),
        placement,
        mesh(expert=4),
        say=lambda line: None,
    )
    assert model.blocks.moe.gate_PDF.dtype == jnp.bfloat16
    assert model.blocks.moe.router_DE.dtype == jnp.float32
    assert model.blocks.attention.query_norm_Z.dtype == jnp.float32
    export(family, model, placement, tmp_path / "out")
    assert_same_bytes(folder.tensors(tmp_path / "out"), golden.tensors(family))


def test_a_device_reads_its_own_experts_only(monkeypatch):
    family = "mixtral"
    placement = golden.random_placement(family, seed=3)
    read = golden.tensors(family)
    touched = []
    array = folder.Tensors.array

    def noting(self, name):
        touched.append(name)
        return array(self, name)

    monkeypatch.setattr(folder.Tensors, "array", noting)
    found = golden.found_layout(family)
    reader = load.Reader(found, read, placement)
    axes, shape = ("layer", "expert", "embed", "mlp"), (2, 8, 32, 24)
    device_1 = (slice(None), slice(2, 4), slice(None), slice(None))
    part = reader.read("blocks.moe.gate_PDF", axes, shape, device_1, np.dtype(np.float32))
    experts_LE = placement.physical_to_logical_LP[:, 2:4]
    expected = [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight"
        for layer, experts_E in enumerate(experts_LE)
        for expert in experts_E
    ]
    assert touched == expected
    for (layer, slot), name in zip(np.ndindex(2, 2), expected, strict=True):
        np.testing.assert_array_equal(part[layer, slot], array(read, name).astype(np.float32).T)


def test_a_part_that_is_not_run_is_named_and_not_written(tmp_path, capsys):
    """DeepSeek-V3's layer behind the last one predicts one more token ahead."""
    family = "deepseek_v3"
    shutil.copytree(golden.ROOT / family, tmp_path / "with")
    read = golden.tensors(family)
    values = {name: read.array(name) for name in read.file_of}
    extra = {f"model.layers.4.{name}": np.ones(3, np.float32) for name in ("enorm", "hnorm")}
    kinds = {name: (read.dtype(name), read.shape(name)) for name in values}
    kinds |= dict.fromkeys(extra, ("F32", (3,)))
    safetensors.write(tmp_path / "with" / folder.SINGLE, kinds, lambda name: (values | extra)[name])
    published = config_json.read(tmp_path / "with")
    tensors = folder.tensors(tmp_path / "with")
    found = layout.find(published.family, published.config.model, tensors)
    assert found.beside == tuple(extra)
    assert hf_main.main(["check", str(tmp_path / "with")]) == 0
    assert "2 more of a part that is not run" in capsys.readouterr().out
    placement = golden.contiguous(family)
    model = golden.model(family, placement, mesh(expert=4))
    export(family, model, placement, tmp_path / "out", found)
    assert_same_bytes(folder.tensors(tmp_path / "out"), read)

    extra = {"model.layers.40.enorm": np.ones(3, np.float32)}  # of no part that is known
    kinds = {name: (read.dtype(name), read.shape(name)) for name in values}
    kinds |= dict.fromkeys(extra, ("F32", (3,)))
    safetensors.write(tmp_path / "with" / folder.SINGLE, kinds, lambda name: (values | extra)[name])
    with pytest.raises(Refused, match=r"'model\.layers\.40\.enorm': 1 is not a part"):
        layout.find(published.family, published.config.model, folder.tensors(tmp_path / "with"))


def test_latent_parameters_are_the_tensors_by_their_published_meaning():
    """Keys and values of a head stand one after the other, heads in order; stacks by layer."""
    family = "deepseek_v3"
    model = golden.model(family, golden.contiguous(family), mesh(expert=4))
    read = lambda name: golden.tensors(family).array(name).astype(np.float32)  # noqa: E731
    for layer in range(4):
        stack = model.dense_blocks if layer < 2 else model.blocks
        stored = read(f"model.layers.{layer}.self_attn.kv_b_proj.weight")
        expand_RHY = np.asarray(stack.attention.expand_RHY[...])[layer % 2]
        for head in range(4):
            key, value = np.split(stored[14 * head : 14 * head + 14], [6])
            np.testing.assert_array_equal(expand_RHY[:, head, :6], key.T)
            np.testing.assert_array_equal(expand_RHY[:, head, 6:], value.T)
    correction = read("model.layers.3.mlp.gate.e_score_correction_bias")
    np.testing.assert_array_equal(model.blocks.moe.correction_E[...][1], correction)
    up = read("model.layers.1.mlp.up_proj.weight")
    np.testing.assert_array_equal(model.dense_blocks.mlp.up_DF[...][1], up.T)


def test_parameters_are_the_tensors_by_their_published_meaning():
    """By hand: a torch Linear is [out, in]; heads of queries lie one after the other."""
    family = "qwen3_moe"
    model = golden.model(family, golden.contiguous(family), mesh(expert=4))
    read = golden.tensors(family)
    stored = read.array("model.layers.1.self_attn.q_proj.weight").astype(np.float32)
    query_DHQ = np.asarray(model.blocks.attention.query_DHQ[...])[1]
    for head in range(4):
        np.testing.assert_array_equal(query_DHQ[:, head], stored[16 * head : 16 * head + 16].T)
    stored = read.array("model.layers.0.self_attn.o_proj.weight").astype(np.float32)
    output_HQD = np.asarray(model.blocks.attention.output_HQD[...])[0]
    np.testing.assert_array_equal(output_HQD.reshape(-1, 32), stored.T)
    assert model.output_DV is None  # tied


def test_written_files_have_the_published_container(tmp_path):
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), np.float16)}
    kinds = {"a": ("F32", (2, 3)), "b": ("F16", (0, 4))}
    safetensors.write(tmp_path / "x.safetensors", kinds, values.__getitem__)
    raw = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    assert header["a"] == {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    assert raw[8 + length :] == values["a"].tobytes()
    file = safetensors.read(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(file.array("a"), values["a"])
    assert file.array("b").shape == (0, 4)
    with pytest.raises(ValueError, match="read-only"):
        file.array("a")[0, 0] = 1


@pytest.fixture
def workdir(tmp_path):
    """A run whose newest step holds the golden Mixtral, its experts under a plan."""
    config = golden.config("mixtral", devices=4)
    placement = golden.random_placement("mixtral", seed=4)
    model = golden.model("mixtral", placement, mesh(expert=4))
    arrays = {f"model.{name}": array for name, array in checkpoint.flatten(model).items()}
    named = checkpoint.flatten(logical_axes(model))
    axes = {f"model.{name}": names for name, names in named.items()}
    infos = checkpoint.describe(arrays, axes)
    contents = checkpoint.Contents(3, infos, Plan(placement), {})
    checkpoint.save(tmp_path / "run" / "checkpoints", arrays, contents)
    (tmp_path / "run" / "config.json").write_text(config_lib.to_json(config))
    return tmp_path / "run"


def test_a_run_is_exported_like_a_published_model(workdir, tmp_path, capsys):
    like, out = golden.ROOT / "mixtral", tmp_path / "out"
    assert hf_main.main(["export", str(workdir), str(out), f"--like={like}"]) == 0
    assert "step 3, 1 file(s)" in capsys.readouterr().out
    assert_same_bytes(folder.tensors(out), golden.tensors("mixtral"))
    assert hf_main.main(["check", str(out)]) == 0

    for run, to, other, says in (
        (workdir, out, like, "exists already"),
        (tmp_path, tmp_path / "new", like, "must be the work directory"),
        (tmp_path, out / "config.json" / "new", like, "cannot be written below"),  # before the run
        (workdir, tmp_path / "new", golden.ROOT / "olmoe", "model.d_ff = 24 in the run, 16 in"),
    ):
        assert hf_main.main(["export", str(run), str(to), f"--like={other}"]) == 1
        assert says in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("value", "dtype"), [(1e5, "F16"), (3.4e38, "BF16"), (np.nan, "F32")])
def test_what_could_not_be_read_back_is_not_written(value, dtype, tmp_path):
    placement, found = golden.contiguous("mixtral", 1), golden.found_layout("mixtral")
    model = golden.model("mixtral", placement, mesh())
    arrays = {name: np.array(array) for name, array in checkpoint.flatten(model).items()}
    arrays["final_norm_D"][-1] = value
    like = golden.ROOT / "mixtral"
    with pytest.raises(Refused, match=rf"model\.norm\.weight = 'NaN or inf': .* in {dtype}"):
        save.export(arrays, found, placement, tmp_path / "out", dtypes=dtype, like=like)
    assert not list(tmp_path.iterdir())
