"""Two processes answer, bit for bit, as one process with two devices does."""

import dataclasses
import sys

import numpy as np
import pytest

from moe_jax.hf import synthetic
from moe_jax.infer import run, sampling
from moe_jax.infer.server import settings
from moe_jax.routing import trace as trace_lib
from tests.infer.test_peer import SIZES
from tests.processes import apart_flags, ended, run_all

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
    return [sys.executable, "-c", ANSWER, devices, processes, out]


def test_two_processes_answer_as_one(tmp_path):
    two, one = tmp_path / "two.npz", tmp_path / "one.npz"
    apart = [flag.partition("=")[2] for flag in apart_flags(2)]
    run_all([*(answer(1, way, two) for way in apart), answer(2, "off", one)])
    with np.load(two) as apart, np.load(one) as together:
        assert apart["rows"].sum() > 0
        for name in ("logits", "rows"):
            assert apart[name].dtype == together[name].dtype
            np.testing.assert_array_equal(apart[name], together[name])


def infer(folder, out, *more):
    command = [sys.executable, "infer.py", f"--hf={folder}", "--devices=2", f"--record={out}.npz"]
    measured = f"--measure={out}.measured.npz"
    return [*command, measured, "--held_out=3", "--max_new_tokens=2", *more]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    made = tmp_path / "mixtral"
    synthetic.make("mixtral", made, **SIZES["mixtral"])
    return made


def test_the_command_over_two_processes(folder, tmp_path):
    """The first writes what one process alone writes: the routing, outputs and counted rows."""
    two, one = tmp_path / "two", tmp_path / "one"
    ways = [*((two, flag) for flag in apart_flags(2)), (one, "--distributed=off")]
    said = run_all([infer(folder, out, flag) for out, flag in ways])
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


def test_processes_that_are_asked_otherwise_are_refused(folder, tmp_path):
    """All of them, before the model is read."""
    apart = zip(apart_flags(2), ("--seed=1", "--seed=2"), strict=True)
    for code, said in ended([infer(folder, tmp_path / "out", *flags) for flags in apart]):
        assert code == 1
        assert f"--hf = '{folder}': has another config" in said
        assert "was asked otherwise, in process 1 than in process 0" in said
    assert not (tmp_path / "out.npz").exists()


def test_what_all_processes_have_to_be_asked_alike():
    """Not where files are, nor who listens where."""
    plain = dataclasses.asdict(request())
    for name, value in (("seats", 4), ("record", "r.npz"), ("replan_tokens", 5)):
        changed = request(serve=dataclasses.replace(request().serve, **{name: value}))
        assert run._asked(changed) != run._asked(request())
    for name, value in (("max_new_tokens", 3), ("benchmark", True), ("measure", "m.npz")):
        assert run._asked(request(**{name: value})) != run._asked(request())
    elsewhere = dataclasses.replace(request().serve, host="here", port=1, bearer_token_file="b")
    same = request(hf="/other", placement="/p.json", distributed="auto", serve=elsewhere)
    assert run._asked(same) == run._asked(request())
    assert dataclasses.asdict(request()) == plain


def request(**fields):
    nothing = dict.fromkeys(("workdir", "devices", "placement", "dispatch", "record", "measure"))
    plain = {"hf": "/a", "topology": "", "trace": "", "prompts": [], "benchmark": False}
    sizes = {"held_out": 3, "held_out_start": 0, "max_new_tokens": 2}
    unset = dict.fromkeys(("context", "seats", "cache_tokens", "bearer_token_file", "record"))
    serve = settings.Settings(host="", port=0, max_queue=9, **unset)
    how = {"sampling": sampling.Sampling(), "serve": serve}
    return run.Request(**{**nothing, **plain, **sizes, **how, **fields})


def test_processes_that_the_devices_cannot_be_divided_among(folder, tmp_path):
    """Said before they look for each other."""
    ((code, said),) = ended([infer(folder, tmp_path / "out", "--distributed=localhost:1,3,0")])
    assert code == 1
    assert "--distributed = 'localhost:1,3,0': must divide the mesh's 2 devices" in said
