"""Two processes: one of them is told to go, and both save the same step; then one goes on."""

import signal
import socket

import pytest

from tests.faults import harness

LONG = (pytest.mark.faults, pytest.mark.timeout(3600))


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


@pytest.mark.parametrize("terms", [1, pytest.param(6, marks=LONG)])
def test_term_of_one_process_of_two(terms, start, tmp_path):
    """The step is agreed on, exit code 0 for both; the curve is that of a run without."""
    num_steps = 12
    whole, workdir = tmp_path / "whole" / "run", tmp_path / "run"
    whole.parent.mkdir()
    for process in start_all(start, whole, num_steps, 2, whole.parent):
        assert process.wait() == 0, process.said()[-3000:]
    lost = 0
    for number in range(terms):
        told = number % 2 + 1  # steps of this start before it is told
        reached = harness.last_step(workdir)
        processes = start_all(start, workdir, num_steps, 2, tmp_path)
        harness.moves_on(processes[0], reached + told - 1)
        processes[(number + 1) % 2].kill(signal.SIGTERM)
        for process in processes:
            assert process.wait() == 0, process.said()[-3000:]
        lost += harness.newest_step(workdir) != harness.last_step(workdir)
        assert harness.newest_step(workdir) < num_steps
    for process in start_all(start, workdir, num_steps, 2, tmp_path):
        assert process.wait() == 0, process.said()[-3000:]
    identical = harness.same_end(workdir, whole)
    harness.told(terms, lost, identical, "term, one of two processes")
    assert (lost, identical) == (0, True)

    # a checkpoint of two processes goes on in one, and that one's in two
    process = start(workdir, num_steps + 1)
    assert process.wait() == 0, process.said()[-3000:]
    assert harness.resumed_after(process) == num_steps
    processes = start_all(start, workdir, num_steps + 2, 2, tmp_path)
    assert [p.wait() for p in processes] == [0, 0], processes[0].said()[-3000:]
    assert harness.resumed_after(processes[0]) == num_steps + 1
