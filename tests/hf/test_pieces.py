"""Pieces read block by block are what whole tensors are."""

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest

from moe_jax import mesh as mesh_lib
from moe_jax.errors import Refused
from moe_jax.hf import fp8, mxfp4, pieces, safetensors
from tests.hf import golden

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "dtypes", [(BFLOAT16, BFLOAT16), (BFLOAT16, np.float32), (np.float32,) * 2]
)
@pytest.mark.parametrize(
    "shape", [(70,), (70, 130), (3, 70, 130), (130, 3, 70), (5, 1, 70), (0, 4)]
)
@pytest.mark.parametrize("host", ["", "none"])
def test_put_is_an_assignment(shape, dtypes, host, monkeypatch):
    monkeypatch.setattr(pieces, "SMALL", 100)
    if host:  # JAX has an accelerator alone
        monkeypatch.setattr(pieces, "_host", lambda: None)
    values = RNG.standard_normal(shape).astype(dtypes[0])
    for order in itertools.permutations(range(len(shape))):
        target = np.empty([shape[axis] for axis in order], dtypes[1])
        pieces.put(values, target.transpose(np.argsort(order)))
        np.testing.assert_array_equal(target, values.transpose(order).astype(dtypes[1]))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_small_blocks_change_nothing(family, monkeypatch):
    """On devices that hold parts of rows and of columns."""
    placement = golden.random_placement(family, seed=4, devices=2)
    mesh = mesh_lib.make(fsdp=2, expert=2, tensor=2)
    expected = golden.model(family, placement, mesh)
    monkeypatch.setattr(pieces, "BLOCK", 100)
    monkeypatch.setattr(pieces, "SMALL", 7)
    jax.tree.map(np.testing.assert_array_equal, golden.model(family, placement, mesh), expected)


def piece(tmp_path, code, order):
    """[2 heads, 150, 256] or so in codes, and what it means."""
    if code is fp8:
        parts = {"w": RNG.integers(0, 126, (300, 256)).astype(np.uint8)}
        parts["w_scale_inv"] = RNG.random((3, 2), np.float32)
        kinds = {"w": "F8_E4M3", "w_scale_inv": "F32"}
    else:
        parts = {"w_blocks": RNG.integers(0, 255, (300, 8, 16)).astype(np.uint8)}
        parts["w_scales"] = RNG.integers(100, 130, (300, 8)).astype(np.uint8)
        kinds = dict.fromkeys(parts, "U8")
    named = {name: (kinds[name], array.shape) for name, array in parts.items()}
    safetensors.write(tmp_path / "w.safetensors", named, parts.__getitem__)
    file = safetensors.read(tmp_path / "w.safetensors")
    made = pieces.Piece(file, "w", [file.codes(n) for n in parts], code, [2, 150, 256], order)
    return made, code.decode(*parts.values()).reshape(2, 150, 256).transpose(order)


@pytest.mark.parametrize("code", [mxfp4, fp8])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_codes_in_blocks(code, order, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK", 2**15)
    made, expected = piece(tmp_path, code, order)
    for inner in ((slice(None),) * 3, (slice(1, 2), slice(None), slice(3, 40))):
        part = expected[inner]
        out = np.empty(part.shape, np.float32)
        copies = list(made.copies(out, inner))
        assert len(copies) == 1 or len(copies) > 2
        pieces.run(iter(copies))
        np.testing.assert_array_equal(out, part)


def test_a_file_that_becomes_shorter_is_refused(tmp_path):
    made, expected = piece(tmp_path, fp8, (0, 1, 2))
    with made.file.path.open("r+b") as opened:
        opened.truncate(1000)
    with pytest.raises(Refused, match="has become shorter since its header was read"):
        pieces.run(made.copies(np.empty(expected.shape, np.float32), (slice(None),) * 3))


def test_the_first_failure_is_raised():
    def fail(number):
        raise ValueError(number)

    with pytest.raises(ValueError, match=r"^0$"):
        pieces.run(lambda n=n: fail(n) for n in range(100))
