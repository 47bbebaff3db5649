"""Which tokens run in the next step: admission, chunks of prompts, preemption. Plain Python.

The mesh is S shards (devices that tokens are split over). Each has `seats` for requests that run
and blocks of cache of its own; a request stays on its shard until it ends or is preempted.

A step holds the next token of every request that is past its prompt, and then, up to a budget of
tokens, chunks of prompts, the oldest request first. What is written in a step is read in the same
step, so several chunks of one prompt may stand in it.

Fairness, the whole rule: requests are served in the order of arrival. The oldest that waits is
admitted next, and nobody passes it. Where blocks run out, the youngest request of that shard is
preempted: its blocks are released, it waits again at its old place in the order, and when it is
admitted its prompt and what it has said so far are computed again (found blocks excepted). So the
oldest request of a shard is never preempted, and as every request fits on an empty shard (that is
checked on arrival), every request ends.

Which shard a request is admitted to: the one that holds most of its prefix already; among those
alike its home, where homes are known (homes.py); then the one with most room; then the one with
most free blocks, so that what can be found elsewhere stays. A request never waits for a shard. But
where homes are known, the first of the `PASSERS` oldest that wait whose home has room goes before
older ones whose home has none: so homes are found, too, where a seat is free now and then. A
request is passed `PATIENCE` times at most, and then nobody passes it.

LongRoPE turns the keys of a text another way once it is longer than those of pre-training. A
request that grows so long gives its blocks back and is computed again from its first token, as a
preempted one is, the oldest of a shard too. Blocks of long texts and of short ones have other keys.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Sequence

from moe_jax.errors import Refused
from moe_jax.infer.serving.blocks import NO_KEY, Blocks, keys_of

LONG = b"long"  # stands before the first block of a text with the long factors of LongRoPE


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes that are fixed for the life of an engine.

    Attributes:
      shards: devices that tokens are split over.
      seats: requests that run on one shard.
      blocks: of cache on one shard.
      block_size: positions in a block.
      chunk: tokens of a prompt in one row of a step.
      chunk_rows: such rows on one shard in a step.
      budget: tokens in a step, over all shards; tokens after prompts come first and always fit.
      max_len: tokens of prompt and answer together.
      long_from: texts that reach this position have the long factors of LongRoPE; None = the model
        has none.
    """

    shards: int
    seats: int
    blocks: int
    block_size: int
    chunk: int
    chunk_rows: int
    budget: int
    max_len: int
    long_from: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise Refused(field.name, value, "must be at least 1", "give a larger one")
        if self.budget <= self.shards * self.seats:
            raise Refused(
                "budget",
                self.budget,
                f"must exceed shards x seats = {self.shards * self.seats}, or prompts never run",
                "raise it, or use fewer seats",
            )

    @property
    def room(self) -> int:
        """Tokens of a request, prompt and answer: the context, where the blocks hold as much."""
        return min(self.max_len, self.blocks * self.block_size)

    def blocks_of(self, num_tokens: int) -> int:
        """Blocks that hold so many positions."""
        return -(-num_tokens // self.block_size)


@dataclasses.dataclass(eq=False)
class Job:
    """A request as the scheduler sees it.

    Attributes:
      arrival: its place in the order.
      tokens: of the prompt and of the answer so far.
      max_tokens: of the answer.
      shard: where it runs; -1 while it waits.
      blocks: of its positions, in order.
      computed: positions whose keys and values are written by the steps planned so far.
      keys: of its full blocks.
      named: blocks that can be found by others, or were found.
      reused: positions that were found at its last admission.
      seated: it has run before, or runs.
      preempted: how often.
      passed: how often a younger one was admitted before it.
      is_long: its keys are turned by the long factors of LongRoPE.
    """

    arrival: int
    tokens: list[int]
    max_tokens: int
    shard: int = -1
    blocks: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    keys: list[bytes] = dataclasses.field(default_factory=list)
    named: int = 0
    reused: int = 0
    seated: bool = False
    preempted: int = 0
    passed: int = 0
    is_long: bool = False
    prompt_len: int = 0

    def __post_init__(self):
        self.prompt_len = len(self.tokens)

    @property
    def in_prompt(self) -> bool:
        """More than its last token is still to be computed; the last one may run alone."""
        return self.computed < len(self.tokens) - 1


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `start + length` of a job, in chunk row `row` of its shard."""

    job: Job
    row: int
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class Step:
    """What runs next.

    Attributes:
      decodes: jobs whose last token runs alone.
      chunks: of prompts.
      ends: jobs whose last token runs in this step, alone or in a chunk: each gets its next
        token from it.
      preempted: jobs that had to leave before it.
    """

    decodes: list[Job]
    chunks: list[Chunk]
    ends: list[Job]
    preempted: list[Job]


PASSERS, PATIENCE = 8, 8
CostOfShards = Callable[[Sequence[int], Sequence[int]], Sequence[float]]


class Scheduler:
    """Waiting and running requests, and the blocks of every shard.

    Attributes:
      homes: from a request's tokens and the requests that run on the shards, what each shard would
        cost it; None = all the same.
      found: positions of prompts that were found and not computed: at first admissions, as later
        ones find what the request computed itself.
      admitted, at_home: requests that got a shard while homes were known; that got their best one.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.blocks = [Blocks(limits.blocks) for _ in range(limits.shards)]
        self.waiting: list[Job] = []  # by arrival
        self.running: list[Job] = []  # by arrival
        self._free_seats = [limits.seats] * limits.shards
        self.homes: CostOfShards | None = None
        self.found = self.admitted = self.at_home = 0
        self._arrivals = 0

    def check(self, prompt_len: int, max_tokens: int) -> None:
        """Refuses what could never run."""
        limits = self.limits
        if prompt_len < 1:
            raise Refused("prompt", "", "must not be empty", "write some text")
        if max_tokens < 1:
            raise Refused("max_tokens", max_tokens, "must be at least 1", "use 16")
        if prompt_len + max_tokens > limits.room:
            raise Refused(
                "prompt + max_tokens",
                f"{prompt_len} + {max_tokens} tokens",
                f"must be at most {limits.room} together, the context of this server",
                "shorten the prompt or lower max_tokens",
            )

    def add(self, tokens: Sequence[int], max_tokens: int) -> Job:
        """A request arrives."""
        self.check(len(tokens), max_tokens)
        job = Job(self._arrivals, list(tokens), max_tokens)
        job.is_long = self._reaches(job)
        self._arrivals += 1
        self.waiting.append(job)
        return job

    def end(self, job: Job) -> None:
        """A request is done, or nobody wants its answer any more; ended ones may be ended again."""
        if job.shard >= 0:
            self._leave(job)
        elif job in self.waiting:
            self.waiting.remove(job)

    def plan(self) -> Step | None:
        """The next step, or None where nothing is to be done. It must be run: it is counted so."""
        self._turn()
        preempted = self._make_room()
        if not preempted:
            self._admit()
        decodes = [job for job in self.running if not job.in_prompt]
        chunks = self._chunks(self.limits.budget - len(decodes))
        if not decodes and not chunks:
            return None
        for job in decodes:
            job.computed += 1
        ends = decodes + [c.job for c in chunks if c.start + c.length == len(c.job.tokens)]
        return Step(decodes, chunks, ends, preempted)

    def accept(self, step: Step, tokens: Sequence[int]) -> None:
        """The step has run: `tokens` are the next ones of `step.ends`."""
        for job in dict.fromkeys([*step.decodes, *(chunk.job for chunk in step.chunks)]):
            full = job.computed // self.limits.block_size
            if full > job.named:
                self._extend_keys(job, job.computed)
                for block in range(job.named, full):
                    held = job.blocks[block]
                    self.blocks[job.shard].name(held, job.keys[block])
                job.named = full
        for job, token in zip(step.ends, tokens, strict=True):
            job.tokens.append(token)

    def _extend_keys(self, job: Job, length: int) -> None:
        first = LONG if job.is_long else NO_KEY
        job.keys = keys_of(job.tokens[:length], self.limits.block_size, job.keys, first)

    def _reaches(self, job: Job) -> bool:
        """Are its tokens at hand a text with the long factors of LongRoPE?"""
        long_from = self.limits.long_from
        return long_from is not None and len(job.tokens) > long_from

    def _turn(self) -> None:
        """Those that have grown long leave their keys behind, and wait to be computed again."""
        for job in list(self.running):
            if not job.is_long and self._reaches(job):
                self._wait_again(job)
                job.keys, job.is_long = [], True

    def _make_room(self) -> list[Job]:
        """A block for the next token of everyone past the prompt, the oldest first."""
        preempted: list[Job] = []
        for job in list(self.running):
            if job.shard < 0 or job.in_prompt:
                continue
            pool = self.blocks[job.shard]
            if self.limits.blocks_of(job.computed + 1) <= len(job.blocks):
                continue
            while not pool.available:
                youngest = [s for s in self.running if s.shard == job.shard][-1]
                self._preempt(youngest)
                preempted.append(youngest)
                if youngest is job:
                    break
            else:
                job.blocks += pool.take(1)
        return preempted

    def _preempt(self, job: Job) -> None:
        self._wait_again(job)
        job.preempted += 1

    def _wait_again(self, job: Job) -> None:
        """At its old place in the order."""
        self._leave(job)
        bisect.insort(self.waiting, job, key=lambda s: s.arrival)

    def _leave(self, job: Job) -> None:
        self.blocks[job.shard].release(job.blocks)
        self._free_seats[job.shard] += 1
        self.running.remove(job)
        job.blocks, job.shard = [], -1
        job.computed = job.named = job.reused = 0

    def _admit(self) -> None:
        """Those that wait, as long as the oldest of them fits somewhere."""
        while self.waiting and (seating := self._next()):
            job, shard, found, at_home = seating
            pool = self.blocks[shard]
            pool.hold(found)
            job.blocks = found + pool.take(self._missing(job, found))
            job.shard = shard
            self._free_seats[shard] -= 1
            job.computed = job.reused = len(found) * self.limits.block_size
            job.named = len(found)
            self.found += 0 if job.seated else job.reused
            job.seated = True
            self.admitted += self.homes is not None
            self.at_home += at_home
            self.waiting.remove(job)
            for older in self.waiting:
                if older.arrival > job.arrival:
                    break
                older.passed += 1
            bisect.insort(self.running, job, key=lambda s: s.arrival)

    def _next(self) -> tuple[Job, int, list[int], bool] | None:
        """Who is admitted next: to which shard, with which blocks; is it home?"""
        oldest = self._seating(self.waiting[0])
        if self.homes is None or oldest is None or oldest[3]:
            return oldest
        for older, job in itertools.pairwise(self.waiting[:PASSERS]):
            if older.passed >= PATIENCE:  # all that are left would pass it
                break
            seating = self._seating(job)
            if seating and seating[3]:
                return seating
        return oldest

    def _seating(self, job: Job) -> tuple[Job, int, list[int], bool] | None:
        """The best shard with room for a request."""
        limits = self.limits
        self._extend_keys(job, len(job.tokens))
        # The last token always runs: its logits are wanted.
        findable = job.keys[: (len(job.tokens) - 1) // limits.block_size]
        fits = []  # shards with room: what is found there, and the room beyond what is missing
        for shard, pool in enumerate(self.blocks):
            if not self._free_seats[shard]:
                continue
            found = pool.find(findable)
            room = pool.available - pool.num_idle(found) - self._missing(job, found)
            # One block more where others run, or they would preempt it in the next steps.
            if room >= (self._free_seats[shard] < limits.seats):
                fits.append((shard, found, room))
        if not fits:
            return None
        costs = self._costs(job)

        def rank(fit: tuple[int, list[int], int]) -> tuple[float, ...]:
            shard, found, room = fit
            return len(found), -costs[shard], room, self.blocks[shard].num_free, -shard

        shard, found, _ = max(fits, key=rank)
        return job, shard, found, self.homes is not None and costs[shard] == min(costs)

    def _missing(self, job: Job, found: list[int]) -> int:
        return self.limits.blocks_of(len(job.tokens)) - len(found)

    def _costs(self, job: Job) -> Sequence[float]:
        """Of every shard for a request that waits."""
        running = [0] * self.limits.shards
        if self.homes is None:
            return running
        for other in self.running:
            running[other.shard] += 1
        return self.homes(job.tokens, running)

    def _chunks(self, budget: int) -> list[Chunk]:
        limits, chunks = self.limits, []
        rows = [0] * limits.shards
        for job in self.running:
            while job.in_prompt and budget > 0 and rows[job.shard] < limits.chunk_rows:
                length = min(limits.chunk, len(job.tokens) - job.computed, budget)
                row = rows[job.shard]
                chunks.append(Chunk(job, row, job.computed, length))
                rows[job.shard] += 1
                job.computed += length
                budget -= length
        return chunks
