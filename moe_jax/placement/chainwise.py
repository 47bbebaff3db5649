"""Search for ExFlow's transitions, which tie layers together.

`transitions`: annealed copies (anneal.py), greedy sweeps and shakes of the best so far, each layer
exactly re-assigned until nothing improves, all partitions into a pool, the best chain through the
pool by dynamic programming (chain.py). A load cap does not depend on labels (which only go to
devices of the same speed), so a chain of layers that keep it keeps it. On several equal nodes the
nodes come first, then the devices inside each.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from moe_jax.placement import anneal, clock, clusters, ilp, priced
from moe_jax.placement import chain as chain_lib
from moe_jax.placement.problem import Problem

POOL = 48
COPIES = 12  # annealed side by side, at most
SWEEPS = (2000, 1000)  # of an annealing from hot, and from warm
WARM = (0.3, 0.2, 0.1)  # first temperatures from the best so far
ANNEALED = 1024  # variables of a layer above which caps are met by sweeps and shakes first
SWEPT = 4  # greedy sweeps of a round without annealing, and as many shakes of the best so far
ROUNDS = 200
PATIENCE = 24  # rounds without gain after which the search ends
NESTED_SHARE = 0.5  # of the time, on several nodes
WHOLE = 400  # variables up to which all layers are solved as one integer program


def transitions(
    problem: Problem, device_LE: np.ndarray, rng: np.random.Generator, deadline: float
) -> Iterator[np.ndarray]:
    """Yields better and better placements for `exflow`."""
    chain = problem.chain(problem.top1_LEE)
    capped = problem.load_cap is not None
    if problem.topology.num_nodes > 1 and problem.topology.nodes.equal and not capped:
        nested_LE = _nested(chain, rng, clock.share(deadline, NESTED_SHARE))
        yield nested_LE
        device_LE = max(device_LE, nested_LE, key=chain.value)
    size = problem.trace.num_experts * problem.num_devices
    large = capped and size > ANNEALED
    even_LE = problem.balanced_LE if capped else None
    yield from Search(chain, even_LE, rng, large=large).run(device_LE, deadline)


def _nested(chain: chain_lib.Chain, rng: np.random.Generator, deadline: float) -> np.ndarray:
    """Nodes first, as if each were one device; then the devices inside each node, by themselves."""
    layers, experts, nodes = chain.num_layers, chain.keep_LEE.shape[1], chain.nodes.count
    each = chain.num_devices // nodes
    node_LE = _best_of(chain.keep_LEE, nodes, rng, clock.share(deadline, 1 / 2))
    device_LE = np.empty((layers, experts), np.int64)
    row_L1 = np.arange(layers)[:, None]
    for node in range(nodes):
        inside_LS = np.nonzero(node_LE == node)[1].reshape(layers, -1)
        keep_LSS = chain.keep_LEE[
            row_L1[:-1, :, None], inside_LS[:-1, :, None], inside_LS[1:, None]
        ]
        share = clock.share(deadline, 1 / (nodes - node))
        device_LE[row_L1, inside_LS] = node * each + _best_of(keep_LSS, each, rng, share)
    return device_LE


def _best_of(
    keep_LEE: np.ndarray, devices: int, rng: np.random.Generator, deadline: float
) -> np.ndarray:
    """int64 [L, E]: the labels that keep most on a flat machine without caps."""
    layers, experts = len(keep_LEE) + 1, keep_LEE.shape[1]
    nothing_LE, no_cap_L = np.zeros((layers, experts)), np.full(layers, np.inf)
    chain = chain_lib.Chain(keep_LEE, devices, devices, 0.0, nothing_LE, no_cap_L)
    search = Search(chain, None, rng)
    *_, best_LE = search.run(search.start(), deadline)
    return best_LE


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """Rounds of annealed copies, or of greedy sweeps and shakes, joined through one pool.

    Attributes:
      chain: what is kept together.
      even_LE: labels within the caps; None where there are none.
      rng: of everything.
      own_LEE: what annealing keeps together within a layer, or None.
      large: layers are so large that annealing is slow beside re-assignment under caps.
    """

    chain: chain_lib.Chain
    even_LE: np.ndarray | None
    rng: np.random.Generator
    own_LEE: np.ndarray | None = None
    large: bool = False

    def run(self, device_LE: np.ndarray, deadline: float) -> Iterator[np.ndarray]:
        """Yields better and better labels, beginning with `device_LE` made better."""
        pool = chain_lib.Pool(self.chain, POOL)
        best_LE, idle = self.finished(device_LE, deadline), 0
        best = self.chain.value(best_LE)
        pool.add(best_LE)
        yield best_LE
        for number in range(ROUNDS):
            # even few sweeps of large copies take a while
            if idle >= PATIENCE or clock.late(deadline):
                return
            before = best
            for new_LE in self.round(pool, best_LE, number, deadline):
                if self.chain.value(new_LE) > best + 1e-12 * abs(best):
                    best_LE, best = new_LE, self.chain.value(new_LE)
                    yield best_LE
            idle = 0 if best > before + 1e-6 * abs(before) else idle + 1

    def round(
        self, pool: chain_lib.Pool, best_LE: np.ndarray, number: int, deadline: float
    ) -> Iterator[np.ndarray]:
        """Many labels into the pool; then the best chain through it."""
        for labels_LE in [*self.copies(best_LE, number, deadline), None]:
            if clock.late(deadline):
                return
            if labels_LE is None:
                labels_LE = pool.best_chain(deadline)
            if labels_LE is not None:
                new_LE = self.finished(labels_LE, deadline)
                pool.add(new_LE)
                yield new_LE

    def copies(self, best_LE: np.ndarray, number: int, deadline: float) -> list[np.ndarray]:
        """Where the labels of a round come from. Under a cap annealing finds more."""
        turn = number % (1 + len(WARM))
        if (self.even_LE is None or self.large) and turn < len(WARM):
            count = 1 if self.large else SWEPT
            swept = [chain_lib.sweep(self.chain, self._first(), deadline) for _ in range(count)]
            return swept + [_shaken(best_LE, self.rng) for _ in range(count)]
        return self.annealed(best_LE, number, deadline)

    def annealed(self, best_LE: np.ndarray, number: int, deadline: float) -> list[np.ndarray]:
        """Copies from hot, or warm from the best so far, in turns."""
        turn, cycle = number % (1 + len(WARM)), number // (1 + len(WARM))
        copies = min(COPIES, anneal.copies_for(self.chain))
        if turn == 0:
            start_BLE, hot, sweeps = np.tile(self.start(), (copies, 1, 1)), anneal.HOT, SWEEPS[0]
        else:
            warm = cycle if self.even_LE is None or self.large else turn - 1
            start_BLE, hot = np.tile(best_LE, (copies, 1, 1)), WARM[warm % len(WARM)]
            sweeps = SWEEPS[1]
        experts = best_LE.shape[1]
        most = min(40 * experts, max(50, 2**28 // (best_LE.size * self.chain.num_devices)))
        own_LEE = self.own_LEE
        return list(
            anneal.anneal(
                self.chain, start_BLE, self.rng, min(sweeps, most), deadline, hot, own_LEE
            )
        )

    def _first(self) -> np.ndarray:
        """int64 [E]: some labels of the first layer, within its cap."""
        if self.even_LE is None:
            return self.start()[0]
        some_EM = self.rng.random(self.chain.keep_LEE.shape[1:2] + (self.chain.num_devices,))
        found_E = priced.assign(some_EM, self.chain.load_LE[0], self.chain.cap_LM[0])
        return self.even_LE[0] if found_E is None else found_E

    def start(self) -> np.ndarray:
        """int64 [L, E]: at random, or as even as can be where there are caps."""
        if self.even_LE is not None:
            return self.even_LE
        layers, experts = self.chain.load_LE.shape
        return clusters.random_starts(experts, self.chain.num_devices, layers, self.rng)

    def finished(self, device_LE: np.ndarray, deadline: float) -> np.ndarray:
        """Every layer re-assigned until nothing improves: exactly, under caps by prices."""
        return self.within(chain_lib.alternate(self.chain, device_LE, deadline))

    def within(self, device_LE: np.ndarray) -> np.ndarray:
        """Layers above their cap replaced by the most even ones."""
        if self.even_LE is None:
            return device_LE
        return np.where(self.chain.over_L(device_LE)[:, None], self.even_LE, device_LE)


def whole(problem: Problem, deadline: float) -> ilp.Solved | None:
    """All layers as one integer program, with proof; None where that is too large."""
    keep_LEE, devices = problem.top1_LEE, problem.num_devices
    size = devices * (problem.load_LE.size + np.count_nonzero(keep_LEE))
    flat = problem.topology.num_nodes == 1 and problem.load_cap is None
    if problem.objective != "exflow" or not flat or size > WHOLE:
        return None
    if not (left := clock.left(deadline)):
        return None
    return ilp.whole_chain(keep_LEE, devices, left)


def _shaken(device_LE: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A few experts of a few neighbouring layers change places."""
    device_LE = device_LE.copy()
    layers, experts = device_LE.shape
    width = int(rng.integers(1, max(2, layers // 3) + 1))
    first = int(rng.integers(0, max(layers - width, 0) + 1))
    for layer in range(first, min(first + width, layers)):
        chosen = rng.choice(experts, size=max(2, experts // 4), replace=False)
        device_LE[layer, chosen] = device_LE[layer, rng.permutation(chosen)]
    return device_LE
