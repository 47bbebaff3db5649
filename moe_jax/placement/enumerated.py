"""Layers of few experts: all their placements, and the best chain of them, with proof.

Axes: L layers, E experts, M devices, S placements of one layer (equal groups, devices named), Q
distinct expert sets of a layer, G renumberings of the devices that leave the machine as it is.

Where a layer's cost depends on its placement and on that of the layer before alone, the best plan
is a shortest path through L times S states: a dynamic program from the last layer to the first,

    rest_l[p] = own_l(p) + min over r of (pair_l+1(p, r) + rest_l+1[r]).

A renumbering of all layers changes no cost, so that rest_l is needed for one placement of each
orbit only: 105 of the 2,520 placements of 8 experts on 4 devices, 1 of 40,320 on 8. What has no
pair (every dispatch from whose layers tokens return home) is the least of a layer by itself.

Pins leave out placements; for rest_l a renumbering has to leave every device alone that a layer
from l on has a pin on (an expert is pinned to one device, so that no other one keeps all pins). A
plan in use names every device: limits/whole.py looks at it without renumberings.

The optimum is proven by having looked at everything; rounding aside (relax.SAFETY). Not for
shuffled dispatch, whose homes are balanced by the numbers of tokens and devices, nor for seconds of
coherent dispatch on a torus (few renumberings, links to be walked), nor for `hops`, which has an
exact method of its own.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

from moe_jax.placement import clock, coherent_seconds, evidence
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.contacts import Sets
from moe_jax.placement.ilp import Solved
from moe_jax.placement.problem import Problem

MOST_STATES = 50_000  # placements of a layer that are held at once
SPEED = 4e8  # numbers looked at in a second, of one core and usually: what fits a time limit
COUNTED = 30  # numbers in whose time an expert of a token is counted
MOST_DEVICES = 8  # whose renumberings are tried one by one
ENTRIES = 2**22  # of a table [placements, devices, sets] at once


@dataclasses.dataclass(frozen=True, eq=False)
class States:
    """All placements of a layer.

    Attributes:
      device_SE: each of them, in lexical order.
      firsts: those that stand for an orbit, F of them.
      orbit_S: the orbit of each, 0 to F - 1.
      number_SM: the renumbering that makes it of the one that stands for it: device_SE[s] is
        number_SM[s][device_SE[firsts[orbit_S[s]]]].
    """

    device_SE: np.ndarray
    firsts: np.ndarray
    orbit_S: np.ndarray
    number_SM: np.ndarray

    @property
    def first_FE(self) -> np.ndarray:
        """Those that stand for an orbit."""
        return self.device_SE[self.firsts]

    def find(self, device_E: np.ndarray) -> int:
        """Where a placement stands."""
        return int(np.searchsorted(_codes(self.device_SE), _codes(device_E[None])[0]))


class Costs:
    """What the layers of a problem cost; the value is the mean over layers.

    Attributes:
      problem: with the objective.
      each: numbers that are looked at for a pair of placements, about.
      tied: layers have a cost with the layer before.
    """

    tied = True

    def __init__(self, problem: Problem, each: int):
        """Args: as the attributes."""
        self.problem, self.each = problem, each

    def own(self, layer: int, device_SE: np.ndarray) -> np.ndarray:
        """float64 [S]: what a placement costs by itself."""
        return np.zeros(len(device_SE))

    def pair(self, layer: int, before_E: np.ndarray, device_SE: np.ndarray) -> np.ndarray:
        """float64 [S]: what it costs besides, after this one of the layer before."""
        return np.zeros(len(device_SE))


def solved(problem: Problem, time_limit: float, deadline: float) -> Solved | None:
    """The best plan, and its value as a bound; None where there are too many placements.

    Args:
      problem: without a plan in use, which is not looked at.
      time_limit: in seconds: what is expected to take longer is not begun.
      deadline: of time.monotonic(), for what was expected wrongly.
    """
    trace, devices, count = problem.trace, problem.num_devices, number_of(problem)
    if count > MOST_STATES or devices > MOST_DEVICES:
        return None
    if (costs := costs_of(problem)) is None:
        return None
    groups = [renumberings(problem, layer) for layer in range(trace.num_layers)]
    pairs = count * sum(max(count // len(number_GM), 1) for number_GM in groups)
    if numbers_alone(problem, count) + pairs * costs.each > time_limit * SPEED:
        clock.cut()
        return None
    # a later layer's contain all of an earlier one's: as many are the same
    different = {len(number_GM): number_GM for number_GM in groups}
    made = {n: states_of(trace.num_experts, devices, each) for n, each in different.items()}
    states = [made[len(number_GM)] for number_GM in groups]
    found = (_chained if costs.tied else _apart)(problem, costs, states, deadline)
    if found is None or not np.isfinite(found[1]):  # late, or nothing keeps pins and cap
        return None
    device_LE, total = found
    return Solved(device_LE, total / trace.num_layers)


def number_of(problem: Problem) -> int:
    """Of the placements of a layer."""
    experts = math.factorial(problem.trace.num_experts)
    return experts // math.factorial(problem.slots) ** problem.num_devices


def numbers_alone(problem: Problem, count: int) -> int:
    """About how many numbers are looked at for what so many placements cost by themselves."""
    trace = problem.trace
    alone = count * problem.num_devices * _sets(problem)
    return trace.num_layers * (alone + COUNTED * trace.num_tokens * trace.top_k)


def _sets(problem: Problem) -> int:
    """About the distinct sets of a layer, at most."""
    trace = problem.trace
    return min(math.comb(trace.num_experts, trace.top_k), trace.num_tokens)


def _pieces(problem: Problem, placements: np.ndarray) -> Iterator[slice]:
    """Placements whose tables fit memory."""
    piece = max(1, ENTRIES // (problem.num_devices * _sets(problem)))
    for start in range(0, len(placements), piece):
        yield slice(start, start + piece)


def _apart(
    problem: Problem, costs: Costs, states: list[States], deadline: float
) -> tuple[np.ndarray, float] | None:
    """The best of every layer, and the sum of what they cost."""
    rows, total = [], 0.0
    for layer in range(problem.trace.num_layers):
        if clock.late(deadline):
            return None
        first_FE = states[layer].first_FE
        value_F = alone(problem, costs, layer, first_FE)
        rows.append(first_FE[value_F.argmin()])
        total += float(value_F.min())
    return np.stack(rows).astype(np.int64), total


def _chained(
    problem: Problem, costs: Costs, states: list[States], deadline: float
) -> tuple[np.ndarray, float] | None:
    """The best chain, and what it costs: from the last layer to the first, then along it."""
    device_SE = states[0].device_SE
    rest_S, next_LF = np.zeros(len(device_SE)), []
    last = problem.trace.num_layers - 1
    for layer in range(last, -1, -1):
        first_FE = states[layer].first_FE
        value_F = alone(problem, costs, layer, first_FE)
        next_F = np.zeros(len(value_F), np.int64)
        for place in np.flatnonzero(np.isfinite(value_F)) if layer < last else ():
            if clock.late(deadline):
                return None
            pair_S = costs.pair(layer + 1, first_FE[place], device_SE) + rest_S
            next_F[place] = pair_S.argmin()
            value_F[place] += pair_S[next_F[place]]
        rest_S = value_F[states[layer].orbit_S]
        next_LF.append(next_F)
    here = int(rest_S.argmin())
    rows = [device_SE[here]]
    for one, next_F in zip(states, next_LF[:0:-1], strict=False):
        after_E = device_SE[next_F[one.orbit_S[here]]]
        rows.append(one.number_SM[here][after_E])
        here = one.find(rows[-1])
    return np.stack(rows).astype(np.int64), float(rest_S.min())


def alone(problem: Problem, costs: Costs, layer: int, device_SE: np.ndarray) -> np.ndarray:
    """float64 [S]: what placements cost by themselves; inf above a load cap, or without a pin."""
    value_S = np.full(len(device_SE), np.inf)
    for some in _pieces(problem, device_SE):
        load_SM = _sums(problem.load_LE[layer], device_SE[some], problem.num_devices)
        over_S = problem.over(layer, load_SM)
        value_S[some] = np.where(over_S, np.inf, costs.own(layer, device_SE[some]))
    if problem.pins is not None:
        pin_E = problem.pins.device_LE[layer]
        value_S[((device_SE != pin_E) & (pin_E >= 0)).any(axis=1)] = np.inf
    return value_S


def renumberings(problem: Problem, first: int = 0) -> np.ndarray:
    """int64 [G, M]: new numbers for the devices that leave machine and costs as they are.

    So too the pins from layer `first` on.
    """
    devices = problem.num_devices
    if problem.labels_count:
        return np.arange(devices)[None]
    number_GM = np.array(list(itertools.permutations(range(devices))))
    same_MM = problem.topology.nodes.same_MM
    kept_G = (same_MM[number_GM[:, :, None], number_GM[:, None, :]] == same_MM).all(axis=(1, 2))
    if (kind_M := problem.kind_M) is not None:
        kept_G &= (kind_M[number_GM] == kind_M).all(axis=1)
    if problem.pins is not None:
        pinned_M = problem.pins.held_LEM[first:].any(axis=(0, 1))
        kept_G &= (number_GM == np.arange(devices))[:, pinned_M].all(axis=1)
    return number_GM[kept_G]


def states_of(experts: int, devices: int, number_GM: np.ndarray) -> States:
    """All placements of so many experts on so many devices."""
    device_SE = arranged(experts, devices)
    code_S = _codes(device_SE)
    orbit_S = np.full(len(device_SE), -1)
    number_SM = np.zeros((len(device_SE), devices), np.int64)
    firsts: list[int] = []
    for s in range(len(device_SE)):
        if orbit_S[s] < 0:
            reached_G = np.searchsorted(code_S, _codes(number_GM[:, device_SE[s]]))
            orbit_S[reached_G], number_SM[reached_G] = len(firsts), number_GM
            firsts.append(s)
    return States(device_SE, np.array(firsts), orbit_S, number_SM)


def arranged(experts: int, devices: int) -> np.ndarray:
    """int8 [S, E]: every device as often as any other, in lexical order."""
    slots = experts // devices
    device_SE = np.zeros((1, 0), np.int8)
    used_SM = np.zeros((1, devices), np.int8)
    for _ in range(experts):
        s, device = np.nonzero(used_SM < slots)
        device_SE = np.concatenate([device_SE[s], device[:, None].astype(np.int8)], axis=1)
        used_SM = used_SM[s]
        used_SM[np.arange(len(s)), device] += 1
    return device_SE


def _codes(device_SE: np.ndarray) -> np.ndarray:
    """int64 [S]: a number for each placement, in lexical order."""
    weight_E = MOST_DEVICES ** np.arange(device_SE.shape[1] - 1, -1, -1, dtype=np.int64)
    return device_SE.astype(np.int64) @ weight_E


def _sums(value_E: np.ndarray, device_SE: np.ndarray, devices: int) -> np.ndarray:
    """float64 [S, M]: of the experts of a device."""
    return np.stack([(device_SE == m) @ value_E for m in range(devices)], axis=1)


def _touch_SMQ(sets: Sets, device_SE: np.ndarray, devices: int) -> np.ndarray:
    """float64 [S, M, Q]: 1 where a set has an expert on a device (or node)."""
    here_SME = np.stack([device_SE == m for m in range(devices)], axis=1)
    there_SMQ = here_SME.astype(np.float32) @ sets.member_QE.T.astype(np.float32)
    return (there_SMQ > 0).astype(float)


def costs_of(problem: Problem) -> Costs | None:
    """Those of the problem's objective; None where layers are not tied to neighbours alone."""
    experts = problem.trace.num_experts
    torus = problem.objective == "seconds" and problem.topology.torus is not None
    if problem.objective == "hops":
        return None
    if problem.objective == "exflow":
        return Transitions(problem, 2 * experts)
    if problem.objective == "moetuner":
        return Stages(problem, problem.num_devices**2 * experts)
    if problem.separable:
        return Apart(problem, 0)
    if problem.dispatch == "shuffled" or torus:
        return None
    ids_TLK = problem.trace.expert_ids_TLK
    always = (ids_TLK[:, :, 0] != problem.trace.no_expert).all()  # else tokens wait where they were
    return Coherent(problem) if always else None


class Apart(Costs):
    """Every layer by itself: `load`, and `rows` and `seconds` where tokens return home."""

    tied = False

    def own(self, layer: int, device_SE: np.ndarray) -> np.ndarray:
        """float64 [S]."""
        problem, devices = self.problem, self.problem.num_devices
        load_SM = _sums(problem.load_LE[layer], device_SE, devices)
        if problem.objective == "load":
            return evidence.over_mean(load_SM, problem.topology.speed_M)
        sets, nodes = problem.sets[layer], problem.topology.nodes
        touched_SM = _touch_SMQ(sets, device_SE, devices) @ sets.count_Q
        node_SN = _touch_SMQ(sets, nodes.node_M[device_SE], nodes.count) @ sets.count_Q
        return problem.scores(layer, touched_SM, node_SN, load_SM)


class Transitions(Costs):
    """The objective `exflow`: transitions that leave their device."""

    def pair(self, layer: int, before_E: np.ndarray, device_SE: np.ndarray) -> np.ndarray:
        """float64 [S]."""
        problem, devices = self.problem, self.problem.num_devices
        moves = max(problem.top1_LEE.sum(), 1.0)
        scale = problem.trace.num_layers * len(problem.top1_LEE) / moves
        from_ME = np.eye(devices)[before_E].T @ problem.top1_LEE[layer - 1]
        cost_ME = problem.hop_MM.T @ from_ME  # of a next expert on each device
        experts = np.arange(device_SE.shape[1])
        return scale * cost_ME[device_SE, experts].sum(axis=1)


class Stages(Costs):
    """The objective `moetuner`: both stages."""

    def own(self, layer: int, device_SE: np.ndarray) -> np.ndarray:
        """float64 [S]: how far all devices are from their mean."""
        tuner = self.problem.tuner
        work_SM = _sums(tuner.work_LE[layer], device_SE, tuner.num_devices)
        return np.abs(work_SM - work_SM.mean(axis=1, keepdims=True)).sum(axis=1)

    def pair(self, layer: int, before_E: np.ndarray, device_SE: np.ndarray) -> np.ndarray:
        """float64 [S]: the slowest pair of devices."""
        tuner = self.problem.tuner
        from_ME = np.eye(tuner.num_devices)[before_E].T @ tuner.flow_lEE[layer - 1]
        slowest_S = np.zeros(len(device_SE))
        for m in range(tuner.num_devices):
            bytes_MS = from_ME @ (device_SE == m).T
            seconds_MS = bytes_MS / tuner.bandwidth_MM[:, m, None]
            slowest_S = np.maximum(slowest_S, seconds_MS.max(axis=0))
        return slowest_S


class Coherent(Costs):
    """`rows` and `seconds` of coherent dispatch: out from the best expert before, back to the best.

    Every token has an expert in every layer.
    """

    def __init__(self, problem: Problem):
        """Args: the problem."""
        super().__init__(problem, 8 * problem.trace.num_experts)
        self._layers = coherent_seconds.model(problem).layers
        self._last: tuple[int, _Sent] | None = None

    def own(self, layer: int, device_SE: np.ndarray) -> np.ndarray:
        """float64 [S]: answers, and what devices compute; in layer 0 the way out, too."""
        problem, one, devices = self.problem, self._layers[layer], self.problem.num_devices
        load_SM = _sums(problem.load_LE[layer], device_SE, devices)
        touch_SMQ = _touch_SMQ(one.sets, device_SE, devices)
        here_SME = np.stack([device_SE == m for m in range(devices)], axis=1).astype(float)
        back_SMM = here_SME @ (one.best_QE.T.toarray() @ touch_SMQ.transpose(0, 2, 1))
        total_S = self._cost(back_SMM.transpose(0, 2, 1))  # from the device that was touched
        if layer == 0:
            out_SM = touch_SMQ @ one.sets.count_Q / devices  # homes are uniform
            total_S = total_S + self._cost(np.repeat(out_SM[:, None], devices, axis=1))
        if problem.objective == "rows":
            return total_S
        tokens = problem.trace.num_tokens
        compute_SM = seconds_lib.compute_seconds(load_SM, problem.topology, problem.work, tokens)
        gather = seconds_lib.attention_seconds(problem.topology, problem.work, problem.dispatch)
        return total_S + compute_SM.max(axis=1) + gather

    def pair(self, layer: int, before_E: np.ndarray, device_SE: np.ndarray) -> np.ndarray:
        """float64 [S]: the way out, from sums over the devices of a node and over all."""
        problem, nodes = self.problem, self.problem.topology.nodes
        sent = self._sent_of(layer, device_SE)
        fast_S, slow_S, total_S = np.zeros((3, len(device_SE)))
        for m in range(problem.num_devices):
            here_E, near_E = before_E == m, nodes.node_M[before_E] == nodes.node_M[m]
            own_S = sent.device_MES[m, here_E].sum(axis=0)
            all_out_S = sent.device_NES[:, here_E].sum(axis=(0, 1))
            near_out_S = sent.device_NES[nodes.node_M[m], here_E].sum(axis=0)
            near_in_S = sent.device_MES[m, near_E].sum(axis=0)
            total_S += all_out_S - own_S
            fast_S = np.maximum(fast_S, np.maximum(near_out_S, near_in_S) - own_S)
            far_S = np.maximum(all_out_S - near_out_S, sent.device_MS[m] - near_in_S)
            slow_S = np.maximum(slow_S, far_S)
        if problem.objective == "rows":
            return total_S * (problem.trace.num_layers / problem.token_layers)
        to_bytes = problem.rows_per_step * problem.work.row_bytes
        tiers = (fast_S, problem.topology.fast), (slow_S, problem.topology.slow)
        return np.maximum(
            *(rows_S * (to_bytes / t.bandwidth) + t.latency * (rows_S > 0) for rows_S, t in tiers)
        )

    def _sent_of(self, layer: int, device_SE: np.ndarray) -> "_Sent":
        """Of one layer, for all placements; kept until another one is asked for."""
        if self._last is None or self._last[0] != layer:
            sets, nodes = self._layers[layer].sets, self.problem.topology.nodes
            wait_QE = np.zeros((len(sets.count_Q), sets.num_experts))
            wait_QE[sets.set_J, sets.before_J] = sets.count_J
            device_MES = np.empty((nodes.devices, sets.num_experts, len(device_SE)))
            for some in _pieces(self.problem, device_SE):
                touch_SMQ = _touch_SMQ(sets, device_SE[some], nodes.devices)
                device_MES[:, :, some] = (touch_SMQ @ wait_QE).transpose(1, 2, 0)
            device_NES = np.add.reduceat(device_MES, nodes.first_N, axis=0)
            self._last = layer, _Sent(device_MES, device_NES, device_MES.sum(axis=1))
        return self._last[1]

    def _cost(self, rows_SMM: np.ndarray) -> np.ndarray:
        """float64 [S]: of rows one way; those on their own device are not sent."""
        problem, own = self.problem, np.arange(self.problem.num_devices)
        rows_SMM = rows_SMM.copy()
        rows_SMM[:, own, own] = 0.0
        if problem.objective == "rows":
            scale = problem.trace.num_layers / problem.token_layers
            return scale * rows_SMM.sum(axis=(1, 2))
        to_bytes = problem.rows_per_step * problem.work.row_bytes
        return seconds_lib.exchange_seconds(rows_SMM * to_bytes, problem.topology, False)


@dataclasses.dataclass(frozen=True, eq=False)
class _Sent:
    """Tokens of a layer by what their placement touches.

    Attributes:
      device_MES: that wait for e, the best expert before, and touch a device.
      device_NES: summed over the devices of a node.
      device_MS: summed over e.
    """

    device_MES: np.ndarray
    device_NES: np.ndarray
    device_MS: np.ndarray
