"""Homes of requests: what is learned against token by token, and what they are worth in service."""

import dataclasses

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.infer.serving import homes
from moe_jax.infer.serving.recorder import Recorder
from moe_jax.infer.serving.request import Options
from moe_jax.infer.serving.scheduler import PATIENCE, Limits, Scheduler
from moe_jax.infer.serving.stats import Stats
from moe_jax.placement import topology as topology_lib
from moe_jax.placement.homes import identities, tally
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.routing.trace import Trace
from tests import tiny
from tests.infer.serving import test_engine, test_placing

TOPOLOGIES = {
    "exchange": topology_lib.flat(4),
    "hierarchical": topology_lib.nodes_by_devices(2, 4),
}


def recorded(seed=0, vocab=11, layers=3):
    """A trace of random tokens, and their identities; one token has no expert."""
    rng = np.random.default_rng(seed)
    seq_len = rng.integers(1, 30, 20).astype(np.int32)
    tokens = int(seq_len.sum())
    ids_TLK = np.stack([rng.permuted(np.arange(8), axis=0)[:2] for _ in range(tokens * layers)])
    ids_TLK = ids_TLK.reshape(tokens, layers, 2).astype(np.uint8)
    ids_TLK[3, 1] = 255
    return Trace(ids_TLK, 8, seq_len), rng.integers(0, vocab - 1, tokens).astype(np.int32)


@pytest.mark.parametrize("dispatch", TOPOLOGIES)
@pytest.mark.parametrize("cells", [1, 200, 1 << 23])
def test_learned_costs_are_those_of_every_token(dispatch, cells, monkeypatch):
    monkeypatch.setattr(identities, "_CELLS", cells)
    trace, token_T = recorded()
    device_LE = np.stack([np.random.default_rng(n).permutation(8) // 2 for n in range(3)])
    problem = Problem(trace, TOPOLOGIES[dispatch], "seconds", dispatch)
    placement = Placement.from_device_LE(device_LE, 4)
    found = homes.learn(problem, token_T, placement, 11, slack=4)
    expected_VM = np.zeros((11, 4))
    for token, ids_LK in zip(token_T, trace.expert_ids_TLK, strict=True):
        alone = Trace(ids_LK[None], 8, np.array([1], np.int32))
        contacts = tally.count(alone, device_LE, problem.topology)
        expected_VM[token] += tally.cost_SM(contacts, tally.prices_of(problem))[0]
    expected_VM -= expected_VM.mean(axis=1, keepdims=True)
    seen_V = np.bincount(token_T, minlength=11)
    np.testing.assert_allclose(found.cost_VM, expected_VM / (seen_V + identities.PRIOR)[:, None])
    assert not found.cost_VM[10].any()  # never seen: no preference
    text = [1, 1, 2]
    cost_M = (2 * found.cost_VM[1] + found.cost_VM[2]) / 3
    # two places on each device, none ahead: the cost alone decides; too far ahead: not here
    cost_S = found(text, [0] * 8)
    np.testing.assert_allclose(cost_S, np.tile(cost_M, 2))
    assert found(text, [4, 0, 0, 0, 0, 0, 0, 3])[0] == np.inf
    assert np.isfinite(found(text, [4, 0, 0, 0, 0, 0, 0, 3])[7])


def test_homes_are_refused_where_they_change_nothing():
    trace, token_T = recorded()
    problem = Problem(trace, topology_lib.flat(4), "seconds", "gathered")
    with pytest.raises(Refused, match="every token goes everywhere"):
        homes.learn(problem, token_T, Placement.contiguous(3, 8, 4), 11, slack=4)
    slots_LP = np.tile(np.arange(12, dtype=np.int32) % 8, (3, 1))
    problem = Problem(trace, topology_lib.flat(4), "seconds", "exchange")
    with pytest.raises(Refused, match=r"plan num_slots = 12: .* depends on the home"):
        homes.learn(problem, token_T, Placement(slots_LP, 8, 4), 11, slack=4)


LIMITS = Limits(
    shards=2, seats=3, blocks=9, block_size=4, chunk=8, chunk_rows=2, budget=20, max_len=32
)


def test_a_home_is_taken_if_it_has_room_and_never_waited_for():
    scheduler = Scheduler(LIMITS)
    scheduler.homes = lambda tokens, running: [1.0, 0.0]  # all want shard 1
    jobs = [scheduler.add([n] * 5, 2) for n in range(6)]
    scheduler.plan()
    assert [job.shard for job in jobs] == [1, 1, 1, 0, 0, 0]
    assert (scheduler.admitted, scheduler.at_home) == (6, 3)


def test_who_is_at_home_passes_but_not_for_long():
    """One seat is free at a time, on shard 0; all odd requests want it, the oldest does not."""
    scheduler = Scheduler(dataclasses.replace(LIMITS, blocks=40))
    scheduler.homes = lambda tokens, running: [float(tokens[0] % 2 == 0), 0.5]
    there = [scheduler.add([n] * 5, 9) for n in (1, 1, 1, 0, 0, 0)]
    scheduler.plan()
    assert [job.shard for job in there] == [0, 0, 0, 1, 1, 1]
    oldest = scheduler.add([2] * 5, 9)
    young = [scheduler.add([2 * n + 1] * 5, 9) for n in range(20)]
    order = []
    leaves = there[0]
    while oldest.shard < 0:
        scheduler.end(leaves)
        scheduler.plan()
        leaves = next(job for job in [oldest, *young] if job.shard == 0 and job not in order)
        order.append(leaves)
    assert order == [*young[:PATIENCE], oldest]
    assert oldest.passed == PATIENCE


def test_nobody_behind_the_oldest_is_passed_too_often_either():
    """One that has been preempted waits before those that have been patient."""
    scheduler = Scheduler(Limits(2, 2, 16, 16, 16, 2, 40, 64))
    scheduler.homes = lambda tokens, running: [float(tokens[0] % 2 == 0), float(tokens[0] % 2)]
    for _ in range(2):
        scheduler.add([1], 4)  # at home on shard 0, which is full then
    scheduler.plan()
    oldest, patient, young = scheduler.add([1], 4), scheduler.add([1], 4), scheduler.add([2], 4)
    patient.passed = PATIENCE
    scheduler.plan()
    assert [job.shard for job in (oldest, patient, young)] == [1, 1, -1]
    assert patient.passed == PATIENCE


def test_a_prefix_that_is_there_comes_before_a_home():
    scheduler = Scheduler(LIMITS)
    first = scheduler.add(list(range(9)), 2)
    step = scheduler.plan()
    scheduler.accept(step, [0] * len(step.ends))
    while (step := scheduler.plan()) and first.in_prompt:
        scheduler.accept(step, [0] * len(step.ends))
    assert first.shard == 0
    scheduler.homes = lambda tokens, running: [1.0, 0.0]
    again, other = scheduler.add([*range(8), 77], 2), scheduler.add([50] * 9, 2)
    scheduler.plan()
    assert (again.shard, other.shard) == (0, 1)


def rows_of(engine, placed, seed):
    """Answers to texts of eight kinds, and rows per token and layer that the dispatch counted."""
    rng = np.random.default_rng(seed)
    engine.read_counters()
    before, answers = (engine.stats.moved, engine.stats.tokens), []
    for _ in range(60):
        parts = []
        answers.append(parts)
        prompt = (8 * rng.integers(8) + rng.integers(0, 2, 24)).tolist()
        engine.submit(prompt, Options(max_tokens=4), parts.append)
    while engine.step():
        placed.between_steps()
    engine.read_counters()
    rows = (engine.stats.moved - before[0]) / (engine.stats.tokens - before[1]) / tiny.LAYERS
    return [[part.token for part in parts] for parts in answers], rows


def learned(placed):
    """Waits for the homes that are being learned."""
    placed._worker.submit(lambda: None).result()
    placed.between_steps()


def test_requests_run_where_their_experts_are():
    """Texts of eight kinds, experts that stay: fewer rows, no bit of an answer changes."""
    engine = test_engine.make(
        test_placing.ROOMY,
        Recorder(4, 64, 64),
        mesh={"data": 1, "expert": 4},
        model__combine="reproducible",
    )
    rules = dataclasses.replace(test_placing.RULES, tokens=800, min_gain=0.99)
    rows, answers = {}, {}
    for wanted in (False, True):
        engine.recorder, engine.scheduler.homes = Recorder(4, 64, 64), None
        for pool in engine.scheduler.blocks:
            pool.forget()
        engine.stats = Stats()
        said = []
        placed = test_placing.start(engine, dataclasses.replace(rules, homes=wanted), said)
        for n in range(2):
            rows_of(engine, placed, n)
        learned(placed)
        assert bool(placed.report.homes) == wanted, said
        assert (engine.scheduler.homes is not None) == wanted
        answers[wanted], rows[wanted] = rows_of(engine, placed, seed=5)
        placed.close()
    assert answers[True] == answers[False]
    print(f"rows per token and layer: {rows[False]:.3f} anywhere, {rows[True]:.3f} at home")
    assert rows[True] < 0.97 * rows[False], rows
    assert engine.scheduler.at_home > 0.5 * engine.scheduler.admitted > 0


@pytest.mark.slow  # the refusal itself: test_homes_are_refused_where_they_change_nothing
def test_dispatches_without_homes_say_so_once():
    engine = test_engine.make(
        test_placing.ROOMY,
        Recorder(4, 64, 64),
        mesh={"data": 1, "expert": 4},
        model__dispatch="gathered",
    )
    said = []
    rules = dataclasses.replace(test_placing.RULES, min_gain=0.99, homes=True)
    placed = test_placing.start(engine, rules, said)
    test_placing.serve(engine, 200, placed)
    learned(placed)
    assert sum("requests run anywhere" in line for line in said) == 1, said
    assert engine.scheduler.homes is None
