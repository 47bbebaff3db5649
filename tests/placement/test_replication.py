"""Replicas: EPLB as published, balance without its defect, the copy rule, counts, the planner."""

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import copies, eplb, replication
from moe_jax.placement.plan import Placement

# The example of EPLB's own README: 2 layers x 12 experts, 16 replicas, 4 groups, 2 nodes, 8 GPUs.
EPLB_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
EPLB_MAP = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def instance(seed: int) -> tuple[np.ndarray, int, int]:
    """Loads [L, E], slots, devices: mild to wild loads, one to two extra slots per device."""
    rng = np.random.default_rng(seed)
    devices = int(rng.choice([4, 8, 16]))
    experts = devices * int(rng.integers(4, 9))
    slots = experts + devices * int(rng.integers(1, 3))
    return rng.lognormal(0.0, rng.choice([0.3, 1.0, 1.5]), (3, experts)), slots, devices


def test_eplb_gives_its_published_example():
    maps = eplb.rebalance_experts(np.array(EPLB_LOADS), 16, 4, 2, 8)
    np.testing.assert_array_equal(maps.physical_to_logical_LR, EPLB_MAP)
    assert eplb.duplicates(maps.physical_to_logical_LR, 8) == 0
    for layer, row in enumerate(EPLB_MAP):
        assert maps.count_LE[layer].tolist() == [row.count(e) for e in range(12)]
        for e in range(12):
            slots = maps.logical_to_physical_LEX[layer, e]
            assert sorted(slots[slots >= 0]) == [p for p in range(16) if row[p] == e]


def test_eplb_puts_copies_of_an_expert_on_one_device():
    """One hot expert, one extra slot per device: its copies outnumber the devices."""
    maps = eplb.rebalance_experts(np.array([[100.0, 1, 1, 1]]), 8, 1, 1, 2)
    assert maps.count_LE.tolist() == [[5, 1, 1, 1]]
    assert eplb.duplicates(maps.physical_to_logical_LR, 2) == 3
    with pytest.raises(Refused, match="holds this expert already"):
        Placement(maps.physical_to_logical_LR, 4, 2)


def test_eplb_is_global_where_nodes_do_not_divide_the_groups():
    load_LE = np.random.default_rng(0).lognormal(size=(2, 12))
    flat = eplb.rebalance_experts(load_LE, 16, 1, 1, 8)
    odd = eplb.rebalance_experts(load_LE, 16, 3, 2, 8)
    np.testing.assert_array_equal(odd.physical_to_logical_LR, flat.physical_to_logical_LR)


@pytest.mark.parametrize("seed", range(100))
def test_balanced_slots_are_valid_and_as_even_as_eplb(seed):
    load_LE, slots, devices = instance(seed)
    plan = replication.balanced_slots(load_LE, slots, devices)  # a Placement is valid, or refused
    assert plan.num_slots == slots
    assert (plan.num_replicas_LE <= devices).all()
    maps = eplb.rebalance_experts(load_LE, slots, 1, 1, devices)
    ours_LM = replication.device_loads(load_LE, plan.physical_to_logical_LP, devices)
    theirs_LM = replication.device_loads(load_LE, maps.physical_to_logical_LR, devices)
    np.testing.assert_allclose(ours_LM.sum(axis=1), load_LE.sum(axis=1))
    assert (ours_LM.max(axis=1) <= theirs_LM.max(axis=1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("seed", range(60))
def test_balanced_slots_are_valid_in_every_corner(seed):
    """Few experts, all slots taken, equal or zero loads, many ties."""
    rng = np.random.default_rng(seed)
    devices, experts = int(rng.integers(1, 8)), int(rng.integers(1, 12))
    least = -(-experts // devices) * devices
    slots = int(rng.choice(np.arange(least, experts * devices + 1, devices)))
    load_LE = rng.integers(0, 3, (3, experts))
    plan = replication.balanced_slots(load_LE, slots, devices)
    loads_LM = replication.device_loads(load_LE, plan.physical_to_logical_LP, devices)
    np.testing.assert_allclose(loads_LM.sum(axis=1), load_LE.sum(axis=1))


def test_copies_stay_on_the_node_of_their_group():
    load_LE = np.random.default_rng(1).lognormal(size=(4, 32))
    plan = replication.balanced_slots(load_LE, 40, 8, num_nodes=2, num_groups=4)
    maps = eplb.rebalance_experts(load_LE, 40, 4, 2, 8)
    node_LEP = plan.physical_to_logical_LP.reshape(4, 2, 20)
    for layer in range(4):
        assert not set(node_LEP[layer, 0]) & set(node_LEP[layer, 1])
        for group in range(4):
            nodes = [
                n
                for n in range(2)
                if set(range(8 * group, 8 * group + 8)) & set(node_LEP[layer, n].tolist())
            ]
            assert len(nodes) == 1
    ours_LM = replication.device_loads(load_LE, plan.physical_to_logical_LP, 8)
    theirs_LM = replication.device_loads(load_LE, maps.physical_to_logical_LR, 8)
    assert (ours_LM.max(axis=1) <= theirs_LM.max(axis=1) * (1 + 1e-6)).all()


def test_rounds_only_improve():
    load_LE, slots, devices = instance(5)
    worst = [
        replication.device_loads(
            load_LE,
            replication.balanced_slots(
                load_LE, slots, devices, rounds=rounds
            ).physical_to_logical_LP,
            devices,
        ).max(axis=1)
        for rounds in (0, 1000)
    ]
    assert (worst[1] <= worst[0] * (1 + 1e-9)).all()
    assert (worst[1] < worst[0]).any()


@pytest.mark.parametrize(
    ("slots", "fix"), [(7, "Use 8"), (4, "Use 8"), (13, "Use 12"), (15, "Use 16"), (40, "Use 32")]
)
def test_bad_slots_are_refused_with_the_nearest_good_number(slots, fix):
    with pytest.raises(Refused, match=fix) as refused:
        replication.balanced_slots(np.ones((1, 8)), slots, 4)
    assert "\n" not in str(refused.value)


def test_bad_loads_are_refused():
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(Refused, match="load_LE"):
            replication.balanced_slots(np.array([[1.0, bad]]), 2, 2)


def test_copy_rule_by_hand():
    """Two nodes of two devices, two slots each; expert 0 on 0, 1, 3; expert 1 on 2; 2 on 0, 3."""
    plan = Placement(np.array([[0, 2, 0, 3, 1, 4, 0, 2]]), 5, 4)
    table = copies.candidates(plan, 0, devices_per_node=2)
    expert_TK = np.array([[0, 2], [0, 2], [0, 1], [0, 2], [9, 0]])
    home_T = np.array([0, 1, 2, 3, 2])
    slot_TK = table.slots_TK(expert_TK, home_T, np.arange(5))
    # home 1 has no copy of 2: the one on its node; home 2 takes node-mate 3's copies of 0 and 2
    np.testing.assert_array_equal(slot_TK, [[0, 1], [2, 1], [6, 4], [6, 7], [-1, 6]])
    flat = copies.candidates(plan, 0)
    # on one node home 2 splits expert 0 by position: slots 0, 2, 6 in turn, shifted by k
    slot_TK = flat.slots_TK(np.array([[0, 0]] * 4), np.full(4, 2), np.arange(4))
    np.testing.assert_array_equal(slot_TK, [[0, 2], [2, 6], [6, 0], [0, 2]])
