"""Plans from served traffic: adopted, proven by counted rows, withdrawn; answers stay the same."""

import dataclasses
import types

import numpy as np
import pytest

from moe_jax import replan
from moe_jax.errors import Refused
from moe_jax.infer.server import run
from moe_jax.infer.serving import placing
from moe_jax.infer.serving.recorder import Recorder
from moe_jax.infer.serving.request import Options
from moe_jax.infer.serving.runner import Runner
from moe_jax.infer.serving.scheduler import Limits
from moe_jax.infer.serving.stats import Stats
from moe_jax.placement import topology as topology_lib
from moe_jax.placement.plan import Plan
from tests import tiny
from tests.infer.serving import test_engine
from tests.model.test_parts import shaken

compiled = test_engine.compiled  # a fixture
HERE = tiny.contiguous(4)
ROOMY = Limits(
    shards=4, seats=4, blocks=16, block_size=16, chunk=16, chunk_rows=2, budget=40, max_len=64
)
RULES = placing.Rules(
    tokens=1500, pays_within=10**9, time_limit=0.3, most_pause=0.0, homes=False
)  # homes: test_homes.py


@pytest.fixture(scope="module")
def shared():
    """Its experts have biases, as gpt-oss's do."""
    sizes = {"mesh": {"data": 1, "expert": 4}, "model__expert_bias": True}
    model = shaken(test_engine.on_mesh(tiny.config(**sizes)))
    return test_engine.make(
        ROOMY, Recorder(4, 64, 64), model=model, model__combine="reproducible", **sizes
    )


@pytest.fixture
def engine(shared):
    shared.recorder = Recorder(4, 64, 64)
    shared.read_counters()
    shared.stats = Stats()
    yield shared
    # experts go back, for the next test
    shared.adopt(placing.migrate.route(_where(shared), HERE), 0, tiny.LAYERS, HERE)


def _where(engine):
    return engine.placed.plan.placement


def start(engine, rules=RULES, said=None, here=HERE):
    placed = placing.Placing(
        engine,
        Plan(here),
        rules,
        topology=topology_lib.flat(4),
        say=(said if said is not None else []).append,
    )
    engine.placed = placed
    return placed


def prompts(seed, count):
    """Texts of a quarter of the bytes each: what a request asks for, few experts answer."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield (64 * rng.integers(0, 4) + rng.integers(0, 64, 40)).tolist()


def serve(engine, count, placed=None, seed=0, until=lambda: False):
    """Tokens of every answer; stops early where `until` holds."""
    answers = []
    for prompt in prompts(seed, count):
        parts = []
        answers.append(parts)
        engine.submit(prompt, Options(max_tokens=8), parts.append)
    while engine.step():
        if placed:
            placed.between_steps()
            if placed.report.state == placing.PLANNING:
                placed._background._thread.join()
            elif placed.report.state == placing.MOVING:
                engine.runner.prepared(wait=True)
    return [[part.token for part in parts] for parts in answers]


def test_a_plan_is_made_adopted_and_proven(engine):
    expected = serve(engine, 160)
    said = []
    placed = start(engine, said=said)
    assert serve(engine, 160, placed) == expected
    report = placed.report
    assert report.adopted == report.proven == 1, said
    assert engine.plan_digest == placed.plan.digest != HERE.digest
    assert report.rows_counted < report.rows_before
    assert report.rows_counted == pytest.approx(report.rows_predicted, rel=0.05)
    moved = placing.migrate.route(HERE, placed.plan.placement).moved_L.sum()
    assert report.moved_experts == moved
    assert report.moved_bytes == moved * engine.runner.mover.expert_bytes
    assert 0 < report.pause <= report.total_pause
    (proof,) = (line for line in said if "is proven" in line)
    assert placed._windows, "one has ended since, under the plan"
    assert f"{report.rows_before:.3f} before" in proof
    mark = engine.stats.mark
    assert mark.digest == placed.plan.digest
    assert 2 * RULES.tokens <= mark.tokens < engine.stats.tokens - RULES.tokens


def planted(monkeypatch, rows_after, placement=None):
    """Every search finds one plan, and promises these rows."""
    decide = replan.decide
    plan = Plan(placement or tiny.random_placement(7, 4))

    def found(setting, before, recorded, seed=0, progress=None):
        real = decide(setting, before, recorded, seed, progress)
        return dataclasses.replace(real, adopt=True, plan=plan, rows_after=rows_after)

    monkeypatch.setattr(replan, "decide", found)
    return plan


def test_a_plan_that_breaks_its_promise_is_withdrawn(engine, monkeypatch):
    expected = serve(engine, 200)
    plan, said = planted(monkeypatch, rows_after=0.01), []
    placed = start(engine, said=said)
    assert serve(engine, 200, placed) == expected
    report = placed.report
    assert (report.adopted, report.proven, report.withdrawn) == (1, 0, 1), said
    assert engine.plan_digest == HERE.digest  # and back
    assert placed.plan.placement == HERE
    assert engine.stats.mark.digest == HERE.digest
    assert any(f"plan {plan.digest[:12]} is withdrawn" in line for line in said)
    # found again, it is not adopted again
    serve(engine, 200, placed, seed=1)
    assert report.adopted == 1
    assert any("withdrawn before" in line for line in said)


@pytest.mark.parametrize("rows_after", [99.0, 0.01], ids=["proven", "withdrawn"])
def test_the_window_that_proves_teaches_homes_too(engine, monkeypatch, rows_after):
    """For the plan in use and, where it is withdrawn, for the one that experts go back to."""
    plan, placed, lessons = planted(monkeypatch, rows_after), start(engine), []

    def learn(placement):
        is_newest = placed._learned_from[-1] is placed.newest
        lessons.append((placed.report.state, placement, is_newest))

    monkeypatch.setattr(placed, "_learn", learn)
    serve(engine, 200, placed)
    assert (placing.PROVING, plan.placement, True) in lessons
    assert ((placing.MOVING, HERE, True) in lessons) == (rows_after < 1)


def test_layers_move_one_by_one_where_no_pause_is_allowed(engine, monkeypatch):
    planted(monkeypatch, rows_after=99.0)
    groups = []
    adopt = engine.adopt

    def counted(way, first, last, placement):
        groups.append((first, last))
        return adopt(way, first, last, placement)

    monkeypatch.setattr(engine, "adopt", counted)
    placed = start(engine)
    serve(engine, 100, placed)
    assert groups == [(layer, layer + 1) for layer in range(tiny.LAYERS)]


def test_a_window_that_has_ended_is_there_to_be_written(engine, monkeypatch):
    """A server that ends then has served traffic, but its recorder is empty."""
    planted(monkeypatch, rows_after=99.0)
    placed, kept = start(engine), []
    assert run._recorded(engine, placed, with_tokens=True) is None

    def watched(end):
        def ends():
            whole, said = engine.trace(), engine.recorder.tokens()
            end()
            assert engine.trace() is None
            silent, spoken = (run._recorded(engine, placed, with_tokens=w) for w in (False, True))
            np.testing.assert_array_equal(spoken.expert_ids_TLK, whole.expert_ids_TLK)
            np.testing.assert_array_equal(spoken.seq_home, whole.seq_home)
            np.testing.assert_array_equal(spoken.token_ids_T, said)
            assert silent.token_ids_T is None
            kept.append(end.__name__)

        return ends

    for name in ("_window_ended", "_prove"):
        monkeypatch.setattr(placed, name, watched(getattr(placed, name)))
    serve(engine, 120, placed)
    assert kept[:3] == ["_window_ended", "_window_ended", "_prove"]
    # The new one has begun: it is written once it has as many requests as a plan needs.
    begun = engine.trace()
    assert begun.num_sequences > 0
    for enough, written in ((1, placed.newest), (0, begun)):
        monkeypatch.setattr(run, "LEAST_SEQUENCES", begun.num_sequences + enough)
        newer = run._recorded(engine, placed, with_tokens=False)
        np.testing.assert_array_equal(newer.expert_ids_TLK, written.expert_ids_TLK)


def test_a_plan_that_is_not_worth_it_moves_nothing(engine):
    said = []
    placed = start(engine, dataclasses.replace(RULES, min_gain=0.99), said)
    serve(engine, 160, placed)
    assert placed.report.plans >= 1
    assert placed.report.adopted == placed.report.moved_experts == 0
    assert placed.plan.placement == HERE
    assert any("experts stay" in line for line in said)


def test_a_search_that_fails_stops_nothing(engine, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(replan, "decide", broken)
    expected, said = serve(engine, 100), []
    placed = start(engine, said=said)
    assert serve(engine, 100, placed) == expected
    assert "no new plan: planted" in said


def test_few_requests_make_no_plan(engine, monkeypatch):
    """Nor is a trace fetched from the devices, step after step."""
    placed = start(engine, dataclasses.replace(RULES, tokens=10))
    with monkeypatch.context() as patch:
        patch.delattr(type(engine), "trace")
        serve(engine, 6, placed)
    assert engine.recorder.num_sequences == engine.trace().num_sequences == 6
    assert placed.report.plans == 0


def test_few_requests_prove_nothing(engine, monkeypatch):
    """Rows of a few long answers say little of a plan: it is not withdrawn for them."""
    planted(monkeypatch, rows_after=0.01)
    placed = start(engine)
    moved = placed._moved

    def then_few():
        moved()
        monkeypatch.setattr(placing, "LEAST_SEQUENCES", 10**6)

    monkeypatch.setattr(placed, "_moved", then_few)
    serve(engine, 160, placed)
    assert placed._served > RULES.tokens
    assert (placed.report.state, placed.report.withdrawn) == (placing.PROVING, 0)


COPIES = tiny.replicated_placement(0, slots=12, stay_on_nodes=1)


@pytest.fixture(scope="module")
def with_copies():
    return test_engine.make(
        ROOMY, Recorder(4, 64, 64), COPIES, mesh={"data": 1, "expert": 4}, model__combine="exact"
    )


def test_no_step_waits_for_a_compiler(with_copies, monkeypatch, compiled):
    """A device that serves more copies than it has slots needs another program to send them."""
    engine, new = with_copies, tiny.replicated_placement(11, slots=12)
    assert placing.migrate.route(COPIES, new).send_LMN.shape[-1] > COPIES.slots_per_device
    planted(monkeypatch, rows_after=99.0, placement=new)
    adopt, within = engine.adopt, []

    def watched(*args):
        before = len(compiled)
        seconds = adopt(*args)
        within.extend(compiled[before:])
        return seconds

    monkeypatch.setattr(engine, "adopt", watched)
    placed = start(engine, here=COPIES)
    serve(engine, 100, placed)
    assert placed.report.adopted == 1
    assert not within
    adopt(placing.migrate.route(new, COPIES), 0, tiny.LAYERS, COPIES)


def test_copies_follow_too(with_copies):
    """Fewer copies of an expert, and shares of them or none; more than there is room for stay."""
    engine, old = with_copies, COPIES
    fewer, same, more = (tiny.replicated_placement(seed, slots=12) for seed in (1, 6, 2))
    room, *others = (p.logical_to_physical_LER.shape[-1] for p in (old, fewer, same, more))
    assert (room, others) == (3, [2, 3, 4])
    expected = serve(engine, 20)
    for before, new in ((old, fewer), (fewer, old), (old, same)):
        way = placing.migrate.route(before, new)
        for layer in range(tiny.LAYERS):
            here = placing.migrate.between(before, new, layer + 1)
            engine.adopt(way, layer, layer + 1, here)
            assert serve(engine, 20) == expected
        assert engine.plan_digest == new.digest
    with pytest.raises(Refused, match=f"compiled for {room}"):
        engine.runner.table_of(more)


def test_a_plan_that_the_engine_cannot_take_ends_nothing(engine, monkeypatch):
    plan, said = planted(monkeypatch, rows_after=0.01), []

    def refuse(placement):
        raise Refused("placement", 2, "compiled for 1", "start again")

    monkeypatch.setattr(engine.runner, "table_of", refuse)
    placed = start(engine, said=said)
    serve(engine, 100, placed)
    monkeypatch.undo()
    assert placed.report.adopted == placed.report.moved_experts == 0
    assert placed.plan.placement == HERE != plan.placement
    assert any("experts stay: placement = 2: compiled for 1" in line for line in said)


def test_what_cannot_be_planned_is_refused(engine):
    start(engine)
    recorder, engine.recorder = engine.recorder, None
    try:
        with pytest.raises(Refused, match="nothing is recorded"):
            start(engine)
    finally:
        engine.recorder = recorder
    with pytest.raises(Refused, match="on one device"):
        placing.check(tiny.config(mesh={"data": 4, "expert": 1}))
    with pytest.raises(Refused, match=r"replan\.tokens"):
        placing.Rules(tokens=0)
    with pytest.raises(Refused, match=r"replan\.margin"):
        placing.Rules(margin=float("nan"))


def test_shares_of_copies_for_other_nodes_are_refused():
    """Before experts move: the steps were compiled for those of the mesh."""
    one, two = (tiny.replicated_placement(3, slots=12, stay_on_nodes=n) for n in (1, 2))
    config = tiny.config(mesh={"data": 1, "expert": 4})
    runner = types.SimpleNamespace(_table=tiny.table(one), config=config)
    assert Runner.table_of(runner, one).share_end_XER is not None
    with pytest.raises(Refused, match="copy_shares = '2 nodes': the machine has 1"):
        Runner.table_of(runner, two)
