"""Commands that run at once on this machine, as the processes of one run or beside each other."""

import os
import pathlib
import socket
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]
HANGS = 1200  # seconds: four processes on two busy cores compile for minutes


def apart_flags(processes):
    """What each of them is told to find the others."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [f"--distributed=localhost:{port},{processes},{n}" for n in range(processes)]


def ended(commands, stderr=subprocess.STDOUT):
    """Exit code and output of each, all started at once."""
    started = [
        subprocess.Popen(
            [*map(str, command)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        for command in commands
    ]
    try:
        said = [process.communicate(timeout=HANGS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def run_all(commands, stderr=subprocess.STDOUT):
    """Output of each; all end with 0."""
    found = ended(commands, stderr)
    assert [code for code, _ in found] == [0] * len(found), "\n".join(text for _, text in found)
    return [text for _, text in found]
