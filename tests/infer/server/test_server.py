"""The server over real sockets: answers, streams, bad input, clients that go away, draining."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from moe_jax import migrate, replan
from moe_jax.infer.server import app, run, settings
from moe_jax.infer.serving import placing
from moe_jax.infer.serving.engine import Engine
from moe_jax.infer.serving.recorder import Recorder
from moe_jax.infer.serving.request import Likely, Options, Part
from moe_jax.infer.serving.service import Service, Ticket
from moe_jax.infer.text import Bytes
from moe_jax.placement import topology as topology_lib
from moe_jax.placement.plan import Plan
from moe_jax.routing import trace as trace_lib
from tests import tiny
from tests.infer.serving.test_engine import make
from tests.placement import test_report_browser

ROOT = pathlib.Path(__file__).resolve().parents[3]
NAME = "tiny"
POLICY = app.Policy(max_body=20_000)


@contextlib.contextmanager
def serving(engine, policy=POLICY, max_queue=100, moves=None):
    """(port, server) of a server on a thread of its own."""
    service = Service(engine, max_queue, moves)
    server = app.Server(service, engine, Bytes(), NAME, policy)
    bound = settings.listen("127.0.0.1", 0)
    http_server = run.http_server(server)
    thread = threading.Thread(target=lambda: asyncio.run(http_server.serve(sockets=[bound])))
    thread.start()
    try:
        yield bound.getsockname()[1], server
    finally:
        http_server.should_exit = True
        thread.join()
        service.stop()
        bound.close()


@pytest.fixture(scope="module")
def engine():
    return make(recorder=Recorder(2, 64, 64))


@pytest.fixture(scope="module")
def started(engine):
    with serving(engine) as (port, server):
        yield port, server


@pytest.fixture
def port(started):
    return started[0]


@pytest.fixture
def server(started):
    """Nothing is open before and after: the thread of its engine sleeps."""

    def wait_until_idle():
        wait_until(lambda: not started[1].num_open and not started[1].service.num_open)

    wait_until_idle()
    yield started[1]
    wait_until_idle()


def wait_until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def ask(port, body, path="/v1/completions", headers=None, method="POST"):
    """(status, object or text)"""
    return answered(port, body, path, headers, method)[:2]


def answered(port, body, path="/v1/completions", headers=None, method="POST"):
    """(status, object or text, headers)"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    payload = body if isinstance(body, bytes | None) else json.dumps(body)
    connection.request(method, path, payload, headers or {})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    is_json = response.headers["content-type"] == "application/json"
    return response.status, json.loads(text) if is_json else text.decode(), response.headers


def events(text):
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def answer(prompt, tokens=8, **more):
    return {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}


def said(found):
    return found["choices"][0]["text"]


def test_streams_and_crowds_say_what_one_request_says_alone(port):
    prompts = [f"text {n}" for n in range(6)]
    alone = [ask(port, answer(prompt)) for prompt in prompts]
    assert [status for status, _ in alone] == [200] * 6
    for _, found in alone:
        assert found["usage"] == {"prompt_tokens": 6, "completion_tokens": 8, "total_tokens": 14}
        assert found["choices"][0]["finish_reason"] == "length"
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda p: ask(port, answer(p, stream=True)), prompts * 2))
    for number, (_, text) in enumerate(together):
        parts = events(text)
        assert "".join(map(said, parts)) == said(alone[number % 6][1])
        assert [part["choices"][0]["finish_reason"] for part in parts][-1] == "length"


def test_several_prompts_choices_and_a_seed(port):
    body = answer(["ab", "cd"], temperature=1.0, seed=3, n=2)
    status, found = ask(port, body)
    assert status == 200
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in found["choices"]]
    assert texts[0] != texts[1]
    again = ask(port, {**body, "prompt": [[97, 98], [99, 100]]})[1]
    assert [choice["text"] for choice in again["choices"]] == texts


@pytest.mark.parametrize("seed", [None, 7])
def test_equal_prompts_have_seeds_of_their_own_unless_one_is_given(seed):
    body = {"prompt": ["x", "x", "x"], "n": 2, "seed": seed}
    jobs = app.fields.completion(body, Bytes().encode).jobs
    assert [options.choice for _, options in jobs] == [0, 1] * 3
    seeds = [options.seed for _, options in jobs]
    assert seeds[::2] == seeds[1::2]
    assert seeds[0] == seed or seed is None
    assert len(set(seeds)) == (3 if seed is None else 1)


def test_a_trace_says_which_tokens_only_where_that_is_asked_for(port, server):
    ask(port, answer("which?"))
    silent, spoken = (
        server.service.call(lambda engine, asked=asked: run._recorded(engine, None, asked)).result()
        for asked in (False, True)
    )
    assert silent.token_ids_T is None
    start_S = np.cumsum(spoken.seq_len) - spoken.seq_len
    texts = [t.tolist() for t in np.split(spoken.token_ids_T, start_S[1:])]
    assert list(b"which?") in [text[:6] for text in texts]
    np.testing.assert_array_equal(spoken.expert_ids_TLK, silent.expert_ids_TLK)


def test_a_trace_that_is_not_written_is_named(tmp_path, capsys):
    """A file that is there would pass for it."""
    path = tmp_path / "r.npz"
    run._write(None, str(path), failed=False)
    assert capsys.readouterr() == ("", f"{path}: not written, no routed token was recorded\n")
    path.write_bytes(b"older")
    run._write(None, str(path), failed=True)
    said = f"{path}: not written, the engine has stopped; the file that is there is an older one\n"
    assert capsys.readouterr() == ("", said)
    assert path.read_bytes() == b"older"


def test_chat_with_logprobs_and_usage(port):
    messages = [
        {"role": "system", "content": "Be."},
        {"role": "user", "content": [{"type": "text", "text": "Hi", "annotations": []}]},
    ]
    body = {"model": NAME, "messages": messages, "max_tokens": 4, "temperature": 0}
    body["stream_options"] = None
    status, found = ask(port, {**body, "logprobs": True, "top_logprobs": 2}, "/v1/chat/completions")
    assert status == 200
    plain = ask(port, answer("system: Be.\n\nuser: Hi\n\nassistant:", 4, logprobs=2))[1]
    choice = found["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": said(plain)}
    tops = [len(one["top_logprobs"]) for one in choice["logprobs"]["content"]]
    assert tops == [2] * 4
    logprobs = [one["logprob"] for one in choice["logprobs"]["content"]]
    assert logprobs == plain["choices"][0]["logprobs"]["token_logprobs"]
    wanted = {"include_usage": True, "include_obfuscation": False}
    streamed = {**body, "stream": True, "stream_options": wanted}
    parts = events(ask(port, streamed, "/v1/chat/completions")[1])
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert parts[-1]["usage"]["completion_tokens"] == 4
    deltas = [part["choices"][0]["delta"].get("content", "") for part in parts[:-1]]
    assert "".join(deltas) == said(plain)


def test_tokens_that_are_no_whole_text():
    """They are told apart, and their bytes are their own."""
    top = [(0xC3, -0.1), (0xE2, -0.2), (97, -0.3), (300, -0.4), (301, -0.5)]
    part = Part(0xC3, "", Likely(-0.1, top), None)
    of = {"model": NAME, "prompt_tokens": 1, "piece": Bytes().piece}
    (plain,), (chat,) = (
        app.reply.Reply(chat=chat, **of).part(0, part)["choices"] for chat in (False, True)
    )
    assert plain["logprobs"]["tokens"] == ["bytes:\\xc3"]
    expected = {"bytes:\\xc3": -0.1, "bytes:\\xe2": -0.2, "a": -0.3, "\ufffd": -0.4}
    assert plain["logprobs"]["top_logprobs"] == [expected]
    (one,) = chat["logprobs"]["content"]
    assert (one["token"], one["bytes"]) == ("bytes:\\xc3", [0xC3])
    assert [other["bytes"] for other in one["top_logprobs"][:3]] == [[0xC3], [0xE2], [97]]


def test_logprobs_are_numbers_of_json():
    likely = Likely(float("nan"), [(97, float("nan")), (98, float("-inf")), (99, -0.5)])
    choice = app.reply.Choice(0)
    choice.add(Part(97, "a", likely, "length"))
    found = []
    for chat in (False, True):
        made = app.reply.Reply(chat=chat, model=NAME, prompt_tokens=1, piece=Bytes().piece)
        found.append(json.loads(app.JSONResponse(made.whole([choice])).body)["choices"][0])
    assert found[0]["logprobs"]["token_logprobs"] == [-9999]
    assert found[0]["logprobs"]["top_logprobs"] == [{"a": -9999, "b": -9999, "c": -0.5}]
    (one,) = found[1]["logprobs"]["content"]
    assert [other["logprob"] for other in (one, *one["top_logprobs"])] == [-9999] * 3 + [-0.5]


def test_a_chat_fills_the_room_there_is(port, engine, monkeypatch):
    """Less than the context, where the cache is small."""
    monkeypatch.setattr(engine, "limits", dataclasses.replace(engine.limits, max_len=640))
    monkeypatch.setattr(engine.scheduler, "limits", engine.limits)
    room = engine.limits.blocks * engine.limits.block_size
    body = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    status, found = ask(port, body, "/v1/chat/completions")
    assert (status, found["usage"]["total_tokens"]) == (200, room)
    assert ask(port, None, f"/v1/models/{NAME}", method="GET")[1]["max_model_len"] == room


def test_the_openai_client(port):
    openai = pytest.importorskip("openai", reason="pip install openai: a client that people have")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [NAME]
    expected = said(ask(port, answer("client"))[1])
    plain = {"model": NAME, "max_tokens": 8, "temperature": 0}
    found = client.completions.create(prompt="client", **plain)
    assert found.choices[0].text == expected
    stream = client.completions.create(prompt="client", stream=True, **plain)
    assert "".join(part.choices[0].text for part in stream) == expected
    messages = [{"role": "user", "content": "Hi"}]
    whole = client.chat.completions.create(messages=messages, **plain)
    stream = client.chat.completions.create(messages=messages, stream=True, **plain)
    parts = [part.choices[0].delta.content or "" for part in stream]
    assert "".join(parts) == whole.choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.completions.create(model=NAME, prompt="x", top_p=-1)


# kind -> (field, what makes the n-th body of it)
BAD = {
    "too long": ("prompt + max_tokens", lambda r: answer("x" * r.randint(57, 999), 8)),
    "too many tokens": ("prompt + max_tokens", lambda r: answer("x", r.randint(64, 10**9))),
    "unknown model": ("model", lambda r: {**answer("x"), "model": "m" * r.randint(0, 3)}),
    "temperature": ("temperature", lambda r: answer("x", temperature=r.choice([-1, -1e-9, 1e9]))),
    "top_p": ("top_p", lambda r: answer("x", top_p=r.choice([0, -0.1, 1.1, 10**400]))),
    "top_k": ("top_k", lambda r: answer("x", top_k=r.choice([-2, 2**31, 10**30, 1.5, True]))),
    "seed": ("seed", lambda r: answer("x", seed=r.choice([-1, 2**31, 10**400, "a"]))),
    "no answer": ("max_tokens", lambda r: answer("x", r.randint(-(10**9), 0))),
    "n": ("n", lambda r: answer("x", n=r.choice([0, -1, 17, 10**9, "2"]))),
    "stop": ("stop", lambda r: answer("x", stop=r.choice([[""], ["a"] * 17, 3, ["x" * 257], [1]]))),
    "logprobs": ("logprobs", lambda r: answer("x", logprobs=r.choice([-1, 21, True, "a"]))),
    "empty": ("prompt", lambda r: answer(r.choice(["", [], [[]], None, ["a", ""]]))),
    "vocabulary": ("prompt", lambda r: answer([1, r.choice([-1, 256, 10**30])])),
    "wrong prompt": ("prompt", lambda r: answer(r.choice([{}, 3, [1, "a"], [[1], 2], [None]]))),
    "surrogate": ("prompt", lambda r: answer("a\ud800" * r.randint(1, 9))),
    "unknown field": ("temprature", lambda r: answer("x", temprature=r.random())),
    "surrogate field": ("\\ud800", lambda r: answer("x", **{"\ud800": r.random()})),
    "unsupported": ("tools", lambda r: answer("x", tools=[r.random()])),
    "stream_options": (
        "stream_options",
        lambda r: answer("x", stream=True, stream_options=r.choice([0, "", False, [], "a", [1]])),
    ),
    "no stream": (
        "stream_options",
        lambda r: answer("x", stream=r.choice([False, None]), stream_options={}),
    ),
    "unknown stream option": (
        "stream_options.include_usag",
        lambda r: answer("x", stream=True, stream_options={"include_usag": r.choice([True, None])}),
    ),
    "user of a stream": (
        "stream_options.user",
        lambda r: answer("x", stream=True, stream_options={"user": "a"}),
    ),
    "obfuscated": (
        "stream_options.include_obfuscation",
        lambda r: answer(
            "x", stream=True, stream_options={"include_obfuscation": r.choice([0, 1])}
        ),
    ),
    "number for a truth": ("echo", lambda r: answer("x", echo=0)),
    "include_usage": (
        "stream_options.include_usage",
        lambda r: answer("x", stream=True, stream_options={"include_usage": r.choice([0, "a"])}),
    ),
    "not JSON": ("body", lambda r: json.dumps(answer("x")).encode()[: r.randint(0, 50)]),
    "NaN": ("body", lambda r: b'{"temperature": ' + r.choice([b"NaN", b"-Infinity"]) + b"}"),
    "deep": ("body", lambda r: b'{"a":' + b"[" * r.randint(9000, 15000)),
    "digits": ("body", lambda r: b'{"n": ' + b"9" * r.randint(5000, 9000) + b"}"),
    "no object": ("body", lambda r: json.dumps(r.choice([[], 3, "x", None, True])).encode()),
    "no UTF-8": ("body", lambda r: b'{"prompt": "' + bytes([r.randint(128, 191)]) + b'"}'),
    "too large": ("body", lambda r: b"x" * r.randint(20_001, 200_000)),
}


def check_bad(port, kind, count):
    field, body_of = BAD[kind]
    rng = random.Random(0)
    for _ in range(count):
        status, found = ask(port, body_of(rng))
        assert status == {"unknown model": 404, "too large": 413}.get(kind, 400), found
        error = found["error"]
        assert error["param"] == field, error
        assert error["rule"], error
        assert error["fix"], error
        assert error["code"] == status
        assert error["message"].startswith(f"{field} = ")
    assert ask(port, answer("still there"))[0] == 200


@pytest.mark.parametrize("kind", BAD)
def test_bad_requests(port, kind):
    check_bad(port, kind, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_fifty_bad_requests_of_each_kind(port, kind):
    check_bad(port, kind, 50)


@pytest.mark.parametrize(
    ("field", "messages"),
    [
        ("messages", None),
        ("messages", []),
        ("messages[0]", ["hi"]),
        ("messages[1].role", [{"role": "user", "content": "a"}, {"role": "robot"}]),
        ("messages[0].content", [{"role": "user", "content": None}]),
        ("messages[0].content", [{"role": "user", "content": [{"type": "image_url"}]}]),
        (
            "messages[0].content.image_url",
            [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": "http://x"}]}],
        ),
        ("messages[0].name", [{"role": "user", "content": "a", "name": {"x": 1}}]),
        ("messages[0].name", [{"role": "user", "content": "a", "name": 0}]),
        ("messages[0].mood", [{"role": "user", "content": "a", "mood": "bad"}]),
        ("messages[0].tool_calls", [{"role": "assistant", "content": "a", "tool_calls": [{}]}]),
        ("messages[0].function_call", [{"role": "user", "function_call": {"a": 1}}]),
    ],
)
def test_bad_messages(port, field, messages):
    status, found = ask(port, {"model": NAME, "messages": messages}, "/v1/chat/completions")
    assert (status, found["error"]["param"]) == (400, field)


def test_an_answer_can_be_sent_back_as_a_message(port):
    """As OpenAI's client writes it, with fields that say nothing."""
    nothing = {
        "refusal": None,
        "annotations": [],
        "name": "bob",
        "function_call": {},
        "prefix": False,
    }
    messages = [{"role": "assistant", "content": "a", "tool_calls": None, **nothing}]
    body = {"model": NAME, "messages": messages, "max_tokens": 2}
    assert ask(port, body, "/v1/chat/completions")[0] == 200


def test_a_request_is_refused_as_a_whole(port, server, engine):
    before = engine.stats.num_arrived
    assert ask(port, answer(["fine", ""]))[0] == 400
    assert server.service.call(lambda engine: engine.stats.num_arrived).result() == before


def test_wrong_paths_and_methods(port):
    assert ask(port, None, "/v2", method="GET")[0] == 404
    status, _, headers = answered(port, None, "/v1/completions", method="GET")
    assert (status, headers["allow"]) == (405, "POST")
    assert ask(port, None, "/v1/models/other", method="GET")[0] == 404
    assert ask(port, None, f"/v1/models/{NAME}", method="GET")[1]["id"] == NAME
    assert ask(port, None, "/health", method="GET") == (200, {"status": "ok"})


def test_a_body_that_does_not_come(port, server):
    server.policy = app.Policy(body_seconds=0.3)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n{")
        assert b"408" in client.recv(4000).split(b"\r\n")[0]
    server.policy = POLICY
    assert ask(port, answer("still there"))[0] == 200


def test_a_client_that_leaves_before_its_body_is_there(server):
    """It is no error of the server's."""
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    scope |= {"query_string": b"", "root_path": "", "http_version": "1.1"}
    asyncio.run(app.make(server)(scope, receive, send))
    assert sent[0]["status"] == 400


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long(server, port, go, stream):
    server.policy = dataclasses.replace(POLICY, answer_seconds=0.2)
    status, found = ask(port, answer("x", stream=stream))
    server.policy = POLICY
    if stream:
        assert status == 200
        found = events(found)[-1]
    else:
        assert status == 504
    assert found["error"]["code"] == 504
    assert found["error"]["rule"] == "must be finished within 0.2 s"
    go.set()
    assert ask(port, answer("still there"))[0] == 200


def test_clients_that_go_away_are_cancelled(port, server, engine):
    before = engine.stats.requests["cancelled"]
    for number in range(4):
        body = json.dumps(answer(f"{number}", 60, stream=number % 2 == 0)).encode()
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}"
            client.sendall(head.encode() + b"\r\n\r\n" + body)
            if number % 2 == 0:
                assert b"200" in client.recv(100)
            else:
                wait_until(lambda: server.num_open)
    wait_until(lambda: engine.stats.requests["cancelled"] >= before + 3)
    wait_until(lambda: not engine.busy)
    assert all(pool.num_held == 0 for pool in engine.scheduler.blocks)
    assert ask(port, answer("still there"))[0] == 200


class _Idle(Service):
    """In its hands nothing happens by itself."""

    def __init__(self):
        self.failure, self.taken, self.cancelled = None, [], []

    def check_open(self, count=1):
        pass

    def check(self, prompt, options):
        pass

    def submit(self, prompt, options, deliver):
        self.taken.append(Ticket(deliver))
        return self.taken[-1]

    def cancel(self, ticket):
        self.cancelled.append(ticket)


class _Alone(app.Server):
    """Serves nothing but what it is given."""

    def __init__(self):
        self.policy, self.num_open = POLICY, 0


def _sent(service, num_answers, stream):
    """Answers on their way."""
    jobs = [([1], Options())] * num_answers
    answers = app._Answers(service, jobs)
    made = app.reply.Reply(chat=False, model=NAME, prompt_tokens=1, piece=Bytes().piece)
    asked = app.fields.Asked([[1]], jobs, stream=stream, usage=False)
    return app._Sent(_Alone(), answers, made, asked)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("later", range(12))
def test_a_client_that_leaves_while_a_part_arrives(stream, later):
    """However many turns of the loop lie between the two."""

    async def one():
        service = _Idle()
        sent = _sent(service, 4, stream)

        async def receive():
            await asyncio.sleep(0.01)
            service.taken[0].deliver(Part(97, "a", None, None))
            for _ in range(later):
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message):
            await asyncio.sleep(0)

        async with asyncio.timeout(1):
            await sent({}, receive, send)
        assert service.cancelled == service.taken
        assert not sent._server.num_open

    asyncio.run(one())


def test_an_answer_is_too_late_even_if_its_parts_are_there():
    async def one():
        service = _Idle()
        answers = app._Answers(service, [([1], Options())])
        for _ in range(3):
            service.taken[0].deliver(Part(97, "a", None, None))
        await asyncio.sleep(0.01)
        with pytest.raises(app.Stopped, match="must be finished within 0 s"):
            async for _ in answers.parts(0):
                pass

    asyncio.run(one())


def test_a_client_that_does_not_read(server, engine):
    """What is sent to it does not get away: after a while its request is cancelled."""
    server.policy = app.Policy(send_seconds=0.2)

    async def stalled():
        async def receive():
            await asyncio.sleep(60)

        async def send(message):
            if message["type"] == "http.response.body":
                await asyncio.sleep(60)

        jobs = [([1, 2], Options(max_tokens=60))]
        answers = app._Answers(server.service, jobs)
        made = app.reply.Reply(chat=False, model=NAME, prompt_tokens=2, piece=Bytes().piece)
        asked = app.fields.Asked([[1, 2]], jobs, stream=True, usage=False)
        await app._Sent(server, answers, made, asked)({}, receive, send)

    asyncio.run(stalled())
    wait_until(lambda: not engine.busy)
    server.policy = POLICY


def test_metrics(port):
    ask(port, answer("metrics"))
    status, text = ask(port, None, "/metrics", method="GET")
    assert status == 200
    values = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert name not in values
            values[name] = float(value)
    assert values['moe_jax_requests_total{finish="length"}'] >= 1
    assert values["moe_jax_time_to_first_token_seconds_count"] >= 1
    assert values['moe_jax_cache_blocks{shard="1"}'] == 4
    assert values['moe_jax_rows_out_total{source="0",destination="1"}'] > 0
    for layer in range(2):
        load = [
            values[f'moe_jax_computed_rows_total{{layer="{layer}",device="{m}"}}'] for m in (0, 1)
        ]
        assert sum(load) % 2 == 0
        worst = values[f'moe_jax_load_max_over_mean{{layer="{layer}"}}']
        assert worst == pytest.approx(max(load) / (sum(load) / 2))
    kinds = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds))


def test_the_page(port):
    """Numbers of the metrics, pictures, no script; it asks for itself again."""
    ask(port, answer("page"))
    status, text = ask(port, None, "/", method="GET")
    assert status == 200
    assert text.startswith("<!doctype html>")
    assert 'http-equiv="refresh" content="3"' in text
    assert "<script" not in text
    metrics = ask(port, None, "/metrics", method="GET")[1]
    taken = re.search(r"moe_jax_requests_arrived_total (\d+)", metrics)[1]
    assert re.search(rf"requests taken</th><td>{int(taken):,}</td>", text)
    moved = re.search(r'rows_out_total{source="0",destination="1"} (\d+)', metrics)[1]
    home = re.search(r'rows_home_total{source="0",destination="1"} (\d+)', metrics)[1]
    assert f"0 to 1: {int(moved) + int(home):,} rows" in text
    assert text.count("<svg") > 4
    assert "Experts stay where they are" in text


@pytest.mark.skipif(test_report_browser.BROWSER is None, reason="no browser is installed")
def test_the_page_in_a_browser(port, tmp_path):
    """Nothing is cut off, nothing too small to read."""
    text = ask(port, None, "/", method="GET")[1]
    (tmp_path / "page.html").write_text(text.replace('http-equiv="refresh"', ""), "utf-8")
    for width in (400, 1400):
        found = test_report_browser.measured(tmp_path / "page.html", tmp_path, width)
        assert found["scroll"] <= found["inner"] == width
        assert min(found["sizes"].values()) >= test_report_browser.SMALLEST
        assert found["outside"] == []


def test_experts_move_under_traffic(engine, monkeypatch):
    """Clients get the same answers while every plan is adopted, and the metrics say so."""
    here, decide = tiny.contiguous(2), replan.decide

    def adopted(setting, before, recorded, seed=0, progress=None):
        found = decide(setting, before, recorded, seed, progress)
        plan = Plan(tiny.random_placement(seed, 2))
        return dataclasses.replace(found, adopt=True, plan=plan, rows_after=99.0)

    monkeypatch.setattr(replan, "decide", adopted)
    expected = {}
    with serving(engine) as (port, _):
        for n in range(40):
            expected[n] = said(ask(port, answer(f"{n} moves"))[1])
    rules = placing.Rules(tokens=400, time_limit=0.05, most_pause=0.0)
    moving = placing.Placing(engine, Plan(here), rules, topology=topology_lib.flat(2))
    with serving(engine, moves=moving) as (port, _):
        for _ in range(6):
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                found = pool.map(lambda n: said(ask(port, answer(f"{n} moves"))[1]), range(40))
                assert dict(enumerate(found)) == expected
        wait_until(lambda: not moving.works)  # nothing changes while it is looked at
        text = ask(port, None, "/metrics", method="GET")[1]
        live = ask(port, None, "/", method="GET")[1]
    values = dict(line.rpartition(" ")[::2] for line in text.splitlines() if line[0] != "#")
    assert float(values["moe_jax_placing_adopted_total"]) >= 1
    assert float(values["moe_jax_placing_moved_experts_total"]) >= 1
    assert sum(float(values[f'moe_jax_placing_state{{state="{s}"}}']) for s in placing.STATES) == 1
    assert f'moe_jax_plan_info{{digest="{engine.plan_digest}"}} 1' in text
    assert f"{moving.report.adopted} adopted" in live
    assert "Placement in the loop is" in live
    engine.adopt(migrate.route(moving.plan.placement, here), 0, tiny.LAYERS, here)


def test_a_search_and_a_move_end_without_requests(engine, monkeypatch):
    """Whoever asks last need not ask again for the plan to come into use."""
    here, decide, may_end = tiny.contiguous(2), replan.decide, threading.Event()
    plan = Plan(tiny.random_placement(3, 2))

    def adopted(setting, before, recorded, seed=0, progress=None):
        found = decide(setting, before, recorded, seed, progress)
        may_end.wait()
        return dataclasses.replace(found, adopt=True, plan=plan, rows_after=99.0)

    monkeypatch.setattr(replan, "decide", adopted)
    rules = placing.Rules(tokens=400, time_limit=0.05, most_pause=0.0)
    moving = placing.Placing(engine, Plan(here), rules, topology=topology_lib.flat(2))
    with serving(engine, moves=moving) as (port, _):
        for n in range(200):
            ask(port, answer(f"{n} moves"))
            if moving.report.state == placing.PLANNING:
                break
        steps = engine.stats.steps
        may_end.set()
        wait_until(lambda: moving.report.state == placing.PROVING and not moving.works)
    assert engine.stats.steps == steps
    assert engine.plan_digest == plan.digest
    engine.adopt(migrate.route(plan.placement, here), 0, tiny.LAYERS, here)


def test_a_bearer_token(engine, server):
    server.policy = app.Policy(bearer="secret")
    with serving_as(server) as port:
        for header, status in ((None, 401), ("Bearer wrong", 401), ("Bearer secret", 200)):
            headers = {"Authorization": header} if header else {}
            assert ask(port, answer("x"), headers=headers)[0] == status
            assert ask(port, None, "/v1/models", headers, "GET")[0] == status
            assert ask(port, None, "/metrics", headers, "GET")[0] == status
        assert ask(port, None, "/health", method="GET")[0] == 200
        for header, status in (("bearer  secret", 200), ("Basic secret", 401), ("secret", 401)):
            found, _, given = answered(port, answer("x"), headers={"Authorization": header})
            assert found == status
            assert given["www-authenticate"] == (None if status == 200 else "Bearer")
    server.policy = POLICY


def test_a_bug_is_an_error_as_openai_has_them(server, port, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(app.fields, "completion", fail)
        status, found = ask(port, answer("x"))
    assert (status, found["error"]["code"], found["error"]["type"]) == (500, 500, "server_error")
    assert ask(port, answer("x"))[0] == 200


@contextlib.contextmanager
def serving_as(server):
    """Another socket of a server that is there."""
    bound = settings.listen("127.0.0.1", 0)
    http_server = run.http_server(server)
    thread = threading.Thread(target=lambda: asyncio.run(http_server.serve(sockets=[bound])))
    thread.start()
    yield bound.getsockname()[1]
    http_server.should_exit = True
    thread.join()
    bound.close()


@pytest.fixture
def go(engine, server, monkeypatch):
    """Until this event is set, the engine's steps do not end. Those that have nothing to do go on:
    a second service that was about to sleep is not to step beside the test's own."""
    event, step = threading.Event(), engine.step

    def wait_and_step():
        if engine.busy:
            event.wait()
        return step()

    monkeypatch.setattr(engine, "step", wait_and_step)
    yield event
    event.set()


def test_a_full_queue(engine, go):
    with (
        serving(engine, max_queue=2) as (port, full),
        concurrent.futures.ThreadPoolExecutor(20) as pool,
    ):
        found = [pool.submit(ask, port, answer("x", 2)) for _ in range(10)]  # 8 seats, 2 wait
        wait_until(lambda: full.service.num_open == 10)
        assert ask(port, answer("x", 2))[0] == 429
        go.set()
        assert [one.result()[0] for one in found] == [200] * 10
        assert ask(port, answer("x", 2))[0] == 200
        status, found = ask(port, answer("x", 2, n=11))  # never, however long it would wait
        assert (status, found["error"]["param"]) == (400, "n")
        assert ask(port, answer("x", 2, n=10))[0] == 200


def test_sigterm_drains(engine, go):
    """Accepted requests finish, new ones get 503, and serving ends."""
    found = {}
    service = Service(engine)
    other = app.Server(service, engine, Bytes(), NAME, POLICY)
    bound = settings.listen("127.0.0.1", 0)
    port = bound.getsockname()[1]

    def clients():
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            accepted = [
                pool.submit(ask, port, answer("x", 20, stream=n % 2 > 0)) for n in range(12)
            ]
            wait_until(lambda: service.num_open == 12)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: service.draining)
            found["new"] = [ask(port, answer("x")) for _ in range(3)]
            found["health"] = ask(port, None, "/health", method="GET")
            go.set()
            found["accepted"] = [one.result() for one in accepted]

    thread = threading.Thread(target=clients)
    thread.start()
    asyncio.run(run.until_drained(other, bound))
    thread.join()
    service.stop()
    bound.close()
    assert [status for status, _ in found["new"]] == [503] * 3
    assert found["health"] == (503, {"status": "draining"})
    assert [status for status, _ in found["accepted"]] == [200] * 12
    assert all("length" in str(body) for _, body in found["accepted"])


def test_a_request_that_cannot_begin_fails_alone(engine, port, monkeypatch):
    stream = Bytes.stream

    def fail(self, prompt, *rest, **named):
        if bytes(prompt) == b"odd":
            raise RuntimeError("a bug")
        return stream(self, prompt, *rest, **named)

    monkeypatch.setattr(Bytes, "stream", fail)
    status, found = ask(port, answer("odd"))
    assert (status, found["error"]["rule"]) == (500, "this request failed")
    assert ask(port, answer("even"))[0] == 200
    assert not engine.busy
    assert not engine.scheduler.waiting


def fails_elsewhere(engine, server, monkeypatch):
    """The engine's steps fail once the event is set, but not in the thread of `server`, which lives
    on: a late message may wake it at any time."""
    go, step, spared = threading.Event(), engine.step, server.service._thread

    def fail():
        if threading.current_thread() is spared:
            return step()
        go.wait()
        raise RuntimeError("a device is gone")

    monkeypatch.setattr(engine, "step", fail)
    return go


def test_an_engine_that_fails_answers_everybody(engine, server, monkeypatch):
    go = fails_elsewhere(engine, server, monkeypatch)
    with serving(engine) as (port, failed), concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = [pool.submit(ask, port, answer("x", stream=n > 0)) for n in range(2)]
        wait_until(lambda: failed.service.num_open == 2)
        go.set()
        assert found[0].result()[0] == 500
        assert "the engine has stopped" in found[1].result()[1]
        assert ask(port, answer("x"))[0] == 503
        assert ask(port, None, "/health", method="GET")[0] == 500
        assert "a device is gone" in failed.service.failure
    for request in list(engine._requests.values()):
        request.deliver = lambda part: None
        engine.cancel(request)


PROCESS = """
import sys, types
from moe_jax import mesh as mesh_lib
mesh_lib.initialize("cpu", 2, "off")
from moe_jax.infer.server import run, settings
from moe_jax.infer.text import Bytes
from moe_jax.placement.plan import Plan
from tests import tiny
from tests.infer.serving.test_engine import TWO, on_mesh
config = tiny.config(mesh=TWO)
source = types.SimpleNamespace(
    config=config, plan=Plan(tiny.contiguous(2)), text=Bytes(), model=lambda mesh: on_mesh(config)
)
rest = dict.fromkeys(("context", "seats", "cache_tokens", "bearer_token_file"))
run.serve(source, settings.Settings("127.0.0.1", 0, max_queue=99, record=sys.argv[1], **rest))
"""


@pytest.mark.slow
def test_a_process_ends_with_code_0_on_sigterm_under_load(tmp_path):
    recorded = tmp_path / "r.npz"
    command = [sys.executable, "-c", PROCESS, str(recorded)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        port = int(process.stdout.readline().partition("127.0.0.1:")[2].split(",")[0])
        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            found = [pool.submit(ask, port, answer(f"{n}", 40)) for n in range(40)]
            waiting = "moe_jax_requests_arrived_total 40"
            wait_until(lambda: waiting in ask(port, None, "/metrics", method="GET")[1])
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: ask(port, None, "/health", method="GET")[0] == 503)
            assert ask(port, answer("late"))[0] == 503
            assert [one.result()[0] for one in found] == [200] * 40
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert "{'length': 40}" in said
    assert trace_lib.load(recorded).num_tokens > 0


def test_calls_that_nobody_waits_for(engine):
    service, go = Service(engine), threading.Event()
    calls = [service.call(lambda _: go.wait(20))]
    wait_until(calls[0].running)
    calls += [service.call(lambda _, n=n: n) for n in (1, 2)]
    assert calls[1].cancel()
    go.set()
    assert calls[2].result(20) == 2
    service.stop()


def test_calls_to_an_engine_that_fails(engine, server, monkeypatch):
    go = fails_elsewhere(engine, server, monkeypatch)
    service = Service(engine)
    assert service.call(lambda _: 1).result(20) == 1
    waiting = service.call(lambda _: 2)  # the engine is in its step
    assert server.service.call(lambda _: 3).result(20) == 3
    go.set()
    assert "has stopped" in str(waiting.exception(20))
    service.stop()
    assert server.service.call(lambda _: 4).result(20) == 4  # the other service lives on


def test_engine_is_only_called_by_its_thread(engine, server):
    assert isinstance(engine, Engine)
    names = {server.service.call(lambda _: threading.current_thread().name).result()}
    assert names == {"engine"}
