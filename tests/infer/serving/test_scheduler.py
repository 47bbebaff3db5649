"""The scheduler by itself: blocks never leak, nobody writes to a shared one, everyone ends."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import Refused
from moe_jax.infer.serving.blocks import Blocks, keys_of
from moe_jax.infer.serving.scheduler import Limits, Scheduler

LIMITS = Limits(
    shards=2, seats=3, blocks=9, block_size=4, chunk=8, chunk_rows=2, budget=20, max_len=32
)


def answer(tokens):
    """What a model would say: the next token is a function of all before it."""
    return int(keys_of(tokens, len(tokens))[0][0]) % 5


class World:
    """Runs steps as an engine would, with cells in place of keys and values, and checks them."""

    def __init__(self, limits=LIMITS):
        self.limits, self.scheduler = limits, Scheduler(limits)
        self.cells = {}  # (shard, block, offset) -> is it long; tokens up to and with its position
        self.alone = {}
        self.ended = {}
        self.preempted = 0

    def add(self, prompt, max_tokens):
        job = self.scheduler.add(prompt, max_tokens)
        self.alone[job] = (list(prompt), max_tokens)
        return job

    def write(self, job, position, written):
        block = job.blocks[position // self.limits.block_size]
        pool = self.scheduler.blocks[job.shard]
        assert pool.holders(block) == 1, "a shared block is written to"
        cell = (job.shard, block, position % self.limits.block_size)
        assert cell not in written, "two tokens of one step are written to one place"
        written.add(cell)
        self.cells[cell] = self.cell(job, position)

    def cell(self, job, position):
        from_ = self.limits.long_from
        is_long = from_ is not None and len(job.tokens) > from_
        return is_long, *job.tokens[: position + 1]

    def step(self):
        step = self.scheduler.plan()
        self.check_blocks()
        if step is None:
            return False
        self.preempted += len(step.preempted)
        written, rows, count = set(), set(), len(step.decodes)
        for job in step.decodes:
            assert job.computed == len(job.tokens)
            self.write(job, job.computed - 1, written)
        for chunk in step.chunks:
            assert 0 < chunk.length <= self.limits.chunk
            assert 0 <= chunk.row < self.limits.chunk_rows
            assert (chunk.job.shard, chunk.row) not in rows
            rows.add((chunk.job.shard, chunk.row))
            count += chunk.length
            for position in range(chunk.start, chunk.start + chunk.length):
                self.write(chunk.job, position, written)
        assert 0 < count <= self.limits.budget
        for job in step.decodes + [chunk.job for chunk in step.chunks]:
            for position in range(job.computed):  # all that attention reads is its own text
                block = job.blocks[position // self.limits.block_size]
                cell = (job.shard, block, position % self.limits.block_size)
                assert self.cells[cell] == self.cell(job, position)
        self.scheduler.accept(step, [answer(job.tokens) for job in step.ends])
        for job in step.ends:
            prompt, max_tokens = self.alone[job]
            if len(job.tokens) - len(prompt) == max_tokens:
                self.scheduler.end(job)
                self.ended[job] = list(job.tokens)
        return True

    def check_blocks(self):
        held = collections.Counter()
        seats = collections.Counter(job.shard for job in self.scheduler.running)
        assert all(count <= self.limits.seats for count in seats.values())
        for job in self.scheduler.running:
            held.update((job.shard, block) for block in job.blocks)
            assert len(job.blocks) >= self.limits.blocks_of(job.computed)
        for shard, pool in enumerate(self.scheduler.blocks):
            counts = [pool.holders(block) for block in range(pool.num_blocks)]
            assert counts == [held[shard, block] for block in range(pool.num_blocks)]
            assert pool.num_held == sum(count > 0 for count in counts)
        arrivals = [job.arrival for job in self.scheduler.waiting]
        assert arrivals == sorted(arrivals)

    def run(self, steps=10_000):
        for _ in range(steps):
            if not self.step():
                break
        assert not self.scheduler.waiting
        assert not self.scheduler.running
        for job, tokens in self.ended.items():
            prompt, max_tokens = self.alone[job]
            expected = list(prompt)
            for _ in range(max_tokens):
                expected.append(answer(expected))
            assert tokens == expected
        for pool in self.scheduler.blocks:
            assert pool.num_held == 0
            assert sorted(pool.take(pool.num_blocks)) == list(range(pool.num_blocks))


EVENT = st.tuples(
    st.sampled_from(["add", "add", "step", "step", "cancel"]),
    st.integers(1, 24),  # prompt length, or which one to cancel
    st.integers(1, 12),
    st.integers(0, 3),  # few different texts: prefixes are shared
)


@pytest.mark.parametrize("long_from", [None, 13])
@settings(max_examples=200, deadline=None)
@given(events=st.lists(EVENT, max_size=60))
def test_any_traffic(long_from, events):
    """With LongRoPE, too: what a text reads was written when it was as long, or as short."""
    world = World(dataclasses.replace(LIMITS, long_from=long_from))
    cancelled = 0
    for kind, first, second, text in events:
        if kind == "add":
            prompt = [(text + i // 6) % 3 for i in range(first)]
            world.add(prompt, min(second, LIMITS.max_len - first))
        elif kind == "step":
            world.step()
        elif world.alone:
            job = list(world.alone)[first % len(world.alone)]
            cancelled += job not in world.ended
            world.scheduler.end(job)
            world.ended.setdefault(job, None)
    world.ended = {job: tokens for job, tokens in world.ended.items() if tokens}
    ended = len(world.ended)
    world.run()
    assert len(world.ended) >= ended
    assert len(world.ended) + cancelled >= len(world.alone)


def test_blocks_run_out_and_the_youngest_leaves():
    world = World(Limits(1, 3, 6, 4, 8, 1, 20, 24))
    jobs = [world.add([n] * 5, 15) for n in range(3)]
    world.run()
    assert world.preempted > 0
    assert jobs[0].preempted == 0, "the oldest is never preempted"
    assert list(world.ended) == jobs


def test_what_a_request_finds_of_its_own_is_not_counted():
    """Beside tokens of prompts it would say that more was found than was asked."""
    world = World(Limits(1, 2, 6, 4, 8, 1, 20, 24))
    first, second = world.add([1] * 5, 15), world.add([2] * 5, 15)
    reused = []
    while world.step():
        reused.append(second.reused)
    assert (first.preempted, second.preempted) == (0, 1)
    assert max(reused) > 0
    assert world.scheduler.found == 0


def test_nobody_passes_the_oldest():
    world = World(Limits(1, 4, 6, 4, 8, 1, 20, 24))
    first = world.add([1] * 12, 4)
    world.step()
    large, small = world.add([2] * 16, 4), world.add([3], 1)
    world.step()
    assert large in world.scheduler.waiting
    assert small in world.scheduler.waiting
    world.run()
    assert next(iter(world.ended)) is first


def test_a_prefix_is_used_again_by_whole_blocks():
    world = World()
    first = world.add(list(range(10)), 8)
    world.step()
    second = world.add([*range(9), 99, 98], 2)
    world.step()
    assert second.reused == 8
    assert second.shard == first.shard
    assert second.blocks[:2] == first.blocks[:2]
    third = world.add(list(range(8)), 2)  # its last token runs, though its block is there
    world.step()
    assert third.reused == 4
    world.run()


def test_a_text_that_grows_long_is_computed_again_at_once():
    """Nothing that was written for a short text is found by it; another long one finds its blocks.
    It counts as no preemption, and happens once."""
    world = World(dataclasses.replace(LIMITS, long_from=10))
    first = world.add([1] * 9, 6)
    while len(first.tokens) < 11:
        world.step()
    assert not first.is_long
    world.step()
    assert (first.is_long, first.reused, first.computed, first.preempted) == (True, 0, 11, 0)
    assert world.step()
    assert first.computed == 12
    second = world.add([*first.tokens[:9], 4, 4, 4], 2)
    world.step()
    assert second.reused == 8
    short = world.add(first.tokens[:9], 2)
    world.step()
    assert short.reused == 8
    assert set(short.blocks).isdisjoint(second.blocks)
    world.run()


def test_texts_spread_over_shards_where_all_have_the_same_room():
    """Each of two texts that fill a shard is still found after the other."""
    world = World()
    texts = [[number] * 24 for number in range(2)]
    for text in texts:
        world.add(text, 8)
        while world.step():
            pass
    again = [world.add(text, 8) for text in texts]
    world.step()
    assert [job.shard for job in again] == [0, 1]
    assert [job.reused for job in again] == [20, 20]
    world.run()


def test_idle_blocks_go_from_the_end_of_a_text():
    pool = Blocks(4)
    held = pool.take(3)
    for block, key in zip(held, keys_of([1, 2, 3], 1), strict=True):
        pool.name(block, key)
    pool.release(held)
    assert pool.available == 4
    pool.take(2)
    assert pool.find(keys_of([1, 2, 3], 1)) == held[:2]
    pool.forget()
    assert pool.find(keys_of([1, 2, 3], 1)) == []
    assert pool.available == 2


def test_keys_stand_for_all_tokens_before():
    assert keys_of([1, 2, 3, 4], 2)[1] != keys_of([0, 2, 3, 4], 2)[1]
    first = keys_of([1, 2, 3, 4, 5], 2)
    assert keys_of([1, 2, 3, 4, 5, 6], 2, first)[:2] == first


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "match"),
    [(0, 1, "must not be empty"), (1, 0, "at least 1"), (30, 3, "at most 32 together")],
)
def test_refusals(prompt, max_tokens, match):
    with pytest.raises(Refused, match=match):
        Scheduler(LIMITS).add(np.ones(prompt, int).tolist(), max_tokens)


def test_limits_are_checked():
    with pytest.raises(Refused, match="must exceed shards x seats = 6"):
        Limits(2, 3, 9, 4, 8, 2, 6, 32)
    with pytest.raises(Refused, match="block_size = 0"):
        Limits(2, 3, 9, 0, 8, 2, 20, 32)
