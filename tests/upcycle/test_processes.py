"""A run of several processes that begins with parameters alone, which one process made."""

import shutil
import sys

import numpy as np
import pytest

from moe_jax import checkpoint
from tests import processes as several
from tests.faults import harness

STEPS = 3


def command(workdir, texts, *more):
    settings = {
        **{f"data.{name}": value for name, value in texts.items()},
        **{"train.num_steps": STEPS, "train.eval_sequences": 2},
        **{"mesh.expert": 2, "platform": "cpu"},
    }
    return [
        *(sys.executable, str(several.ROOT / "train.py")),
        *(f"--config={workdir}/config.py", f"--workdir={workdir}"),
        *(f"--config.{name}={value}" for name, value in settings.items()),
        *more,
    ]


@pytest.mark.slow
def test_several_processes_begin_with_parameters_alone_as_one_does(upcycled, texts, tmp_path):
    """Experts of one device are moved to one of each process; the rest of the state is fresh."""
    one, two = tmp_path / "one", tmp_path / "two"
    for workdir in (one, two):
        shutil.copytree(upcycled, workdir)
    several.run_all([command(one, texts, "--config.virtual_devices=2")])
    apart = several.apart_flags(2)
    here = "--config.virtual_devices=1"
    said = several.run_all([command(two, texts, here, flag) for flag in apart])
    assert "step 0: read in" in said[0]
    assert "resuming" not in said[0]
    assert [row[0] for row in harness.rows(two)] == list(range(1, STEPS + 1))
    # one sum of two terms has the bits of the other order; more of them may be rounded otherwise
    for ours, theirs in zip(harness.rows(two), harness.rows(one), strict=True):
        np.testing.assert_allclose(ours[1:3], theirs[1:3], rtol=1e-5)
    assert checkpoint.steps(two / "checkpoints") == [0, STEPS]
    ours, theirs = harness.arrays(two, STEPS), harness.arrays(one, STEPS)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        most = 1e-5 * np.abs(array).max() if array.dtype.kind == "f" else 0
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=most, err_msg=name)
