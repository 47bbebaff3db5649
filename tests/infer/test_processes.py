"""Two processes answer, bit for bit, as one process with two devices does."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

from moe_jax.hf import synthetic
from moe_jax.routing import trace as trace_lib
from tests.infer.test_peer import SIZES
from tests.train.test_processes import apart_flags

ROOT = pathlib.Path(__file__).resolve().parents[2]
ANSWER = """
import sys
import numpy as np
from moe_jax import mesh as mesh_lib
devices, processes, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
mesh_lib.initialize("cpu", devices, processes)
import jax
from moe_jax.infer.engine import Engine
from moe_jax.infer.sampling import Sampling
from tests import tiny
config = tiny.config(mesh={"data": 1, "expert": 2}, model__dispatch="exchange")
mesh = tiny.mesh(config)
engine = Engine(config, mesh, tiny.model(1, 2), tiny.table(tiny.contiguous(2)))
prompts = [list(range(1 + i, 9 + 2 * i)) for i in range(6)]
found = engine.generate(prompts, 0, Sampling())
logits = mesh_lib.fetch(found.logits_BSV)
if jax.process_index() == 0:
    rows = found.records[0].dispatch_LMM
    np.savez(out, logits=logits, rows=rows)
"""


def answer(devices, processes, out):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", ANSWER, str(devices), processes, str(out)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_answer_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    two, one = tmp_path / "two.npz", tmp_path / "one.npz"
    started = [answer(1, f"localhost:{port},2,{number}", two) for number in range(2)]
    started.append(answer(2, "off", one))
    try:
        said = [process.communicate(timeout=400)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0, 0], "\n".join(said)[-3000:]
    with np.load(two) as apart, np.load(one) as together:
        assert apart["rows"].sum() > 0
        for name in ("logits", "rows"):
            assert apart[name].dtype == together[name].dtype
            np.testing.assert_array_equal(apart[name], together[name])


def infer(folder, out, *more):
    command = [sys.executable, "infer.py", f"--hf={folder}", "--devices=2", f"--record={out}.npz"]
    command += ["--held_out=3", "--max_new_tokens=2", f"--measure={out}.measured.npz", *more]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_command_over_two_processes(tmp_path):
    """The first writes what one process alone writes: the routing, outputs and counted rows."""
    folder, two, one = (tmp_path / name for name in ("mixtral", "two", "one"))
    synthetic.make("mixtral", folder, **SIZES["mixtral"])
    started = [infer(folder, two, flag) for flag in apart_flags(2)]
    started.append(infer(folder, one))
    try:
        said = [process.communicate(timeout=400)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0, 0], "\n".join(said)[-3000:]
    assert ["digest" in text for text in said] == [True, False, True]  # the first speaks for both
    digests = [trace_lib.load(f"{path}.npz").digest for path in (two, one)]
    assert digests[0] == digests[1]
    with (
        np.load(f"{two}.measured.npz") as apart,
        np.load(f"{one}.measured.npz") as together,
    ):
        assert set(apart) == set(together)
        for name in set(apart) - {"padding_LMM"}:  # messages between processes are finer
            np.testing.assert_array_equal(apart[name], together[name], err_msg=name)


def test_processes_that_the_devices_cannot_be_divided_among(tmp_path):
    """Said before they look for each other."""
    folder = tmp_path / "mixtral"
    synthetic.make("mixtral", folder, **SIZES["mixtral"])
    process = infer(folder, tmp_path / "out", "--distributed=localhost:1,3,0")
    said = process.communicate(timeout=100)[0]
    assert process.returncode == 1
    assert "--distributed = 'localhost:1,3,0': must divide the mesh's 2 devices" in said
