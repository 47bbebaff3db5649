"""Who is slow: a host that computes slowly, one that receives or sends slowly, or one link.

A training step tells nobody apart: everybody waits for the slowest. So every `train.probe_every`
steps each host times, between two steps, a matmul of its own and messages to every other host, and
all of them learn all times. After C4 (arXiv 2406.04594), which reads the same from the times of a
collective library's own messages; JAX shows none.

Messages go in rounds. In round d host i sends to i + d and so receives from i - d, and its time is
that of the slower of the two. A link from i to j is in the times of both of its ends, and so is no
slower than the lesser of them. Where i + d and i - d are one host, the round goes in two halves.

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
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from moe_jax import metrics
from moe_jax.config import Config

WINDOW = 5  # probes
SLOW = 1.6  # times the median of its peers
_SIDE = 256  # of the matmul
_VALUES = 1 << 16  # float32 of a message
_REPEATS = 3  # of each timing; the least counts

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
    """(from, to) of the messages of each round; every ordered pair is in one of them."""
    found = []
    for distance in range(1, num_hosts):
        pairs = [(host, (host + distance) % num_hosts) for host in range(num_hosts)]
        halves = [pairs[: num_hosts // 2], pairs[num_hosts // 2 :]]
        found += halves if 2 * distance == num_hosts else [pairs]
    return found


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
        self._programs: list[Any] | None = None

    def __call__(self) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, "R P"]]:
        """(compute_P, time_RP), the same on every process."""
        if self._programs is None:
            self._build()
        assert self._programs is not None
        times = [
            _least(self._matmul, self._square, self._square),
            *(_least(program, self._message) for program in self._programs),
        ]
        all_times = np.asarray(multihost_utils.process_allgather(np.array(times, np.float32)))
        all_PX = all_times.reshape(self.num_hosts, -1).astype(np.float64)
        return all_PX[:, 0], all_PX[:, 1:].T

    def _build(self) -> None:
        self._square = jax.device_put(np.ones((_SIDE, _SIDE), np.float32), self._mine)
        self._matmul = jax.jit(jnp.dot).lower(self._square, self._square).compile()
        whole = NamedSharding(self._line, PartitionSpec("host"))
        shape = (self.num_hosts, _VALUES)
        self._message = jax.make_array_from_callback(
            shape, whole, lambda index: np.ones(shape, np.float32)[index]
        )
        self._programs = [self._sending(pairs) for pairs in rounds(self.num_hosts)]
        for program in self._programs:  # compiled, and connected
            jax.block_until_ready(program(self._message))

    def _sending(self, pairs: list[tuple[int, int]]) -> Callable[[jax.Array], jax.Array]:
        def send(message: jax.Array) -> jax.Array:
            return jax.lax.ppermute(message, "host", pairs)

        spec = PartitionSpec("host")
        return jax.jit(jax.shard_map(send, mesh=self._line, in_specs=spec, out_specs=spec))


class Stragglers:
    """Probes every so many steps of a run of several processes, and says what has changed."""

    def __init__(self, config: Config, mesh: Mesh):
        self._every = config.train.probe_every
        self._probe = Probe(mesh)
        self._judge = Judge(self._probe.num_hosts)
        self._known: list[tuple[str, tuple[int, ...]]] = []

    def look(self, step: int, state: Any) -> None:
        """After every step, by every process; `state` is what the step at hand makes."""
        if not self._every or step % self._every or jax.process_count() == 1:
            return
        jax.block_until_ready(state)
        found = self._judge.add(*self._probe())
        known = [(finding.kind, finding.hosts) for finding in found]
        if known != self._known:
            gist = "; ".join(map(str, found)) or "nobody is slow any more"
            metrics.fail(f"step {step}: {gist}")
        self._known = known


def _least(call: Callable[..., Any], *arguments: jax.Array) -> float:
    """Seconds of the quickest of a few calls."""
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - started)
    return min(times)
