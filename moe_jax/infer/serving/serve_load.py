"""The benchmark `infer.py --benchmark --serve-load`: requests that arrive, ways to serve them.

All ways get the same requests at the same times: held-out text in mixed lengths, answers of mixed
lengths, Poisson arrivals; and all have a cache of the same size. *Static batching* takes as many
of those that wait as it has room for at full length, pads them to one shape, and takes nobody in
until the longest answer is there; its program is the one of engine.py. With `--peer_python`
*transformers* does the same with `generate`, in a process of its own, on the same cores (peer/).
Rounds alternate between the ways, and the median round counts.

By themselves: what the host does in a step of 16 requests, what the recorder costs in it, and how
many rows requests save that run where their experts are (homes.py).
"""

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from moe_jax import auto, data, metrics, permute
from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.errors import Refused
from moe_jax.infer import engine as static_lib
from moe_jax.infer import load, published, sampling
from moe_jax.infer.peer import asked
from moe_jax.infer.serving import homes, sizes
from moe_jax.infer.serving.engine import Engine
from moe_jax.infer.serving.recorder import Recorder
from moe_jax.infer.serving.request import Options, Part
from moe_jax.infer.serving.runner import Runner
from moe_jax.infer.serving.scheduler import Limits
from moe_jax.infer.serving.stats import Stats
from moe_jax.placement.problem import Problem

REQUESTS, ROUNDS = 128, 3
_PROMPT, _ANSWER = (16, 128), (8, 120)  # tokens, uniformly; less in a shorter context
_CONTEXT = 256
_AT_ONCE = 16
_STEP_PROMPT, _STEP_ANSWER = 24, 68  # where single steps are measured
_RECORDER_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Load:
    """Attributes:
    arrival: seconds from the start, ascending.
    prompts: tokens. answers: numbers of tokens.
    """

    arrival: np.ndarray
    prompts: list[list[int]]
    answers: list[int]

    @property
    def num_new(self) -> int:
        return sum(self.answers)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Attributes:
    seconds: until the last answer.
    first: seconds from each arrival to its first token.
    """

    seconds: float
    first: np.ndarray


def lengths(context: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Least and most tokens of prompts, and of answers: those above, where both fit."""
    if context >= _PROMPT[1] + _ANSWER[1]:
        return _PROMPT, _ANSWER

    def part(tokens: int) -> int:
        return max(tokens * context // _CONTEXT, 1)

    return (part(_PROMPT[0]), part(_PROMPT[1])), (part(_ANSWER[0]), part(_ANSWER[1]))


def make_load(text: np.ndarray, per_second: float, seed: int, *, context: int = _CONTEXT) -> Load:
    """Args:
    text: tokens to cut prompts from.
    per_second: requests, on average.
    context: tokens that a prompt and its answer may have together.
    """
    rng = np.random.default_rng(seed)
    of_prompt, of_answer = lengths(context)
    length_R = rng.integers(*of_prompt, REQUESTS, endpoint=True)
    starts = rng.integers(0, len(text) - of_prompt[1], REQUESTS)
    return Load(
        np.cumsum(rng.exponential(1 / per_second, REQUESTS)),
        [text[s : s + n].tolist() for s, n in zip(starts, length_R, strict=True)],
        rng.integers(*of_answer, REQUESTS, endpoint=True).tolist(),
    )


def continuous(engine: Engine, traffic: Load) -> Outcome:
    """Requests join as they arrive."""
    for pool in engine.scheduler.blocks:
        pool.forget()
    first = np.full(REQUESTS, np.nan)
    start, arrived = time.perf_counter(), 0

    def listen(number: int) -> None:
        def deliver(_: Part) -> None:
            if np.isnan(first[number]):
                first[number] = time.perf_counter() - start - traffic.arrival[number]

        options = Options(max_tokens=traffic.answers[number], ignore_end=True)
        engine.submit(traffic.prompts[number], options, deliver)

    while True:
        now = time.perf_counter() - start
        while arrived < REQUESTS and traffic.arrival[arrived] <= now:
            listen(arrived)
            arrived += 1
        if not engine.step():
            if arrived == REQUESTS:
                return Outcome(time.perf_counter() - start, first)
            time.sleep(max(0.0, traffic.arrival[arrived] - (time.perf_counter() - start)))


# (prompts, numbers of tokens to answer) -> seconds from the call to the first tokens
AnswerBatch = Callable[[list[list[int]], list[int]], float]


def static(answer: AnswerBatch, traffic: Load, batch: int) -> Outcome:
    """Whole batches, one after the other."""
    first = np.full(REQUESTS, np.nan)
    start, arrived = time.perf_counter(), 0
    waiting: collections.deque[int] = collections.deque()
    while arrived < REQUESTS or waiting:
        now = time.perf_counter() - start
        while arrived < REQUESTS and traffic.arrival[arrived] <= now:
            waiting.append(arrived)
            arrived += 1
        if not waiting:
            time.sleep(max(0.0, traffic.arrival[arrived] - now))
            continue
        taken = [waiting.popleft() for _ in range(min(batch, len(waiting)))]
        called = time.perf_counter() - start
        chosen = [traffic.prompts[number] for number in taken]
        seconds = answer(chosen, [traffic.answers[number] for number in taken])
        first[taken] = called + seconds - traffic.arrival[taken]
    return Outcome(time.perf_counter() - start, first)


def in_one_shape(engine: static_lib.Engine, batch: int, context: int) -> AnswerBatch:
    """By engine.py: prompts padded on the right, sequences that have ended fed nothing."""
    greedy, (_, width), _ = sampling.Sampling(), *lengths(context)

    def answer(prompts: list[list[int]], answers: list[int]) -> float:
        start, first = time.perf_counter(), 0.0
        token_BS, length_B = np.zeros((batch, width), np.int32), np.zeros(batch, np.int32)
        for row, prompt in enumerate(prompts):
            token_BS[row, : len(prompt)], length_B[row] = prompt, len(prompt)
        cache = engine.empty_cache(batch, context)
        _, logits_BV, cache, _ = engine.prefill(token_BS, length_B, cache)
        for i in range(max(answers)):
            position_B = (length_B + i).astype(np.int32)
            chosen_B = engine.choose(logits_BV, position_B, greedy)
            first = first or time.perf_counter() - start
            going = [i + 1 < wanted for wanted in answers]
            fed_B = np.full(batch, -1, np.int32)
            fed_B[: len(prompts)] = np.where(going, chosen_B[: len(prompts)], -1)
            if any(going):
                logits_BV, cache, _ = engine.decode(fed_B, position_B, cache)
        return first

    return answer


def by_transformers(peer: asked.Peer) -> AnswerBatch:
    """By `generate`: prompts padded on the left, all sequences as long as the longest answer."""
    return lambda prompts, answers: peer.ask("generate", tokens=prompts, new=max(answers))["first"]


def run(source: load.Source | published.Source, peer_python: str | None = None) -> None:
    """Prints the comparison; see the head of this file.

    Args:
      peer_python: interpreter with torch and transformers, for a source that they can read.
    """
    with contextlib.ExitStack() as stack:
        peer = None
        if peer_python:
            assert isinstance(source, published.Source)
            peer = stack.enter_context(asked.Peer(peer_python))
            peer.ask("load", folder=str(source.tensors.folder), threads=os.cpu_count())
        _run(source, peer)


def sizes_of(model: ModelConfig, mesh: Mesh) -> tuple[Limits, int]:
    """Those of the engine, and how many sequences of full length its cache has room for: as many
    on each shard."""
    context = min(_CONTEXT, model.max_seq_len)
    limits = sizes.limits(model, mesh, context=context)
    return limits, limits.blocks * limits.block_size // context * limits.shards


def _run(source: load.Source | published.Source, peer: asked.Peer | None) -> None:
    config = source.config
    mesh = mesh_lib.of_config(config.mesh)
    model, table = load.model(source, mesh), permute.table(source.plan.placement)
    limits, batch = sizes_of(config.model, mesh)
    context, positions = limits.max_len, limits.shards * limits.blocks * limits.block_size
    engine = Engine(Runner(config, mesh, model, table, limits), source.text)
    ways = {"static": in_one_shape(static_lib.Engine(config, mesh, model, table), batch, context)}
    corpus = source.text.corpus(data.load_corpus(config.data).held_out)

    # all at once: compiles, and says what rate is high
    flood = make_load(corpus, 1e6, seed=0, context=context)
    continuous(engine, flood)
    static(ways["static"], flood, batch)
    if peer:
        ways["transformers"] = by_transformers(peer)
        _use_the_faster(peer, ways["transformers"], flood, batch)
    peak = REQUESTS / continuous(engine, flood).seconds
    metrics.say(
        f"{REQUESTS} requests on mesh {config.mesh}, cache of {positions:,} positions: "
        f"{limits.shards * limits.seats} seats, or {batch} at full length; greedy, "
        f"{config.model.dtype}"
    )
    for count in (1, _AT_ONCE):
        _host_share(engine, corpus, count)
    recorder = Recorder(limits.shards, 64, limits.max_len)
    runner = Runner(config, mesh, model, table, limits, recorder.places)
    recording = Engine(runner, source.text, recorder)
    _recorder_cost(engine, recording, corpus)
    if config.mesh.expert_devices > 1:
        _worth_of_homes(recording, recorder, source, corpus)
    for name, rate in (("all at once", 1e6), ("at 0.7 of that rate", 0.7 * peak)):
        _compare(engine, ways, corpus, batch, rate, name)


def _use_the_faster(peer: asked.Peer, way: AnswerBatch, traffic: Load, batch: int) -> None:
    """Of the two ways of computing experts that do not copy their weights for every token."""
    seconds = {}
    for experts in ("eager", "grouped_mm"):
        peer.ask("use", experts=experts, cache="dynamic")
        seconds[experts] = static(way, traffic, batch).seconds
    fastest = min(seconds, key=seconds.__getitem__)
    peer.ask("use", experts=fastest, cache="dynamic")
    metrics.say(f"transformers computes experts by {fastest!r}, the faster of {list(seconds)}")


def _compare(
    engine: Engine,
    ways: dict[str, AnswerBatch],
    corpus: np.ndarray,
    batch: int,
    per_second: float,
    name: str,
) -> None:
    context = engine.limits.max_len
    rates: dict[str, list[float]] = {way: [] for way in ("continuous", *ways)}
    firsts: dict[str, list[np.ndarray]] = {way: [] for way in rates}
    for round_ in range(ROUNDS):
        traffic = make_load(corpus, per_second, seed=round_ + 1, context=context)
        for way in rates:
            outcome = (
                static(ways[way], traffic, batch) if way in ways else continuous(engine, traffic)
            )
            rates[way].append(traffic.num_new / outcome.seconds)
            firsts[way].append(outcome.first)
        metrics.progress(f"{name}: round {round_ + 1}/{ROUNDS}")
    for way in rates:
        first = np.concatenate(firsts[way])
        p50, p99 = np.percentile(first, (50, 99))
        metrics.say(
            f"requests {name}, {way}: {np.median(rates[way]):,.0f} tokens/s; "
            f"first token p50 {p50:.2f} s, p99 {p99:.2f} s"
        )
    for way in ways:
        ratio = np.median(np.divide(rates["continuous"], rates[way]))
        metrics.say(f"requests {name}: continuous / {way} {ratio:.2f} in tokens/s")


def _submit(engine: Engine, corpus: np.ndarray, count: int) -> None:
    for pool in engine.scheduler.blocks:
        pool.forget()
    length = min(_STEP_PROMPT, max(engine.limits.max_len // 4, 1))
    answer = min(_STEP_ANSWER, engine.limits.max_len - length)
    options = Options(max_tokens=answer, ignore_end=True)
    for n in range(count):
        engine.submit(corpus[n * 32 : n * 32 + length].tolist(), options, lambda part: None)


def _host_share(engine: Engine, corpus: np.ndarray, count: int) -> None:
    _submit(engine, corpus, count)
    stats, seconds = engine.stats, []
    while True:
        before = stats.host_seconds, stats.device_seconds, stats.tokens
        if not engine.step():
            break
        if stats.tokens - before[2] == count:
            seconds.append((stats.host_seconds - before[0], stats.device_seconds - before[1]))
    host, device = np.median(seconds, axis=0)
    metrics.say(
        f"a step with {count} to answer: {1e3 * (host + device):.1f} ms, of it on the host "
        f"(plan, pack, deliver) {1e3 * host:.2f} ms = {host / (host + device):.1%}"
    )


def _recorder_cost(engine: Engine, recording: Engine, corpus: np.ndarray) -> None:
    """CPU time of all threads, step by step in turn: others on the machine count less in it."""
    ratios = []
    for _ in range(_RECORDER_ROUNDS):
        pairs = []
        for one in (engine, recording):
            _submit(one, corpus, _AT_ONCE)
        while engine.busy and recording.busy:
            pair = []
            for one in (engine, recording):
                started, tokens = time.process_time(), one.stats.tokens
                one.step()
                whole = one.stats.tokens - tokens == _AT_ONCE
                pair.append(time.process_time() - started if whole else np.nan)
            pairs.append(pair)
        without, with_ = np.nanmedian(pairs, axis=0)
        ratios.append(with_ / without)
    metrics.say(
        f"the recorder: a step takes {np.median(ratios):.3f} x the CPU time "
        f"({min(ratios):.3f} to {max(ratios):.3f} in {_RECORDER_ROUNDS} rounds)"
    )


def _worth_of_homes(
    engine: Engine, recorder: Recorder, source: load.Source | published.Source, corpus: np.ndarray
) -> None:
    """Learned from the requests of one load, worth what the dispatch counts in others."""
    config, placement = source.config, source.plan.placement
    context = engine.limits.max_len
    continuous(engine, make_load(corpus, 1e6, seed=0, context=context))
    trace = engine.trace()
    assert trace is not None
    try:
        topology = auto.topology_of(config)
        model, slack = config.model, homes.slack(engine.limits.seats)
        problem = Problem(trace, topology, "seconds", model.dispatch)
        learned = homes.learn(problem, recorder.tokens(), placement, model.vocab_size, slack)
    except Refused as refused:
        metrics.say(f"requests have no homes here: {refused}")
        return
    rows, scheduler = {}, engine.scheduler
    for way, of_requests in {"anywhere": None, "at home": learned}.items():
        scheduler.homes = of_requests
        engine.read_counters()
        engine.stats = Stats()
        for seed in range(1, ROUNDS + 1):
            continuous(engine, make_load(corpus, 1e6, seed, context=context))
        engine.read_counters()
        rows[way] = engine.stats.moved / (engine.stats.tokens * placement.num_layers)
    metrics.say(
        f"rows per token and layer: {rows['anywhere']:.3f} where requests run anywhere, "
        f"{rows['at home']:.3f} at homes learned from other requests "
        f"({scheduler.at_home / scheduler.admitted:.0%} got theirs)"
    )
