"""Several processes: one of them is told to go, and all save the same step; then one goes on. One
of them is killed, and the other ends; or all are; then all go on."""

import signal
import socket
import time

import numpy as np
import pytest

from tests.faults import harness


def start_all(start, workdir, num_steps, processes, logs):
    """The processes of one run, each with a device and a log of its own; two share experts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        start(
            workdir,
            num_steps,
            log=logs / f"{number}.log",
            more=[f"--distributed=localhost:{port},{processes},{number}"],
            virtual_devices=1,
            mesh__data=processes // 2,
        )
        for number in range(processes)
    ]


def ended(processes):
    for process in processes:
        assert process.wait() == 0, process.said()[-3000:]


def told_to_go(start, workdir, num_steps, number, logs, count=2):
    """One start of several processes, one of which gets a SIGTERM; whether a step was lost."""
    steps = number % 2 + 1  # of this start before the signal
    beyond = harness.last_step(workdir) + steps - 1
    logs = logs / f"start {number}"  # a log goes on where it ended
    logs.mkdir()
    processes = start_all(start, workdir, num_steps, count, logs)
    harness.moves_on(processes[0], beyond)
    told = processes[(number + 1) % count]
    told.kill(signal.SIGTERM)
    ended(processes)
    assert [p for p in processes if "SIGTERM: saving" in p.said()] == [told]  # the others agreed
    assert harness.newest_step(workdir) < num_steps
    return harness.newest_step(workdir) != harness.last_step(workdir)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "number"), [(2, 0), (4, 2), (4, 3)])
def test_term_of_one_process(count, number, start, tmp_path):
    """The step is agreed on, exit code 0 for all; one process alone goes on from there."""
    workdir, num_steps = tmp_path / "run", 200
    lost = told_to_go(start, workdir, num_steps, number, tmp_path, count)
    saved = harness.newest_step(workdir)
    process = start(workdir, num_steps, virtual_devices=count, mesh__data=count // 2)
    harness.moves_on(process, saved)
    process.kill(signal.SIGTERM)
    ended([process])
    assert (lost, harness.resumed_after(process)) == (False, saved)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_terms_of_one_process_of_two(start, tmp_path):
    """Again and again: the curve is that of two processes that were left alone."""
    terms, num_steps = 4, 24  # agreeing takes a step or two, after the one or two before the signal
    whole, workdir = tmp_path / "whole" / "run", tmp_path / "run"
    whole.parent.mkdir()
    ended(start_all(start, whole, num_steps, 2, whole.parent))
    lost = sum(told_to_go(start, workdir, num_steps, n, tmp_path) for n in range(terms))
    ended(start_all(start, workdir, num_steps, 2, tmp_path))
    identical = harness.same_end(workdir, whole)
    harness.told(terms, lost, identical, "term, one of two processes, by turns")
    assert (lost, identical) == (0, True)

    # a checkpoint of two processes goes on in one, and that one's in two
    process = start(workdir, num_steps + 1)
    ended([process])
    assert harness.resumed_after(process) == num_steps
    processes = start_all(start, workdir, num_steps + 2, 2, tmp_path)
    ended(processes)
    assert harness.resumed_after(processes[0]) == num_steps + 1


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_kills_of_all_processes(start, tmp_path):
    """A machine that goes down: both at once, in saves too; nothing that was saved is lost."""
    rng, kills, num_steps = np.random.default_rng(3), 10, 150
    whole, workdir = tmp_path / "whole" / "run", tmp_path / "run"
    whole.parent.mkdir()
    ended(start_all(start, whole, num_steps, 2, whole.parent))
    lost = in_save = 0
    for _ in range(kills):
        saved, reached = harness.newest_step(workdir), harness.last_step(workdir)
        processes = start_all(start, workdir, num_steps, 2, tmp_path)
        harness.saves(processes[0], saved + 1)
        time.sleep(rng.uniform(0, 0.1))
        for process in processes:
            process.kill(signal.SIGKILL)
        assert [process.wait() for process in processes] == [-signal.SIGKILL] * 2
        resumed = harness.resumed_after(processes[0])
        lost += resumed < saved or resumed < reached - 2 * harness.EVERY
        in_save += bool(list((workdir / "checkpoints").glob(".*")))
    ended(start_all(start, workdir, num_steps, 2, tmp_path))
    identical = harness.same_end(workdir, whole)
    harness.told(kills, lost, identical, f"kill, both of two processes ({in_save} within a save)")
    assert (lost, identical) == (0, True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_of_one_process_of_two(start, tmp_path):
    """The other fails and ends, when heartbeats are missed; both go on with the bits of a run that
    was left alone."""
    whole, workdir, num_steps = tmp_path / "whole" / "run", tmp_path / "run", 60
    whole.parent.mkdir()
    ended(start_all(start, whole, num_steps, 2, whole.parent))
    for killed in (1, 0):
        before = harness.newest_step(workdir)
        processes = start_all(harness.as_a_user, workdir, num_steps, 2, tmp_path)
        harness.saves(processes[0], before + 1)
        processes[killed].kill(signal.SIGKILL)
        since = time.monotonic()
        code = processes[1 - killed].wait(timeout=300)
        seconds = time.monotonic() - since
        print(f"\nprocess {killed} killed: the other ends after {seconds:.0f} s, code {code}")
        assert code != 0
        assert before < harness.newest_step(workdir) < num_steps
    saved = harness.newest_step(workdir)
    processes = start_all(start, workdir, num_steps, 2, tmp_path)
    ended(processes)
    assert harness.resumed_after(processes[0]) == saved
    assert harness.same_end(workdir, whole)
