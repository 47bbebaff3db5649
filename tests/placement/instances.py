"""Random instances of the planner's problem, numbered, and values counted in another way.

`instance(n)` is the same problem for ever: combinations of objective, dispatch, cap, nodes and
replicas in a fixed random order, sizes drawn from n; those of objectives that no dispatch enters
come after all others. The first FEW are small. At the end: made traces and partitions that several
tests share, and `rest_slow`.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from moe_jax.placement import baselines, cost, greedy, hops, topology
from moe_jax.placement import problem as problem_lib
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.routing import synthetic
from moe_jax.routing.trace import Trace

FEW, ALL = 60, 300
OBJECTIVES = ("seconds", "rows", "exflow", "load")
ALONE = ("hops", "moetuner")  # no dispatch enters them
DISPATCHES = ("exchange", "hierarchical", "coherent", "gathered")
CAPS = ("none", "relative", "absolute")


Combination = tuple[str, str, str, int, bool]  # objective, dispatch, cap, nodes, replicas


def every(objectives: tuple[str, ...]) -> list[Combination]:
    return list(itertools.product(objectives, DISPATCHES, CAPS, (1, 2), (False, True)))


def has_a_meaning(one: Combination) -> bool:
    """What the planner takes; the others it refuses."""
    objective, replicas = one[0], one[-1]
    return one[:2] != ("rows", "gathered") and not (objective == "moetuner" and replicas)


def combinations(objectives: tuple[str, ...]) -> list[Combination]:
    """Every one that has a meaning once, shuffled once and for all."""
    found = list(filter(has_a_meaning, every(objectives)))
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


COMBINATIONS = combinations(OBJECTIVES) + combinations(ALONE)


def instance(number: int) -> Problem:
    """Problem number `number`."""
    objective, dispatch, cap, nodes, replicas = COMBINATIONS[number % len(COMBINATIONS)]
    rng = np.random.default_rng([7, number])
    small = number < FEW
    devices = int(rng.choice([2, 4] if small or nodes == 2 else [2, 3, 4, 5]))
    experts = devices * int(rng.integers(2, (4 if devices == 2 else 3) if small else 5))
    layers = int(rng.integers(2 if objective == "exflow" else 1, 3 if small else 5))
    tokens = int(rng.integers(30, 120 if small else 400))
    trace = synthetic.realistic(
        num_tokens=tokens,
        num_layers=layers,
        num_experts=experts,
        top_k=int(rng.integers(1, min(4, experts) + 1)),
        seed=number,
        num_classes=int(rng.integers(2, 12)),
        num_sequences=int(rng.integers(1, 9)),
    )
    if rng.random() < 0.3:
        trace = with_gaps(trace, rng)
    machine = topology.nodes_by_devices(nodes, devices)
    slots = None
    if replicas:
        most = experts // devices + int(rng.integers(1, 3))
        slots = devices * min(most, experts)
    made = Problem(trace, machine, objective, dispatch, num_slots=slots)
    if objective == "hops":
        made = dataclasses.replace(made, dispatcher=hops.DISPATCHERS[int(rng.integers(2))])
    return dataclasses.replace(made, load_cap=_cap(made, cap, rng))


def with_gaps(trace: Trace, rng: np.random.Generator) -> Trace:
    """Some experts missing (the others move up), and tokens without any in one layer."""
    ids = trace.expert_ids_TLK.copy()
    none = trace.no_expert
    ids[rng.random(ids.shape) < 0.15] = none
    ids[:: int(rng.integers(5, 9)), int(rng.integers(ids.shape[1]))] = none
    order_TLK = np.argsort(ids == none, axis=2, kind="stable")
    return Trace(np.take_along_axis(ids, order_TLK, axis=2), trace.num_experts, trace.seq_len)


def _cap(problem: Problem, kind: str, rng: np.random.Generator) -> LoadCap | None:
    if kind == "none":
        return None
    if kind == "relative":
        return LoadCap(float(rng.uniform(1.02, 1.4)), True)
    least = reachable_L(problem) / (problem.load_LE.sum(axis=1) / problem.num_devices)
    return LoadCap(float(np.nanmax(least) * rng.uniform(1.02, 1.3)))


def reachable_L(problem: Problem) -> np.ndarray:
    """Largest device load of every layer that packing and swaps reach without replicas."""
    device_LE = greedy.balanced(problem.load_LE, problem.num_devices)
    return problem_lib.loads(problem.load_LE, device_LE, problem.num_devices).max(axis=1)


def draws(problem: Problem, count: int, seed: int) -> list[np.ndarray]:
    """Random placements without replicas that keep the load cap."""
    sizes = (problem.trace.num_layers, problem.trace.num_experts, problem.num_devices)
    drawn = [baselines.random(*sizes, seed=seed + i) for i in range(count)]
    drawn.append(baselines.contiguous(*sizes))
    drawn.append(greedy.balanced(problem.load_LE, problem.num_devices))
    return [device_LE for device_LE in drawn if problem.all_allowed(device_LE)]


def counted(problem: Problem, placement: Placement) -> float:
    """The objective token by token from the rows of cost.py, not by the planner's closed forms."""
    trace, each = problem.trace, problem.topology.devices_per_node
    ids_TLK = trace.expert_ids_TLK
    if problem.objective == "exflow":
        return _transitions(problem, placement)
    if problem.objective == "hops":
        return _hops(problem, placement)
    if problem.objective == "moetuner":
        return stages(problem, placement.device_LE)
    load_LM = cost.computed_LM(ids_TLK, placement, problem.dispatch, None, each)
    if problem.objective == "load":
        return float((load_LM.max(axis=1) / load_LM.mean(axis=1)).mean())
    rows = cost.rows(ids_TLK, placement, problem.dispatch, devices_per_node=each)
    if problem.objective == "rows":
        real = (ids_TLK != trace.no_expert).any(axis=2).sum()
        return float((rows.total_LMM * problem.row_weight_MM).sum() / real)
    total = seconds_lib.seconds(
        rows, load_LM, problem.topology, problem.work, problem.dispatch, trace.num_tokens
    ).total_L
    return float(total.mean())


def loads_LM(problem: Problem, placement: Placement) -> np.ndarray:
    """What every device computes, where the objective says that tokens are."""
    if problem.objective == "hops":
        load_LM = np.zeros((problem.trace.num_layers, problem.num_devices))
        for way in _ways(problem, placement):
            np.add.at(load_LM[way.layer], way.device_n, way.share)
        return load_LM
    return cost.computed_LM(
        problem.trace.expert_ids_TLK,
        placement,
        "coherent" if problem.objective == "exflow" else problem.dispatch,  # its tokens stay
        None,
        problem.topology.devices_per_node,
    )


class Way(NamedTuple):
    """The assignments of one layer from one device.

    Attributes:
      layer: its number.
      at, to: the device that dispatches, the one that collects.
      share: of the tokens that are at `at`.
      device_n: that serves an assignment.
    """

    layer: int
    at: int
    to: int
    share: float
    device_n: np.ndarray


def _ways(problem: Problem, placement: Placement) -> Iterator[Way]:
    """Of the objective `hops`, all of its assignments."""
    trace, devices = problem.trace, problem.num_devices
    for home in range(devices):
        homes_T, each = np.full(trace.num_tokens, home), problem.topology.devices_per_node
        walk = cost.walk(trace.expert_ids_TLK, placement, "exchange", homes_T, each)
        for layer, step in enumerate(walk):
            at, to, share = home, home, 1 / devices
            if problem.dispatcher == "blocks":
                (at, to), share = hops.block(layer, trace.num_layers, devices), 1.0
            if at == home:
                yield Way(layer, at, to, share, step.device_TK[step.device_TK >= 0])


def _hops(problem: Problem, placement: Placement) -> float:
    """To the device of every assignment, and on to the one that collects."""
    hops_MM, trace, total = problem.topology.hops_MM, problem.trace, 0.0
    for way in _ways(problem, placement):
        there_n = hops_MM[way.at, way.device_n] + hops_MM[way.device_n, way.to]
        total += way.share * float(there_n.sum())
    return total / max((trace.expert_ids_TLK != trace.no_expert).any(axis=2).sum(), 1)


def stages(problem: Problem, device_LE: np.ndarray) -> float:
    """MoETuner's value, by loops over tokens and pairs of their experts; groups may be uneven."""
    trace, machine, work = problem.trace, problem.topology, problem.work
    layers, devices = trace.num_layers, machine.num_devices
    computed_LM, pairs_LMM = np.zeros((layers, devices)), np.zeros((layers, devices, devices))
    for ids_LK in trace.expert_ids_TLK.tolist():
        on_LK = [
            [device_LE[n, e] for e in ids_K if e != trace.no_expert]
            for n, ids_K in enumerate(ids_LK)
        ]
        for layer, on_K in enumerate(on_LK):
            for g in on_K:
                computed_LM[layer, g] += 1
                for h in on_LK[layer + 1] if layer + 1 < layers else []:
                    pairs_LMM[layer, g, h] += 1
    value = 0.0
    for layer in range(layers):
        mean = computed_LM[layer].sum() / devices
        for tokens in computed_LM[layer]:
            value += abs(tokens - mean) * work.row_flops / machine.device_flops
        slowest = 0.0
        for g, h in itertools.permutations(range(devices), 2):
            tier = machine.fast if machine.node_M[g] == machine.node_M[h] else machine.slow
            slowest = max(slowest, pairs_LMM[layer, g, h] * work.row_bytes / tier.bandwidth)
        value += slowest
    return work.batch_tokens / trace.num_tokens * value / layers


def _transitions(problem: Problem, placement: Placement) -> float:
    """Weighted hops of the best expert per token, by loops; the mean over homes with replicas."""
    trace, total, moves = problem.trace, 0.0, 0
    for homes_T in cost.homes(placement, trace.num_tokens):
        walk = cost.walk(
            trace.expert_ids_TLK[:, :, :1],
            placement,
            "coherent",
            homes_T,
            problem.topology.devices_per_node,
        )
        device_LT = [step.device_TK[:, 0] for step in walk]
        for here_T, there_T in itertools.pairwise(device_LT):
            for here, there in zip(here_T.tolist(), there_T.tolist(), strict=True):
                if here >= 0 and there >= 0:
                    total += problem.hop_MM[here, there]
                    moves += 1
    return (trace.num_layers - 1) * total / max(moves, 1)


def tiny_trace(seed: int, **changes) -> Trace:
    """2 layers x 6 experts: all plans can be tried."""
    sizes = {"num_tokens": 200, "num_layers": 2, "num_experts": 6, "top_k": 2, "num_classes": 5}
    return synthetic.realistic(**(sizes | changes), seed=seed, num_sequences=6)


def noisy_trace(seed: int, **changes) -> Trace:
    sizes = {"num_tokens": 300, "num_layers": 3, "num_experts": 8, "top_k": 2, "num_classes": 6}
    return synthetic.realistic(**(sizes | changes), seed=seed, num_sequences=8)


def partitions(experts: int, devices: int) -> list[np.ndarray]:
    equal = sorted(np.arange(experts) % devices)
    return [np.array(p) for p in sorted(set(itertools.permutations(equal)))]


def rest_slow(values, default: int) -> list:
    """Parameters of a test: the first `default` ones in every run, the rest with `-m slow`."""
    values = list(values)
    slow = [pytest.param(value, marks=pytest.mark.slow) for value in values[default:]]
    return [*values[:default], *slow]
