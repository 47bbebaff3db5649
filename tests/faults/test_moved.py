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
from tests.processes import apart_flags

MOVES = {"replan__every": 8, "replan__record_steps": 4, "replan__seconds": 0.05}
STEPS = 60


@contextlib.contextmanager
def hurt(kind, workdir, num_steps, *, log=None, more=(), **fields):
    """A process of tests/faults/hurt.py, ended at the end; it writes to the log of its run."""
    script = str(harness.ROOT / "tests" / "faults" / "hurt.py")
    with open(log or harness.log_of(workdir), "ab") as log_file:
        process = subprocess.Popen(
            [sys.executable, script, kind, *harness.arguments(workdir, num_steps, **fields), *more],
            cwd=harness.ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(harness.ROOT),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            stdout=log_file,
            stderr=log_file,
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


def same_but_moved(workdir, expected, step):
    """Whether curves and states, experts in order, have the same bits; whether plans differ."""
    ours, placement = logical(workdir, step)
    theirs, stayed = logical(expected, step)
    identical = harness.rows(workdir) == harness.rows(expected) and all(
        np.asarray(ours[name]).tobytes() == np.asarray(theirs[name]).tobytes() for name in theirs
    )
    return identical, placement != stayed


def each_of(workdir, processes):
    """What the processes of a run on two devices are told; the first writes to the run's log."""
    if processes == 1:
        return [{}]
    logs = [None, *(workdir.with_name(f"{workdir.name}.{n}.log") for n in range(1, processes))]
    return [
        {"log": log, "more": [flag], "virtual_devices": 2 // processes}
        for log, flag in zip(logs, apart_flags(processes), strict=True)
    ]


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
    identical, moved = same_but_moved(workdir, expected, STEPS)
    harness.told(done, lost, identical, "kill after a move of experts")
    assert moved
    assert (lost, identical) == (0, True)


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("processes", "kills"), [(1, 20), (2, 10)])
def test_kills_while_experts_move(processes, kills, start, tmp_path):
    """SIGKILL at any moment to all processes of runs whose experts move every fourth step."""
    rng, num_steps = np.random.default_rng(processes), 200  # far enough for all kills
    expected, workdir = tmp_path / "whole", tmp_path / "run"
    for process in [start(expected, num_steps, **how) for how in each_of(expected, processes)]:
        assert process.wait() == 0, process.said()[-3000:]
    moves = {"replan__every": 4, "replan__record_steps": 4, "replan__seconds": 0.05}
    log = harness.log_of(workdir)
    done = lost = at_stake = in_save = 0
    finished = False
    while not finished:
        saved, reached = harness.newest_step(workdir), harness.last_step(workdir)
        before = len(said(workdir)) if log.exists() else 0
        with contextlib.ExitStack() as stack:
            started = [
                stack.enter_context(hurt("moves", workdir, num_steps, **how, **moves))
                for how in each_of(workdir, processes)
            ]
            if done < kills and saved < num_steps - 8:  # else no plan may come any more
                until_moved(started[0], workdir, before)
                time.sleep(rng.uniform(0, 0.4))
                for process in started:
                    process.send_signal(signal.SIGKILL)
            codes = [process.wait(timeout=300) for process in started]
        assert set(codes) <= {0, -signal.SIGKILL}, said(workdir)[-3000:]
        finished = codes == [0] * processes
        done += not finished
        at_stake += not finished and harness.last_step(workdir) > harness.newest_step(workdir)
        in_save += bool(list((workdir / "checkpoints").glob(".*")))
        began = said(workdir)[before:]
        lost += bool(saved) and f"resuming after step {saved}" not in began
        lost += saved < reached - 2 * harness.EVERY
    identical, moved = same_but_moved(workdir, expected, num_steps)
    kind = f"kill while experts move ({processes} processes, {in_save} within a save)"
    harness.told(done, lost, identical, kind)
    assert moved
    assert at_stake
    assert done >= kills // 2  # on a faster machine a run ends after fewer
    assert (lost, identical) == (0, True)
