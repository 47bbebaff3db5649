"""Two processes: one of them is told to go, and both save the same step; then one goes on."""

import signal
import socket

import pytest

from tests.faults import harness


def start_all(start, workdir, num_steps, processes, logs):
    """The processes of one run, each with one device and a log of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        start(
            workdir,
            num_steps,
            log=logs / f"{number}.log",
            more=[f"--distributed=localhost:{port},{processes},{number}"],
            virtual_devices=2 // processes,
        )
        for number in range(processes)
    ]


def ended(processes):
    for process in processes:
        assert process.wait() == 0, process.said()[-3000:]


def told_to_go(start, workdir, num_steps, number, logs):
    """One start of two processes, one of which gets a SIGTERM; whether a step was lost."""
    steps = number % 2 + 1  # of this start before the signal
    beyond = harness.last_step(workdir) + steps - 1
    processes = start_all(start, workdir, num_steps, 2, logs)
    harness.moves_on(processes[0], beyond)
    processes[(number + 1) % 2].kill(signal.SIGTERM)
    ended(processes)
    assert harness.newest_step(workdir) < num_steps
    return harness.newest_step(workdir) != harness.last_step(workdir)


@pytest.mark.slow
def test_term_of_one_process_of_two(start, tmp_path):
    """The step is agreed on, exit code 0 for both; one process alone goes on from there."""
    workdir, num_steps = tmp_path / "run", 200
    lost = told_to_go(start, workdir, num_steps, 0, tmp_path)
    saved = harness.newest_step(workdir)
    process = start(workdir, num_steps)
    harness.moves_on(process, saved)
    process.kill(signal.SIGTERM)
    ended([process])
    assert (lost, harness.resumed_after(process)) == (False, saved)


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_terms_of_one_process_of_two(start, tmp_path):
    """Again and again: the curve is that of two processes that were left alone."""
    terms, num_steps = 4, 12
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
