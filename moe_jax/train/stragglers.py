"""Who is slow: a host that computes slowly, one that receives or sends slowly, or one link.

A training step tells nobody apart: everybody waits for the slowest. So every `train.probe_every`
steps each host times, between two steps, a matmul of its own and messages to every other host, and
all of them learn all times. After C4 (arXiv 2406.04594), which reads the same from the times of a
collective library's own messages; JAX shows none.

One matmul or message may take less than a call from Python does, and less than the turn that a host
with too few cores gets at once: the first probe finds out how many make a time worth measuring.

Messages go in rounds. In each a host sends to one other or receives from it, and the receiver
answers with one value, so that both ends know the time of the way there: without an answer a sender
is done when its buffers have the message, and runs ahead. (In rounds in which all send and receive
at once, a slow link is in the times of one end or of both, as the transport has it.)

What is slow was so in all but one of the last `WINDOW` probes (the second least of their times
counts), against the median of all hosts (of all links of the same distance: on a torus they are as
far). A host that hiccups now and then is no alarm.

Axes: P hosts (processes), R rounds.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from moe_jax import metrics
from moe_jax.config import Config

WINDOW = 5  # probes
SLOW = 1.6  # times the median of its peers
_SIDE = 256  # of a matmul
_VALUES = 1 << 16  # float32 of a message
_COMPUTE_SECONDS = 0.05  # of all matmuls of a probe, at least: some turns of a shared core
_MESSAGE_SECONDS = 0.003  # of the messages of a round
_MOST = 1 << 16  # matmuls or messages
_REPEATS = 3  # of a round's messages; the least counts: the first waits for hosts that are late

COMPUTES, RECEIVES, SENDS, LINK = "computes", "receives", "sends", "link"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something slow.

    Attributes:
      kind: COMPUTES, RECEIVES, SENDS or LINK.
      hosts: its number; of a link, from and to.
      times: as slow as its peers' median.
    """

    kind: str
    hosts: tuple[int, ...]
    times: float

    def __str__(self) -> str:
        if self.kind == LINK:
            return f"the link from host {self.hosts[0]} to {self.hosts[1]}: {self.times:.1f} x"
        return f"host {self.hosts[0]} {self.kind} slowly: {self.times:.1f} x"


def rounds(num_hosts: int) -> list[list[tuple[int, int]]]:
    """(from, to) of the messages of each round; every ordered pair is in one, a host at most once.

    A tournament's: all but the last go round in a circle. In the second half it goes the other way.
    """
    others = num_hosts - 1 + num_hosts % 2  # an odd number of them goes round whole
    found = []
    for turn in range(others if num_hosts > 1 else 0):
        meet = [((turn + k) % others, (turn - k) % others) for k in range(1, (others + 1) // 2)]
        found.append(meet if num_hosts % 2 else [(turn, others), *meet])
    return found + [[(b, a) for a, b in pairs] for pairs in found]


def link_seconds(time_RP: Float[np.ndarray, "R P"], num_hosts: int) -> Float[np.ndarray, "P P"]:
    """[from, to]: the lesser of the times of both ends; 0 from a host to itself."""
    seconds_PP = np.zeros((num_hosts, num_hosts))
    for time_P, pairs in zip(time_RP, rounds(num_hosts), strict=True):
        for source, destination in pairs:
            seconds_PP[source, destination] = min(time_P[source], time_P[destination])
    return seconds_PP


class Judge:
    """Keeps the last probes and says what is slow in them. Plain NumPy."""

    def __init__(self, num_hosts: int):
        self._num_hosts = num_hosts
        self._compute: deque[np.ndarray] = deque(maxlen=WINDOW)
        self._links: deque[np.ndarray] = deque(maxlen=WINDOW)

    def add(
        self, compute_P: Float[np.ndarray, " P"], time_RP: Float[np.ndarray, "R P"]
    ) -> list[Finding]:
        """A probe; what is slow by now, nothing before there are `WINDOW` of them.

        Args:
          compute_P: seconds of every host's matmul.
          time_RP: seconds of every host in every round.
        """
        self._compute.append(compute_P)
        self._links.append(link_seconds(time_RP, self._num_hosts))
        if len(self._compute) < WINDOW or self._num_hosts < 2:
            return []
        compute_P = _second_least(self._compute)
        times_P = compute_P / np.median(compute_P)
        if self._num_hosts == 2:  # the median of two is their mean
            times_P = compute_P / compute_P.min()
        found = [
            Finding(COMPUTES, (host,), float(times_P[host]))
            for host in np.flatnonzero(times_P > SLOW).tolist()
        ]
        return found + self._slow_links(_second_least(self._links))

    def _slow_links(self, seconds_PP: np.ndarray) -> list[Finding]:
        """Whole columns are receivers, whole rows senders; what is left are links."""
        times_PP = np.zeros_like(seconds_PP)
        for pairs in _distances(self._num_hosts):
            source, destination = np.array(pairs).T
            seconds = seconds_PP[source, destination]
            peers = seconds.min() if len(seconds) == 2 else np.median(seconds)
            times_PP[source, destination] = seconds / max(peers, 1e-12)
        slow_PP = times_PP > SLOW
        found = []
        most = self._num_hosts - 1
        if most > 1:  # of two hosts, a link and an end are one
            for kind, axis in ((RECEIVES, 0), (SENDS, 1)):
                for host in np.flatnonzero(2 * slow_PP.sum(axis=axis) > most).tolist():
                    line = times_PP[:, host] if axis == 0 else times_PP[host]
                    found.append(Finding(kind, (host,), float(np.median(line[line > 0]))))
        for finding in found:
            host = finding.hosts[0]
            if finding.kind == RECEIVES:
                slow_PP[:, host] = False
            else:
                slow_PP[host] = False
        for source, destination in np.argwhere(slow_PP).tolist():
            times = float(times_PP[source, destination])
            found.append(Finding(LINK, (source, destination), times))
        return found


def _second_least(probes: Sequence[np.ndarray]) -> np.ndarray:
    return np.sort(np.stack(probes), axis=0)[1]


def _distances(num_hosts: int) -> list[list[tuple[int, int]]]:
    """All pairs of each distance: peers."""
    return [[(h, (h + d) % num_hosts) for h in range(num_hosts)] for d in range(1, num_hosts)]


@dataclasses.dataclass(frozen=True)
class _Timed:
    """Work that is done n times in one call; `times`: the n that is worth measuring."""

    call: Callable[[int], jax.Array]
    times: int

    @classmethod
    def of(cls, call: Callable[[int], jax.Array], seconds: float) -> "_Timed":
        """With the n, the same on every process, that keeps the slowest of them busy so long."""
        _seconds(call, 1)  # compiled, and connected
        times = 1
        while times < _MOST and _all(_seconds(call, times)).max() < seconds:
            times *= 2
        return cls(call, times)

    def least(self, repeats: int) -> float:
        """Seconds of one of the n, in the quickest of so many calls."""
        return min(_seconds(self.call, self.times) for _ in range(repeats)) / self.times


class Probe:
    """Times this host and its links. Every process calls it between the same two steps."""

    def __init__(self, mesh: Mesh):
        self._hosts = sorted({device.process_index for device in mesh.devices.flat})
        first: dict[int, jax.Device] = {}
        for device in mesh.devices.flat:
            first.setdefault(device.process_index, device)
        self.num_hosts = len(self._hosts)
        self._line = Mesh(np.array([first[host] for host in self._hosts]), ("host",))
        self._mine = first[jax.process_index()]
        self._matmuls: _Timed | None = None
        self._messages: list[_Timed] = []

    def __call__(self) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, "R P"]]:
        """(compute_P, time_RP), seconds of a matmul and of a message, the same on every process."""
        if self._matmuls is None:
            self._matmuls = _Timed.of(self._computing(), _COMPUTE_SECONDS)
            self._messages = [
                _Timed.of(self._sending(pairs), _MESSAGE_SECONDS)
                for pairs in rounds(self.num_hosts)
            ]
        times = [self._matmuls.least(1), *(timed.least(_REPEATS) for timed in self._messages)]
        all_PX = _all(*times).reshape(self.num_hosts, -1)
        return all_PX[:, 0], all_PX[:, 1:].T

    def _computing(self) -> Callable[[int], jax.Array]:
        square = jax.device_put(np.full((_SIDE, _SIDE), 1 / _SIDE, np.float32), self._mine)

        @jax.jit
        def multiply(square: jax.Array, times: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, times, lambda _, x: x @ square, square)

        return lambda times: multiply(square, np.int32(times))

    def _sending(self, pairs: list[tuple[int, int]]) -> Callable[[int], jax.Array]:
        shape, spec = (self.num_hosts, _VALUES), PartitionSpec("host")
        message = jax.make_array_from_callback(
            shape, NamedSharding(self._line, spec), lambda index: np.ones(shape, np.float32)[index]
        )
        back = [(destination, source) for source, destination in pairs]

        def there_and_back(_: int, x_1V: jax.Array) -> jax.Array:
            came_1V = jax.lax.ppermute(x_1V, "host", pairs)
            return x_1V.at[:, :1].set(jax.lax.ppermute(came_1V[:, :1], "host", back))

        def send(x_1V: jax.Array, times: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, times, there_and_back, x_1V)

        program = jax.jit(
            jax.shard_map(send, mesh=self._line, in_specs=(spec, PartitionSpec()), out_specs=spec)
        )
        return lambda times: program(message, np.int32(times))


class Stragglers:
    """Probes every so many steps of a run of several processes, and says what has changed."""

    def __init__(self, config: Config, mesh: Mesh):
        self._every = config.train.probe_every
        self._probe = Probe(mesh)
        self._judge = Judge(self._probe.num_hosts)
        self._known: list[tuple[str, tuple[int, ...]]] = []

    def look(self, step: int, state: Any) -> dict[str, float]:
        """After every step, by every process; `state` is what the step at hand makes.

        Returns what belongs to the metrics of this step, if it was probed: of every host the
        seconds of a matmul, and of a message in the slowest of its rounds.
        """
        if not self._every or step % self._every or jax.process_count() == 1:
            return {}
        jax.block_until_ready(state)
        compute_P, time_RP = self._probe()
        found = self._judge.add(compute_P, time_RP)
        known = [(finding.kind, finding.hosts) for finding in found]
        if known != self._known:
            gist = "; ".join(map(str, found)) or "nobody is slow any more"
            metrics.fail(f"step {step}: {gist}")
        self._known = known
        seconds = {f"host_{p}_matmul_seconds": float(s) for p, s in enumerate(compute_P)}
        message_P = time_RP.max(axis=0)
        return seconds | {f"host_{p}_message_seconds": float(s) for p, s in enumerate(message_P)}


def _seconds(call: Callable[[int], jax.Array], times: int) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call(times))
    return time.perf_counter() - started


def _all(*seconds: float) -> Float[np.ndarray, "P N"]:
    """What every process has measured."""
    return np.asarray(multihost_utils.process_allgather(np.array(seconds, np.float32)), float)
