"""Bounds against brute force over every placement: never above the optimum, never a guess."""

import dataclasses
import itertools
import time

import numpy as np
import pytest

from moe_jax.placement import bounds, contact_bound, cuts, relax, semidefinite, topology
from moe_jax.placement.layout import Groups, Layout
from moe_jax.placement.problem import LoadCap, Problem
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


def placements(experts: int, devices: int, layers: int) -> np.ndarray:
    """int64 [placements, L, E]: all of them, the first layer up to the names of devices."""
    labels = np.stack(partitions(experts, devices))
    first = [row for row in labels if list(dict.fromkeys(row.tolist())) == list(range(devices))]
    rest = [labels] * (layers - 1)
    return np.array(list(itertools.product(first, *rest)))


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
    """What is to be kept together: within_LEE once per pair, across_LEE from layer to layer."""

    within_LEE: np.ndarray
    across_LEE: np.ndarray
    groups: Groups

    def most_kept(self, deadline: float = FAR, steps: int = 3000) -> np.ndarray:
        weight_N = self.groups.layout.flat(self.within_LEE / 2, self.across_LEE)
        return semidefinite.most_kept(self.groups, weight_N, deadline, steps)


def random_wanted(seed: int, experts: int, devices: int, layers: int, capped: bool) -> Wanted:
    rng = np.random.default_rng(seed)
    within_LEE = rng.exponential(size=(layers, experts, experts)) ** 2
    within_LEE *= rng.random(within_LEE.shape) < 0.6
    within_LEE = within_LEE + within_LEE.transpose(0, 2, 1)
    within_LEE[:, np.arange(experts), np.arange(experts)] = 0
    across_LEE = rng.integers(0, 9, size=(layers - 1, experts, experts)).astype(float) ** 2
    load_LE = np.ceil(rng.exponential(20, size=(layers, experts)) ** 1.3)
    cap_L = np.full(layers, np.inf)
    if capped:
        loads_PM = np.array(
            [
                [np.bincount(p, weights=w).max() for w in load_LE]
                for p in partitions(experts, devices)
            ]
        )
        cap_L = np.quantile(loads_PM, 0.3, axis=0, method="lower")
    kind = seed % 3
    width = 1 if layers == 1 or kind == 2 else 2
    groups = Groups(Layout(layers, experts, width), devices, load_LE, cap_L)
    return Wanted(within_LEE * (kind != 1), across_LEE[: groups.layout.pairs], groups)


def most_by_brute_force(wanted: Wanted) -> np.ndarray:
    """What most_kept bounds, over all placements within the caps."""
    groups = wanted.groups
    layers, experts = groups.load_LE.shape
    every_PLE = placements(experts, groups.devices, layers)
    onehot = np.eye(groups.devices)[every_PLE]
    load_PLM = np.einsum("le,plem->plm", groups.load_LE, onehot)
    every_PLE = every_PLE[(load_PLM.max(axis=2) <= groups.cap_L).all(axis=1)]
    assert len(every_PLE)
    same = every_PLE[:, :, :, None] == every_PLE[:, :, None, :]
    kept_PL = (wanted.within_LEE * same).sum(axis=(2, 3)) / 2
    if groups.layout.width == 1:
        return kept_PL.max(axis=0)
    met = every_PLE[:, :-1, :, None] == every_PLE[:, 1:, None, :]
    return (kept_PL.sum(axis=1) + (wanted.across_LEE * met).sum(axis=(1, 2, 3))).max()[None]


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize(
    ("experts", "devices", "layers"), [(4, 2, 1), (6, 2, 1), (6, 3, 1), (4, 4, 1), (8, 2, 1)]
)
def test_relaxation_of_single_layers(experts, devices, layers, capped):
    for seed in (0, 3):
        wanted = random_wanted(seed, experts, devices, layers, capped)
        best_L = most_by_brute_force(wanted)
        for steps in (1, 7, 160):
            assert (wanted.most_kept(steps=steps) >= best_L * (1 - 1e-12)).all()


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize(
    ("experts", "devices", "layers"), [(4, 2, 2), (4, 2, 4), (4, 4, 2), (6, 2, 2), (6, 3, 2)]
)
def test_relaxation_of_tied_layers(experts, devices, layers, capped):
    for seed in range(3):
        wanted = random_wanted(seed, experts, devices, layers, capped)
        best_A = most_by_brute_force(wanted)
        for steps in (1, 160):
            assert (wanted.most_kept(steps=steps) >= best_A * (1 - 1e-12)).all()


def test_relaxation_is_exact_where_it_can_be():
    """Small cases without caps are mostly solved: a bound that is merely valid would not do."""
    tight = []
    for seed in range(5):
        wanted = random_wanted(seed, 6, 2, 2, False)
        tight.append(wanted.most_kept(steps=1000).sum() / most_by_brute_force(wanted).sum())
    assert np.median(tight) < 1.001
    keep_EE = np.kron(np.eye(4), np.ones((2, 2)))
    chain = Wanted(np.zeros((3, 8, 8)), np.stack([keep_EE, keep_EE]), no_caps(3, 8, 4, 2))
    assert chain.most_kept() == pytest.approx(2 * keep_EE.sum())


def test_a_cap_makes_the_bound_tighter():
    """The fewest kept under a cap is far below what is kept without; so is its bound."""
    shares = []
    for seed in range(4):
        capped = random_wanted(3 * seed + 1, 6, 3, 2, True)
        free = dataclasses.replace(capped.groups, cap_L=np.full(2, np.inf))
        wanted = dataclasses.replace(capped, groups=free)
        shares.append(capped.most_kept(steps=400).sum() / wanted.most_kept(steps=400).sum())
        best = most_by_brute_force(capped).sum() / most_by_brute_force(wanted).sum()
        assert best <= shares[-1] * (1 + 1e-3)
    assert min(shares) < 0.95


def test_a_cap_counts_where_no_two_experts_are_forbidden():
    """Three hot experts want one another; any two of them may share a device, all three not."""
    load_LE = np.array([[4.0, 4, 4, 1, 1, 1]])
    hot_LEE = np.zeros((1, 6, 6))
    hot_LEE[0, :3, :3] = 1 - np.eye(3)
    for cap, most in ((12.0, 3.0), (9.5, 1.8)):
        groups = Groups(Layout(1, 6), 2, load_LE, np.array([cap]))
        wanted = Wanted(hot_LEE, np.zeros((0, 6, 6)), groups)
        assert not cuts.Loads(groups).apart_LEE.any()
        best = most_by_brute_force(wanted)
        assert best <= wanted.most_kept(steps=1000) <= most + 0.01
    assert best == 1


def test_relaxation_without_time_without_wishes_and_on_one_device():
    wanted = random_wanted(1, 6, 3, 2, True)
    assert wanted.most_kept(deadline=0.0) >= most_by_brute_force(wanted)
    nothing = Wanted(np.zeros((2, 6, 6)), np.zeros((0, 6, 6)), no_caps(2, 6, 3, 1))
    np.testing.assert_array_equal(nothing.most_kept(), 0)
    alone = dataclasses.replace(wanted, groups=no_caps(2, 6, 1, 2))
    everything = wanted.within_LEE.sum() / 2 + wanted.across_LEE.sum()
    assert alone.most_kept() == pytest.approx(everything)


def no_caps(layers: int, experts: int, devices: int, width: int) -> Groups:
    load_LE, cap_L = np.ones((layers, experts)), np.full(layers, np.inf)
    return Groups(Layout(layers, experts, width), devices, load_LE, cap_L)


@pytest.mark.parametrize("layers", [1, 3])
def test_every_placement_keeps_every_inequality(layers):
    """y (b - A x) >= 0 for placements x within the caps, whatever y."""
    rng = np.random.default_rng(layers)
    experts, devices = 6, 3
    groups = random_wanted(4, experts, devices, layers, True).groups
    layout, cap_L = groups.layout, groups.cap_L
    triangles = cuts.Triangles(layout, rng)
    for _ in range(3):
        triangles.separate(rng.random(layout.size), 400)
        triangles.y_Y = np.ones(len(triangles.y_Y))
    loads = cuts.Loads(groups)
    for _ in range(6):
        loads.ascend(layout.symmetric(rng.random(layout.size)), np.ones(layout.size))
        triangles.y_Y = rng.exponential(size=len(triangles.y_Y))
        for device_LE in rng.permutation(placements(experts, devices, layers))[:60]:
            same_LEE = device_LE[:, :, None] == device_LE[:, None, :]
            met_LEE = device_LE[:-1, :, None] == device_LE[1:, None, :]
            x_N = layout.flat(same_LEE, met_LEE[: layout.pairs]).astype(float)
            assert triangles.constant_L.sum() - triangles.force_N() @ x_N >= -1e-9
            load_LM = np.einsum("le,lem->lm", groups.load_LE, np.eye(devices)[device_LE])
            if (load_LM.max(axis=1) <= cap_L).all():
                assert loads.constant_L.sum() - loads.force_N() @ x_N >= -1e-9
                assert not (loads.apart_LEE & same_LEE).any()


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
    for seed in range(4):
        experts, devices = (4, 2) if nodes == 1 or seed % 2 else (4, 4)
        trace = random_trace(seed, 2, experts, 2)
        problem = Problem(trace, topology.nodes_by_devices(nodes, devices), objective, dispatch)
        labels = partitions(experts, devices)
        first = labels if nodes > 1 else labels[: max(1, len(labels) // 2)]
        best = min(problem.value(np.stack([a, b])) for a in first for b in labels)
        assert 0 <= relax.lower_bound(problem, FAR, 100) <= best


@pytest.mark.parametrize(
    ("objective", "dispatch", "layers"),
    [
        ("rows", "exchange", 1),
        ("seconds", "hierarchical", 1),
        ("exflow", "exchange", 2),
        ("rows", "coherent", 2),
    ],
)
def test_lower_bound_under_a_cap_and_with_tokens_that_lack_experts(objective, dispatch, layers):
    nodes = 2 if dispatch == "hierarchical" else 1
    for seed in range(4):
        trace = random_trace(seed, layers, 6, 3)
        ids_TLK = trace.expert_ids_TLK.copy()
        ids_TLK[::7, :, 1:] = trace.no_expert
        ids_TLK[::11, -1] = trace.no_expert
        trace = dataclasses.replace(trace, expert_ids_TLK=ids_TLK, expert_weights_TLK=None)
        machine = topology.nodes_by_devices(nodes, 2)
        problem = Problem(trace, machine, objective, dispatch, load_cap=LoadCap(1.02, True))
        every = [p for p in placements(6, 2, layers) if problem.all_allowed(p)]
        best = min(problem.value(device_LE) for device_LE in every)
        bound = relax.lower_bound(problem, FAR, 100)
        assert 0 <= bound <= best
        assert relax.lower_bound(problem, 0.0) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_exflow_where_links_between_nodes_are_the_faster_ones(seed):
    """A box of PCIe with a network card for each device."""
    fast, slow = topology.Tier(25e9, 0.0), topology.Tier(50e9, 0.0)
    machine = topology.Topology("pcie", 2, 2, fast, slow)
    problem = Problem(random_trace(seed, 2, 4, 1), machine, "exflow")
    rows = list(itertools.permutations(range(4)))
    best = min(problem.value(np.array(pair)) for pair in itertools.product(rows, rows))
    found = relax.lower_bound(problem, time.monotonic() + 5)
    assert 0 < found <= best * (1 + 1e-9)


def test_coherent_rows_layer_by_layer(monkeypatch):
    """What is proven where pairs of layers have no time to begin: below all plans, not by much."""
    monkeypatch.setattr(relax, "BEGIN", -1.0)
    gaps = []
    for seed in range(6):
        trace = random_trace(seed, 1 + seed % 2, 6, 3, tokens=200)
        problem = Problem(trace, topology.flat(2), "rows", "coherent")
        best = min(map(problem.value, placements(6, 2, 1 + seed % 2)))
        gaps.append(1 - relax.lower_bound(problem, FAR, 200) / best)
    assert min(gaps) >= 0
    assert np.mean(gaps) < 0.35


def test_contacts_are_bounded_closely():
    """Rows of small layers: within a few percent of the optimum, on average."""
    gaps = []
    for seed in range(6):
        trace = random_trace(seed, 1, 8, 3, tokens=200)
        problem = Problem(trace, topology.flat(2), "rows", "exchange")
        best = min(problem.value(device_LE) for device_LE in placements(8, 2, 1))
        gaps.append(1 - relax.lower_bound(problem, FAR, 600) / best)
    assert min(gaps) >= 0
    assert np.mean(gaps) < 0.03


def test_choices_that_follow_the_relaxation_are_worth_it(monkeypatch):
    """Against the first choice of inequalities alone."""
    bound = {}
    for every in (contact_bound.EVERY, 10**6):
        monkeypatch.setattr(contact_bound, "EVERY", every)
        traces = [random_trace(seed, 1, 12, 4, tokens=200) for seed in range(3)]
        problems = [Problem(trace, topology.flat(3), "rows", "exchange") for trace in traces]
        bound[every] = np.mean([relax.lower_bound(p, FAR, 600) for p in problems])
    assert bound[20] > 1.1 * bound[10**6]


def test_refining_only_improves():
    trace = random_trace(1, 2, 8, 2, tokens=400)
    problem = Problem(trace, topology.flat(4), "exflow")
    found = [relax.lower_bound(problem, FAR, steps) for steps in (1, 20, 300)]
    assert found == sorted(found)
    assert found[-1] > found[0]
