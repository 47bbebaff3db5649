"""Continuous batching of one model on the mesh: requests come and go between steps.

    limits = sizes.limits(config.model, mesh)
    engine = Engine(Runner(config, mesh, model, table, limits), text)
    request = engine.submit(prompt, Options(max_tokens=64), deliver)
    while engine.step(): ...

One thread calls it; service.py puts a thread and a lock around it. All shapes of a step are
compiled when the runner is made, and nothing after that.

Axes: as in packing.py; L layers, P slots of experts, M devices that hold experts.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_jax import migrate
from moe_jax.errors import Refused
from moe_jax.infer.serving import packing
from moe_jax.infer.serving.recorder import Recorder
from moe_jax.infer.serving.request import Answer, Deliver, Likely, Options, Part, Writes
from moe_jax.infer.serving.runner import Runner
from moe_jax.infer.serving.scheduler import Job, Scheduler, Step
from moe_jax.infer.serving.stats import Stats
from moe_jax.placement.plan import Placement
from moe_jax.routing.trace import Trace

_READ_COUNTERS_EVERY = 256  # steps: int32 holds far more


@dataclasses.dataclass(eq=False)
class Request:
    """One answer on its way.

    Attributes:
      job: what the scheduler knows of it.
      options: how it is made.
      arrived, spoke: seconds of the clock, when it came and when its newest token was there.
    """

    job: Job
    options: Options
    answer: Answer
    deliver: Deliver
    arrived: float
    spoke: float = 0.0


class Engine:
    """Requests in, parts of answers out."""

    def __init__(
        self,
        runner: Runner,
        text: Writes,
        recorder: Recorder | None = None,
        plan_digest: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Args:
        runner: the model on the devices; from now on only this object calls it.
        text: what tokens mean.
        recorder: of routing, with the places that the runner has; None = nothing is recorded.
        plan_digest: of the placement, for people.
        """
        assert recorder is None or recorder.places == runner.places
        self.runner, self.recorder = runner, recorder
        self.config, self.limits = runner.config, runner.limits
        self.stats, self.plan_digest = Stats(), plan_digest
        self.watch: Callable[[Job, np.ndarray], None] | None = None  # logits of every new token
        self.scheduler = Scheduler(runner.limits)
        self._text, self._clock = text, clock
        self._requests: dict[Job, Request] = {}

    # --- requests -------------------------------------------------------------------------

    def check(self, prompt: Sequence[int], options: Options) -> None:
        """Refuses what could never be answered; reads nothing that a step changes."""
        self.scheduler.check(len(prompt), options.max_tokens)
        vocabulary = self.config.model.vocab_size
        wrong = next((t for t in prompt if not 0 <= t < vocabulary), None)
        if wrong is not None:
            rule = f"tokens lie in [0, {vocabulary}), the vocabulary of this model"
            raise Refused("prompt", wrong, rule, "use the model's own tokens")

    def submit(self, prompt: Sequence[int], options: Options, deliver: Deliver) -> Request:
        """A request arrives. Raises `Refused`; `deliver` is called from `step` and `cancel`."""
        self.check(prompt, options)
        answer = Answer(self._text, prompt, options)  # first: where it fails nothing is left behind
        job = self.scheduler.add(prompt, options.max_tokens)
        request = Request(job, options, answer, deliver, self._clock())
        self._requests[job] = request
        self.stats.arrived(len(prompt))
        return request

    def cancel(self, request: Request, finish: str = "cancelled") -> None:
        """Nobody wants this answer any more; of one that is finished nothing happens."""
        if request.job in self._requests:
            self._finish(request, finish)
            request.deliver(Part(None, "", None, finish))

    def _finish(self, request: Request, finish: str) -> None:
        self.scheduler.end(request.job)
        if self.recorder:
            self.recorder.end(request.job)
        del self._requests[request.job]
        self.stats.finished(finish)

    # --- steps ----------------------------------------------------------------------------

    def step(self) -> bool:
        """Runs one step; False where there is nothing to do."""
        start = self._clock()
        step = self.scheduler.plan()
        if step is None:
            return False
        rows = self._rows(step)
        number, layout = self._layout(step, rows)
        packed = self._pack(step, rows, layout)
        put = self.runner.put(number, packed)
        dispatched = self._clock()
        out, logits = self.runner.run(number, put)
        token, logprob, top, top_logprob = packing.read_out(np.asarray(out))
        arrived = self._clock()
        index = [job.shard * layout.rows + rows[job] for job in step.ends]
        tokens = token[index].tolist()
        if self.watch:
            logits_RV = np.asarray(logits)
            for job, i in zip(step.ends, index, strict=True):
                self.watch(job, logits_RV[i])
        self.scheduler.accept(step, tokens)
        self._deliver(step, tokens, index, (logprob, top, top_logprob), arrived)
        self.stats.step(
            num_tokens=len(step.decodes) + sum(chunk.length for chunk in step.chunks),
            num_new=len(tokens),
            preempted=len(step.preempted),
            host=dispatched - start + self._clock() - arrived,
            device=arrived - dispatched,
        )
        if self.stats.steps % _READ_COUNTERS_EVERY == 0:
            self.read_counters()
        return True

    def _deliver(
        self, step: Step, tokens: list[int], index: list[int], likely: Any, now: float
    ) -> None:
        logprob, top, top_logprob = likely
        for job, token, i in zip(step.ends, tokens, index, strict=True):
            request = self._requests[job]
            wanted, found = request.options.logprobs, None
            if wanted is not None:
                pairs = zip(top[i, :wanted].tolist(), top_logprob[i].tolist(), strict=False)
                found = Likely(float(logprob[i]), [(t, p) for t, p in pairs if t >= 0])
            text, finish = request.answer.add(token)
            self.stats.spoke(now - (request.spoke or request.arrived), first=not request.spoke)
            request.spoke = now
            if finish:
                self._finish(request, finish)
            request.deliver(Part(token, text, found, finish))

    def _rows(self, step: Step) -> dict[Job, int]:
        """A row of its shard for everyone in the step; those whose last token runs alone first."""
        taken = [0] * self.limits.shards
        rows = {}
        for job in dict.fromkeys([*step.decodes, *(chunk.job for chunk in step.chunks)]):
            rows[job] = taken[job.shard]
            taken[job.shard] += 1
        return rows

    def _layout(self, step: Step, rows: dict[Job, int]) -> tuple[int, packing.Layout]:
        """The first that the step fits in, and its number."""
        most_rows = 1 + max(rows.values())
        most_chunks = max((chunk.row + 1 for chunk in step.chunks), default=0)
        return next(
            (number, layout)
            for number, layout in enumerate(self.runner.layouts)
            if most_rows <= layout.rows and most_chunks <= layout.chunk_rows
        )

    def _pack(self, step: Step, rows: dict[Job, int], layout: packing.Layout) -> np.ndarray:
        """What the program reads, see packing.py."""
        packed, fields = layout.empty()
        limits, recorder = self.limits, self.recorder
        for job in step.decodes:
            at, position = (job.shard, rows[job]), job.computed - 1
            fields["token"][at] = job.tokens[-1]
            fields["position"][at] = position
            fields["sample"][at] = rows[job]
            fields["table"][at][: len(job.blocks)] = job.blocks
            if job.is_long:
                fields["long"][at] = 1
            if recorder:
                self._meet(recorder, job, position)
                fields["record"][at] = recorder.place(job, position, 1)[0]
        for chunk in step.chunks:
            job, shard, row = chunk.job, chunk.job.shard, rows[chunk.job]
            first = layout.rows + chunk.row * limits.chunk
            tokens, end = slice(first, first + chunk.length), chunk.start + chunk.length
            fields["token"][shard, tokens] = job.tokens[chunk.start : end]
            fields["position"][shard, tokens] = np.arange(chunk.start, end)
            fields["row"][shard, chunk.row] = row
            if job.is_long:
                fields["long"][shard, tokens] = 1
            fields["table"][shard, row, : len(job.blocks)] = job.blocks
            if end == len(job.tokens):
                fields["sample"][shard, row] = first + chunk.length - 1
            if recorder:
                self._meet(recorder, job, chunk.start)
                fields["record"][shard, tokens] = recorder.place(job, chunk.start, chunk.length)
        for job in step.ends:
            at, options = (job.shard, rows[job]), self._requests[job].options
            fields["draw"][at] = len(job.tokens)
            fields["temperature"][at] = options.temperature
            if options.temperature > 0:
                fields["top_p"][at], fields["top_k"][at] = options.top_p, options.top_k
                fields["seed"][at], fields["choice"][at] = options.seed, options.choice
            if options.logprobs is not None:
                fields["logprobs"][at] = options.logprobs
        return packed

    def _meet(self, recorder: Recorder, job: Job, position: int) -> None:
        if position == job.reused:  # its first token since it was admitted
            recorder.admit(job, position)

    def adopt(self, way: migrate.Route, first: int, last: int, placement: Placement) -> float:
        """`Runner.move` between two steps, in seconds. A request that runs goes on, unchanged.

        Raises:
          Refused: see `Runner.table_of`.
        """
        started = self._clock()
        self.runner.move(way, first, last, placement)
        self.plan_digest = placement.digest
        return self._clock() - started

    # --- what it did ----------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self._requests)

    def read_counters(self) -> None:
        """Adds the rows that were moved and computed to `stats`."""
        self.stats.rows(*self.runner.take_counters())

    def trace(self) -> Trace | None:
        """What the recorder holds; None where it holds nothing."""
        if self.recorder is None:
            return None
        holders = self.config.mesh.expert_devices
        homes = [shard % holders for shard in range(self.limits.shards)]
        trace = self.recorder.trace(
            self.runner.recorded(), self.config.model.num_experts, homes, self.config.name
        )
        return trace and dataclasses.replace(trace, layer_ids=self.config.model.moe_layer_ids)
