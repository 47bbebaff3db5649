"""How commands end where stdout takes no answer, or the system a file: a line, no traceback."""

import contextlib
import os
import pathlib
import sys

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.hf import __main__ as hf
from moe_jax.hf import synthetic
from moe_jax.placement import __main__ as placement
from moe_jax.placement.plan import Plan
from moe_jax.routing import __main__ as routing
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace

CODES = {"full": errors.UNSAID, "closed": 0}


@contextlib.contextmanager
def stdout_is(state, monkeypatch):
    """It takes nothing, and to close it is no error."""
    if state == "full":
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.pipe()
        os.close(reader)
    with os.fdopen(writer, "w") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        yield


@pytest.fixture
def trace_path(tmp_path):
    trace = Trace(np.array([[[0]], [[1]]], np.uint8), 2, np.array([1, 1]))
    trace_lib.save(trace, tmp_path / "t.npz")
    return tmp_path / "t.npz"


@pytest.mark.parametrize("state", CODES)
def test_what_follows_goes_nowhere(state, monkeypatch, capsys):
    with stdout_is(state, monkeypatch):
        assert errors.say("an answer") == CODES[state]
        assert errors.say("another") == 0
    lost = "done, but the answer is not printed: No space left on device\n"
    assert capsys.readouterr().err == (lost if CODES[state] else "")


@pytest.mark.parametrize("state", CODES)
def test_statistics_are_counted_to_the_end(state, trace_path, monkeypatch):
    with stdout_is(state, monkeypatch):
        assert routing.main([str(trace_path)]) == CODES[state]


@pytest.mark.parametrize("state", CODES)
def test_a_plan_that_is_written_is_not_called_refused(
    state, trace_path, tmp_path, monkeypatch, capsys
):
    plan = tmp_path / "p.json"
    words = ["solve", str(trace_path), "--devices=2", f"--out={plan}", "--time-limit=0"]
    with stdout_is(state, monkeypatch):
        assert placement.main(words) == CODES[state]
    assert Plan.read(plan)
    assert "refused" not in capsys.readouterr().err


def test_a_command_whose_reader_is_gone_is_not_refused(monkeypatch, capsys):
    with stdout_is("closed", monkeypatch):
        assert errors.exit_code(lambda: print("a line", flush=True)) == 1
    assert capsys.readouterr().err == "ended: nobody reads what is printed\n"


def test_what_the_system_refuses_is_a_line(capsys):
    assert errors.exit_code(lambda: pathlib.Path("/nowhere/file").read_text()) == 1
    assert capsys.readouterr().err == "refused: /nowhere/file: No such file or directory\n"


@pytest.mark.parametrize("state", CODES)
def test_an_answer_that_is_not_printed_is_no_refusal(state, monkeypatch, capsys):
    with stdout_is(state, monkeypatch):
        assert errors.exit_code(lambda: "written") == CODES[state]
    assert "refused" not in capsys.readouterr().err


def test_a_folder_that_is_written_is_not_called_refused(tmp_path, monkeypatch, capsys):
    """Nor is the answer of a model's folder, or of what is made of it, lost without a word."""
    out = tmp_path / "out"
    with stdout_is("full", monkeypatch), monkeypatch.context() as patch:
        patch.setattr(synthetic, "make", lambda shape, out, seed: pathlib.Path(out).mkdir() or 5)
        assert hf.main(["make", "mixtral", str(out)]) == errors.UNSAID
    assert out.is_dir()
    assert capsys.readouterr().err.startswith("done, but the answer is not printed")
