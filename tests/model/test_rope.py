"""Rotary positions against transformers' own functions, and turning against complex numbers."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as config_lib
from moe_jax.config import RopeConfig
from moe_jax.errors import Refused
from moe_jax.hf import rope_json
from moe_jax.model import rope
from tests import tiny

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "hf_rope.json").read_text())


def of_golden(golden):
    read = rope_json.read(pathlib.Path("config.json"), golden["config"], 1e4, {})
    width = golden["width"]
    model = {"model__d_head": width, "model__rope": read.fields, "model__rope_theta": read.theta}
    config = tiny.config(**model).model
    return rope.of_config(config.rope, config.rope_theta, width)


@pytest.mark.parametrize("name", GOLDEN)
def test_frequencies_and_scale_equal_those_of_transformers(name):
    made = of_golden(GOLDEN[name])
    long_F = made.long_frequencies or made.frequencies
    for ours_F, key in ((made.frequencies, "frequency"), (long_F, "long_frequency")):
        theirs_F = np.array(GOLDEN[name][key])
        np.testing.assert_allclose(ours_F, theirs_F, rtol=2.5e-7)  # two units in the last place
        # Nearly all bit by bit, and the rest by powers of torch that are not rounded to nearest:
        # one rounding of a frequency is 1e-2 radians at position 100,000.
        assert (np.array(ours_F) != theirs_F).sum() <= 2
    assert made.scale == pytest.approx(GOLDEN[name]["scale"], rel=1e-12)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("older", [False, True])
def test_what_is_written_is_read_again(name, older):
    golden = GOLDEN[name]
    read = rope_json.read(pathlib.Path("config.json"), golden["config"], 1e4, {})
    config = tiny.config(model__d_head=golden["width"], model__rope=read.fields).model.rope
    said = rope_json.written(config, read.theta)
    json.dumps(said)
    if older:  # versions of transformers before 5 know nothing of the other
        del said["rope_parameters"]
    again = rope_json.read(pathlib.Path("config.json"), said, 7.0, {})
    assert tiny.config(model__d_head=golden["width"], model__rope=again.fields).model.rope == config
    assert again.theta == read.theta


def test_the_older_way_of_writing_says_the_same():
    golden = GOLDEN["yarn of DeepSeek-V3"]
    group = dict(golden["config"]["rope_parameters"])
    older = {"rope_theta": group.pop("rope_theta"), "max_position_embeddings": 163840}
    group["type"] = group.pop("rope_type")
    assert of_golden({**golden, "config": {**older, "rope_scaling": group}}) == of_golden(golden)


def test_phi_writes_its_scale_as_two_equal_numbers():
    golden = GOLDEN["longrope"]
    group = {**golden["config"]["rope_parameters"], "short_mscale": 1.25, "long_mscale": 1.25}
    config = {**golden["config"], "rope_parameters": group}
    assert of_golden({**golden, "config": config}).scale == 1.25


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_equals_multiplication_by_complex_numbers(interleaved):
    rng = np.random.default_rng(0)
    x_BSHQ, width = rng.normal(size=(2, 3, 4, 8)), 8
    position_BS = np.array([[0, 1, 7], [5, 2, 900]])
    made = rope.Rope((1.0, 0.3, 0.05, 0.001), 1.5, interleaved=interleaved)
    turn_BSF = 1.5 * np.exp(1j * position_BS[:, :, None] * np.array(made.frequencies))
    if interleaved:
        pairs = x_BSHQ[..., 0::2] + 1j * x_BSHQ[..., 1::2]
    else:
        pairs = x_BSHQ[..., : width // 2] + 1j * x_BSHQ[..., width // 2 :]
    turned = pairs * turn_BSF[:, :, None]
    actual = rope.rotate(jnp.asarray(x_BSHQ, jnp.float32), jnp.asarray(position_BS), made)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-4)


def test_long_sequences_have_frequencies_of_their_own():
    made = rope.Rope((1.0,), long_frequencies=(0.5,), long_from=10)
    x_BSHQ = jnp.ones((3, 2, 1, 2))
    position_BS = jnp.array([[0, 9], [9, 10], [3, 3]])
    actual = rope.rotate(x_BSHQ, position_BS, made)
    for row, frequency in enumerate((1.0, 0.5, 1.0)):
        one = rope.rotate(x_BSHQ[row:][:1], position_BS[row:][:1], rope.Rope((frequency,)))
        np.testing.assert_array_equal(actual[row : row + 1], one)


def test_temperature_of_latent_attention():
    assert rope.logit_scale(RopeConfig(mscale_all_dim=1.0)) == 1
    config = RopeConfig(kind="yarn", factor=40.0, original_seq_len=4096, mscale_all_dim=0.707)
    assert rope.logit_scale(config) == pytest.approx((0.0707 * np.log(40) + 1) ** 2)


YARN = {"kind": "yarn", "factor": 4.0, "original_seq_len": 64}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"kind": "yarm"}, "did you mean 'yarn'"),
        ({"kind": "dynamic"}, "must be one of 'plain'"),
        ({"factor": 2.0}, "is nothing that kind 'plain' reads"),
        ({"kind": "linear", "factor": 0.5}, "at least 1"),
        ({**YARN, "low_freq_factor": 2.0}, "is nothing that kind 'yarn' reads"),
        ({**YARN, "original_seq_len": 0}, "original_seq_len = 0: must be above 0"),
        ({**YARN, "beta_fast": 0.5}, "beta_slow = 1.0"),
        ({**YARN, "mscale": -1.0}, "at least 0"),
        ({**YARN, "kind": "llama3", "low_freq_factor": 4.0}, "low_freq_factor = 4.0"),
        ({**YARN, "kind": "longrope"}, "a number for each of 2 frequencies"),
        (
            {**YARN, "kind": "longrope", "short_factor": [1, 1], "long_factor": [2, -1.0]},
            "long_factor = -1.0: must be above 0",
        ),
        ({**YARN, "short_factor": "1, 1"}, "must be a list of numbers"),
        ({**YARN, "short_factor": [1, "x"]}, r"short_factor\[1\]"),
    ],
)
def test_refusals(fields, match):
    with pytest.raises(Refused, match=match):
        tiny.config(model__rope=fields)


def test_a_config_with_lists_reads_back():
    fields = {"kind": "longrope", "factor": 2.0, "original_seq_len": 32}
    fields |= {"short_factor": [1, 1.5], "long_factor": (2.0, 3.0)}
    made = tiny.config(model__rope=fields)
    assert made.model.rope.short_factor == (1.0, 1.5)
    assert config_lib.from_json(config_lib.to_json(made)) == made
    assert config_lib.digest(made) != config_lib.digest(tiny.config())
