"""Weights of 8 bits with scales of blocks: what they mean, and a model that holds them."""

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
from moe_jax.hf import config_json, folder, fp8, layout, load, save
from tests.hf import golden

FAMILY = "deepseek_v3"
CONFIG = {
    **{"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"},
    "weight_block_size": [128, 128],
}
ROUTED = "model.layers.2.mlp.experts.5.up_proj.weight"


def by_hand(weights_OI, scales_PJ):
    """Value for value, from bits: E4M3 with bias 7, no infinity."""
    values_OI = np.zeros(weights_OI.shape)
    for o, i in np.ndindex(weights_OI.shape):
        bits = int(weights_OI[o, i])
        sign, exponent, mantissa = bits >> 7, bits >> 3 & 15, bits & 7
        size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
        if (exponent, mantissa) == (15, 7):
            size = np.nan
        values_OI[o, i] = (-1) ** sign * size * float(scales_PJ[o // 128, i // 128])
    return values_OI


def test_values_are_those_of_the_format():
    rng = np.random.default_rng(0)
    weights_OI = rng.integers(0, 256, (130, 257)).astype(np.uint8)
    weights_OI[0, :256] = np.arange(256)
    scales_PJ = np.exp(rng.normal(size=(2, 3))).astype(np.float32)
    decoded_OI = fp8.decode(weights_OI, scales_PJ)
    np.testing.assert_array_equal(decoded_OI, by_hand(weights_OI, scales_PJ).astype(np.float32))
    of_bytes = fp8.decode(np.arange(256, dtype=np.uint8)[None], np.ones((1, 2), np.float32))
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(of_bytes[0], theirs)
    assert fp8.shapes((130, 257)) == {"": (130, 257), "_scale_inv": (2, 3)}


@pytest.fixture
def models(tmp_path):
    """The golden model with projections in 8 bits, and with the same values in bfloat16."""
    rng = np.random.default_rng(1)
    read = golden.tensors(FAMILY)
    plain = {name: read.array(name) for name in read.file_of}
    coded = dict(plain)
    for name, array in list(plain.items()):
        if name.endswith(("_proj.weight", "_with_mqa.weight")):
            weights = rng.integers(0, 255, array.shape).astype(np.uint8)
            weights[weights == 127] = 0
            scale = np.exp(rng.normal(size=(1, 1)) - 3).astype(np.float32)
            coded |= {name: weights, f"{name}_scale_inv": scale}
            plain[name] = by_hand(weights, scale).astype(np.float32).astype(ml_dtypes.bfloat16)
    folders = []
    for name, arrays in (("coded", coded), ("plain", plain)):
        folders.append(pathlib.Path(shutil.copytree(golden.ROOT / FAMILY, tmp_path / name)))
        golden.write(folders[-1], arrays, codes="F8_E4M3")
    say(folders[0], quantization_config=CONFIG)
    return folders


def say(model: pathlib.Path, **changes) -> None:
    said = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**said, **changes}))


def loaded(model: pathlib.Path):
    published = config_json.read(model)
    config = dataclasses.replace(published.config.model, dtype="bfloat16")
    tensors = folder.tensors(model)
    found = layout.find(published.family, config, tensors)
    placement = golden.random_placement(FAMILY, seed=2)
    mesh = mesh_lib.make(expert=4)
    made = load.parameters(config, found, tensors, placement, mesh, say=lambda line: None)
    return found, checkpoint.flatten(made)


def test_a_model_in_8_bits_is_that_in_bfloat16(models, tmp_path, capsys):
    (way, coded), (plain_way, plain) = map(loaded, models)
    assert (way.name, plain_way.name) == ("fp8", "per expert")
    assert coded.keys() == plain.keys()
    for name in plain:
        assert coded[name].dtype == plain[name].dtype
        np.testing.assert_array_equal(np.asarray(coded[name]), np.asarray(plain[name]), name)
    assert hf_main.main(["check", str(models[0])]) == 0
    assert "(fp8)" in capsys.readouterr().out
    placement = golden.random_placement(FAMILY, seed=2)
    out = tmp_path / "out"
    save.export(coded, way, placement, out, dtypes="BF16", like=models[0])
    written, read = folder.tensors(out), folder.tensors(models[0])
    assert written.file_of.keys() == read.file_of.keys()
    for name in read.file_of:  # byte for byte
        assert written.dtype(name) == read.dtype(name)
        assert written.codes(name).tobytes() == read.codes(name).tobytes(), name


def test_only_blocks_that_changed_have_other_codes():
    rng = np.random.default_rng(2)
    before = rng.integers(0, 126, (300, 200)).astype(np.uint8), rng.random((3, 2), np.float32)
    values = fp8.decode(*before)
    values[130, 190] *= 1.3  # of block 1, 1
    values[130, 191] = 1000
    weights, scales = fp8.encode(values, *before)
    changed = np.zeros((300, 200), bool)
    changed[128:256, 128:] = True
    assert not (weights != before[0])[~changed].any()
    assert np.argwhere(scales != before[1]).tolist() == [[1, 1]]
    block = values[128:256, 128:]
    assert scales[1, 1] == block.max() / np.float32(448)
    sizes = np.sort(np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(float))
    sizes *= float(scales[1, 1])
    nearest = np.abs(block.astype(float)[..., None] - sizes).min(-1)
    off = np.abs(fp8.decode(weights, scales)[128:256, 128:] - block.astype(float))
    np.testing.assert_allclose(off, nearest, rtol=0, atol=1e-4 * block.max() / 448)


SCALES = f"{ROUTED}_scale_inv"
BAD = {
    "NaN": (lambda a: a[ROUTED].__setitem__((3, 7), 127), f"{ROUTED} = .*NaN or infinity"),
    "too large": (lambda a: a[SCALES].fill(3e38), f"{ROUTED} = .*NaN or infinity"),
    "missing": (lambda a: a.pop(SCALES), f"{SCALES}.*missing"),
    "misshapen": (lambda a: a.update({SCALES: a[SCALES][:0]}), rf"{SCALES}: \[0, 1\] in the file"),
    "numbers": (
        lambda a: a.update({ROUTED: a[ROUTED].astype(np.float32)}),
        f"{ROUTED} = 'F32': is not read as codes of quantised weights here: must be F8_E4M3",
    ),
}


@pytest.mark.parametrize(("change", "says"), BAD.values(), ids=BAD.keys())
def test_bad_codes(models, change, says):
    golden.changed(models[0], change, codes="F8_E4M3")
    with pytest.raises(Refused, match=says):
        loaded(models[0])


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"weight_block_size": [64, 128]}, "weight_block_size"),
        ({"weight_block_size": None}, "weight_block_size"),
        ({"fmt": "e5m2"}, "fmt"),
        ({"quant_method": "awq"}, "quant_method"),
    ],
)
def test_other_ways_are_refused(models, changes, field):
    say(models[0], quantization_config={**CONFIG, **changes})
    with pytest.raises(Refused, match=rf"quantization_config\.{field} = "):
        config_json.read(models[0])
