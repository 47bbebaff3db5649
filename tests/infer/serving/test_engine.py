"""Batch invariance, against one request at a time; refusals; counted compilations and rows."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from jax import monitoring

from moe_jax import migrate, permute
from moe_jax.errors import Refused
from moe_jax.infer import record, sampling
from moe_jax.infer.engine import Engine as StaticEngine
from moe_jax.infer.serving import packing, sizes, supported
from moe_jax.infer.serving.engine import Engine
from moe_jax.infer.serving.recorder import Recorder
from moe_jax.infer.serving.request import Options
from moe_jax.infer.serving.runner import Runner
from moe_jax.infer.serving.scheduler import Limits
from moe_jax.infer.serving.stats import Stats
from moe_jax.infer.text import Bytes
from moe_jax.model import transformer
from moe_jax.placement import cost
from moe_jax.placement.plan import Placement
from moe_jax.train import step as step_lib
from tests import tiny
from tests.model.test_parts import PARTS, shaken

# Few seats and blocks: requests wait, are cut into chunks, preempted and computed again.
TIGHT = Limits(
    shards=2, seats=4, blocks=4, block_size=16, chunk=16, chunk_rows=2, budget=30, max_len=64
)
TWO = {"data": 1, "expert": 2}


def make(limits=TIGHT, recorder=None, placement=None, model=None, **overrides):
    return Engine(runner(limits, recorder, placement, model, **overrides), Bytes(), recorder)


def runner(limits=TIGHT, recorder=None, placement=None, model=None, **overrides):
    config = tiny.config(**{"mesh": TWO, **overrides})
    devices = config.mesh.expert_devices
    here = Placement.contiguous(config.model.num_plan_layers, config.model.num_experts, devices)
    placement = placement or here
    mesh = tiny.mesh(config)
    limits = dataclasses.replace(
        limits,
        shards=config.mesh.token_devices,
        budget=limits.budget * config.mesh.token_devices,
        long_from=sizes.long_from(config.model),
    )
    model = permute.apply(model or on_mesh(config), here, placement)
    places = recorder.places if recorder else 0
    return Runner(config, mesh, model, tiny.table(placement), limits, places)


def on_mesh(config):
    shardings = jax.tree.map(
        lambda leaf: leaf.sharding, step_lib.abstract_state(config, tiny.mesh(config)).model
    )
    return jax.device_put(transformer.Transformer(jax.random.key(1), config.model), shardings)


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
        prompt = rng.integers(0, 256, rng.integers(1, 32)).tolist()
        if rng.random() < 0.4:
            prompt = common[: rng.integers(1, 40)] + prompt[:6]
        options = Options(
            max_tokens=int(rng.integers(4, 24)),
            temperature=float(rng.choice([0.0, 0.7])),
            top_p=float(rng.choice([1.0, 0.9])),
            seed=n % 2,
        )
        yield int(rng.choice([0, 0, 0, 2])), prompt, options


@pytest.fixture(scope="module")
def static():
    """The engine of infer.py on one device."""
    config = tiny.config(mesh={"data": 1, "expert": 1}, model__dispatch="local")
    table = tiny.table(tiny.contiguous(1))
    return StaticEngine(config, tiny.mesh(config), tiny.model(1, 1), table)


@pytest.fixture(scope="module")
def shared():
    """Its steps have all four shapes: two rows or four, without chunks, with one or two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_FEW_ROWS", 2)
        patch.setattr(packing, "_FEW_CHUNKS", 1)
        engine = make(recorder=Recorder(2, 8, 64))
    assert [(way.rows, way.chunk_rows) for way in engine.runner.layouts] == [
        *((2, 0), (4, 0), (2, 1), (4, 2))
    ]
    return engine


@pytest.fixture
def engine(shared):
    """One that does nothing and has found nothing yet."""
    assert not shared.busy
    for pool in shared.scheduler.blocks:
        pool.forget()
        assert pool.num_held == 0
    shared.scheduler.found, shared.watch = 0, None
    shared.recorder = Recorder(2, 8, 64)
    shared.read_counters()
    shared.stats = Stats()
    return shared


@pytest.fixture
def compiled():
    """What was compiled since."""
    names = []

    def listen(name, *_, **__):
        if "compile" in name:
            names.append(name)

    monitoring.register_event_duration_secs_listener(listen)
    yield names
    monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def alone(shared):
    """Requests, and an engine that was empty before each: nobody is there, no prefix is found."""
    requests = list(traffic(0, 20))
    engine = shared
    served = Served(engine)
    for _, prompt, options in requests:
        served.submit(prompt, options)
        served.run()
        for pool in engine.scheduler.blocks:
            pool.forget()
    assert not engine.scheduler.found
    return requests, served


def serve_together(engine, requests):
    served = Served(engine)
    for wait, prompt, options in requests:
        for _ in range(wait):
            engine.step()
        served.submit(prompt, options)
    served.run()
    return served


def assert_same_bits(found, expected):
    for number in range(len(expected.parts)):
        assert found.tokens(number) == expected.tokens(number)
        np.testing.assert_array_equal(found.logits[number], expected.logits[number])


def test_random_arrivals_change_no_bit(alone, engine):
    """Every request says what it says alone, and its logits have the same bits."""
    requests, expected = alone
    assert_same_bits(serve_together(engine, requests), expected)
    assert engine.stats.preempted > 0
    assert engine.scheduler.found > 0
    assert all(pool.num_held == 0 for pool in engine.scheduler.blocks)


def test_a_request_of_nan_changes_no_other():
    """Token 255 has no numbers: beside its request and in its blocks after it, bits stay."""
    config = tiny.config(mesh=TWO, model__tied_output=False)
    model = on_mesh(config)
    model.embedding_VD[...] = model.embedding_VD[...].at[255].set(np.nan)
    engine = make(model=model, model__tied_output=False)
    options, prompt, broken = Options(max_tokens=12), list(range(20)), [255] * 50

    def asked(*prompts):
        served = Served(engine)
        for one in prompts:
            served.submit(one, options)
        served.run()
        for pool in engine.scheduler.blocks:
            pool.forget()
        return served.tokens(0), np.asarray(served.logits[0]), served

    tokens, logits_TV, _ = asked(prompt)
    assert np.isfinite(logits_TV).all()
    beside = asked(prompt, broken, broken)
    assert np.isnan(beside[2].logits[1]).any()
    for found_tokens, found_TV, _ in (beside, asked(prompt), asked(prompt, prompt)):
        assert found_tokens == tokens
        np.testing.assert_array_equal(found_TV, logits_TV)


def test_alone_equals_the_static_engine(alone, static):
    requests, served = alone
    for number, (_, prompt, options) in enumerate(requests[:6]):
        how = sampling.Sampling(options.temperature, options.top_p, options.seed)
        generation = static.generate([prompt], options.max_tokens, how)
        assert served.tokens(number) == generation.tokens[0]
        logits_V = np.asarray(generation.logits_BSV)[0, len(prompt) - 1]
        np.testing.assert_allclose(served.logits[number][0], logits_V, rtol=0, atol=1e-5)


def test_answers_do_not_change_while_experts_move(alone, engine, compiled):
    """A layer moves before every step, from plan to plan; nothing is dropped or compiled."""
    requests, expected = alone
    here = tiny.contiguous(2)
    engine.runner.mover.prepare(migrate.route(here, here))
    compiled.clear()
    steps, plain = itertools.count(), engine.step
    old, new = here, here
    moved = set()

    def step():
        nonlocal old, new
        number, layer = divmod(next(steps), tiny.LAYERS)
        if layer == 0:
            old, new = new, tiny.random_placement(number, 2)
        way = migrate.route(old, new)
        engine.adopt(way, layer, layer + 1, migrate.between(old, new, layer + 1))
        moved.add(engine.plan_digest)
        return plain()

    engine.step = step
    try:
        assert_same_bits(serve_together(engine, requests), expected)
    finally:
        del engine.step
        now = migrate.between(old, new, (next(steps) - 1) % tiny.LAYERS + 1)
        assert engine.plan_digest == now.digest
        engine.adopt(migrate.route(now, here), 0, tiny.LAYERS, here)
    assert len(moved) > 20
    assert not compiled
    copies = tiny.replicated_placement(0, devices=2)
    with pytest.raises(Refused, match="compiled for 1"):
        engine.adopt(migrate.route(copies, copies), 0, tiny.LAYERS, copies)


MESHES = {
    "local": {"mesh": {"data": 2, "expert": 1}, "model__dispatch": "local"},
    "gathered": {"mesh": {"data": 2, "expert": 4}, "model__dispatch": "gathered"},
    "exchange": {"mesh": {"data": 2, "expert": 4}},
    "hierarchical": {"mesh": {"node": 2, "expert": 2}, "model__dispatch": "hierarchical"},
    "fsdp_tensor": {"mesh": {"fsdp": 2, "expert": 2, "tensor": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_every_dispatch_and_mesh(alone, name):
    """Random arrivals on other meshes; only where a row is cut over `tensor` are bits others."""
    requests, expected = alone
    found = serve_together(make(**MESHES[name]), requests)
    if name != "fsdp_tensor":
        assert_same_bits(found, expected)
    for number in range(len(requests)):
        assert found.tokens(number) == expected.tokens(number)
        np.testing.assert_allclose(found.logits[number], expected.logits[number], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_widths_at_which_few_rows_round_otherwise():
    """Red with fewer than 64 rows on a shard: see kernels/README.md on tile sizes."""
    wide = {"model__d_model": 192, "model__d_head": 24, "model__d_ff": 96, "model__num_heads": 8}
    requests = list(traffic(3, 12))
    engines = [make(**wide) for _ in range(2)]
    alone = Served(engines[0])
    for _, prompt, options in requests:
        alone.submit(prompt, options)
        alone.run()
        for pool in engines[0].scheduler.blocks:
            pool.forget()
    assert_same_bits(serve_together(engines[1], requests), alone)


LATENT = {
    "model__latent": {"kv_rank": 6, "d_rope": 4, "d_value": 5, "query_rank": 8},
    "model__num_layers": 3,
    "model__num_dense_layers": 1,
    "model__d_ff_dense": 20,
    "model__num_kv_heads": 4,
}
SCALED = {
    "model__embedding_scale": 3.0,
    "model__residual_scale": 0.4,
    "model__attention_scale": 0.3,
    "model__logits_divisor": 2.0,
    "model__norm": "layer",
    "model__output_bias": True,
}


LONG = {
    "model__rope": {
        **{"kind": "longrope", "factor": 8.0, "original_seq_len": 40},
        **{"short_factor": (1.0, 1.5), "long_factor": (9.0, 30.0)},
    }
}


@pytest.mark.parametrize(
    "parts",
    [
        PARTS,
        LONG,
        pytest.param(LATENT | LONG, marks=pytest.mark.slow),
        pytest.param(LATENT, marks=pytest.mark.slow),
        pytest.param(SCALED, marks=pytest.mark.slow),
    ],
    ids=["windows_sinks_biases", "long", "latent_long", "latent_dense", "scales_layer_norm"],
)
def test_parts_of_published_families_equal_the_static_engine(parts):
    """Texts longer than the window, in chunks; some grow beyond the positions of pre-training."""
    config = tiny.config(mesh={"data": 1, "expert": 1}, model__dispatch="local", **parts)
    model, table = shaken(on_mesh(config)), tiny.table(tiny.contiguous(1))
    static = StaticEngine(config, tiny.mesh(config), model, table)
    served = Served(make(model=model, mesh={"data": 1, "expert": 1}, **parts))
    prompts = tiny.tokens(3, 30).tolist()
    prompts += [prompts[0] + prompts[1][:12], prompts[0][:25]]  # one is long, one stays short
    for prompt in prompts:
        served.submit(prompt, Options(max_tokens=20))
    served.run()
    expected = static.generate(prompts, 20, sampling.Sampling())
    for number, prompt in enumerate(prompts):
        assert served.tokens(number) == expected.tokens[number]
        logits_V = np.asarray(expected.logits_BSV)[number, len(prompt) - 1]
        np.testing.assert_allclose(served.logits[number][0], logits_V, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [LATENT, LONG], ids=["latent", "long"])
def test_parts_of_published_families_change_no_bit(parts):
    requests, engines = list(traffic(4, 16)), [make(**parts) for _ in range(2)]
    alone = Served(engines[0])
    for _, prompt, options in requests:
        alone.submit(prompt, options)
        alone.run()
        for pool in engines[0].scheduler.blocks:
            pool.forget()
    assert_same_bits(serve_together(engines[1], requests), alone)
    assert engines[1].stats.preempted > 0


WIDE = {
    **{"model__d_model": 64, "model__d_head": 16, "model__num_experts": 32, "model__top_k": 4},
    **{"mesh": {"data": 1, "expert": 1}, "model__dispatch": "local"},
}
SIGMOID = {"model__router_scores": "sigmoid", "model__router_correction": True}


@pytest.mark.parametrize(
    "parts",
    [
        WIDE,
        WIDE | {"model__qk_norm": "head"},
        pytest.param(WIDE | PARTS, marks=pytest.mark.slow),
        pytest.param(WIDE | SCALED, marks=pytest.mark.slow),
        pytest.param(WIDE | SIGMOID, marks=pytest.mark.slow),
        pytest.param(
            WIDE | {"model__router_weights": "sparse_mixer", "model__top_k": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param({**WIDE, "model__d_model": 24}, marks=pytest.mark.slow),
    ],
    ids=["softmax", "norm_of_heads", "parts", "scaled", "sigmoid", "sparse_mixer", "narrow"],
)
def test_a_token_has_the_same_bits_in_small_and_large_steps(parts):
    """Decoded in a step of few rows and in a chunk among 260: see model/short.py."""
    limits = dataclasses.replace(TIGHT, blocks=24, chunk_rows=16, budget=260)
    served = Served(make(limits, **parts))
    rows = [layout.num_tokens for layout in served.engine.runner.layouts]
    assert (min(rows), max(rows)) == (4, 260)
    prompts = tiny.tokens(3, 20).tolist()
    for prompt in prompts:
        served.submit(prompt, Options(max_tokens=10, logprobs=2))
        served.run()
    for number, prompt in enumerate(prompts):
        answer = served.tokens(number)
        for count in range(1, 10):
            served.submit(prompt + answer[:count], Options(max_tokens=1, logprobs=2))
            served.run()
            np.testing.assert_array_equal(served.logits[-1][0], served.logits[number][count])
            assert served.parts[-1][0].likely == served.parts[number][count].likely


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_placement_changes_no_bit(alone, seed):
    requests, expected = alone
    engine = make(placement=tiny.random_placement(seed, devices=2))
    assert_same_bits(serve_together(engine, requests), expected)


def test_nothing_is_compiled_in_service(engine, compiled):
    serve_together(engine, list(traffic(1, 6)))
    engine.read_counters()
    served = Served(engine)
    served.submit([1, 2, 3], Options(max_tokens=3, temperature=1.0, top_k=3, logprobs=2))
    served.run()
    assert compiled == []
    jax.jit(lambda x: x + 1)(np.float32(1))
    assert compiled, "the listener hears what is compiled"


def test_routing_is_recorded_and_rows_are_counted(alone, engine, static):
    """The reservoir has room for all: it holds each token, and rows are those of the planner."""
    requests, served = alone[0][:8], Served(engine)
    for first in range(0, 8, 2):  # few at a time: nobody is preempted
        for _, prompt, options in requests[first : first + 2]:
            served.submit(prompt, options)
        served.run()
    engine.read_counters()
    trace = engine.trace()
    fed = [len(prompt) + len(served.parts[n]) - 1 for n, (_, prompt, _) in enumerate(requests)]
    assert trace.num_tokens == sum(fed) - engine.scheduler.found == engine.stats.tokens
    predicted = cost.rows(
        trace.expert_ids_TLK, tiny.contiguous(2), "exchange", home_T=trace.home_T, combine="exact"
    )
    np.testing.assert_array_equal(engine.stats.dispatch_LMM, predicted.dispatch_LMM)
    np.testing.assert_array_equal(engine.stats.combine_LMM, predicted.combine_LMM)
    assert engine.stats.computed_LP.sum() == trace.num_tokens * 2 * tiny.LAYERS

    texts = [prompt + served.tokens(n)[:-1] for n, (_, prompt, _) in enumerate(requests)]
    oracle = record.routed_tokens([static.generate(texts, 0, sampling.Sampling())], tiny.EXPERTS)
    whole = np.split(oracle.expert_TLK, np.cumsum(oracle.seq_len)[:-1])
    for recorded_TLK in np.split(trace.expert_ids_TLK, np.cumsum(trace.seq_len)[:-1]):
        # The beginning of a text may have been found, and then it was not routed again.
        length = len(recorded_TLK)
        assert any(np.array_equal(text_TLK[-length:], recorded_TLK) for text_TLK in whole)


def test_cancelled_requests_leave_their_blocks(engine):
    served = Served(engine)
    requests = [served.submit([n] * 20, Options(max_tokens=20)) for n in range(8)]
    for _ in range(3):
        engine.step()
    for request in requests[::2]:
        engine.cancel(request)
        engine.cancel(request)
    served.run()
    for number, parts in enumerate(served.parts):
        assert parts[-1].finish == ("length" if number % 2 else "cancelled")
        assert sum(part.finish is not None for part in parts) == 1
    assert engine.stats.requests == {"length": 4, "cancelled": 4}
    assert all(pool.num_held == 0 for pool in engine.scheduler.blocks)


def test_logprobs_and_top_k(engine):
    served = Served(engine)
    served.submit([5, 6, 7], Options(max_tokens=4, logprobs=3))
    served.submit([5, 6, 7], Options(max_tokens=4, temperature=5.0, top_k=1, seed=9))
    served.run()
    assert served.tokens(0) == served.tokens(1), "of the one most likely token nothing is drawn"
    for part, logits_V in zip(served.parts[0], served.logits[0], strict=True):
        expected_V = np.asarray(jax.nn.log_softmax(logits_V))
        assert part.likely.logprob == pytest.approx(expected_V[part.token], abs=1e-5)
        assert [token for token, _ in part.likely.top] == np.argsort(-expected_V)[:3].tolist()
    assert served.parts[1][0].likely is None


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"model__dispatch": "coherent"}, "model.dispatch = 'coherent'.*--dispatch=exchange"),
        ({"model__dispatch": "shuffled"}, "model.dispatch = 'shuffled'"),
        ({"model__capacity_factor": 1.5}, "capacity_factor = 1.5"),
        ({"model__max_seq_len": 32}, "--context = 64.*max_seq_len = 32"),
    ],
)
def test_models_that_are_not_served(overrides, match):
    with pytest.raises(Refused, match=match):
        make(**overrides)


def test_a_part_nobody_thought_of_is_refused(monkeypatch):
    monkeypatch.setattr(supported, "KNOWN", supported.KNOWN - {"qk_norm"})
    with pytest.raises(Refused, match=r"model.qk_norm = 'head'.*not served yet"):
        make(model__qk_norm="head")


def test_tokens_out_of_vocabulary_are_refused(engine):
    for token in (-1, 256):
        with pytest.raises(Refused, match="vocabulary"):
            engine.submit([1, token], Options(), lambda part: None)
    assert not engine.busy
