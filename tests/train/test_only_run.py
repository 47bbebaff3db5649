"""One run in a work directory: who comes later waits, and all processes are told alike."""

import contextlib
import threading

import jax
import pytest

from moe_jax import mesh as mesh_lib
from moe_jax.errors import Refused
from moe_jax.train import only_run


def test_a_run_waits_for_the_one_before_it(tmp_path, monkeypatch, capsys):
    """That was told to end, and is still saving."""
    monkeypatch.setattr(only_run, "_AGAIN", 0.01)
    held = contextlib.ExitStack()
    held.enter_context(only_run.only_run(tmp_path))
    threading.Timer(0.3, held.close).start()
    with only_run.only_run(tmp_path):
        assert "another run is in it; waiting" in capsys.readouterr().out


def test_a_work_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(Refused, match=r"--workdir = .*could not be made \(Not a directory\)"),
        only_run.only_run(tmp_path / "file" / "run"),
    ):
        raise AssertionError("it was made")


def test_all_processes_are_refused_where_one_cannot_begin(tmp_path, monkeypatch):
    """This is process 1: it has no lock of its own, and is told by what is gathered."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(mesh_lib, "in_any_process", lambda flag: True)
    with (
        pytest.raises(Refused, match="could not be made by process 0"),
        only_run.only_run(tmp_path),
    ):
        raise AssertionError("it went on")
