"""A reservoir of routed tokens spread over requests: bounded on the device, chosen on the host.

The device holds `regions` x `span` places on every shard; a step scatters the experts of its tokens
into the places that the host named, and that is all that the hot path sees. A region belongs to one
request and holds its first `span` routed tokens, in order. Once all regions of a shard are taken,
the n-th request on it takes the region of a random earlier one with probability regions / n
(Vitter, algorithm R, doi 10.1145/3147.3165), so at any time the reservoir is a uniform sample of
each shard's requests.
"""

import dataclasses
import random

import numpy as np

from moe_jax.infer.serving.scheduler import Job
from moe_jax.routing.trace import Trace


@dataclasses.dataclass
class _Region:
    """Attributes:
    job: whose tokens these are.
    first: position of the first of them.
    is_long: they were routed with the long factors of LongRoPE.
    count: of them.
    """

    job: Job
    first: int
    is_long: bool
    count: int = 0


class Recorder:
    """Which tokens go where in the buffer [shards regions span, L, K] on the devices."""

    def __init__(self, shards: int, regions: int, span: int, seed: int = 0):
        self.shards, self.regions, self.span = shards, regions, span
        self._regions: list[list[_Region]] = [[] for _ in range(shards)]
        self._seen = [0] * shards
        self._of_job: dict[Job, tuple[int, int]] = {}
        self._met: set[Job] = set()
        self._random = random.Random(seed)

    @property
    def places(self) -> int:
        """Tokens that one shard has room for."""
        return self.regions * self.span

    def admit(self, job: Job, first: int) -> None:
        """A request begins to run on a shard, from position `first` on."""
        if job in self._of_job:  # it waited again, and may be elsewhere now
            shard, number = self._of_job[job]
            region = self._regions[shard][number]
            if shard == job.shard and job.is_long != region.is_long:  # all of it is routed anew
                self._regions[shard][number] = _Region(job, first, job.is_long)
                return
            if shard == job.shard and first <= region.first + region.count:
                return
            del self._of_job[job]
            return
        if job in self._met:  # it had its chance
            return
        self._met.add(job)
        shard = job.shard
        self._seen[shard] += 1
        regions = self._regions[shard]
        number = len(regions)
        if number == self.regions:
            number = self._random.randrange(self._seen[shard])
            if number >= self.regions:
                return
            self._of_job.pop(regions[number].job, None)
            regions[number] = _Region(job, first, job.is_long)
        else:
            regions.append(_Region(job, first, job.is_long))
        self._of_job[job] = shard, number

    def place(self, job: Job, start: int, length: int) -> np.ndarray:
        """Where the tokens at these positions go on the job's shard; -1 = nowhere."""
        if job not in self._of_job:
            return np.full(length, -1)
        shard, number = self._of_job[job]
        region = self._regions[shard][number]
        at = np.arange(start - region.first, start - region.first + length)
        region.count = max(region.count, min(start - region.first + length, self.span))
        # Before it: tokens that were found when it was taken, and are not found after a preemption.
        return np.where((at >= 0) & (at < self.span), number * self.span + at, -1)

    def end(self, job: Job) -> None:
        """A request runs no more; its tokens stay."""
        self._of_job.pop(job, None)
        self._met.discard(job)

    @property
    def num_sequences(self) -> int:
        """Those of `trace`, without it."""
        return sum(region.count > 0 for regions in self._regions for region in regions)

    def tokens(self) -> np.ndarray:
        """int32 [T]: identities of the tokens of `trace`."""
        held = [region for regions in self._regions for region in regions]
        texts = [r.job.tokens[r.first : r.first + r.count] for r in held]
        return np.array([token for text in texts for token in text], np.int32)

    def trace(
        self, recorded_XLK: np.ndarray, num_experts: int, home_of_shard: list[int], model: str
    ) -> Trace | None:
        """The tokens at hand as a trace, a sequence a request; None where there are none.

        Args:
          recorded_XLK: the buffer, all shards.
          home_of_shard: the device, as plans count, of every shard.
          model: its name.
        """
        parts, homes = [], []
        for shard, regions in enumerate(self._regions):
            for number, region in enumerate(regions):
                if region.count:
                    start = shard * self.places + number * self.span
                    parts.append(recorded_XLK[start : start + region.count])
                    homes.append(home_of_shard[shard])
        if not parts:
            return None
        return Trace(
            expert_ids_TLK=np.concatenate(parts),
            num_experts=num_experts,
            seq_len=np.array([len(part) for part in parts], np.int32),
            seq_home=np.array(homes, np.int32),
            model=model,
            corpus="served requests",
        )
