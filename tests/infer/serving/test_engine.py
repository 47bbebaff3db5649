"""Batch invariance, against one request at a time; refusals; counted compilations and rows."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.infer import sampling
from moe_jax.infer.engine import Engine as StaticEngine
from moe_jax.infer.serving.engine import Engine
from moe_jax.infer.serving.recorder import Recorder
from moe_jax.infer.serving.request import Options
from moe_jax.infer.serving.scheduler import Limits
from moe_jax.infer.text import Bytes
from tests import tiny

# Few seats and blocks: requests wait, are cut into chunks, preempted and computed again.
TIGHT = Limits(
    shards=8, seats=2, blocks=5, block_size=16, chunk=16, chunk_rows=2, budget=70, max_len=64
)


def make(config=None, limits=TIGHT, recorder=None, **overrides):
    config = config or tiny.config(**overrides)
    model = tiny.model(config.mesh.data, config.mesh.expert)
    table = tiny.table(tiny.contiguous(config.mesh.expert))
    return Engine(config, tiny.mesh(config), model, table, limits, Bytes(), recorder)


class Served:
    """Requests with what was delivered and the logits of every token."""

    def __init__(self, engine):
        self.engine, self.parts, self.logits, self.number = engine, [], [], {}
        engine.watch = lambda job, logits_V: self.logits[self.number[job]].append(logits_V)

    def submit(self, prompt, options):
        parts = []
        self.parts.append(parts)
        self.logits.append([])
        request = self.engine.submit(prompt, options, parts.append)
        self.number[request.job] = len(self.parts) - 1
        return request

    def run(self):
        while self.engine.step():
            pass
        assert not self.engine.busy

    def tokens(self, number):
        return [part.token for part in self.parts[number]]


def traffic(seed, count):
    """(steps to wait before it, prompt, options) of random requests, some with common prefixes."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, 256, 40).tolist()
    for n in range(count):
        prompt = rng.integers(0, 256, rng.integers(1, 30)).tolist()
        if rng.random() < 0.4:
            prompt = common[: rng.integers(1, 40)] + prompt[:8]
        options = Options(
            max_tokens=int(rng.integers(1, 64 - len(prompt))),
            temperature=float(rng.choice([0.0, 0.7])),
            top_p=float(rng.choice([1.0, 0.9])),
            seed=n,
        )
        yield int(rng.choice([0, 0, 1, 3])), prompt, options


def one_at_a_time(requests):
    """Tokens and prefill logits of each request by itself, from the engine of infer.py."""
    config = tiny.config(mesh={"data": 1, "expert": 1}, model__dispatch="local")
    engine = StaticEngine(
        config, tiny.mesh(config), tiny.model(1, 1), tiny.table(tiny.contiguous(1))
    )
    for _, prompt, options in requests:
        how = sampling.Sampling(options.temperature, options.top_p, options.seed)
        generation = engine.generate([prompt], options.max_tokens, how)
        yield generation.tokens[0], np.asarray(generation.logits_BSV)[0, len(prompt) - 1]


def test_random_arrivals_change_no_bit(served_alone):
    """Every request says what it says alone, and its logits have the same bits."""
    requests, alone = served_alone
    together = Served(make())
    for wait, prompt, options in requests:
        for _ in range(wait):
            together.engine.step()
        together.submit(prompt, options)
    together.run()
    assert together.engine.stats.preempted > 0
    assert together.engine.scheduler.found > 0
    for number in range(len(requests)):
        assert together.tokens(number) == alone.tokens(number)
        np.testing.assert_array_equal(together.logits[number], alone.logits[number])


@pytest.fixture(scope="module")
def served_alone():
    """One engine, empty before each request: nobody else is there, no prefix is found."""
    requests = list(traffic(0, 40))
    alone = Served(make())
    for _, prompt, options in requests:
        alone.submit(prompt, options)
        alone.run()
        for pool in alone.engine.scheduler.blocks:
            pool.forget()
    return requests, alone


def test_alone_equals_the_static_engine(served_alone):
    requests, alone = served_alone
    for number, (tokens, logits_V) in enumerate(one_at_a_time(requests)):
        assert alone.tokens(number) == tokens
        np.testing.assert_allclose(alone.logits[number][0], logits_V, rtol=0, atol=1e-5)
