"""The benchmark's own rules, with answers that cost nothing."""

import numpy as np
import pytest

from moe_jax.infer.engine import Engine
from moe_jax.infer.peer import asked
from moe_jax.infer.sampling import Sampling
from moe_jax.infer.serving import serve_load
from tests import tiny


def test_batches_are_whole_and_in_order():
    traffic = serve_load.make_load(np.arange(1000) % 256, 1e9, seed=1)
    calls = []

    def answer(prompts, answers):
        calls.append((prompts, answers))
        return 1.0

    outcome = serve_load.static(answer, traffic, batch=48)
    assert [len(prompts) for prompts, _ in calls] == [48, 48, 32]
    assert [prompt for prompts, _ in calls for prompt in prompts] == traffic.prompts
    assert [count for _, counts in calls for count in counts] == traffic.answers
    # a second after the call, which came after the arrival
    assert (outcome.first > 1 - 1e-3).all()
    assert {len(p) for p in traffic.prompts} <= set(range(16, 129))


@pytest.mark.parametrize("context", [2, 7, 64, 247, 248, 256])
def test_requests_fit_in_a_short_context(context):
    text = np.arange(1000) % 256
    traffic = serve_load.make_load(text, 1e9, seed=1, context=context)
    pairs = list(zip(traffic.prompts, traffic.answers, strict=True))
    assert all(prompt and answer for prompt, answer in pairs)
    assert max(len(prompt) + answer for prompt, answer in pairs) <= context
    assert max(map(len, traffic.prompts)) > context // 3
    if context >= 248:  # that of published figures
        published = serve_load.make_load(text, 1e9, seed=1)
        assert (traffic.prompts, traffic.answers) == (published.prompts, published.answers)


def test_batches_are_the_same_on_every_shard():
    for max_seq_len in (16, 100, 256, 4096):
        config = tiny.config(mesh={"data": 2, "expert": 4}, model__max_seq_len=max_seq_len)
        limits, batch = serve_load.sizes_of(config.model, tiny.mesh(config))
        assert limits.max_len == min(max_seq_len, 256)
        assert batch % limits.shards == 0 < batch
        assert batch * limits.max_len <= limits.shards * limits.blocks * limits.block_size


def test_the_own_way_answers_as_the_engine_does(monkeypatch):
    """Each as long as it was asked for, and then nothing."""
    monkeypatch.setattr(serve_load, "_PROMPT", (2, 8))
    monkeypatch.setattr(serve_load, "_CONTEXT", 16)
    config = tiny.config(mesh={"data": 1, "expert": 1}, model__dispatch="local")
    engine = Engine(config, tiny.mesh(config), tiny.model(1, 1), tiny.table(tiny.contiguous(1)))
    prompts, answers = [row[: 2 + n] for n, row in enumerate(tiny.tokens(3, 8).tolist())], [5, 1, 3]
    fed = []
    decode = engine.decode

    def watched(token_B, position_B, cache):
        fed.append(token_B.copy())
        return decode(token_B, position_B, cache)

    monkeypatch.setattr(engine, "decode", watched)
    seconds = serve_load.in_one_shape(engine, 8, 16)(prompts, answers)
    assert seconds > 0
    fed_SB = np.stack(fed)
    monkeypatch.setattr(engine, "decode", decode)
    expected = engine.generate(prompts, 5, Sampling(), all_logits=False).tokens
    for row, count in enumerate(answers):
        assert fed_SB[:, row].tolist() == expected[row][: count - 1] + [-1] * (5 - count)
    assert (fed_SB[:, 3:] == -1).all()


def test_transformers_is_asked_for_the_longest_answer():
    class Peer(asked.Peer):
        def __init__(self):
            pass

        def ask(self, do, **what):
            assert (do, what) == ("generate", {"tokens": [[1], [2, 3]], "new": 7})
            return {"first": 0.25}

    assert serve_load.by_transformers(Peer())([[1], [2, 3]], [4, 7]) == pytest.approx(0.25)
