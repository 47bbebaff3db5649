"""10,000 requests over loopback: none lost, memory flat, 200 cancelled in the middle, 100 bad.

All the while experts move, from plan to plan: every request hears what it hears without.

    python -m pytest -m slow tests/infer/server/test_soak.py

Stops by itself: after so many requests, or so many seconds (and then says how far it came).
"""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import pathlib
import random
import socket
import sys
import threading
import time

import pytest

from moe_jax import replan
from moe_jax.infer.serving import placing
from moe_jax.infer.serving.recorder import Recorder
from moe_jax.infer.serving.request import Options
from moe_jax.infer.serving.stats import Stats
from moe_jax.placement import topology as topology_lib
from moe_jax.placement.plan import Plan
from tests import tiny
from tests.infer.server.test_server import BAD, NAME, answer, serving, wait_until
from tests.infer.serving.test_engine import make

REQUESTS, CANCELLED, CLIENTS, SECONDS = 10_000, 200, 12, 480
ADOPTIONS = 10
PROMPTS = [f"{n} " * (n % 5 + 1) for n in range(40)]


def resident():
    """MiB of this process in memory."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20


class Soak:
    """What all clients share."""

    def __init__(self, port):
        self.port, self.lock = port, threading.Lock()
        self.left = list(range(REQUESTS))
        self.said = {}
        self.answered = self.cancelled = self.refused = 0
        self.end = time.monotonic() + SECONDS

    def client(self, seed):
        rng = random.Random(seed)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            self.run(connection, rng)

    def run(self, connection, rng):
        while time.monotonic() < self.end:
            with self.lock:
                if not self.left:
                    break
                number = self.left.pop()
            if number % (REQUESTS // CANCELLED) == 0:
                self.go_away(number)
            elif number % 100 == 7:
                self.bad(connection, list(BAD)[number // 100 % len(BAD)], rng)
            else:
                self.ask(connection, number)

    def ask(self, connection, number):
        prompt, stream = number % len(PROMPTS), number % 3 == 0
        body = answer(PROMPTS[prompt], prompt % 4 + 1, stream=stream)
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        text = response.read().decode()
        assert response.status == 200, text
        if stream:
            lines = [line[6:] for line in text.split("\n\n") if line]
            assert lines[-1] == "[DONE]"
            parts = [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]
            found = "".join(parts)
        else:
            found = json.loads(text)["choices"][0]["text"]
        with self.lock:
            self.answered += 1
            assert self.said.setdefault(prompt, found) == found

    def go_away(self, number):
        body = json.dumps(answer(f"away {number}", 40, stream=True)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as client:
            client.sendall(head.encode() + body)
            assert b"200" in client.recv(100)
        with self.lock:
            self.cancelled += 1

    def bad(self, connection, kind, rng):
        body = BAD[kind][1](rng)
        payload = body if isinstance(body, bytes) else json.dumps(body)
        connection.request("POST", "/v1/completions", payload)
        response = connection.getresponse()
        response.read()
        assert 400 <= response.status < 500
        with self.lock:
            self.refused += 1


@pytest.fixture
def fair():
    """Clients and server share a process: the server hears in time of a client that goes away."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def every_plan_is_adopted(monkeypatch):
    """Searches are those of service, and find a random plan each."""
    decide, seeds = replan.decide, iter(range(1000))

    def found(*arguments):
        plan = Plan(tiny.random_placement(next(seeds), 2))
        return dataclasses.replace(decide(*arguments), adopt=True, plan=plan, rows_after=99.0)

    monkeypatch.setattr(replan, "decide", found)


def said_alone(engine):
    """What every prompt is answered with before anything moves."""
    said = {}
    for prompt, text in enumerate(PROMPTS):
        parts = []
        options = Options(max_tokens=prompt % 4 + 1, ignore_end=True)
        engine.submit(list(text.encode()), options, parts.append)
        while engine.step():
            pass
        said[prompt] = "".join(part.text for part in parts)
    return said


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("fair", "every_plan_is_adopted")
def test_soak():
    engine = make(recorder=Recorder(2, 64, 64), model__combine="reproducible")
    alone = said_alone(engine)
    engine.stats = Stats()
    rules = placing.Rules(tokens=2000, time_limit=0.1, most_pause=0.0)
    moves = placing.Placing(engine, Plan(tiny.contiguous(2)), rules, topology_lib.flat(2))
    sizes = []
    with serving(engine, moves=moves) as (port, server):
        soak = Soak(port)
        soak.said |= alone
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(soak.client, seed) for seed in range(CLIENTS)]
            while not all(client.done() for client in clients):
                done = REQUESTS - len(soak.left)
                if done >= (len(sizes) + 1) * REQUESTS // 5:
                    sizes.append(resident())
                time.sleep(0.05)
            for client in clients:
                client.result()
        wait_until(lambda: not server.service.num_open and not engine.busy)
    done = REQUESTS - len(soak.left)
    print(f"{NAME}: {done:,} requests, {dict(engine.stats.requests)}, memory {sizes} MiB")
    report = moves.report
    print(f"{report.adopted} plans adopted, {report.moved_experts} experts moved, longest pause "
          f"{report.pause:.3f} s, homes learned {report.homes} times")  # fmt: skip
    assert soak.answered + soak.cancelled + soak.refused == done
    assert report.withdrawn == 0
    assert report.adopted >= ADOPTIONS * done // REQUESTS
    assert engine.stats.requests["length"] >= soak.answered
    assert engine.stats.requests["cancelled"] + engine.stats.requests["length"] == (
        soak.answered + soak.cancelled
    )
    assert all(pool.num_held == 0 for pool in engine.scheduler.blocks)
    assert sizes[-1] - sizes[0] < 32, "memory grows"
    assert engine.stats.requests["cancelled"] >= soak.cancelled // 2
    if done < REQUESTS:
        pytest.skip(f"{done:,} of {REQUESTS:,} requests in {SECONDS} s; none of them was lost")
