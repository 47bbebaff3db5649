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
import pytest

from moe_jax.errors import Refused
from moe_jax.kernels import grouped_matmul as gm


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed (pip install libtpu; Linux x86-64)",
)
def test_compiles_for_tpu_v5e_inside_shard_map():
    script = pathlib.Path(__file__).with_name("compile_for_tpu.py")
    run = subprocess.run(
        [sys.executable, script, "v5e:2x4"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    # three matmuls, each with y, dx and dw; weights are read transposed, never stored so
    report = json.loads(run.stdout.splitlines()[-1])
    assert list(report.values()) == [{"kernels": 9, "transposes": 0}] * 2


def test_shapes_the_hardware_cannot_tile_are_refused():
    sizes_G = jnp.array([8], jnp.int32)

    def lower(d_model, dtype):
        x_ND = jax.ShapeDtypeStruct((8, d_model), dtype)
        w_GDF = jax.ShapeDtypeStruct((1, d_model, 128), dtype)
        run = jax.jit(lambda x, w: gm.grouped_matmul(x, w, sizes_G, implementation="pallas_tpu"))
        return run.trace(x_ND, w_GDF)

    lower(1000, jnp.float32)
    lower(1280, jnp.float32)
    with pytest.raises(
        Refused, match=r"D must be a multiple of 128 or at most 1024. Pad D to 1152"
    ):
        lower(1100, jnp.float32)
    with pytest.raises(Refused, match=r"pallas_tpu implementation takes float32 and bfloat16"):
        lower(128, jnp.float16)
