"""A run that stands still, and one that is killed after its experts moved: real processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_jax import checkpoint, permute
from moe_jax.placement.plan import Placement
from tests.faults import harness

MOVES = {"replan__every": 8, "replan__record_steps": 4, "replan__seconds": 0.05}
STEPS = 60


@contextlib.contextmanager
def hurt(kind, workdir, num_steps, **fields):
    """A process of tests/faults/hurt.py, ended at the end; it writes to the log of its run."""
    script = str(harness.ROOT / "tests" / "faults" / "hurt.py")
    with open(harness.log_of(workdir), "ab") as log:
        process = subprocess.Popen(
            [sys.executable, script, kind, *harness.arguments(workdir, num_steps, **fields)],
            cwd=harness.ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(harness.ROOT),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def said(workdir):
    return harness.log_of(workdir).read_text(encoding="utf-8", errors="replace")


def until_moved(process, workdir, start):
    """Waits until the log says so beyond `start`. Fails if the process ended before."""
    deadline = time.monotonic() + 300
    while "experts moved" not in said(workdir)[start:]:
        assert process.poll() is None, said(workdir)[-3000:]
        assert time.monotonic() < deadline, said(workdir)[-3000:]
        time.sleep(0.01)


def test_hang(start, whole, tmp_path):
    """The stacks say where, exit code 75, and the next start goes on from the last save."""
    workdir, num_steps = tmp_path / "run", 20
    expected = whole(num_steps)  # has compiled the step: compiling takes long, too
    fields = {"train__hang_seconds": 30.0, "train__hang_exit": True}
    with hurt("stands", workdir, num_steps, **fields) as process:
        assert process.wait(timeout=300) == 75, said(workdir)[-3000:]
    assert "__next__" in (workdir / "hang.txt").read_text()
    saved = harness.newest_step(workdir)
    again = start(workdir, num_steps)
    assert again.wait() == 0, again.said()[-3000:]
    lost = int(saved != 6 or harness.resumed_after(again) != saved)  # 8 steps, saved every third
    identical = harness.same_end(workdir, expected)
    harness.told(1, lost, identical, "hang")
    assert (lost, identical) == (0, True)


def logical(workdir, step):
    """Arrays of a step with their experts in order."""
    folder = workdir / "checkpoints" / str(step)
    contents = checkpoint.read_contents(folder)
    placement = contents.plan.placement
    order = Placement.contiguous(placement.num_layers, placement.num_experts, 1)
    arrays = checkpoint.restore_numpy(folder, contents)
    return permute.apply_to_arrays(arrays, contents.arrays, placement, order), placement


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.faults)])
def test_kill_after_moves(kills, whole, tmp_path):
    """SIGKILL between a move and the save after it, or in it: no bit of the curve changes."""
    rng, workdir, expected = np.random.default_rng(5), tmp_path / "run", whole(STEPS)
    done = lost = 0
    while done < kills:
        saved, before = harness.newest_step(workdir), said(workdir) if done else ""
        with hurt("moves", workdir, STEPS, **MOVES) as process:
            until_moved(process, workdir, len(before))
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, said(workdir)[-3000:]
        done += 1
        began = said(workdir)[len(before) :]
        lost += bool(saved) and f"resuming after step {saved}" not in began
    with hurt("moves", workdir, STEPS, **MOVES) as process:
        assert process.wait(timeout=300) == 0, said(workdir)[-3000:]
    ours, placement = logical(workdir, STEPS)
    theirs, stayed = logical(expected, STEPS)
    identical = harness.rows(workdir) == harness.rows(expected) and all(
        np.asarray(ours[name]).tobytes() == np.asarray(theirs[name]).tobytes() for name in theirs
    )
    harness.told(done, lost, identical, "kill after a move of experts")
    assert placement != stayed
    assert (lost, identical) == (0, True)
