"""Which copy of an expert serves a token: the copy rule, which is part of every plan.

`stay` is described in shares.py; its shares travel in the placement. Without shares it is `local`.

Axes: T tokens, K experts per token, E experts, M devices, R copies of an expert, s slots per
device. A token at home device h that chose expert e as its k-th:

1. copies of e on h itself are the candidates (there is at most one);
2. else its copies on other devices of h's node;
3. else all of its copies;
4. of c candidates, in ascending slot order, it takes number (t + k) mod c, t being the token's
   position: in a running program its row in the batch plus its position in the sequence, so that
   neighbours in a sequence take turns, and so do the sequences of a decode step; on a trace, which
   knows no batches, its index.

Nothing here depends on loads or on other tokens, so a compiled program applies the rule without
communication: per home one table and one remainder (model/dispatch/table.py). The split is even, up
to rounding, among tokens without a copy nearby. On one node, homes being uniform, each of c copies
gets 1 / c.

Homes are where a token is when the layer begins: fixed where tokens return, the device of the
last best expert where they stay (coherent dispatch).
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int, Integer

from moe_jax.errors import Refused
from moe_jax.placement import nodes as nodes_lib
from moe_jax.placement import shares
from moe_jax.placement.nodes import DevicesPerNode, Nodes
from moe_jax.placement.plan import Placement

RULES = ("local", "stay")


def rule_of(placement: Placement) -> str:
    """The rule's name."""
    return RULES[placement.share_LNP is not None]


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """The rule of one layer as tables.

    Attributes:
      slot_EMR: candidates of an expert for a home in ascending order, padded with -1.
      count_EM: how many there are.
    """

    slot_EMR: Int[np.ndarray, "E M R"]
    count_EM: Int[np.ndarray, "E M"]

    def slots_TK(
        self,
        expert_TK: Integer[np.ndarray, "T K"],
        home_T: Integer[np.ndarray, " T"],
        position_T: Integer[np.ndarray, " T"],
    ) -> Int[np.ndarray, "T K"]:
        """int64: the slot of every assignment, -1 where there is no expert."""
        _, devices, copies = self.slot_EMR.shape
        expert_TK = expert_TK.astype(np.int64)
        real_TK = (expert_TK >= 0) & (expert_TK < len(self.count_EM))
        at_TK = np.where(real_TK, expert_TK, 0) * devices + home_T[:, None]
        turn_TK = (position_T[:, None] + np.arange(expert_TK.shape[1])).astype(np.int32)
        turn_TK %= self.count_EM.astype(np.int32).take(at_TK)
        return np.where(real_TK, self.slot_EMR.take(at_TK * copies + turn_TK), -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Stay:
    """The rule `stay` of one layer as tables.

    Attributes:
      slot_NEW: slots by node of the home (the last row: of experts that are not the best) and part.
      local_EM: the slot on the home device, or -1.
      node_M: the node of every device.
    """

    slot_NEW: Int[np.ndarray, "N1 E W"]
    local_EM: Int[np.ndarray, "E M"]
    node_M: Int[np.ndarray, " M"]

    def slots_TK(
        self,
        expert_TK: Integer[np.ndarray, "T K"],
        home_T: Integer[np.ndarray, " T"],
        position_T: Integer[np.ndarray, " T"],
    ) -> Int[np.ndarray, "T K"]:
        """int64: the slot of every assignment, -1 where there is no expert."""
        expert_TK = expert_TK.astype(np.int64)
        real_TK = (expert_TK >= 0) & (expert_TK < len(self.local_EM))
        safe_TK = np.where(real_TK, expert_TK, 0)
        row_TK = np.full(safe_TK.shape, len(self.slot_NEW) - 1)
        row_TK[:, 0] = self.node_M[home_T]
        part_TK = shares.part_TK(position_T, safe_TK.shape[1])
        slot_TK = self.slot_NEW[row_TK, safe_TK, part_TK]
        local_T = self.local_EM[safe_TK[:, 0], home_T]
        slot_TK[:, 0] = np.where(local_T >= 0, local_T, slot_TK[:, 0])
        return np.where(real_TK, slot_TK, -1)


def candidates(
    placement: Placement, layer: int, devices_per_node: DevicesPerNode | None = None
) -> Candidates | Stay:
    """The tables of one layer; devices are numbered node by node, None is one node."""
    nodes = nodes_lib.of(placement.num_devices, devices_per_node)
    if placement.share_LNP is not None and placement.share_LNP[layer].any():
        expert_P, share_NP = placement.physical_to_logical_LP[layer], placement.share_LNP[layer]
        return staying(expert_P.astype(np.int64), share_NP.astype(np.int64), nodes)
    slot_ER = placement.logical_to_physical_LER[layer].astype(np.int64)
    device_ER = np.where(slot_ER < 0, -1, slot_ER // placement.slots_per_device)
    return tables(slot_ER, device_ER, nodes)


def staying(
    expert_P: Int[np.ndarray, " P"], share_NP: Int[np.ndarray, "N1 P"], nodes: Nodes
) -> Stay:
    """The tables of the rule `stay` from the slots of one layer and their shares."""
    if len(share_NP) != nodes.count + 1:
        raise Refused(
            shares.FIELD,
            f"{len(share_NP) - 1} nodes",
            f"the machine has {nodes.count}",
            "Use the machine that the plan was made for",
        )
    order_P = np.argsort(expert_P, kind="stable")
    slot_NW = np.stack([np.repeat(order_P, share_P[order_P]) for share_P in share_NP])
    slots_per_device = len(expert_P) // nodes.devices
    local_EM = np.full((int(expert_P.max()) + 1, nodes.devices), -1)
    local_EM[expert_P, np.arange(len(expert_P)) // slots_per_device] = np.arange(len(expert_P))
    slot_NEW = slot_NW.reshape(len(share_NP), -1, shares.PARTS)
    return Stay(slot_NEW, local_EM, nodes.node_M)


def tables(
    slot_ER: Int[np.ndarray, "E R"],
    device_ER: Int[np.ndarray, "E R"],
    nodes: Nodes,
) -> Candidates:
    """The tables from every expert's slots (ascending, padded with -1) and their devices."""
    near_EMR = nearness(device_ER, nodes)
    keep_EMR = near_EMR == near_EMR.max(axis=2, keepdims=True)
    order_EMR = np.argsort(~keep_EMR, axis=2, kind="stable")
    slot_EMR = np.where(keep_EMR, slot_ER[:, None, :], -1)
    return Candidates(np.take_along_axis(slot_EMR, order_EMR, axis=2), keep_EMR.sum(axis=2))


def held(holds_EM: Bool[np.ndarray, "E M"], nodes: Nodes) -> Candidates:
    """The tables from who holds what, devices in place of slots."""
    devices = holds_EM.shape[1]
    device_EM = np.where(holds_EM, np.arange(devices), devices)
    device_ER = np.sort(device_EM, axis=1)[:, : int(holds_EM.sum(axis=1).max())]
    device_ER = np.where(device_ER == devices, -1, device_ER)
    return tables(device_ER, device_ER, nodes)


def nearness(device_ER: Int[np.ndarray, "E R"], nodes: Nodes) -> Int[np.ndarray, "E M R"]:
    """2 on the home device, 1 on its node, 0 elsewhere, -1 where there is no copy."""
    home_M = np.arange(nodes.devices)[None, :, None]
    device_E1R = device_ER[:, None, :]
    on_home: Bool[np.ndarray, "E M R"] = device_E1R == home_M
    on_node = nodes.node_of(device_E1R) == nodes.node_M[home_M]
    return np.where(device_E1R < 0, -1, on_home.astype(np.int64) + on_node)


def check_nodes(placement: Placement, num_nodes: int) -> None:
    """Refuses shares that were made for another number of nodes."""
    if placement.share_nodes not in (None, num_nodes):
        raise Refused(
            shares.FIELD,
            f"{placement.share_nodes} nodes",
            f"the machine has {num_nodes}",
            "Use the machine that the plan was made for, with as many nodes in the mesh",
        )


def check_slots(num_slots: int, num_experts: int, num_devices: int) -> None:
    """Refuses a number of slots that no valid plan has, naming the nearest that one has."""
    least = -(-num_experts // num_devices) * num_devices
    most = num_experts * num_devices
    down, up = num_slots // num_devices * num_devices, -(-num_slots // num_devices) * num_devices
    nearest = down if num_slots - down < up - num_slots else up
    nearest = min(max(nearest, least), most)
    for wrong, rule in (
        (num_slots < num_experts, f"every one of the {num_experts} experts needs a slot"),
        (
            num_slots > most,
            f"no expert twice on one device: {num_experts} experts on {num_devices} devices fill "
            f"at most {most} slots",
        ),
        (num_slots % num_devices, f"a multiple of the {num_devices} devices"),
    ):
        if wrong:
            raise Refused("slots", num_slots, rule, f"Use {nearest}")
