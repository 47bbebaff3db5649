"""The least of the busiest link: against all ways to spread contacts, and against the counts."""

import itertools

import numpy as np
import pytest

from moe_jax.placement import topology, ways, wire_bound
from moe_jax.placement.topology import Tier, Topology
from moe_jax.placement.torus import Torus

MACHINES = [
    topology.flat(4),
    topology.nodes_by_devices(2, 4),
    topology.uneven((3, 1)),
    topology.uneven((1, 2, 3)),
    Topology("mesh", 1, 6, torus=Torus((2, 3), (False, False))),
    Topology("rings", 2, 4, torus=Torus((4,), (True,))),
]


def spreads(columns: int, parts: int) -> np.ndarray:
    """Every way to spread `parts` parts of one contact on the columns."""
    found = [
        np.bincount(list(chosen), minlength=columns)
        for chosen in itertools.combinations_with_replacement(range(columns), parts)
    ]
    return np.array(found) / parts


@pytest.mark.parametrize("seed", range(6))
def test_value_of_a_game_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    table_RX = rng.random((5, 3)) * (rng.random((5, 3)) < 0.8)
    every = (table_RX @ spreads(3, 60).T).max(axis=0)
    value = wire_bound.least_busiest(table_RX)
    assert every.min() * 0.97 <= value <= every.min() * (1 + 1e-12)


def test_nothing_on_the_wire():
    assert wire_bound.least_busiest(np.zeros((3, 2))) == 0.0
    assert wire_bound.least_busiest(np.array([[0.0, 1.0]])) == 0.0


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_every_link_is_that_of_the_closed_forms(machine):
    """Bandwidths and latencies make ways.seconds say what the busiest link of a tier carries."""
    rng = np.random.default_rng(1)
    touched_PM = rng.random((20, machine.num_devices))
    node_PN = rng.random((20, machine.num_nodes))
    still = Tier(1e30, 0.0)
    for dispatch in ("exchange", "hierarchical"):
        slow_PX = node_PN if dispatch == "hierarchical" else touched_PM
        out, back = wire_bound.ways(machine, dispatch)
        for tier, parts in (("fast", ("fast_RM", touched_PM)), ("slow", ("slow_RX", slow_PX))):
            fields = {"fast": still, "slow": still, tier: Tier(1.0, 0.0)}
            timed = Topology(
                "x", machine.num_nodes, machine.devices_per_node, torus=machine.torus, **fields
            )
            wanted_P = ways.seconds(timed, dispatch, touched_PM, node_PN, 0.0)
            found_P = sum((parts[1] @ getattr(way, parts[0]).T).max(axis=1) for way in (out, back))
            np.testing.assert_allclose(found_P, wanted_P, rtol=1e-9, atol=1e-25)


def test_even_devices_have_the_mean_as_value():
    for machine in MACHINES[:2]:
        way = wire_bound.ways(machine, "exchange")[0]
        nodes, each = machine.num_nodes, machine.num_devices // machine.num_nodes
        fast = (each - 1) / machine.num_devices**2
        assert wire_bound.least_busiest(way.fast_RM) == pytest.approx(fast)
        slow = (nodes - 1) * each / machine.num_devices**2
        assert wire_bound.least_busiest(way.slow_RX) == pytest.approx(slow)


def test_five_and_three_by_hand():
    """Share a of the contacts on the five: 5 a / 24 received by the three is balanced with it."""
    way = wire_bound.ways(topology.uneven((5, 3)), "exchange")[0]
    # a device of the three receives (1 - a) / 3 x 5 / 8, and sends a / 8: equal at a = 5 / 8
    assert wire_bound.least_busiest(way.slow_RX) == pytest.approx(5 / 8 / 8)


def test_a_large_torus_needs_no_program(monkeypatch):
    monkeypatch.setattr(wire_bound.optimize, "linprog", None)
    machine = topology.preset("v5e256")
    way = wire_bound.ways(machine, "exchange")[0]
    hops = machine.torus.hops_GG.sum(axis=0)[0] / 256 / 1024
    assert wire_bound.least_busiest(way.fast_RM) == pytest.approx(hops)
