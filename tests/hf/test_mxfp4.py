"""Weights of 4 bits and a scale: what they mean, and models that hold them."""

import dataclasses
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest

from moe_jax import checkpoint
from moe_jax import mesh as mesh_lib
from moe_jax.errors import Refused
from moe_jax.hf import __main__ as hf_main
from moe_jax.hf import config_json, folder, layout, load, mxfp4, pieces, save
from tests.hf import golden

FAMILY = "gpt_oss"
EXPERTS = "model.layers.{}.mlp.experts."
PARTS = ("blocks", "scales")


def by_the_standard(blocks_RGX, scales_RG):
    """Value for value, from bits: E2M1 with bias 1, E8M0 with bias 127."""
    rows, groups, _ = blocks_RGX.shape
    values_RV = np.zeros((rows, 32 * groups))
    for r, g, x in np.ndindex(blocks_RGX.shape):
        for place in range(2):
            bits = int(blocks_RGX[r, g, x]) >> (4 * place) & 15
            sign, exponent, mantissa = bits >> 3, bits >> 1 & 3, bits & 1
            size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
            value = (-1) ** sign * size * 2.0 ** (int(scales_RG[r, g]) - 127)
            values_RV[r, 32 * g + 2 * x + place] = value
    return values_RV


def test_values_are_those_of_the_standard():
    rng = np.random.default_rng(0)
    blocks_RGX = rng.integers(0, 256, (8, 3, 16)).astype(np.uint8)
    blocks_RGX[:5, 0] = np.arange(80).reshape(5, 16)
    scales_RG = rng.integers(0, 252, (8, 3)).astype(np.uint8)  # 6 x 2^125 is below infinity
    scales_RG[0] = 0, 127, 252
    decoded_RV = mxfp4.decode(blocks_RGX, scales_RG)
    np.testing.assert_array_equal(decoded_RV, by_the_standard(blocks_RGX, scales_RG))
    as_bfloat16 = decoded_RV.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(as_bfloat16.astype(np.float32), decoded_RV)  # exact there


def test_values_are_those_of_transformers():
    """Bit by bit, the sign of zero too."""
    found = np.load(golden.ROOT.parent / "hf_mxfp4.npz", allow_pickle=False)
    decoded = mxfp4.decode(found["blocks"], found["scales"]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(decoded.view(np.uint16), found["bfloat16_bits"])


def test_a_scale_that_is_no_number():
    blocks_GX, scales_G = np.zeros((2, 16), np.uint8), np.array([127, 255], np.uint8)
    decoded_V = mxfp4.decode(blocks_GX, scales_G)
    assert (decoded_V[:32] == 0).all()
    assert np.isnan(decoded_V[32:]).all()


@pytest.fixture
def models(tmp_path):
    """The golden model with experts in codes as published, and in bfloat16 by the standard."""
    rng = np.random.default_rng(1)
    read = golden.tensors(FAMILY)
    plain = {name: read.array(name) for name in read.file_of}
    coded = dict(plain)
    for layer in range(2):
        for name in ("gate_up_proj", "down_proj"):
            name = EXPERTS.format(layer) + name
            experts, summed, width = plain[name].shape
            blocks = rng.integers(0, 256, (experts, width, summed // 32, 16)).astype(np.uint8)
            blocks[::2] &= 0x33  # at most 1.5: the standard would choose another scale
            scales = rng.integers(120, 126, blocks.shape[:-1]).astype(np.uint8)
            del coded[name]
            coded |= {name + "_blocks": blocks, name + "_scales": scales}
            values = [by_the_standard(*of_expert) for of_expert in zip(blocks, scales, strict=True)]
            plain[name] = np.stack(values).swapaxes(1, 2).astype(ml_dtypes.bfloat16)
    folders = []
    for name, arrays in (("coded", coded), ("plain", plain)):
        folders.append(pathlib.Path(shutil.copytree(golden.ROOT / FAMILY, tmp_path / name)))
        golden.write(folders[-1], arrays, codes="U8")
    said = json.loads((folders[0] / "config.json").read_text())
    said |= {"quantization_config": {"quant_method": "mxfp4"}, "dtype": None}
    (folders[0] / "config.json").write_text(json.dumps(said))
    return folders


def loaded(model: pathlib.Path, dtype: str, placement=None):
    published = config_json.read(model)
    config = dataclasses.replace(published.config.model, dtype=dtype)
    tensors = folder.tensors(model)
    found = layout.find(published.family, config, tensors)
    placement = placement or golden.contiguous(FAMILY)
    mesh = mesh_lib.make(expert=4)
    made = load.parameters(config, found, tensors, placement, mesh, say=lambda line: None)
    return found, checkpoint.flatten(made)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_in_codes_is_that_in_bfloat16(models, dtype, capsys):
    placement = golden.random_placement(FAMILY, seed=2)
    (way, coded), (plain_way, plain) = (loaded(m, dtype, placement) for m in models)
    assert (way.name, plain_way.name) == ("mxfp4", "fused")
    assert coded.keys() == plain.keys()
    for name in plain:
        assert coded[name].dtype == plain[name].dtype
        np.testing.assert_array_equal(np.asarray(coded[name]), np.asarray(plain[name]), name)
    assert config_json.read(models[0]).config.model.dtype == "bfloat16"  # it says none
    assert hf_main.main(["check", str(models[0])]) == 0
    assert "(mxfp4)" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_are_written_back_byte_for_byte(models, dtype, tmp_path):
    placement = golden.random_placement(FAMILY, seed=2)
    way, arrays = loaded(models[0], dtype, placement)
    save.export(arrays, way, placement, tmp_path / "out", dtypes="BF16", like=models[0])
    written, coded = folder.tensors(tmp_path / "out"), folder.tensors(models[0])
    assert written.file_of.keys() == coded.file_of.keys()
    for name in coded.file_of:
        assert written.dtype(name) == coded.dtype(name)
        assert written.codes(name).tobytes() == coded.codes(name).tobytes(), name


def test_only_groups_that_changed_have_other_codes(models, tmp_path):
    way, arrays = loaded(models[0], "float32")
    name = "blocks.moe.gate_PDF"
    changed = np.array(arrays[name])
    changed[1, 3, 5, 7] = 100.0  # layer, expert, and place in row 14 of gate and up in turns
    placement = golden.contiguous(FAMILY)
    out = tmp_path / "out"
    save.export(arrays | {name: changed}, way, placement, out, dtypes="BF16", like=models[0])
    written, coded = folder.tensors(out), folder.tensors(models[0])
    for tensor in coded.file_of:
        differ = written.codes(tensor) != coded.codes(tensor)
        if tensor in [EXPERTS.format(1) + f"gate_up_proj_{part}" for part in PARTS]:
            assert {tuple(place[:3]) for place in np.argwhere(differ)} == {(3, 14, 0)}
        else:
            assert not differ.any(), tensor
    blocks, scales = (written.codes(EXPERTS.format(1) + f"gate_up_proj_{part}") for part in PARTS)
    assert scales[3, 14, 0] == 127 + 4  # 100 lies from 4 x 16 on
    assert mxfp4.decode(blocks, scales)[3, 14, 5] == 96
    changed[1, 3, 5, 7] = np.nan
    again = tmp_path / "again"
    with pytest.raises(Refused, match="gate_up_proj = 'NaN or inf'"):
        save.export(arrays | {name: changed}, way, placement, again, dtypes="BF16", like=models[0])


def test_values_are_rounded_to_the_nearest_by_the_standard():
    """Against every magnitude with its scale; ties go to the even mantissa."""
    rng = np.random.default_rng(0)
    values_NV = (rng.standard_normal((300, 32)) * np.exp(rng.normal(size=(300, 1)) * 8)).astype(
        np.float32
    )
    values_NV[0] = [6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25] * 4
    values_NV[1] = 0
    blocks, scales = np.zeros((300, 1, 16), np.uint8), np.full((300, 1), 200, np.uint8)
    blocks[1] = 3  # not what it means
    made = mxfp4.encode(values_NV, blocks, scales)
    decoded_NV = mxfp4.decode(*made)
    for values_V, scale, decoded_V in zip(
        values_NV[2:], made[1][2:, 0], decoded_NV[2:], strict=True
    ):
        assert int(scale) - 127 == int(np.floor(np.log2(np.abs(values_V).max()))) - 2
        sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) * 2.0 ** (int(scale) - 127)
        nearest = np.abs(np.abs(values_V[:, None].astype(float)) - sizes).min(axis=1)
        np.testing.assert_array_equal(np.abs(values_V.astype(float) - decoded_V), nearest)
    np.testing.assert_array_equal(decoded_NV[0], [6, 4, 4, 2, 2, 1, 1, 0] * 4)
    assert not decoded_NV[1].any()


def test_codes_are_not_made_up(models, tmp_path):
    """A folder without codes to go by; and a model that was read in codes as one in bfloat16."""
    way, arrays = loaded(models[0], "bfloat16")
    placement = golden.contiguous(FAMILY)
    with pytest.raises(Refused, match=r"--like.*must hold the quantised weights"):
        save.export(arrays, way, placement, tmp_path / "out", dtypes="BF16", like=models[1])
    assert not (tmp_path / "out").exists()
    published = config_json.read(models[1])
    fused = layout.of_family(published.family, "fused", published.config.model)
    save.export(arrays, fused, placement, tmp_path / "out", dtypes="BF16", like=models[1])
    written, plain = folder.tensors(tmp_path / "out"), folder.tensors(models[1])
    for name in plain.file_of:
        assert written.array(name).tobytes() == plain.array(name).tobytes(), name


def test_a_device_decodes_its_own_experts_only(models, monkeypatch):
    decoded = []
    decode = mxfp4.decode
    monkeypatch.setattr(pieces, "THREADS", 1)  # in order
    monkeypatch.setattr(mxfp4, "decode", lambda *a: decoded.append(a[0]) or decode(*a))
    published = config_json.read(models[0])
    tensors = folder.tensors(models[0])
    found = layout.find(published.family, published.config.model, tensors)
    placement = golden.random_placement(FAMILY, seed=3)
    reader = load.Reader(found, tensors, placement)
    axes, shape = ("layer", "expert", "embed", "mlp"), (2, 8, 32, 32)
    device_1 = (slice(None), slice(2, 4), slice(None), slice(None))
    reader.read("blocks.moe.up_PDF", axes, shape, device_1, np.dtype(np.float32))
    experts_LE = placement.physical_to_logical_LP[:, 2:4]
    expected = [
        tensors.codes(EXPERTS.format(layer) + "gate_up_proj_blocks")[expert, 1::2]
        for layer, experts_E in enumerate(experts_LE)
        for expert in experts_E
    ]
    for ours, theirs in zip(decoded, expected, strict=True):
        assert np.shares_memory(ours, theirs) or np.array_equal(ours, theirs)
        assert ours.shape == (32, 1, 16)


SCALES = EXPERTS.format(1) + "down_proj_scales"
BAD = {
    "NaN": (lambda a: a[SCALES].__setitem__((7, 3, 0), 255), f"{SCALES} = .*NaN or infinity"),
    "too large": (lambda a: a[SCALES].__setitem__((7, 3, 0), 254), f"{SCALES} = .*NaN or infini"),
    "missing": (lambda a: a.pop(SCALES), f"{SCALES}.*missing"),
    "misshapen": (lambda a: a.update({SCALES: a[SCALES][:, :, :0]}), rf"{SCALES}: \[8, 32, 0\] in"),
    "numbers": (
        lambda a: a.update({SCALES: a[SCALES].astype(np.float32)}),
        f"{SCALES} = 'F32': is not read as codes of quantised weights",
    ),
}


@pytest.mark.parametrize(("change", "says"), BAD.values(), ids=BAD.keys())
def test_bad_codes(models, change, says):
    golden.changed(models[0], change, codes="U8")
    with pytest.raises(Refused, match=says):
        loaded(models[0], "float32")


@pytest.mark.parametrize(
    ("field", "key"), [("d_model", "hidden_size"), ("d_ff", "intermediate_size")]
)
def test_a_width_that_is_not_whole_groups(models, field, key):
    published = config_json.read(models[0])
    config = dataclasses.replace(published.config.model, **{field: 48})
    with pytest.raises(Refused, match=rf"config\.json: {key} = 48: must be a multiple of 32"):
        layout.find(published.family, config, folder.tensors(models[0]))
