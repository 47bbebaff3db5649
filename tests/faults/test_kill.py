"""Processes that are killed or asked to go, at moments drawn from a seed, and started again."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.faults import harness

KILLS = int(os.environ.get("FAULTS_KILLS", "200"))  # fewer where time is short
STEPS = {"short": 20, "long": 60}
LONG = (pytest.mark.faults, pytest.mark.timeout(7200))


@pytest.mark.parametrize(("kills", "size"), [(3, "short"), pytest.param(KILLS, "long", marks=LONG)])
def test_kill(kills, size, start, whole, tmp_path):
    """SIGKILL at any moment after the first step, saves included: no saved step is lost."""
    rng, num_steps = np.random.default_rng(0), STEPS[size]
    expected = whole(num_steps)
    done = lost = in_save = at_stake = runs = 0
    identical = True
    while done < kills:
        workdir, runs = tmp_path / str(runs), runs + 1
        finished = False
        while not finished:
            saved, reached = harness.newest_step(workdir), harness.last_step(workdir)
            starts = harness.starts(workdir)
            process = start(workdir, num_steps)
            if done < kills:
                if rng.random() < 0.8:  # else maybe while it imports, compiles or reads
                    harness.begins(process, starts)
                    if rng.random() < 0.7:
                        harness.saves(process, 1)  # something can be lost
                time.sleep(rng.uniform(0, 0.6))
                process.kill(signal.SIGKILL)
            code = process.wait()
            assert code in (0, -signal.SIGKILL), process.said()[-3000:]
            finished = code == 0
            done += not finished
            at_stake += not finished and harness.newest_step(workdir) > 0
            in_save += bool(list((workdir / "checkpoints").glob(".*")))
            if harness.starts(workdir) > starts:
                resumed = harness.resumed_after(process)
                lost += resumed < saved or resumed < reached - 2 * harness.EVERY
        identical = identical and harness.same_end(workdir, expected)
    told = f"kill ({in_save} within a save, {at_stake} after one, {runs} runs)"
    harness.told(done, lost, identical, told)
    assert (lost, identical) == (0, True)
    assert at_stake


@pytest.mark.parametrize(("terms", "size"), [(2, "short"), pytest.param(20, "long", marks=LONG)])
def test_term(terms, size, start, whole, tmp_path):
    """SIGTERM: the step at hand is saved, exit code 0, and the next start goes on there."""
    rng, num_steps = np.random.default_rng(1), STEPS[size]
    expected = whole(num_steps)
    done = lost = runs = 0
    identical = True
    while done < terms:
        workdir, runs = tmp_path / str(runs), runs + 1
        while harness.newest_step(workdir) < num_steps:
            starts = harness.starts(workdir)
            process = start(workdir, num_steps)
            if done < terms:
                harness.begins(process, starts)
                time.sleep(rng.uniform(0, 0.4))
                process.kill(signal.SIGTERM)
            code = process.wait()
            stopped = harness.newest_step(workdir) < num_steps
            # a run that has saved its last step listens no more, and may be ended like any program
            assert code == 0 or (code, stopped) == (-signal.SIGTERM, False), process.said()[-3000:]
            done += stopped
            lost += stopped and harness.newest_step(workdir) != harness.last_step(workdir)
        identical = identical and harness.same_end(workdir, expected)
    harness.told(done, lost, identical, f"term ({runs} runs)")
    assert (lost, identical) == (0, True)


def test_a_second_signal_ends_at_once():
    """Even where the main thread stands in something that no handler of Python's interrupts."""
    code = """
import ctypes
from moe_jax.train import preemption
with preemption.Notice():
    print("ready", flush=True)
    libc = ctypes.CDLL(None)
    while True:
        libc.sleep(1)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=harness.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(harness.ROOT)},
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert "again: ending at once" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)  # closes its pipes
    assert process.returncode == 143
