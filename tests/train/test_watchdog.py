"""A run that stands still says where; one that moves says nothing."""

import os
import subprocess
import sys
import threading
import time

import pytest

from moe_jax.train import resume, watchdog
from tests import tiny
from tests.faults import harness
from tests.train import test_loop


def stands_still(path):
    """A function to be found in the stacks."""
    event = threading.Event()
    while not path.exists():
        event.wait(0.05)


def test_a_stand_still_is_written_down_once(tmp_path, capsys):
    with watchdog.Watchdog(0.1, tmp_path) as watch:
        watch.beat("step 3, loss 2.5")
        stands_still(tmp_path / "hang.txt")
        watch.beat("step 4, loss 2.4")
    text = (tmp_path / "hang.txt").read_text()
    assert "stands_still" in text
    assert "step 3, loss 2.5" in text
    assert "MainThread" in text
    assert "no figures" in text  # of memory, from CPU devices
    assert "it goes on: step 4" in capsys.readouterr().err


def test_processes_write_files_of_their_own(tmp_path, monkeypatch):
    """They hang together, and each knows its own stacks alone."""
    monkeypatch.setattr(watchdog.jax, "process_index", lambda: 3)
    with watchdog.Watchdog(0.1, tmp_path) as watch:
        watch.beat("step 3")
        stands_still(tmp_path / "hang.3.txt")
    assert not (tmp_path / "hang.txt").exists()


def test_a_save_that_never_ends_is_said(tmp_path):
    with watchdog.Watchdog(0.1, tmp_path) as watch, watch.saving():
        stands_still(tmp_path / "hang.txt")
    assert "no save has ended for 1 s" in (tmp_path / "hang.txt").read_text()


def test_saves_have_longer(tmp_path, monkeypatch):
    """Both that a run makes on its way, and its last one, and what is still written at its end."""
    made, left = [], []
    enter = watchdog.Watchdog.__enter__
    monkeypatch.setattr(
        watchdog.Watchdog, "__enter__", lambda self: made.append(self) or enter(self)
    )
    for name in ("save", "save_last"):
        save = getattr(resume.Checkpoints, name)

        def saved(self, *args, save=save):
            left.append(made[0]._deadline - time.monotonic())
            save(self, *args)

        monkeypatch.setattr(resume.Checkpoints, name, saved)
    config = tiny.config(
        mesh={"data": 1, "expert": 1},
        model__dispatch="local",
        train__num_steps=2,
        train__checkpoint_every=1,
        train__eval_every=2,
        train__hang_seconds=1000.0,
    )
    test_loop.train(config, tmp_path / "run")
    assert [round(seconds, -3) for seconds in left] == [10_000, 10_000]
    assert round(made[0]._deadline - time.monotonic(), -3) == 10_000
    with made[0].saving():
        pass
    assert made[0]._deadline - time.monotonic() < 1001  # steps come again


def test_none_is_asked_for(tmp_path):
    with watchdog.Watchdog(0.0, tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exit_after", [True, False])
def test_it_ends_the_process_if_told_to(exit_after, tmp_path):
    code = f"""
import pathlib, sys, time
from moe_jax.train import watchdog
workdir = pathlib.Path({str(tmp_path)!r})
with watchdog.Watchdog(0.1, workdir, exit_after={exit_after}) as watch:
    watch.beat("step 1")
    while not (workdir / "hang.txt").exists() or {exit_after}:
        time.sleep(0.05)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=harness.ROOT,
        env={**os.environ, "PYTHONPATH": str(harness.ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == (75 if exit_after else 0)
    assert "no step has ended for 0.1 s" in done.stderr
