"""Plans with few moves where layers are tied: many plans at many prices, and the best mix of them.

Axes: L layers, E experts, M devices, C options of a layer.

- exflow: a move has a price, added to what an expert keeps where it is. Layers are re-assigned in
  turn (chain.py; under a load cap by best swaps, in closed form), from the plan in use with the
  price falling and from the free plan with the price rising; and swap after swap, the one that
  gains most per move, or loses least per move saved (paths.py). Their rows are the options.
  The mixes of some numbers of moves are refined, layer by layer by an exact program that limits the
  moves, and join the options.
- coherent and shuffled dispatch, moetuner: options are those of exchange dispatch (menu.py), in
  seconds for moetuner.

Two neighbouring layers have a value together that no other layer enters (knapsack.chained), exactly
so where every token has an expert in every layer. Long traces are sampled for it; plans are valued
on all of the trace.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from moe_jax.placement import chain as chain_lib
from moe_jax.placement import clock
from moe_jax.placement.limits import paths
from moe_jax.placement.limits.nearest import Within, best
from moe_jax.placement.problem import Problem
from moe_jax.routing.trace import Trace

PRICES = (8.0, 4.0, 2.5, 1.8, 1.4, 1.0, 0.7, 0.5, 0.25, 0.1, 0.0)  # in mean gains of a move
OPTIONS = 48  # of a layer, at most
TABLE = 2**28  # steps of the dynamic program, at most: options^2 x layers x moves
PAIRED = (2, 4, 8)  # options of a layer whose pairs are counted token by token, more and more
TOKENS = 2**15  # that they are counted on, at most


@dataclasses.dataclass(frozen=True, eq=False)
class Tolled(chain_lib.Chain):
    """A chain in which experts are worth something by themselves where they are.

    Attributes:
      bonus_LEM: what an expert is worth on a device: the price of a move saved, or a pin.
    """

    bonus_LEM: np.ndarray = dataclasses.field(kw_only=True)

    def benefit_EM(self, device_LE: np.ndarray, layer: int, before: bool, after: bool):
        return super().benefit_EM(device_LE, layer, before, after) + self.bonus_LEM[layer]


def plans(
    problem: Problem, old_LE: np.ndarray, start_LE: np.ndarray, free_LE: np.ndarray, deadline: float
) -> Iterator[np.ndarray]:
    """Plans for `exflow` from few moves to many; pins and caps are kept."""
    chain = problem.chain(problem.top1_LEE)
    yield from (start_LE, free_LE)
    third, half = clock.share(deadline, 1 / 3), clock.share(deadline, 1 / 2)
    yield from paths.away(problem, chain, old_LE, start_LE, third)
    yield from paths.back(problem, chain, old_LE, free_LE, half)
    gained = max(chain.value(free_LE) - chain.value(start_LE), 0.0)
    mean = gained / max(int((free_LE != old_LE).sum() - (start_LE != old_LE).sum()), 1)
    for prices, device_LE in ((PRICES, start_LE), (PRICES[::-1], free_LE)):
        for price in prices:
            if clock.late(deadline):
                return
            tolled = _tolled(problem, chain, old_LE, price * mean)
            device_LE = _settled(problem, tolled, device_LE, deadline)
            yield device_LE


def refined(
    problem: Problem, old_LE: np.ndarray, plan_LE: np.ndarray, moves: int, deadline: float
) -> np.ndarray:
    """Each layer given its neighbours by an exact program, at most `moves` moves in all."""
    chain, device_LE = problem.chain(problem.top1_LEE), plan_LE.copy()
    improved = True
    while improved:
        improved = False
        for layer in range(chain.num_layers):
            if not (left := clock.left(deadline)):
                return device_LE
            benefit_EM = chain.benefit_EM(device_LE, layer, before=True, after=True)
            moved_L = (device_LE != old_LE).sum(axis=1)
            room = moves - int(moved_L.sum() - moved_L[layer])
            within = within_of(problem, layer)
            new_E = best(benefit_EM, within, old_LE[layer], room, min(left, 1.0)).device_E
            row_E = np.arange(len(benefit_EM))
            if new_E is None:
                continue
            gain = (benefit_EM[row_E, new_E] - benefit_EM[row_E, device_LE[layer]]).sum()
            if gain > 1e-9 * (1.0 + np.abs(benefit_EM).sum()):
                device_LE[layer], improved = new_E, True
    return device_LE


def within_of(problem: Problem, layer: int) -> Within:
    """What labels of a layer must keep."""
    pin_E = np.full(problem.trace.num_experts, -1)
    if problem.pins is not None:
        pin_E = problem.pins.device_LE[layer]
    cap_M = problem.cap_L[layer] * problem.topology.speed_M
    return Within(pin_E, problem.load_LE[layer], cap_M, problem.num_devices)


def options(plans_PLE: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The distinct rows of every layer, [C, E]: those of the first two plans and the last ones."""
    size = plans_PLE[0].size * len(plans_PLE[0])
    most = int(np.clip(np.sqrt(TABLE / size), 4, OPTIONS))
    found = []
    for rows in zip(*plans_PLE, strict=True):
        distinct = {row_E.tobytes(): row_E for row_E in rows}
        kept = [*distinct.values()]
        found.append(np.stack(kept[:2] + kept[2:][-most + 2 :]))
    return found


def hop_edges(chain: chain_lib.Chain, options_: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What options of neighbouring layers keep together, [C, D], negative: less is better."""
    edges = []
    for keep_EE, left_CE, right_DE in zip(chain.keep_LEE, options_[:-1], options_[1:], strict=True):
        column_E = np.arange(right_DE.shape[1])
        edge_CD = np.empty((len(left_CE), len(right_DE)))
        for c, left_E in enumerate(left_CE):
            kept_EM = keep_EE.T @ chain.likeness_MM[left_E]
            edge_CD[c] = -kept_EM[column_E, right_DE].sum(axis=1)
        edges.append(edge_CD)
    return edges


def counted_edges(
    problem: Problem, options_: Sequence[np.ndarray], deadline: float
) -> list[np.ndarray] | None:
    """The objective of the later of two neighbouring layers, [C, D]; None if time ran out."""
    edges = []
    for layer in range(1, problem.trace.num_layers):
        pair, scale = _pair(problem, layer)
        left_CE, right_DE = options_[layer - 1], options_[layer]
        edge_CD = np.empty((len(left_CE), len(right_DE)))
        for c, d in np.ndindex(*edge_CD.shape):
            if clock.late(deadline):
                return None
            edge_CD[c, d] = scale * _values_2(pair, np.stack([left_CE[c], right_DE[d]]))[1]
        edges.append(edge_CD)
    return edges


def counted_first(problem: Problem, option_CE: np.ndarray) -> np.ndarray:
    """float64 [C]: the objective of the first layer."""
    pair, scale = _pair(problem, 1)
    layers = pair.trace.num_layers  # 1 where there is no other
    return np.array([scale * _values_2(pair, np.stack([row_E] * layers))[0] for row_E in option_CE])


def _values_2(pair: Problem, device_2E: np.ndarray) -> np.ndarray:
    """float64 [2]: what each of two layers adds, the way between them in the later one."""
    if pair.objective != "moetuner":
        return pair.values_L(device_2E)
    stages = pair.tuner.stages(device_2E)
    return stages.deviation_L + np.append(0.0, stages.slowest_l)


def _pair(problem: Problem, layer: int) -> tuple[Problem, float]:
    """The problem of two neighbouring layers, and what its values count in the whole."""
    trace = problem.trace
    count = trace.num_tokens
    if not counted_whole(problem):
        count = TOKENS
    at = np.unique(np.linspace(0, trace.num_tokens - 1, count).astype(int))
    ids_TLK = trace.expert_ids_TLK[at][:, layer - 1 : layer + 1]
    two = Trace(ids_TLK, trace.num_experts, np.array([len(at)]))
    pair = dataclasses.replace(problem.unrestricted, trace=two, load_cap=None)
    if problem.objective != "rows":
        return pair, 1.0
    share = len(at) / trace.num_tokens
    each = pair.token_layers / two.num_layers
    return pair, (trace.num_layers / problem.token_layers) * each / share


def counted_whole(problem: Problem) -> bool:
    """Values of neighbours are exact, not counted on a part of the tokens."""
    return problem.objective == "moetuner" or problem.trace.num_tokens <= TOKENS


def _tolled(problem: Problem, chain: chain_lib.Chain, old_LE: np.ndarray, price: float) -> Tolled:
    bonus_LEM = price * (old_LE[:, :, None] == np.arange(problem.num_devices))
    if problem.pins is not None:  # a pin outweighs all transitions of a layer
        bonus_LEM = bonus_LEM + 4 * (1 + price) * (chain.keep_LEE.sum() + 1) * problem.pins.held_LEM
    values = {field.name: getattr(chain, field.name) for field in dataclasses.fields(chain)}
    return Tolled(**values, bonus_LEM=bonus_LEM)


def _settled(problem: Problem, chain: Tolled, device_LE: np.ndarray, deadline: float) -> np.ndarray:
    """Layers re-assigned in turn until nothing improves."""
    if problem.load_cap is None:
        return chain_lib.alternate(chain, device_LE, deadline)
    device_LE, moved = device_LE.copy(), True
    while moved and not clock.late(deadline):
        moved = False
        for layer in range(chain.num_layers):
            new_E = _swapped(problem, chain, device_LE, layer)
            moved |= not np.array_equal(new_E, device_LE[layer])
            device_LE[layer] = new_E
    return device_LE


def _swapped(problem: Problem, chain: Tolled, device_LE: np.ndarray, layer: int) -> np.ndarray:
    """Best swaps of one layer, its neighbours as they are, within cap and pins."""
    device_LE = device_LE.copy()
    least = 1e-9 * (1.0 + np.abs(chain.benefit_EM(device_LE, layer, True, True)).sum())
    while True:
        gain_EE = paths.gains_EE(problem, chain, device_LE, layer)
        e, f = np.unravel_index(int(gain_EE.argmax()), gain_EE.shape)
        if not gain_EE[e, f] > least:
            return device_LE[layer]
        device_LE[layer, [e, f]] = device_LE[layer, [f, e]]
