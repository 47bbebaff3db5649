"""The server as an ASGI application (Starlette): OpenAI-style routes over a `Service`.

Every refusal is a JSON object with field, value, rule and fix. A request is taken or refused as a
whole, before anything of it is answered. When a client goes away, or reads so slowly that nothing
can be sent for a while, its request is cancelled; others are not touched.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from moe_jax.errors import Refused
from moe_jax.infer.server import fields, live, prometheus, reply
from moe_jax.infer.serving.engine import Engine
from moe_jax.infer.serving.request import Options, Part
from moe_jax.infer.serving.service import Service, Ticket, Unavailable
from moe_jax.infer.text import Text


@dataclasses.dataclass(frozen=True)
class Policy:
    """Bounds of one server.

    Attributes:
      max_body: bytes of a request.
      body_seconds: until a body must be there.
      send_seconds: until a client must have taken what is sent to it.
      answer_seconds: until an answer must be finished.
      bearer: token that clients must show; "" = none.
    """

    max_body: int = 2 * 2**20
    body_seconds: float = 30.0
    send_seconds: float = 60.0
    answer_seconds: float = 3600.0
    bearer: str = ""


class Stopped(Exception):
    """An answer that ended in a way that is none: Attributes: status, refused."""

    def __init__(self, status: int, refused: Refused):
        super().__init__(str(refused))
        self.status, self.refused = status, refused


@dataclasses.dataclass
class _Rate:
    """New tokens a second between two looks at the counter, a second apart at least."""

    tokens: int = 0
    at: float = 0.0
    rate: float = 0.0

    def look(self, tokens: int) -> float:
        now = time.monotonic()
        if now - self.at >= 1:
            self.rate = (tokens - self.tokens) / (now - self.at) if self.at else 0.0
            self.tokens, self.at = tokens, now
        return self.rate


class Server:
    """What the routes share.

    Attributes:
      num_open: requests that are being answered.
    """

    def __init__(self, service: Service, engine: Engine, text: Text, name: str, policy: Policy):
        """Args:
        engine: of the service; only what never changes is read here.
        text: what tokens mean.
        name: of the model.
        """
        self.service, self.policy, self.name = service, policy, name
        self._engine, self._text = engine, text
        self._created, self._rate = int(time.time()), _Rate()
        self.num_open = 0

    # --- routes ---------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        if self.service.failure:
            return JSONResponse({"status": "failed"}, 500)
        if self.service.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        self._check_bearer(request)
        one = {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "moe_jax",
            "max_model_len": self._engine.limits.room,
        }
        if (asked := request.path_params.get("model")) is None:
            return JSONResponse({"object": "list", "data": [one]})
        self._check_model(asked)
        return JSONResponse(one)

    async def metrics(self, request: Request) -> Response:
        self._check_bearer(request)

        def read(engine: Engine) -> str:
            waiting = max(0, self.service.num_open - len(engine.scheduler.running))
            rate = self._rate.look(engine.stats.new_tokens)
            return prometheus.page(
                engine, self.service.placing, waiting, self.service.draining, rate
            )

        page = await self._between_steps(read)
        return PlainTextResponse(page, media_type=prometheus.CONTENT_TYPE)

    async def live(self, request: Request) -> Response:
        self._check_bearer(request)
        service = self.service

        def read(engine: Engine) -> str:
            waiting = max(0, service.num_open - len(engine.scheduler.running))
            rate = self._rate.look(engine.stats.new_tokens)
            return live.html(engine, service.placing, self.name, waiting, rate)

        return HTMLResponse(await self._between_steps(read))

    async def _between_steps(self, read: Callable[[Engine], str]) -> str:
        try:
            return await asyncio.wrap_future(self.service.call(read))
        except RuntimeError:
            why = Refused("server", "stopped", "the engine has stopped", "start it again")
            raise Stopped(503, why) from None

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, is_chat=False)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, is_chat=True)

    # --- one request ----------------------------------------------------------------------

    async def _answer(self, request: Request, is_chat: bool) -> Response:
        self._check_bearer(request)
        self.service.check_open()
        body = fields.parse(await self._body(request))
        self._check_model(body.get("model", self.name))
        text, context = self._text, self._engine.limits.room
        # On a thread: a long text takes its time, and others' streams go on.
        if is_chat:
            asked = await asyncio.to_thread(fields.chat, body, text.chat, context)
        else:
            asked = await asyncio.to_thread(fields.completion, body, text.encode)
        answers = _Answers(self.service, asked.jobs)
        made = reply.Reply(
            chat=is_chat,
            model=self.name,
            prompt_tokens=sum(map(len, asked.prompts)),
            piece=self._text.piece,
        )
        return _Sent(self, answers, made, asked)

    def _check_bearer(self, request: Request) -> None:
        if not self.policy.bearer:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(token.strip().encode(), self.policy.bearer.encode())
        if scheme.lower() != "bearer" or not same:
            rule = "must be 'Bearer TOKEN' with the token of this server"
            raise Stopped(401, Refused("Authorization", "...", rule, "show the token"))

    def _check_model(self, asked: Any) -> None:
        if asked != self.name:
            rule = f"is not served here; {self.name!r} is"
            raise Stopped(404, Refused("model", asked, rule, f"use {self.name!r}"))

    async def _body(self, request: Request) -> bytes:
        most = self.policy.max_body
        rule = f"must have at most {most} bytes"
        too_large = Stopped(413, Refused("body", "too large", rule, "send less"))
        if int(request.headers.get("content-length", 0)) > most:
            raise too_large

        async def read() -> bytes:
            body = bytearray()
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_large
            return bytes(body)

        try:
            async with asyncio.timeout(self.policy.body_seconds):
                return await read()
        except TimeoutError:
            rule = f"must be sent within {self.policy.body_seconds:g} s"
            raise Stopped(408, Refused("body", "incomplete", rule, "send it at once")) from None
        except ClientDisconnect:  # nobody reads this answer
            rule = "was not sent to its end"
            raise Stopped(400, Refused("body", "incomplete", rule, "send it again")) from None


class _Answers:
    """All answers to one request of HTTP; taken together or not at all."""

    def __init__(self, service: Service, jobs: list[tuple[list[int], Options]]):
        self._service = service
        self._parts: asyncio.Queue[tuple[int, Part]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._open = len(jobs)
        loop = asyncio.get_running_loop()

        def deliver_of(index: int) -> Callable[[Part], None]:
            def deliver(part: Part) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
                    loop.call_soon_threadsafe(self._parts.put_nowait, (index, part))

            return deliver

        try:
            service.check_open(len(jobs))
            for job in jobs:
                service.check(*job)
            for index, (prompt, options) in enumerate(jobs):
                self._tickets.append(service.submit(prompt, options, deliver_of(index)))
        except (Refused, Unavailable):
            self.cancel()
            raise

    def cancel(self) -> None:
        for ticket in self._tickets:
            self._service.cancel(ticket)

    async def parts(self, seconds: float) -> AsyncIterator[tuple[int, Part]]:
        """(number of the answer, part), until all are finished, which may take so long."""
        end = time.monotonic() + seconds
        while self._open:
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    index, part = await self._parts.get()
                if time.monotonic() > end:  # a part that was there is had without waiting
                    raise TimeoutError
            except TimeoutError:
                rule = f"must be finished within {seconds:g} s"
                raise Stopped(504, Refused("answer", "too long", rule, "ask for less")) from None
            if part.finish == "failed":
                rule = "the engine has stopped" if self._service.failure else "this request failed"
                why = Refused("server", "failed", rule, "see the server's log")
                raise Stopped(500, why)
            if part.finish == "cancelled":
                why = Refused("server", "stopping", "the answer was cut short", "ask again")
                raise Stopped(503, why)
            self._open -= part.finish is not None
            yield index, part


class _Sent(Response):
    """An answer on its way to a client that may go away, or be slow."""

    def __init__(self, server: Server, answers: _Answers, made: reply.Reply, asked: fields.Asked):
        self._server, self._answers, self._made, self._asked = server, answers, made, asked
        self._choices = [reply.Choice(index) for index in range(len(asked.jobs))]
        self.background = None
        server.num_open += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        policy = self._server.policy

        async def send_in_time(message: Any) -> None:
            # Not `wait_for`: until Python 3.12 it drops a cancellation that comes when what it
            # waits for is done.
            async with asyncio.timeout(policy.send_seconds):
                await send(message)

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        answer = self._stream if self._asked.stream else self._whole
        working = asyncio.ensure_future(answer(scope, receive, send_in_time))
        leaving = asyncio.ensure_future(gone())
        try:
            # An answer that takes too long ends by itself, with an error.
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                with contextlib.suppress(TimeoutError, OSError):  # too slow, or gone
                    working.result()
        finally:
            self._answers.cancel()  # first: it waits for nobody
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)
            self._server.num_open -= 1

    async def _whole(
        self, scope: Scope, receive: Receive, send: Callable[[Any], Awaitable[None]]
    ) -> None:
        try:
            async for index, part in self._answers.parts(self._server.policy.answer_seconds):
                self._choices[index].add(part)
            response = JSONResponse(self._made.whole(self._choices))
        except Stopped as stopped:
            response = JSONResponse(reply.error(stopped.status, stopped.refused), stopped.status)
        await response(scope, receive, send)

    async def _stream(self, _: Scope, __: Receive, send: Callable[[Any], Awaitable[None]]) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def event(data: Any) -> None:
            if data is not None:
                line = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
                body = f"data: {line}\n\n".encode("utf-8", errors="replace")
                await send({"type": "http.response.body", "body": body, "more_body": True})

        try:
            for choice in self._choices:
                await event(self._made.first(choice.index))
            async for index, part in self._answers.parts(self._server.policy.answer_seconds):
                self._choices[index].add(part)
                await event(self._made.part(index, part))
            if self._asked.usage:
                await event(self._made.last(self._choices))
        except Stopped as stopped:  # the status is sent already
            await event(reply.error(stopped.status, stopped.refused))
        await event("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def make(server: Server) -> Starlette:
    """The application."""

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return JSONResponse(reply.error(400, error), 400)

    async def stopped(_: Request, error: Exception) -> Response:
        assert isinstance(error, Stopped | Unavailable)
        headers = None
        if error.status in (429, 503):
            headers = {"retry-after": "1"}
        elif error.status == 401:
            headers = {"www-authenticate": "Bearer"}
        return JSONResponse(reply.error(error.status, error.refused), error.status, headers)

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = f"{request.method} {request.url.path}"
        why = Refused("path", where, str(error.detail), "see /v1/models, /v1/completions")
        # Headers: a 405 says which methods there are.
        return JSONResponse(reply.error(error.status_code, why), error.status_code, error.headers)

    async def failed(_: Request, __: Exception) -> Response:
        # The error is raised on, and so logged, after this is sent.
        why = Refused("server", "failed", "this request failed", "see the server's log")
        return JSONResponse(reply.error(500, why), 500)

    return Starlette(
        routes=[
            Route("/", server.live),
            Route("/health", server.health),
            Route("/metrics", server.metrics),
            Route("/v1/models", server.models),
            Route("/v1/models/{model}", server.models),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
        ],
        exception_handlers={
            Refused: refused,
            Stopped: stopped,
            Unavailable: stopped,
            HTTPException: no_route,
            Exception: failed,
        },
    )
