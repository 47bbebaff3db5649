"""The relaxation for plans with copies: against every plan, whatever its solver did."""

import itertools
import math

import numpy as np
import pytest

from moe_jax.placement import copies_homes, copies_relax, replication, topology, with_copies
from moe_jax.placement.contact_bound import TokenSets
from moe_jax.placement.copies_relax import Gain, Relaxation
from moe_jax.placement.layout import Layout
from moe_jax.placement.problem import Problem
from moe_jax.routing.trace import Trace
from tests.placement import instances


def every_layer(experts: int, devices: int, slots: int) -> list[np.ndarray]:
    """bool [E, M]: all layers."""
    sets = [
        np.isin(np.arange(experts), held) for held in itertools.combinations(range(experts), slots)
    ]
    layers = [np.stack(held, axis=1) for held in itertools.product(sets, repeat=devices)]
    return [held_EM for held_EM in layers if held_EM.any(axis=1).all()]


def gained(gain: Gain, layout: Layout, held: list[np.ndarray]) -> float:
    """Entry by entry."""
    total = 0.0
    blocks = [
        (held[n], held[n], layout.within(np.arange(layout.size))[n]) for n in range(len(held))
    ]
    if layout.width == 2:
        across = layout.across(np.arange(layout.size))
        blocks += [(held[n], held[n + 1], across[n]) for n in range(len(held) - 1)]
    for one_EM, other_EM, at_EE in blocks:
        for e, f in np.ndindex(at_EE.shape):
            both = int((one_EM[e] & other_EM[f]).sum())
            total += gain.together_N[at_EE[e, f]] * min(both, 1) - gain.apart_N[at_EE[e, f]] * both
    copies_LE = np.stack([held_EM.sum(axis=1) for held_EM in held])
    return total + float((gain.copies_LE * copies_LE).sum())


def some_gain(layout: Layout, rng: np.random.Generator) -> Gain:
    own_N = np.zeros(layout.size, bool)
    layout.within(own_N)[:] = np.eye(layout.experts, dtype=bool)
    together_N, apart_N = rng.random((2, layout.size)) * ~own_N
    copies_LE = rng.random((layout.layers, layout.experts))
    return Gain(layout.symmetric(together_N), layout.symmetric(0.3 * apart_N), copies_LE)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize(("experts", "devices", "slots"), [(3, 2, 2), (4, 2, 3), (3, 3, 2)])
def test_no_plan_gains_more_whatever_the_multipliers_are(experts, devices, slots, width):
    rng = np.random.default_rng(experts + devices)
    layout = Layout(2, experts, width)
    plans = [
        list(pair) for pair in itertools.product(every_layer(experts, devices, slots), repeat=2)
    ]
    for _ in range(4):
        gain = some_gain(layout, rng)
        best = max(gained(gain, layout, held) for held in plans)
        run = Relaxation(layout, devices, devices * slots, gain)
        bounds = [float(run.bound_A().sum())]
        run._scaled_Cnn[:] = 3 * rng.normal(size=run._scaled_Cnn.shape)
        bounds.append(float(run.bound_A().sum()))
        for _ in range(150):
            run.step()
        bounds.append(float(run.bound_A().sum()))
        assert best <= min(bounds) + 1e-9
        assert bounds[-1] < 1.25 * best  # and the solver does bring it down


def test_groups_that_are_wanted_together_are_found():
    """Two pairs and an expert that everybody wants: it has a copy with each of them."""
    layout = Layout(1, 5)
    want_EE = np.zeros((5, 5))
    for e, f in [(0, 1), (2, 3), (0, 4), (1, 4), (2, 4), (3, 4)]:
        want_EE[e, f] = want_EE[f, e] = 1.0
    assert copies_relax.most(layout, 2, 6, want_EE.ravel() / 2, math.inf) == pytest.approx(6, 1e-3)
    # without the second copy one of the pairs has to do without it
    assert copies_relax.most(layout, 5, 5, want_EE.ravel() / 2, math.inf) == pytest.approx(
        0, abs=1e-6
    )


def test_without_time_nothing_is_proven():
    layout = Layout(1, 5)
    assert copies_relax.most(layout, 2, 6, np.ones(25) / 2, 0.0) == math.inf
    trace = instances.tiny_trace(0, num_layers=2, num_experts=6)
    problem = Problem(trace, topology.flat(2), "rows", num_slots=8)
    assert copies_homes.fewest_L(problem, True, 0.0) is None
    counted, note = with_copies.lower_bound(problem, 0.0)
    assert counted <= with_copies.lower_bound(problem, math.inf)[0]
    assert "relaxation" in note


def most_kept(best_TL: np.ndarray, held: list[np.ndarray]) -> int:
    """Transitions that stay, each token taking its best way through all layers."""
    total = 0
    for best_L in best_TL:
        kept_M = np.where(held[0][best_L[0]], 0, -99)
        for held_EM, e in zip(held[1:], best_L[1:], strict=True):
            stays_M = kept_M + 1
            kept_M = np.where(held_EM[e], np.maximum(stays_M, kept_M.max()), -99)
        total += int(kept_M.max())
    return total


@pytest.mark.parametrize(("experts", "devices", "slots"), [(4, 2, 3), (3, 3, 2), (4, 3, 2)])
@pytest.mark.parametrize("layers", [2, 3])
def test_no_plan_keeps_more_transitions_under_any_copy_rule(layers, experts, devices, slots):
    trace = instances.tiny_trace(
        layers, num_tokens=20, num_layers=layers, num_experts=experts, top_k=1, num_classes=2
    )
    problem = Problem(trace, topology.flat(devices), "exflow", num_slots=devices * slots)
    best_TL = trace.expert_ids_TLK[:, :, 0].astype(int)
    layer = every_layer(experts, devices, slots)
    plans = list(itertools.product(layer, repeat=layers))
    if len(plans) > 300:
        chosen = np.random.default_rng(0).choice(len(plans), 300, replace=False)
        plans = [plans[n] for n in chosen]
    most = max(most_kept(best_TL, list(held)) for held in plans)
    bound, _ = with_copies.lower_bound(problem, math.inf)
    assert 0 <= bound <= problem.hops(most) + 1e-9


@pytest.mark.parametrize("ratio", [0.1, 1.0, 4.0])
def test_transitions_where_links_between_nodes_are_faster_or_slower(ratio):
    """All pairs once, so that devices keep few of them, and nodes more."""
    ids_TL = np.array(list(itertools.product(range(8), repeat=2)), np.uint8)
    trace = Trace(ids_TL[:, :, None], 8, np.array([64]))
    fast, slow = topology.Tier(ratio * 1e11, 1e-6), topology.Tier(1e11, 1e-6)
    problem = Problem(trace, topology.Topology("n", 2, 2, fast, slow), "exflow", num_slots=12)
    rng, plans = np.random.default_rng(0), []
    for _ in range(40):
        load_LE = rng.random((2, 8))
        plans.append(replication.balanced_slots(load_LE, 12, 4))
    best = min(problem.value_of(plan) for plan in plans)
    assert 0 < with_copies.lower_bound(problem, 0.0)[0] <= best


def test_homes_by_hand():
    """Both experts are on both devices: a device per token, and none besides home."""
    trace = instances.tiny_trace(0, num_tokens=30, num_layers=1, num_experts=2, top_k=2)
    problem = Problem(trace, topology.flat(2), "rows", num_slots=4)
    both = copies_homes.fewest_L(problem, True, math.inf)
    assert both is not None
    assert both[0] == pytest.approx(0.0, abs=1e-3)  # both are everywhere
    without = copies_homes.fewest_L(problem, False, math.inf)
    assert without is not None
    assert without[0] == pytest.approx(problem.token_layers, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_as_many_homes_as_the_tree_says_at_most(seed):
    rng = np.random.default_rng(seed)
    trace = instances.tiny_trace(seed, num_tokens=60, num_layers=1, num_experts=6, top_k=3)
    trace = instances.with_gaps(trace, rng)
    one = Problem(trace, topology.flat(3), "rows", num_slots=9).sets[0]
    sets = TokenSets(one.expert_QK, one.count_Q)
    x_nn = 0.4 * rng.random((6, 6))
    np.fill_diagonal(x_nn, 0.45)  # so that trees are better than all homes, mostly
    apart_nn, copies_n = np.zeros((6, 6)), np.zeros(6)
    own = copies_homes._at_home(sets, x_nn + x_nn.T, 3, apart_nn, copies_n)
    equal = False
    for held_EM in every_layer(6, 3, 3)[::7]:
        z_nn = held_EM.astype(float) @ held_EM.T
        most = own + copies_n @ np.diag(z_nn) - (apart_nn * z_nn).sum() / 2
        homes = sum(
            weight * held_EM[node_K[node_K < 6]].any(axis=0).mean()
            for node_K, weight in zip(sets.node_QK, sets.weight_Q, strict=True)
        )
        assert homes <= most + 1e-9
        equal = equal or most < 1.1 * homes
    assert equal
