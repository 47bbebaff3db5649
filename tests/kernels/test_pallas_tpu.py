"""What only the TPU kernels promise; their values are tested in test_grouped_matmul.py.

Interpret mode does not check the tiling rules of the hardware: the compiler for it does, and runs
without a TPU.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.kernels import grouped_matmul as gm
from moe_jax.kernels.tpu import tiles

COMPILER = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed (pip install libtpu; Linux x86-64)",
)
TOPOLOGIES = [
    "v5e:2x4",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("v5p:2x2x1", "v6e:2x4")),
]


def compiled(topology, what):
    script = pathlib.Path(__file__).with_name("compile_for_tpu.py")
    run = subprocess.run(
        [sys.executable, script, topology, what], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@COMPILER
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_inside_shard_map(topology):
    # forward gate with up, and down; backward dh with gate and up again, dx, dw of gate with up, dw
    # of down; weights are read either way, never transposed in memory, but their dw are then two
    report = compiled(topology, "both")
    assert list(report.values()) == [{"kernels": n, "transposes": 0} for n in (6, 6, 7)]


@COMPILER
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_weights_in_8_bits_compile_and_are_widened_only_on_chip(topology):
    report = compiled(topology, "narrow")
    assert set(map(str, report.values())) == {str({"kernels": 2, "widened": 0})}, report


def test_types_the_hardware_has_not_are_refused():
    x_ND, w_GDF = jnp.zeros((8, 128), jnp.float16), jnp.zeros((1, 128, 128), jnp.float16)
    with pytest.raises(Refused, match=r"pallas_tpu implementation takes float32 and bfloat16"):
        gm.grouped_matmul(x_ND, w_GDF, jnp.array([8], jnp.int32), implementation="pallas_tpu")


def test_the_hardware_meets_no_float16_beside_the_rows():
    """Biases, weights of rows, scales and results in it are cast before and after the kernels."""
    half, g, d, f = jnp.float16, 2, 128, 256
    x_ND, w_GDF, w_GFD = jnp.ones((8, d)), jnp.ones((g, d, f)), jnp.ones((g, f, d))
    sizes_G = jnp.array([5, 3], jnp.int32)
    bias_GF, bias_GD = jnp.ones((g, f), half), jnp.ones((g, d), half)
    biases = {"bias_gate_GF": bias_GF, "bias_up_GF": bias_GF, "bias_down_GD": bias_GD}

    def ffn(x_ND, biases, row_weight_N):
        how = {"row_weight_N": row_weight_N, "implementation": "pallas_tpu", **biases}
        return gm.grouped_ffn(x_ND, w_GDF, w_GDF, w_GFD, sizes_G, **how)

    def matmul(x_ND, w_GDF, scale_GF):
        how = {"w_scale_GF": scale_GF, "preferred_element_type": half}
        return gm.grouped_matmul(x_ND, w_GDF, sizes_G, implementation="pallas_tpu", **how)

    def both(x_ND, biases, row_weight_N):
        y_ND, vjp = jax.vjp(ffn, x_ND, biases, row_weight_N)
        narrow = matmul(x_ND, w_GDF.astype(jnp.int8), bias_GF)
        return vjp(y_ND), narrow, matmul(x_ND, w_GDF, None)

    traced = jax.jit(both).trace(x_ND, biases, jnp.ones(8, half))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert len(calls) > 6
    assert not any("f16>" in line.replace("bf16>", "") for line in calls)


def test_other_platforms_are_refused_and_told_what_runs_there():
    x_ND, w_GDF = jnp.zeros((8, 128)), jnp.zeros((1, 128, 128))
    with pytest.raises(Refused, match=r"'pallas_tpu': runs on TPUs, and x_ND lies on cpu. Pass im"):
        gm.grouped_matmul(x_ND, w_GDF, jnp.array([8], jnp.int32), implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("d_model", "d_ff"), [(1100, 48), pytest.param(48, 1100, marks=pytest.mark.slow)]
)
def test_widths_that_are_no_tiles_are_filled_up(d_model, d_ff, monkeypatch):
    """Too long to be summed at once, no multiple of 128: y, dx and dw as of the oracle."""
    monkeypatch.setattr(tiles, "_LONGEST_WHOLE", 1024)
    rng = np.random.default_rng(0)
    x_ND, w_GDF, dy_NF = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((20, d_model), (2, d_model, d_ff), (20, d_ff))
    )
    sizes_G = jnp.array([7, 9], jnp.int32)

    def results(implementation):
        run = lambda x, w: gm.grouped_matmul(x, w, sizes_G, implementation=implementation)  # noqa: E731
        y_NF, vjp = jax.vjp(run, x_ND, w_GDF)
        return [np.asarray(a) for a in (y_NF, *vjp(dy_NF))]

    found, expected = results("pallas_tpu_interpret"), results("reference")
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())
    assert (found[0][16:] == 0).all()
