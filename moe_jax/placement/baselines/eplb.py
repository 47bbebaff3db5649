"""EPLB as published by DeepSeek: the balance baseline with replicas, defect included.

Axes: L MoE layers, E experts, R replicas in all (slots), X largest number of copies of an expert,
M devices, N nodes, B rows of a batch of packings (layers, or layers x nodes).

Hierarchical: groups of experts are packed onto nodes; inside a node the expert with the largest
load per copy gets the next copy until the slots are used up; copies are packed onto the devices
of the node. Global: the same with one node and one group; it is used as well where the nodes do
not divide the groups. There is no hierarchical form for nodes of different sizes. Packing goes
heaviest first, each to the lightest pack with room (where a pack holds one item, item i goes to
pack i). Ties go to the lower index.

Nothing keeps two copies of one expert off one device, where the second one is a wasted slot:
`duplicates` counts them. So the maps are not a valid Placement; replication.py makes one that is as
balanced without that.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Num

from moe_jax.errors import Refused
from moe_jax.placement.plan import Placement


class Published(Placement):
    """EPLB's map, for counting only: as a Placement, but a device may hold an expert twice.

    The copy rule then splits rows over slots, so that such a device gets two shares. It is not to
    be written or loaded.
    """

    def __post_init__(self):
        pass  # no promise of validity


class Maps(NamedTuple):
    """What EPLB returns, int64.

    Attributes:
      physical_to_logical_LR: the expert of every slot.
      logical_to_physical_LEX: the slots of every expert in order of creation, padded with -1.
      count_LE: copies of every expert.
    """

    physical_to_logical_LR: Int[np.ndarray, "L R"]
    logical_to_physical_LEX: Int[np.ndarray, "L E X"]
    count_LE: Int[np.ndarray, "L E"]


def rebalance_experts(
    weight_LE: Num[np.ndarray, "L E"],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
) -> Maps:
    """The maps for these loads; see the head of this file."""
    weight_LE = weight_LE.astype(np.float32)  # as published: rounding decides ties
    layers, experts = weight_LE.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    _check(experts, num_replicas, num_groups, num_nodes, num_gpus)
    layer_L1 = np.arange(layers)[:, None]

    # Experts in node order: the experts of node 0, those of node 1, ...
    group_LG = weight_LE.reshape(layers, num_groups, -1).sum(axis=2)
    node_LG, place_LG = pack(group_LG, num_nodes)
    spot_LG = node_LG * (num_groups // num_nodes) + place_LG
    group_at_LG = np.argsort(spot_LG, axis=1)
    member = np.arange(experts // num_groups)
    expert_at_LE = group_at_LG[:, :, None] * len(member) + member
    expert_at_LE = expert_at_LE.reshape(layers, experts)

    # One row per layer and node from here on.
    load_BE = weight_LE[layer_L1, expert_at_LE].reshape(layers * num_nodes, -1)
    owner_BR, rank_BR, count_BE = replicate(load_BE, num_replicas // num_nodes)
    row_B1 = np.arange(len(load_BE))[:, None]
    device_BR, place_BR = pack(_shares(load_BE, count_BE)[row_B1, owner_BR], num_gpus // num_nodes)
    slot_BR = device_BR * (num_replicas // num_gpus) + place_BR
    made_BR = np.argsort(slot_BR, axis=1)

    first_N = np.arange(num_nodes)[:, None] * (experts // num_nodes)
    at_LNR = owner_BR[row_B1, made_BR].reshape(layers, num_nodes, -1) + first_N
    expert_LR = expert_at_LE[layer_L1, at_LNR.reshape(layers, -1)]
    rank_LR = rank_BR[row_B1, made_BR].reshape(layers, -1)
    count_LE = np.empty((layers, experts), np.int64)
    count_LE[layer_L1, expert_at_LE] = count_BE.reshape(layers, experts)
    slots_LEX = np.full((layers, experts, int(count_LE.max())), -1)
    slots_LEX[layer_L1, expert_LR, rank_LR] = np.arange(num_replicas)
    return Maps(expert_LR, slots_LEX, count_LE)


def duplicates(physical_to_logical_LR: np.ndarray, num_gpus: int) -> int:
    """Slots whose expert is on their device already, over all layers."""
    layers = len(physical_to_logical_LR)
    expert_LMs = np.sort(physical_to_logical_LR.reshape(layers, num_gpus, -1), axis=2)
    return int((expert_LMs[:, :, 1:] == expert_LMs[:, :, :-1]).sum())


def pack(
    weight_BR: Num[np.ndarray, "B R"], packs: int
) -> tuple[Int[np.ndarray, "B R"], Int[np.ndarray, "B R"]]:
    """The pack of every item and its place there, packs holding equally many items.

    Sums are of the type of the weights.
    """
    rows, items = weight_BR.shape
    room = items // packs
    if room == 1:
        pack_BR = np.tile(np.arange(items), (rows, 1))
        return pack_BR, np.zeros_like(pack_BR)
    row_B = np.arange(rows)
    order_BR = np.argsort(-weight_BR, axis=1, kind="stable")
    load_BM = np.zeros((rows, packs), weight_BR.dtype)
    size_BM = np.zeros((rows, packs), np.int64)
    pack_BR, place_BR = np.empty((rows, items), np.int64), np.empty((rows, items), np.int64)
    for item_B in order_BR.T:
        pack_B = np.where(size_BM < room, load_BM, np.inf).argmin(axis=1)
        pack_BR[row_B, item_B] = pack_B
        place_BR[row_B, item_B] = size_BM[row_B, pack_B]
        load_BM[row_B, pack_B] += weight_BR[row_B, item_B]
        size_BM[row_B, pack_B] += 1
    return pack_BR, place_BR


def replicate(
    load_BE: Num[np.ndarray, "B E"], num_slots: int
) -> tuple[Int[np.ndarray, "B R"], Int[np.ndarray, "B R"], Int[np.ndarray, "B E"]]:
    """The expert of every copy, its number among the copies of that expert, copies per expert."""
    rows, experts = load_BE.shape
    row_B = np.arange(rows)
    owner_BR = np.tile(np.arange(num_slots), (rows, 1))
    rank_BR = np.zeros((rows, num_slots), np.int64)
    count_BE = np.ones((rows, experts), np.int64)
    for slot in range(experts, num_slots):
        expert_B = _shares(load_BE, count_BE).argmax(axis=1)
        owner_BR[:, slot] = expert_B
        rank_BR[:, slot] = count_BE[row_B, expert_B]
        count_BE[row_B, expert_B] += 1
    return owner_BR, rank_BR, count_BE


def _shares(load_BE: np.ndarray, count_BE: np.ndarray) -> np.ndarray:
    """Loads per copy, of the type of the loads."""
    return load_BE / count_BE.astype(load_BE.dtype)


def _check(experts: int, slots: int, groups: int, nodes: int, devices: int) -> None:
    for field, value, of, name in (
        ("num_groups", groups, experts, "experts"),
        ("num_nodes", nodes, devices, "devices"),
        ("num_gpus", devices, slots, "slots"),
    ):
        if of % value:
            raise Refused(field, value, f"must divide the {of} {name}", f"Use a divisor of {of}")
    if slots < experts:
        raise Refused("num_replicas", slots, f"{experts} experts need a slot each", "Add slots")
