"""The command `infer.py --serve`: load, compile, listen, drain on SIGTERM.

On SIGTERM or SIGINT no more requests are taken (503), those that were are answered, and the process
ends with exit code 0. A second signal cancels what is left.

Of several processes the first listens. The others run the model with it and end with it; one that
is asked to end says so, and all of them drain.
"""

import asyncio
import contextlib
import dataclasses
import pathlib
import signal
import socket
import sys
from collections.abc import Iterator

import jax
import uvicorn

from moe_jax import mesh as mesh_lib
from moe_jax import metrics, replan
from moe_jax.infer import load, published
from moe_jax.infer.server import app
from moe_jax.infer.server.settings import Settings, listen
from moe_jax.infer.serving import sizes
from moe_jax.infer.serving.engine import Engine
from moe_jax.infer.serving.placing import LEAST_SEQUENCES, Placing, Rules
from moe_jax.infer.serving.recorder import Recorder
from moe_jax.infer.serving.runner import Runner
from moe_jax.infer.serving.scheduler import Limits
from moe_jax.infer.serving.service import Service
from moe_jax.permute import table
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace

_RECORDED = 1 << 16  # tokens that the reservoir holds, over all shards
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SPAN = 512  # tokens of one request that it holds, at most


def serve(source: load.Source | published.Source, settings: Settings) -> None:
    """Serves until a signal; the mesh's devices must be there. Every process calls this."""
    leads = jax.process_index() == 0
    bearer = settings.check(listens=leads)
    config, plan = source.config, source.plan
    pins = replan.pins_of("--replan_pins", settings.replan_pins, plan)
    mesh = mesh_lib.of_config(config.mesh)
    limits = sizes.limits(
        config.model,
        mesh,
        context=settings.context,
        seats=settings.seats,
        cache_tokens=settings.cache_tokens,
    )
    recorder = None
    if settings.record or settings.replan_tokens:
        span = min(_SPAN, limits.max_len)
        recorder = Recorder(limits.shards, max(1, _RECORDED // limits.shards // span), span)
    model, places = load.model(source, mesh), recorder.places if recorder else 0
    runner = Runner(config, mesh, model, table(plan.placement), limits, places)
    if not leads:
        follow(runner)
        return
    engine = Engine(runner, source.text, recorder, plan_digest=plan.digest)
    go_by_place = plan.placement.has_replicas or settings.replan_tokens > 0
    if config.model.combine == "partial" and go_by_place:
        metrics.say("combine partial: the last bits of answers go by where experts are")
    placing = None
    if settings.replan_tokens:
        rules = Rules(
            tokens=settings.replan_tokens,
            most_pause=settings.replan_pause,
            homes=settings.replan_homes,
            pins=pins,
        )
        placing = Placing(engine, plan, rules, say=metrics.say)
    service = Service(engine, settings.max_queue, placing)
    server = app.Server(service, engine, source.text, config.name, app.Policy(bearer=bearer))
    trace = None
    try:
        _listen(server, settings, f"{config.name} {{}}, plan {plan.digest[:12]}: {_sizes(limits)}")
        if settings.record and not service.failure:
            with_tokens = settings.record_tokens
            trace = service.call(lambda engine: _recorded(engine, placing, with_tokens)).result()
    finally:
        service.stop()
    if settings.record:
        if service.failure and placing and placing.newest:
            trace = _said(placing.newest, settings.record_tokens)
        _write(trace, settings.record, failed=bool(service.failure))
    if service.failure:
        print(service.failure, file=sys.stderr)
        sys.exit(1)
    metrics.say(f"served {engine.stats.num_arrived:,} requests: {dict(engine.stats.requests)}")


def follow(runner: Runner) -> None:
    """Runs what the first process runs until it ends, and tells it when this one is asked to."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number in _SIGNALS:
            signal.signal(number, lambda *_: runner.broadcast.ask())
        runner.follow()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(server: app.Server, settings: Settings, line: str) -> None:
    """Serves until a signal; `line` is said with the address in it."""
    policy = server.policy
    with contextlib.closing(listen(settings.host, settings.port, policy.send_seconds)) as bound:
        host, port = bound.getsockname()[:2]
        if not policy.bearer and host not in ("127.0.0.1", "::1"):
            metrics.fail(f"{host} is not loopback and no --bearer_token_file is given: anybody")
        metrics.say("serving " + line.format(f"on http://{host}:{port}"))
        asyncio.run(until_drained(server, bound))


def _sizes(limits: Limits) -> str:
    return (
        f"{limits.shards} shard(s) x {limits.seats} requests, context {limits.room}, "
        f"cache {limits.shards * limits.blocks * limits.block_size:,} tokens"
    )


def _recorded(engine: Engine, placing: Placing | None, with_tokens: bool) -> Trace | None:
    """The trace of what was served, with the identities of its tokens if they are asked for.

    Where experts follow the traffic, of the newest window with as many requests as a plan needs;
    where none has, of what there is.
    """
    trace, recorder = engine.trace(), engine.recorder
    whole = placing.newest if placing else None
    if whole and (trace is None or trace.num_sequences < LEAST_SEQUENCES):
        trace = whole
    elif trace is not None and recorder is not None:
        trace = dataclasses.replace(trace, token_ids_T=recorder.tokens())
    return _said(trace, with_tokens) if trace else None


def _said(trace: Trace, with_tokens: bool) -> Trace:
    return trace if with_tokens else dataclasses.replace(trace, token_ids_T=None)


def _write(trace: Trace | None, path: str, failed: bool) -> None:
    """What was recorded; else says that it is not there: an older file would pass for it."""
    if trace is not None:
        trace_lib.save(trace, path)
        metrics.say(f"{path}: {trace.num_tokens:,} tokens, {trace.num_sequences} texts")
        return
    why = "the engine has stopped" if failed else "no routed token was recorded"
    older = "; the file that is there is an older one" if pathlib.Path(path).exists() else ""
    metrics.fail(f"{path}: not written, {why}{older}")


class _Uvicorn(uvicorn.Server):
    """Signals are ours: the server listens on while it drains."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(server: app.Server) -> uvicorn.Server:
    """The application, to be served on a socket that listens."""
    config = uvicorn.Config(
        app.make(server),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
    )
    return _Uvicorn(config)


async def until_drained(server: app.Server, bound: socket.socket) -> None:
    """Serves until a signal, and then until everything that was taken is answered."""
    http = http_server(server)
    loop, signalled = asyncio.get_running_loop(), asyncio.Event()

    def stop() -> None:
        if signalled.is_set():
            http.should_exit = http.force_exit = True
        else:
            metrics.say(f"draining {server.service.num_open} requests")
        server.service.drain()
        signalled.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)

    async def watch() -> None:
        service, told = server.service, False
        while not (told and not service.num_open and not server.num_open):
            if service.failure:
                break
            if service.draining and not told:
                told = True
                if not signalled.is_set():
                    metrics.say("another process was asked to end: draining")
            await asyncio.sleep(0.05)
        http.should_exit = True

    watching = asyncio.ensure_future(watch())
    try:
        await http.serve(sockets=[bound])
    finally:
        watching.cancel()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
