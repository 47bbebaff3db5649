"""Two processes behind one port: answers, plans, signals, and one of them gone."""

import concurrent.futures
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading

import pytest

from moe_jax.hf import synthetic
from moe_jax.routing import trace as trace_lib
from tests.infer.server.test_server import answer, ask, wait_until
from tests.infer.test_peer import SIZES
from tests.processes import ROOT, apart_flags

HANGS = 500  # seconds: two processes on two busy cores compile for minutes


@contextlib.contextmanager
def started(folder, apart, *more, program=("infer.py",)):
    """Processes that serve a folder, and the port of the first of them."""
    command = [sys.executable, *program, "--serve", "--port=0", f"--hf={folder}", "--devices=2"]
    running = [
        subprocess.Popen(
            [*command, *flag, *more],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for flag in apart
    ]
    lines = queue.Queue()
    said = [[] for _ in running]

    def read(process, kept):
        for line in process.stdout:
            kept.append(line)
            if "127.0.0.1:" in line:
                lines.put(line)

    readers = [threading.Thread(target=read, args=pair) for pair in zip(running, said, strict=True)]
    for reader in readers:
        reader.start()
    try:
        port = int(lines.get(timeout=HANGS).partition("127.0.0.1:")[2].split(",")[0])
        yield running, port, said
    finally:
        for process in running:
            process.kill()
        for process, reader in zip(running, readers, strict=True):
            process.wait()
            reader.join()
            process.stdout.close()


def answers(port):
    """Of several requests at once: texts and logprobs."""
    name = ask(port, None, "/v1/models", method="GET")[1]["data"][0]["id"]
    bodies = [answer(f"{n} " * (n + 1), 12, logprobs=2, model=name) for n in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda body: ask(port, body), bodies))
    assert [status for status, _ in found] == [200] * 12
    return [body["choices"] for _, body in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("hf") / "mixtral"
    synthetic.make("mixtral", made, **SIZES["mixtral"])
    return made


def test_two_processes_answer_as_one_and_end_together(folder, tmp_path):
    """The second is told to end: the first drains, both write what they have to, and end with 0."""
    recorded = tmp_path / "r.npz"
    apart = [[flag] for flag in apart_flags(2)]
    with started(folder, apart, f"--record={recorded}", "--replan_tokens=400") as two:
        running, port, said = two
        found = [answers(port) for _ in range(6)]
        wait_until(lambda: answers(port) and any("plan made" in line for line in said[0]), 100)
        running[1].send_signal(signal.SIGTERM)
        assert [process.wait(HANGS) for process in running] == [0, 0], said
    assert "another process was asked to end: draining" in "".join(said[0])
    assert trace_lib.load(recorded).num_tokens > 0
    with started(folder, [[]]) as (_, port, _):
        assert [answers(port)] * len(found) == found


@pytest.mark.slow
def test_one_of_them_is_gone(folder):
    """Nobody is left waiting: requests hear of it, and the first process ends with an error."""
    with started(folder, [[flag] for flag in apart_flags(2)]) as (running, port, said):
        answers(port)
        running[1].kill()
        assert running[0].wait(HANGS) != 0, said


FAILS = """
import runpy, sys
from moe_jax.infer.serving.engine import Engine
def fail(self):
    if self.busy:
        raise ValueError("a bug")
    return False
Engine.step = fail
sys.argv = ["infer.py", *sys.argv[1:]]
runpy.run_path("infer.py", run_name="__main__")
"""


@pytest.mark.slow
def test_an_engine_that_fails_ends_all_of_them(folder):
    """And does not wait for the others, who wait for it."""
    apart = [[flag] for flag in apart_flags(2)]
    with started(folder, apart, program=("-c", FAILS)) as (running, port, said):
        name = ask(port, None, "/v1/models", method="GET")[1]["data"][0]["id"]
        assert ask(port, answer("x", model=name))[0] == 500
        assert running[0].wait(60) == 1, said
        assert running[1].wait(60) != 0, said
    assert "a bug" in "".join(said[0])


@pytest.mark.slow
def test_a_signal_to_each_of_them_cancels_nothing(folder):
    """As schedulers send it, host by host."""
    with started(folder, [[flag] for flag in apart_flags(2)]) as (running, port, said):
        name = ask(port, None, "/v1/models", method="GET")[1]["data"][0]["id"]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            long = pool.submit(ask, port, answer("x", 1500, model=name))
            wait_until(lambda: "tokens_total" in ask(port, None, "/metrics", method="GET")[1])
            running[1].send_signal(signal.SIGTERM)
            wait_until(lambda: any("asked to end" in line for line in said[0]))
            assert not long.done()
            running[0].send_signal(signal.SIGTERM)
            status, found = long.result()
            assert (status, found["choices"][0]["finish_reason"]) == (200, "length"), found
        assert [process.wait(HANGS) for process in running] == [0, 0], said
