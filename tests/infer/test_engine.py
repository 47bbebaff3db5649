"""Cached decoding against full recomputation, batches, sampling, recorded rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import permute
from moe_jax.errors import Refused
from moe_jax.infer import record, sampling
from moe_jax.infer.engine import Engine
from moe_jax.model import transformer
from moe_jax.placement import cost
from moe_jax.placement.plan import Plan
from tests import tiny

GREEDY = sampling.Sampling()
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [200], [50, 60, 70], [9, 8, 7, 6, 5, 4, 3]]


def make_engine(placement):
    config = tiny.config()
    model = permute.apply(tiny.model(), tiny.contiguous(), placement)
    return Engine(config, tiny.mesh(config), model, tiny.table(placement))


@pytest.fixture(scope="module")
def engine():
    return make_engine(tiny.contiguous())


@functools.cache
def whole(config):
    """The model without a cache, as a program."""
    return jax.jit(transformer.build_forward(config.model, tiny.mesh(config), "reference"))


def recompute(prompt, num_tokens, **model):
    """Greedy continuation by running the whole text again for every token, without a cache."""
    config = tiny.config(mesh={"data": 1, "expert": 1}, model__dispatch="local", **model)
    forward = whole(config)
    table, model, text, logits = tiny.table(tiny.contiguous(1)), tiny.model(1, 1), list(prompt), []
    for _ in range(num_tokens):
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(text)] = text
        real = np.arange(24)[None] < len(text)
        output = forward(model, padded, table, real_BS=real)
        logits.append(np.asarray(output.logits_BSV[0, len(text) - 1]))
        text.append(int(np.argmax(logits[-1])))
    return text[len(prompt) :], logits


def test_cached_decoding_equals_full_recomputation(engine):
    generation = engine.generate(PROMPTS, 10, GREEDY)
    for number, prompt in enumerate(PROMPTS):
        expected, logits = recompute(prompt, 10)
        assert generation.tokens[number] == expected
        first = np.asarray(generation.logits_BSV)[number, len(prompt) - 1]
        np.testing.assert_allclose(first, logits[0], rtol=0, atol=1e-5)


def test_texts_that_grow_long_have_the_long_factors_throughout():
    """LongRoPE, prompts of 9, 1, 3 and 7 tokens: two grow beyond 12, one after the other."""
    long = {"short_factor": (1.0, 1.0), "long_factor": (9.0, 30.0), "original_seq_len": 12}
    rope = {"model__rope": {"kind": "longrope", "factor": 8.0, **long}}
    config, placement = tiny.config(**rope), tiny.contiguous()
    engine = Engine(config, tiny.mesh(config), tiny.model(), tiny.table(placement))
    generation = engine.generate(PROMPTS, 10, GREEDY)
    assert generation.tokens == [recompute(prompt, 10, **rope)[0] for prompt in PROMPTS]
    trace = record.trace([generation], config, "texts", PROMPTS)
    said = [prompt + tokens for prompt, tokens in zip(PROMPTS, generation.tokens, strict=True)]
    # those so far are routed again where the first prompt reaches position 12, and the last does
    routed = [[*text[:-7], *text[:-5], *text[:-1]] for text in said]
    assert trace.token_ids_T.tolist() == [token for text in routed for token in text]
    counted = sum(record.dispatch_LMM for record in generation.records)
    home_T = np.repeat(trace.seq_home, trace.seq_len)
    predicted = cost.rows(
        trace.expert_ids_TLK, placement, "exchange", home_T=home_T, combine="exact"
    )
    np.testing.assert_array_equal(counted, predicted.dispatch_LMM)


def test_streaming_calls_with_every_token_in_order(engine):
    seen = {n: [] for n in range(len(PROMPTS))}
    generation = engine.generate(PROMPTS, 5, GREEDY, lambda n, token: seen[n].append(token))
    assert list(seen.values()) == generation.tokens


def test_a_text_ends_at_its_end(engine):
    """What a sequence says before does not change, nothing is routed after; all ended: no step."""
    full = engine.generate(PROMPTS, 10, GREEDY)
    end = full.tokens[1][3]
    expected = [
        tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in full.tokens
    ]
    seen = {n: [] for n in range(len(PROMPTS))}
    cut = engine.generate(
        PROMPTS, 10, GREEDY, lambda n, token: seen[n].append(token), ends=frozenset({end})
    )
    assert cut.tokens == expected == list(seen.values())
    lengths = record.routed_tokens([cut], tiny.EXPERTS).seq_len
    fed = [len(tokens) - (len(tokens) == 10 or tokens[-1] == end) for tokens in expected]
    assert lengths.tolist() == [len(p) + n for p, n in zip(PROMPTS, fed, strict=True)]
    alone = engine.generate(PROMPTS[1:2], 10, GREEDY, ends={end})
    assert alone.tokens == expected[1:2]
    assert len(alone.records) == len(expected[1])


def test_no_new_tokens_is_a_prefill(engine):
    generation = engine.generate(PROMPTS, 0, GREEDY)
    assert generation.tokens == [[], [], [], []]
    assert len(generation.records) == 1


def test_answers_are_bit_identical_under_placements_and_rows_are_predicted(engine):
    expected = engine.generate(PROMPTS * 4, 6, GREEDY)
    tokens = record.routed_tokens([expected], tiny.EXPERTS)
    for seed in range(3):
        placement = tiny.random_placement(seed)
        generation = make_engine(placement).generate(PROMPTS * 4, 6, GREEDY)
        assert generation.tokens == expected.tokens
        np.testing.assert_array_equal(generation.logits_BSV, expected.logits_BSV)
        predicted = cost.rows(
            tokens.expert_TLK, placement, "exchange", home_T=tokens.home_T, combine="exact"
        )
        measured = [
            sum(getattr(r, name) for r in generation.records)
            for name in ("dispatch_LMM", "combine_LMM")
        ]
        np.testing.assert_array_equal(measured[0], predicted.dispatch_LMM)
        np.testing.assert_array_equal(measured[1], predicted.combine_LMM)


@pytest.mark.slow  # by default: serving/test_placing.py, model/test_copies.py
@pytest.mark.parametrize("stay_on_nodes", [0, 1], ids=["local", "stay"])
def test_replicas_answer_alike_and_the_measurement_is_predicted(engine, tmp_path, stay_on_nodes):
    """Logits within rounding: on CPU a row's bits depend on how many rows its expert has."""
    from moe_jax.sim import measurement, replay

    prompts = tiny.tokens(8, 8).tolist()
    expected = engine.generate(prompts, 6, GREEDY)
    placement = tiny.replicated_placement(3, stay_on_nodes=stay_on_nodes)
    generation = make_engine(placement).generate(prompts, 6, GREEDY)
    assert generation.tokens == expected.tokens
    np.testing.assert_allclose(generation.logits_BSV, expected.logits_BSV, rtol=0, atol=1e-5)
    path = tmp_path / "m.npz"
    record.write_measurement(path, [generation], prompts, tiny.config(), Plan(placement))
    measured = measurement.read(path)
    checks = replay.check_counts(
        "after", measured, replay.predict(measured, placement), range(len(measured.computed_LP))
    )
    assert [check.problem for check in checks] == [None] * 3
    if stay_on_nodes:  # under `local`, sequences of even length take even turns either way
        by_index = cost.computed_LP(measured.expert_ids_TLK, placement, "exchange", measured.home_T)
        assert (by_index != measured.computed_LP).any()


def test_trace_holds_every_routed_token(engine):
    generation = engine.generate(PROMPTS, 6, GREEDY)
    trace = record.trace([generation], tiny.config(), "prompts")
    # the last token was chosen but never fed
    np.testing.assert_array_equal(trace.seq_len, [len(p) + 5 for p in PROMPTS])
    assert trace.num_layers == tiny.LAYERS
    prefill = generation.records[0].expert_LBSK
    np.testing.assert_array_equal(trace.expert_ids_TLK[:9], prefill[:, 0, :9].swapaxes(0, 1))
    assert trace.token_ids_T is None  # the text is nobody's business unless it is asked for
    spoken = record.trace([generation], tiny.config(), "prompts", PROMPTS).token_ids_T
    texts = [p + t[:-1] for p, t in zip(PROMPTS, generation.tokens, strict=True)]
    assert spoken.tolist() == [token for text in texts for token in text]
    # 4 prompts fill up a batch of 8, one sequence a device; 4 devices on the expert axis
    np.testing.assert_array_equal(trace.seq_home, [0, 1, 2, 3])


def test_measurement_reads_back(engine, tmp_path):
    from moe_jax.sim import measurement

    prompts = tiny.tokens(8, 8).tolist()
    generation = engine.generate(prompts, 4, GREEDY)
    plan = Plan(tiny.contiguous())
    record.write_measurement(tmp_path / "m.npz", [generation], prompts, tiny.config(), plan)
    read = measurement.read(tmp_path / "m.npz")
    assert read.meta.plan_digest == plan.digest
    assert read.text_ids_BS.shape == (8, 12)
    np.testing.assert_array_equal(read.logits_BSV, np.asarray(generation.logits_BSV)[:, :8])


def test_sampling_is_reproducible_and_follows_the_seed(engine):
    draw = lambda seed: engine.generate(PROMPTS, 8, sampling.Sampling(1.5, 0.95, seed)).tokens  # noqa: E731
    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_nucleus_equals_the_definition():
    rng = np.random.default_rng(0)
    logits_BV = jnp.asarray(rng.normal(size=(50, 11)) * 2, jnp.float32)
    for top_p in (0.1, 0.5, 0.9):
        kept_BV = np.isfinite(sampling.nucleus(logits_BV, top_p))
        for logits_V, kept_V in zip(np.asarray(logits_BV, np.float64), kept_BV, strict=True):
            probability_V = np.exp(logits_V) / np.exp(logits_V).sum()
            order = np.argsort(-probability_V)
            needed = int(np.searchsorted(np.cumsum(probability_V[order]), top_p)) + 1
            assert set(np.flatnonzero(kept_V)) == set(order[:needed])


def test_sampled_frequencies_follow_the_temperature():
    logits_V = np.log([0.5, 0.25, 0.125, 0.125])
    logits_BV = jnp.asarray(np.tile(logits_V, (4000, 1)), jnp.float32)
    drawn = sampling.choose(logits_BV, jnp.zeros(4000, jnp.int32), sampling.Sampling(0.5, 1.0, 0))
    expected = np.exp(2 * logits_V) / np.exp(2 * logits_V).sum()
    actual = np.bincount(np.asarray(drawn), minlength=4) / 4000
    # five standard deviations of a binomial share
    assert (np.abs(actual - expected) < 5 * np.sqrt(expected * (1 - expected) / 4000)).all()


@pytest.mark.parametrize(
    ("prompts", "new_tokens", "match"),
    [([[]], 4, "must not be empty"), ([[1] * 60], 5, "rotary range"), ([[1]], -1, "at least 0")],
)
def test_refusals(engine, prompts, new_tokens, match):
    with pytest.raises(Refused, match=match):
        engine.generate(prompts, new_tokens, GREEDY)
