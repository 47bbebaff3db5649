"""Two processes answer, bit for bit, as one process with two devices does."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

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
