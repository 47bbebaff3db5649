"""What runs on 8 virtual devices compiles for a pod: the whole training step, kernels included."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("compile_for_tpu.py")
HBM_BYTES = {"v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed (pip install libtpu; Linux x86-64)",
)
@pytest.mark.parametrize(
    ("topology", "dispatch", "chips"),
    [
        ("v5p:4x4x4", "exchange", 64),  # the expert axis takes parts of two axes of the torus
        pytest.param("v5e:4x4", "exchange", 16, marks=pytest.mark.slow),
        pytest.param("v5e:4x4", "gathered", 16, marks=pytest.mark.slow),
        pytest.param("v6e:16x16", "exchange", 256, marks=pytest.mark.slow),
    ],
)
def test_training_step_compiles(topology, dispatch, chips):
    run = subprocess.run(
        [sys.executable, SCRIPT, topology, dispatch],
        capture_output=True,
        text=True,
        timeout=540,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["chips"] == chips
    # out and home, forward and backward; three matmuls, each with y, dx and dw
    assert report["ragged_exchanges"] == (4 if dispatch == "exchange" else 0)
    assert report["kernels"] == 9
    used = report["argument_bytes"] + report["temporary_bytes"]
    assert used < HBM_BYTES[topology.split(":")[0]]
