"""Host memory of an import: the parameters, and little beside them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.hf import memory

ROOT = pathlib.Path(__file__).parents[2]
_QUICK = ("per expert", "fp8")  # tensors as they are, and what is decoded


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize(
    "case",
    [n if n in _QUICK else pytest.param(n, marks=pytest.mark.slow) for n in memory.CASES],
)
def test_peak_is_the_parameters_and_1_2_of_the_largest_tensor(case, tmp_path):
    memory.write(case, tmp_path / "model")
    for devices in (1, 2) if case in ("per expert", "mxfp4") else (1,):
        flags = f"--xla_force_host_platform_device_count={devices}"
        ended = subprocess.run(
            [sys.executable, "-m", "tests.hf.memory", str(tmp_path / "model"), str(devices)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        grown, parameters, largest = json.loads(ended.stdout)
        beside = (grown - parameters) / largest
        print(
            f"{case}, {devices} device(s): parameters {parameters / 1e6:,.0f} MB, peak "
            f"{grown / 1e6:,.0f} MB, beside them {beside:.2f} of the largest tensor"
        )
        assert beside <= 1.2
        assert grown > 0.9 * parameters  # what is measured is there
