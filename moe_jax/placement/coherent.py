"""Search where tokens are with the best expert of the layer before: coherent, shuffled dispatch.

Axes: T tokens, L MoE layers, E experts, K experts per token, M devices, Q distinct sets of a layer,
J distinct (best expert before, set) pairs, P swaps.

With h the device on which a token waits and S the devices of its experts, a layer sends |S - h|
rows out and |S| - 1 back (to where the token goes on, which is in S): 2 |S| - [h in S] - 1. So

    rows = sum over layers of 2 contacts - (tokens that wait on a device which their set touches)

The first sum is each partition's own; the second ties adjacent layers and is linear in the labels
of the layer before. Hence both are exact in chain.Pool (an assignment per pair of partitions, then
dynamic programming), and contacts.Sets gives the rows after every swap of a layer, its neighbours
being fixed: a contact of set q with device m costs 2 count_q - (tokens of q that wait on m).

In shuffled dispatch rows come back to h: 2 |S| - 2 [h in S], the same with twice the worth of
waiting at the right place (`saves`). There h is where *most* of the layer before were, and no
device has more than its share (row_homes.py); the best expert stands for that, and caps on loads
(the ladder) for the share, so this search is a proxy.

Annealing (anneal.py) cannot count sets. It sees pairs: best-to-all transitions, and co-activation
at `OWN` times its worth, since three experts on one device save two contacts, not three.

Exact where every token has an expert in every layer; a token without one counts as waiting nowhere.
What is kept in the end is decided by the true objective in any case.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from moe_jax.placement import chain as chain_lib
from moe_jax.placement import chainwise, clock, contacts, layerwise
from moe_jax.placement.problem import Problem

OWN = (0.25, 0.35, 0.5)  # of a co-activation, turn by turn
SAVES = {"coherent": 1.0, "shuffled": 2.0}  # rows
CLUSTERED = 0.2  # of the time, where the whole search follows
DESCENT = 0.75  # of that time, before swaps on exact rows
DESCENDED = 3  # best copies of a round that descend on exact rows


@dataclasses.dataclass(frozen=True, eq=False)
class WaitingSets(contacts.Sets):
    """Distinct sets of a layer, and on which expert of the layer before their tokens wait.

    Attributes:
      set_J: int64, the set of each pair.
      before_J: int64, the best expert of the layer before.
      count_J: float64, tokens.
      first: there is no layer before; tokens wait anywhere.
      saves: rows, both ways, of a token that waits on a device which its set touches.
      wait_QM: float64, tokens that wait on each device, once `waiting` has set it.
    """

    set_J: np.ndarray
    before_J: np.ndarray
    count_J: np.ndarray
    first: bool
    saves: float
    wait_QM: np.ndarray | None = None

    def waiting(self, before_E: np.ndarray, devices: int) -> "WaitingSets":
        """The same sets, given the devices of the layer before."""
        if self.first:
            wait_QM = np.repeat(self.count_Q[:, None] / devices, devices, axis=1)
        else:
            at_J = self.set_J * devices + before_E[self.before_J]
            size = len(self.count_Q) * devices
            waiting = np.bincount(at_J, weights=self.count_J, minlength=size)
            wait_QM = waiting.reshape(-1, devices).astype(float)
        return dataclasses.replace(self, wait_QM=wait_QM)

    def weight_QM(self, devices: int) -> np.ndarray:
        """Rows out and back that a contact costs."""
        assert self.wait_QM is not None
        return 2.0 * self.count_Q[:, None] - self.saves * self.wait_QM

    def contacts(self, part_E: np.ndarray, devices: int) -> float:
        """(token, device) pairs, wherever tokens wait; in the first layer less what they save."""
        share = self.saves / devices if self.first else 0.0
        return (2.0 - share) / 2.0 * float(self.count_Q @ self.touches_QM(part_E, devices).sum(1))

    def touches_QM(self, part_E: np.ndarray, devices: int) -> np.ndarray:
        """bool [Q, M]."""
        return self._experts_on(part_E, devices) > 0

    def ahead_EM(self, part_E: np.ndarray, devices: int) -> np.ndarray:
        """float64 [E, M]: saved by tokens that wait on an expert of the layer before, by device."""
        touches_JM = self.saves * self.touches_QM(part_E, devices)[self.set_J]
        return np.stack(
            [
                np.bincount(self.before_J, self.count_J * touches_J, minlength=self.num_experts)
                for touches_J in touches_JM.T
            ],
            axis=1,
        )


def sets_of(problem: Problem, layer: int) -> WaitingSets:
    """The sets of a layer with the best experts of the layer before."""
    sets, experts = problem.sets[layer], problem.trace.num_experts
    ids_TK = np.sort(np.minimum(problem.trace.expert_ids_TLK[:, layer].astype(np.int64), experts))
    before_T = problem.trace.expert_ids_TLK[:, max(layer - 1, 0), 0].astype(np.int64)
    ids_TK, before_T = ids_TK[ids_TK[:, 0] < experts], before_T[ids_TK[:, 0] < experts]
    set_T = set_of_tokens(sets, ids_TK)
    known_T = before_T < experts
    pair_J, count_J = np.unique(set_T[known_T] * experts + before_T[known_T], return_counts=True)
    return WaitingSets(
        sets.expert_QK,
        sets.count_Q,
        experts,
        pair_J // experts,
        pair_J % experts,
        count_J.astype(float),
        first=layer == 0,
        saves=SAVES[problem.dispatch],
    )


def set_of_tokens(sets: contacts.Sets, ids_TK: np.ndarray) -> np.ndarray:
    """int64 [T]: the set of every token, its experts in ascending order, as contacts.sets_of."""
    side, top_k = sets.num_experts + 1, ids_TK.shape[1]
    if side**top_k >= 2**63:
        return np.arange(len(ids_TK))
    power_K = side ** np.arange(top_k, dtype=np.int64)
    return np.searchsorted(sets.expert_QK @ power_K, ids_TK @ power_K)


@dataclasses.dataclass(frozen=True, eq=False)
class CoherentChain(chain_lib.Chain):
    """Rows that are saved; `keep_LEE` holds best-to-all transitions, for annealing only."""

    sets: tuple[WaitingSets, ...] = ()

    def ahead_EM(self, layer: int, part_E: np.ndarray) -> np.ndarray:
        return self.sets[layer].ahead_EM(part_E, self.num_devices)

    def own(self, layer: int, part_E: np.ndarray) -> float:
        return -2.0 * self.sets[layer].contacts(part_E, self.num_devices)

    def value(self, device_LE: np.ndarray) -> float:
        """Minus the rows of all layers both ways, but for a constant."""
        experts = np.arange(device_LE.shape[1])
        total = sum(self.own(layer, row_E) for layer, row_E in enumerate(device_LE))
        for layer in range(1, self.num_layers):
            total += self.ahead_EM(layer, device_LE[layer])[experts, device_LE[layer - 1]].sum()
        return float(total)


def descended(chain: CoherentChain, device_LE: np.ndarray, deadline: float) -> np.ndarray:
    """Best swaps of one layer after another on exact rows, until no layer has any."""
    device_LE = device_LE.copy()
    todo = np.ones(chain.num_layers, bool)
    while todo.any():
        for layer in np.flatnonzero(todo).tolist():
            if clock.late(deadline):
                return device_LE
            todo[layer] = False
            new_E = _swapped(chain, device_LE, layer)
            if not np.array_equal(new_E, device_LE[layer]):
                device_LE[layer] = new_E
                todo[max(layer - 1, 0) : layer + 2] = True
                todo[layer] = False
    return device_LE


def _swapped(chain: CoherentChain, device_LE: np.ndarray, layer: int) -> np.ndarray:
    device_E, devices = device_LE[layer].copy(), chain.num_devices
    sets = chain.sets[layer].waiting(device_LE[layer - 1], devices)
    ahead_EM = np.zeros((len(device_E), devices))
    if layer + 1 < chain.num_layers:
        ahead_EM = chain.ahead_EM(layer + 1, device_LE[layer + 1])
    least = 1e-9 * (1.0 + sets.count_Q.sum())
    while True:
        e_P, f_P = np.nonzero(np.triu(device_E[:, None] != device_E[None, :]))
        gain_P = gains_P(chain, layer, sets, ahead_EM, device_E, e_P, f_P)
        used_M = np.zeros(devices, bool)
        for p in np.argsort(-gain_P, kind="stable"):  # swaps between other devices add up exactly
            a, b = device_E[e_P[p]], device_E[f_P[p]]
            if not gain_P[p] > least or used_M.all():
                break
            if not used_M[a] and not used_M[b]:
                used_M[[a, b]] = True
                device_E[e_P[p]], device_E[f_P[p]] = b, a
        if not used_M.any():
            return device_E


def gains_P(chain, layer, sets, ahead_EM, device_E, e_P, f_P) -> np.ndarray:
    """float64 [P]: rows saved by each swap; -inf for those that add load above the cap."""
    devices, load_E = chain.num_devices, chain.load_LE[layer]
    if not len(e_P):
        return np.zeros(0)
    a_P, b_P = device_E[e_P], device_E[f_P]
    now = sets.touched_M(device_E, devices).sum()
    gain_P = now - sets.swapped_PM(device_E, devices, e_P, f_P).sum(axis=1)
    gain_P += ahead_EM[e_P, b_P] + ahead_EM[f_P, a_P] - ahead_EM[e_P, a_P] - ahead_EM[f_P, b_P]
    load_M = np.bincount(device_E, weights=load_E, minlength=devices)
    shift_P = load_E[f_P] - load_E[e_P]
    cap_M = chain.cap_LM[layer] * (1 + 1e-9)
    over_P = (load_M[a_P] + shift_P > cap_M[a_P]) | (load_M[b_P] - shift_P > cap_M[b_P])
    return np.where(over_P, -np.inf, gain_P)


@dataclasses.dataclass(frozen=True, eq=False)
class _Search(chainwise.Search):
    """Annealed copies by pairs; the best of them, and every chain of the pool, by exact rows."""

    def copies(self, best_LE: np.ndarray, number: int, deadline: float) -> list[np.ndarray]:
        assert self.own_LEE is not None
        own_LEE = OWN[number % len(OWN)] * self.own_LEE
        found = dataclasses.replace(self, own_LEE=own_LEE).annealed(best_LE, number, deadline)
        if clock.late(deadline):
            return []  # it takes longer to value them
        return sorted(map(self.within, found), key=self.chain.value, reverse=True)[:DESCENDED]

    def finished(self, device_LE: np.ndarray, deadline: float) -> np.ndarray:
        assert isinstance(self.chain, CoherentChain)
        return descended(self.chain, self.within(device_LE), deadline)


def search(
    problem: Problem, device_LE: np.ndarray, rng: np.random.Generator, deadline: float
) -> Iterator[np.ndarray]:
    """Yields placements for tied dispatches; the caller keeps what is better.

    Clusterings by co-activation with aligned labels first, for `seconds` under a ladder of load
    caps, rows and balance being at odds; each also after swaps on exact rows. For `rows` the whole
    search follows; for `seconds` coherent_seconds.py goes on from here.
    """
    factors = (np.inf,) if problem.objective == "rows" else layerwise.LADDER
    chains = chains_of(problem, factors)
    yield chain_lib.align(chains[0], problem.balanced_LE)
    first = clock.share(deadline, CLUSTERED) if len(chains) == 1 else deadline
    near_LE: Sequence[np.ndarray | None] = [None] * problem.trace.num_layers
    for rung, chain in enumerate(chains):
        share = clock.share(first, 1 / (len(chains) - rung))
        part_LE = _clustered(problem, chain, near_LE, rng, clock.share(share, DESCENT))
        near_LE = part_LE
        # repaired where it is over the problem's cap: over a rung's by little may still be best
        start_LE = chain_lib.align(chain, problem.repaired(np.stack(part_LE)))
        yield start_LE
        start_LE = descended(chain, start_LE, share)
        yield start_LE
    if len(chains) == 1:
        ways = _Search(
            chain,
            problem.balanced_LE,
            rng,
            2.0 / SAVES[problem.dispatch] * problem.coactivation_LEE,
        )
        yield from ways.run(start_LE, deadline)


def chains_of(problem: Problem, factors: tuple[float, ...]) -> list[CoherentChain]:
    """The chain under each cap of the ladder, never above the problem's own."""
    plain = problem.chain(problem.best_to_all_LEE)
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    sets = tuple(sets_of(problem, layer) for layer in range(problem.trace.num_layers))
    even = enumerate(problem.balanced_LE)
    reachable_L = np.array([problem.relative_M(layer, row_E).max() for layer, row_E in even])
    rungs = (layerwise.capped(problem.cap_L, reachable_L, factor) for factor in factors)
    return [CoherentChain(**{**fields, "cap_L": cap_L}, sets=sets) for cap_L in rungs]


def _clustered(problem: Problem, chain, near_LE, rng, deadline: float) -> list[np.ndarray]:
    """Every layer by itself, from the labels given."""
    found = []
    for layer, cap in enumerate(chain.cap_L):
        share = clock.share(deadline, 1 / (chain.num_layers - layer))
        found.append(layerwise.clustered(problem, layer, cap, near_LE[layer], rng, share))
    return found
