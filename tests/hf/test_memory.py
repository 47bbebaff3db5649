"""Host memory of an import and of an export: the parameters, and little beside them."""

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
def test_peaks_are_the_parameters_and_1_2_of_the_largest_tensor(case, tmp_path):
    memory.write(case, tmp_path / "model")
    for devices in (1, 2) if case in ("per expert", "mxfp4") else (1,):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        folders = (str(tmp_path / "model"), str(devices), str(tmp_path / f"out {devices}"))
        ended = subprocess.run(
            [sys.executable, "-m", "tests.hf.memory", *folders],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": ".",
                "JAX_PLATFORMS": "cpu",
                **flags,
                **memory.NO_POOL,
            },
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        imported, exported, parameters, largest = json.loads(ended.stdout)
        beside, beside_export = (imported - parameters) / largest, exported / largest
        print(
            f"{case}, {devices} device(s): parameters {parameters / 1e6:,.0f} MB, largest tensor "
            f"{largest / 1e6:,.0f}; beside the parameters, of that tensor: import {beside:.2f}, "
            f"export {beside_export:.2f}"
        )
        assert beside <= 1.2
        assert beside_export <= 1.2
        assert imported > 0.9 * parameters  # what is measured is there
        assert beside_export > 0.9
