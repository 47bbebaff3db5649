"""A disk that is full and a folder that cannot be written: said at once, no half step, no hang."""

import os
import re
import resource
import shlex
import subprocess
import sys

import pytest

from moe_jax import checkpoint
from tests.faults import harness

STEPS = 100


def limit_files(process, size):
    """No file of the process may grow beyond `size` bytes: writes fail as on a full disk."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def half_steps(workdir):
    return [path.name for path in (workdir / "checkpoints").iterdir() if path.name[0] == "."]


def test_a_full_disk_ends_a_run_that_was_not_told_to_go_on(start, whole, tmp_path):
    workdir, num_steps = tmp_path / "run", STEPS
    process = start(workdir, num_steps)
    harness.saves(process, 1)
    limit_files(process, 1000)
    assert process.wait() == 1
    # (tensorstore's threads print a line of their own for each write that they had begun)
    last = process.said().splitlines()[-1]
    assert re.match(r"train\.py: checkpoint = .* could not be written", last)
    assert not half_steps(workdir)
    saved = harness.newest_step(workdir)
    assert start(workdir, num_steps).wait() == 0  # there is room again
    lost = int(harness.resumed_after(process) != saved)
    identical = harness.same_end(workdir, whole(num_steps))
    harness.told(1, lost, identical, "disk-full, stop")
    assert saved > 0
    assert (lost, identical) == (0, True)


def test_a_full_disk_is_waited_out_by_a_run_that_was_told_to_go_on(start, whole, tmp_path):
    workdir, num_steps = tmp_path / "run", STEPS
    process = start(workdir, num_steps, train__failed_save="go_on")
    harness.until(process, f"step {harness.EVERY}: being saved")
    limit_files(process, 1000)
    harness.until(process, "Training goes on until the next save")
    limit_files(process, resource.RLIM_INFINITY)
    assert process.wait() == 0
    assert "wait in memory" in process.said()
    lost = int(harness.newest_step(workdir) != num_steps)
    identical = harness.same_end(workdir, whole(num_steps))
    harness.told(1, lost, identical, "disk-full, go on")
    assert (lost, identical) == (0, True)


@pytest.mark.skipif(not os.path.isdir("/proc/sys"), reason="no folder that nobody can write to")
def test_a_folder_that_cannot_be_written_is_refused_before_training(start, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to("/proc/sys")
    process = start(workdir, 20, train__failed_save="go_on")
    assert process.wait() == 1
    said, left = process.said(), checkpoint.steps(workdir / "checkpoints")
    harness.told(1, len(left), not harness.rows(workdir), "read-only (no step was made)")
    assert "could not be written" in said
    assert "Traceback" not in said
    assert not harness.rows(workdir)
    assert not left


def test_a_disk_that_is_full_from_the_start_is_refused(tmp_path):
    """A real one, of 64 KiB, in a space of its own: no write of the run has room."""
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o size=64k none {tmp_path}/disk"
    fill = f"dd if=/dev/zero of={tmp_path}/disk/full bs=64k 2> /dev/null"
    space = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*space, mount], capture_output=True).returncode:
        pytest.skip("no disk of its own can be mounted here")
    words = harness.arguments(tmp_path / "disk" / "run", 20)
    train = [sys.executable, str(harness.ROOT / "train.py"), *words]
    script = f"{mount} && mkdir {tmp_path}/disk/run && {fill}; exec {shlex.join(train)}"
    ended = subprocess.run([*space, script], capture_output=True, text=True, cwd=harness.ROOT)
    harness.told(1, 0, True, "disk-full, from the start (no step was made)")
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("train.py: --workdir = ")
    assert "could not be written (No space left on device)" in ended.stderr
    assert "Traceback" not in ended.stderr
