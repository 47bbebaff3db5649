"""Bounds against brute force over every placement: never above the optimum, never a guess."""

import itertools
import time

import numpy as np
import pytest

from moe_jax.placement import bounds, relax, topology
from moe_jax.placement.problem import Problem
from moe_jax.routing import synthetic
from moe_jax.routing.trace import Trace

FAR = time.monotonic() + 1e6


def partitions(experts: int, devices: int) -> list[np.ndarray]:
    """All labellings with equal groups."""
    equal = sorted(np.arange(experts) % devices)
    return [np.array(p) for p in sorted(set(itertools.permutations(equal)))]


def random_trace(seed: int, layers: int, experts: int, top_k: int, tokens: int = 60) -> Trace:
    """From no structure to much, so that bounds are tried where they are loose and tight."""
    affinity = (0.0, 0.7, 0.97)[seed % 3]
    return synthetic.realistic(
        num_tokens=tokens,
        num_layers=layers,
        num_experts=experts,
        top_k=top_k,
        seed=seed,
        num_classes=4,
        affinity=affinity,
        popularity=0.5,
        num_sequences=6,
    )


@pytest.mark.parametrize("steps", [1, 7, 300])
@pytest.mark.parametrize(("experts", "devices"), [(4, 2), (6, 2), (6, 3), (4, 4)])
def test_partition_bound_of_one_layer(experts, devices, steps):
    rng = np.random.default_rng(experts + devices)
    for _ in range(8):
        weight = rng.exponential(size=(experts, experts)) * (rng.random((experts, experts)) < 0.6)
        weight = weight + weight.T
        np.fill_diagonal(weight, 0)
        best = max(
            (weight * (labels[:, None] == labels[None, :])).sum()
            for labels in partitions(experts, devices)
        )
        assert bounds.partition_upper(weight, 1, devices, FAR, steps) >= best


@pytest.mark.parametrize(("experts", "devices"), [(4, 2), (6, 3), (6, 2)])
def test_transition_bound_of_two_layers(experts, devices):
    rng = np.random.default_rng(experts * devices)
    for _ in range(6):
        keep = rng.integers(0, 9, size=(experts, experts)) ** 2
        labels = partitions(experts, devices)
        fixed = labels[0] if devices == 2 else None
        best = max(
            (keep * (a[:, None] == b[None, :])).sum()
            for a in labels
            for b in ([fixed] if fixed is not None and experts == 99 else labels)
        )
        bound = bounds.stays_upper(keep.astype(float), devices, FAR, 120)
        assert best <= bound <= keep.sum() + 1e-9


def test_the_bound_is_tight_where_structure_is_perfect():
    keep = np.kron(np.eye(4), np.ones((2, 2)))
    assert bounds.stays_upper(keep, 4, FAR) == pytest.approx(keep.sum())
    noisy = keep + 0.1
    assert bounds.stays_upper(noisy, 4, FAR) == pytest.approx(keep.sum() * 1.1, rel=0.02)


@pytest.mark.parametrize(("experts", "devices"), [(4, 2), (6, 3), (6, 2), (8, 4), (8, 2)])
def test_load_bound(experts, devices):
    rng = np.random.default_rng(experts - devices)
    labels = partitions(experts, devices) if experts < 8 else _some_partitions(devices)
    for _ in range(10):
        load = np.floor(rng.exponential(20, size=experts) ** 1.5)
        best = min(np.bincount(p, weights=load).max() for p in labels)
        assert bounds.load_lower(load, devices) <= best + 1e-9


def _some_partitions(devices: int) -> list[np.ndarray]:
    return [
        np.array([i in chosen for i in range(8)], int) if devices == 2 else np.array([0, *pairing])
        for chosen in itertools.combinations(range(8), 4)
        for pairing in ([_pairing(chosen)] if devices == 4 else [()])
    ]


def _pairing(chosen: tuple[int, ...]) -> list[int]:
    """Eight experts in four pairs: a chosen one with an unchosen one, in order."""
    others = [i for i in range(8) if i not in chosen]
    label = np.empty(8, int)
    label[list(chosen)] = label[others] = np.arange(4)
    return label[1:].tolist() if label[0] == 0 else np.roll(label, -1)[:7].tolist()


@pytest.mark.parametrize("objective", ["rows", "seconds", "load"])
@pytest.mark.parametrize("dispatch", ["exchange", "hierarchical", "gathered"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_lower_bound_of_separable_problems(objective, dispatch, nodes):
    """Layers are independent, so one layer and all its placements are enough."""
    if (objective, dispatch) == ("rows", "gathered"):
        return
    for seed in range(6):
        experts, devices = ((6, 2), (4, 4), (4, 2))[seed % 3]
        trace = random_trace(seed, 1, experts, 2 + seed % 2)
        machine = topology.nodes_by_devices(nodes, devices)
        problem = Problem(trace, machine, objective, dispatch)
        best = min(problem.value(labels[None]) for labels in partitions(experts, devices))
        bound = relax.lower_bound(problem, FAR, 100)
        assert 0 <= bound <= best


@pytest.mark.parametrize(
    ("objective", "dispatch"),
    [("exflow", "exchange"), ("rows", "coherent"), ("seconds", "coherent")],
)
@pytest.mark.parametrize("nodes", [1, 2])
def test_lower_bound_of_chains(objective, dispatch, nodes):
    for seed in range(6):
        experts, devices = (4, 2) if nodes == 1 or seed % 2 else (4, 4)
        trace = random_trace(seed, 2, experts, 2)
        problem = Problem(trace, topology.nodes_by_devices(nodes, devices), objective, dispatch)
        labels = partitions(experts, devices)
        first = labels if nodes > 1 else labels[: max(1, len(labels) // 2)]
        best = min(problem.value(np.stack([a, b])) for a in first for b in labels)
        assert 0 <= relax.lower_bound(problem, FAR, 100) <= best


def test_refining_only_improves():
    trace = random_trace(1, 2, 8, 2, tokens=400)
    problem = Problem(trace, topology.flat(4), "exflow")
    found = [relax.lower_bound(problem, FAR, steps) for steps in (1, 20, 300)]
    assert found == sorted(found)
    assert found[-1] > found[0]
