"""What a placement puts on the wire: rows per (source, destination) pair, token by token.

Axes: T tokens, L MoE layers, K experts per token, M devices, P slots; a row is one token's
activation (d_model values). Entry [l, s, d] of a count is the rows of layer l that device s sends
to device d; what stays on its device is not on the wire, so diagonals are zero. `home_T` names the
device that holds each token (-1: not known). Known homes give exact integers; unknown ones give the
expectation over homes drawn uniformly, exactly. S: the devices of a token's experts.

With replicas the copy rule (copies.py) says which device serves an assignment, given the home (in
coherent dispatch: where the token is when the layer begins) and the token's position. The
expectation is then the mean over all homes, each followed through the layers.

Dispatches
- gathered: every token goes to every other device, and a sum (`partial`) or a row for each of its
  experts (`exact`) comes back from every one: the same under every placement.
- exchange: home sends one row to each device of S, which answers with one row (`partial`: its
  experts' sum; `reproducible`: the same rows, summed on a common grid) or one per expert there
  (`exact`: summed at home in rank order).
- hierarchical: one row to each remote node, to the device with home's place in that node (nodes.py
  says which where nodes differ), and from there one row to each further device of S in the node;
  answers take the same way back.
- coherent (ExFlow, arXiv 2401.08383): the token does not return; it goes on from the device of its
  best expert, known as soon as the layer is routed. Layer l sends from where layer l - 1 left it.
- shuffled: an exchange from homes that every layer chooses anew, by where the experts of the layer
  before were and equally many on each device (row_homes.py, with the rule and what a step is). So
  homes are always known, and `home_T` does not matter. What moves the rows there is not counted:
  split attention gathers and scatters them in any case.

A token without an expert in a layer sends nothing there, in any dispatch, and but for shuffled
dispatch stays where it is.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int, Integer, Num

from moe_jax.errors import Refused
from moe_jax.placement import copies, row_homes
from moe_jax.placement import nodes as nodes_lib
from moe_jax.placement.nodes import DevicesPerNode, Nodes
from moe_jax.placement.plan import Placement

DISPATCHES = ("exchange", "hierarchical", "coherent", "shuffled", "gathered")
TIED = ("coherent", "shuffled")  # of them: where tokens are depends on the layer before
COMBINES = ("partial", "exact", "reproducible")
UNKNOWN = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows on the wire, on the way out (dispatch) and back (combine): int64, or float64 expected.

    Attributes:
      dispatch_LMM: [L, source, destination].
      combine_LMM: [L, source, destination]; here the source is the device of the experts.
    """

    dispatch_LMM: Num[np.ndarray, "L M M"]
    combine_LMM: Num[np.ndarray, "L M M"]

    @property
    def total_LMM(self) -> Num[np.ndarray, "L M M"]:
        return self.dispatch_LMM + self.combine_LMM


@no_type_check  # `_check` refuses the same in words that name the fix
def rows(
    expert_ids_TLK: Integer[np.ndarray, "T L K"],
    placement: Placement,
    dispatch: str,
    home_T: Int[np.ndarray, " T"] | None = None,
    combine: str = "partial",
    devices_per_node: DevicesPerNode | None = None,
    position_T: Int[np.ndarray, " T"] | None = None,
    step_tokens: int | None = None,
) -> Rows:
    """Counts the rows of every layer; see the head of this file.

    Args:
      expert_ids_TLK: experts of every token; ids outside 0..E-1 mean "no expert".
      placement: which slots hold which experts.
      dispatch: one of DISPATCHES.
      home_T: device of every token before layer 0, -1 where unknown; None: all unknown.
      combine: one of COMBINES.
      devices_per_node: needed for `hierarchical`, and where the copy rule is to know of nodes;
        devices are numbered node by node.
      position_T: what the copy rule goes by; None: the index. Only with replicas does it matter.
      step_tokens: tokens of a step, for `shuffled`; None: all are one step.
    """
    _check(expert_ids_TLK, placement, dispatch, home_T, combine, devices_per_node)
    where = (devices_per_node, position_T, step_tokens)
    each = [
        _rows(expert_ids_TLK, placement, dispatch, homes_T, combine, *where)
        for homes_T in homes(placement, len(expert_ids_TLK), home_T, dispatch, step_tokens)
    ]
    if len(each) == 1:
        return each[0]
    return Rows(
        sum(one.dispatch_LMM for one in each) / len(each),
        sum(one.combine_LMM for one in each) / len(each),
    )


@no_type_check  # annotations of what `rows` has checked
def _rows(
    expert_ids_TLK, placement, dispatch, home_T, combine, devices_per_node, position_T, step_tokens
) -> Rows:
    devices = placement.num_devices
    unknown = bool((home_T < 0).any())
    there, back = [], []
    where = (devices_per_node, position_T, step_tokens)
    steps = walk(expert_ids_TLK, placement, dispatch, home_T, *where)
    for device_TK, home_T, next_T in steps:
        if dispatch == "gathered":
            each_T = (device_TK >= 0).sum(axis=1)
            out_MM = _gathered(np.minimum(each_T, 1), home_T, devices)
            back_MM = out_MM.T
            if combine == "exact":
                back_MM = _gathered(each_T, home_T, devices).T
        elif dispatch == "hierarchical":
            nodes = nodes_lib.of(devices, devices_per_node)
            ways = _Ways(device_TK, home_T, nodes)
            out_MM = ways.rows(first_of(device_TK), first_of(nodes.node_of(device_TK)))
            back_MM = out_MM.T
            if combine == "exact":
                every_TK = device_TK >= 0
                back_MM = ways.rows(every_TK, every_TK).T
        else:
            first_TK = first_of(device_TK)
            out_MM = _direct(device_TK, first_TK, home_T, devices)
            sent_TK = device_TK >= 0 if combine == "exact" else first_TK
            back_MM = out_MM.T
            if sent_TK is not first_TK or next_T is not home_T:
                back_MM = _direct(device_TK, sent_TK, next_T, devices).T
        there.append(out_MM)
        back.append(back_MM)
    kind = np.float64 if unknown else np.int64
    return Rows(np.stack(there).astype(kind), np.stack(back).astype(kind))


class Step(NamedTuple):
    """One layer of a walk.

    Attributes:
      device_TK: where every assignment is computed, -1 where there is no expert.
      home_T: where the tokens are when the layer begins, -1 where unknown.
      next_T: where they are when it ends.
    """

    device_TK: Integer[np.ndarray, "T K"]
    home_T: Int[np.ndarray, " T"]
    next_T: Int[np.ndarray, " T"]


def walk(
    expert_ids_TLK: Integer[np.ndarray, "T L K"],
    placement: Placement,
    dispatch: str,
    home_T: Int[np.ndarray, " T"],
    devices_per_node: DevicesPerNode | None = None,
    position_T: Int[np.ndarray, " T"] | None = None,
    step_tokens: int | None = None,
) -> Iterator[Step]:
    """Layer by layer, where tokens are and where their experts are computed.

    Args:
      home_T: one of `homes` of the same dispatch.
    """
    where = (devices_per_node, position_T)
    for layer in range(placement.num_layers):
        device_TK = devices_TK(expert_ids_TLK, placement, layer, home_T, *where)
        next_T = home_T
        if dispatch == "coherent":
            next_T = np.where(device_TK[:, 0] >= 0, device_TK[:, 0], home_T)
        yield Step(device_TK, home_T, next_T)
        home_T = next_T
        if dispatch == "shuffled":
            first_TK = first_copies_TK(expert_ids_TLK, placement, layer, device_TK)
            home_T = row_homes.balanced(first_TK, placement.num_devices, step_tokens)


def first_copies_TK(
    ids_TLK: np.ndarray, placement: Placement, layer: int, device_TK: np.ndarray
) -> np.ndarray:
    """int64 [T, K]: the device of every assignment's first copy, whichever one computes it; -1
    where `device_TK`, from `devices_TK`, says that there is no expert.
    """
    if not placement.has_replicas:
        return device_TK
    first_E = placement.logical_to_physical_LER[layer, :, 0] // placement.slots_per_device
    ids_TK = np.where(device_TK >= 0, ids_TLK[:, layer].astype(np.int64), 0)
    return np.where(device_TK >= 0, first_E[ids_TK], UNKNOWN)


def homes(
    placement: Placement,
    tokens: int,
    home_T: Int[np.ndarray, " T"] | None = None,
    dispatch: str = "exchange",
    step_tokens: int | None = None,
) -> list[np.ndarray]:
    """The homes whose mean is the expectation: as they are, or each device for those unknown.

    In shuffled dispatch they are never unknown: a step begins in order, whatever is given.
    """
    if dispatch == "shuffled":
        return [row_homes.first(tokens, placement.num_devices, step_tokens)]
    home_T = np.full(tokens, UNKNOWN) if home_T is None else home_T.astype(np.int64)
    if not placement.has_replicas or not (home_T < 0).any():
        return [home_T]
    return [np.where(home_T < 0, device, home_T) for device in range(placement.num_devices)]


def computed_LP(
    expert_ids_TLK: Integer[np.ndarray, "T L K"],
    placement: Placement,
    dispatch: str = "exchange",
    home_T: Int[np.ndarray, " T"] | None = None,
    devices_per_node: DevicesPerNode | None = None,
    position_T: Int[np.ndarray, " T"] | None = None,
    step_tokens: int | None = None,
) -> Num[np.ndarray, "L P"]:
    """Rows that every physical expert computes: int64, or float64 expected.

    Only with replicas do dispatch, homes and positions matter: they decide which copy computes.
    """
    if not placement.has_replicas:
        load_LE = []
        for layer in range(expert_ids_TLK.shape[1]):
            ids = expert_ids_TLK[:, layer].astype(np.int64).ravel()
            ids = ids[(ids >= 0) & (ids < placement.num_experts)]
            # one expert more, without load, for slots that are empty (-1; uneven.py)
            load_LE.append(np.bincount(ids, minlength=placement.num_experts + 1))
        return np.take_along_axis(np.stack(load_LE), placement.physical_to_logical_LP, axis=1)
    where = (devices_per_node, position_T, step_tokens)
    each = [
        _computed(expert_ids_TLK, placement, dispatch, homes_T, *where)
        for homes_T in homes(placement, len(expert_ids_TLK), home_T, dispatch, step_tokens)
    ]
    return each[0] if len(each) == 1 else np.sum(each, axis=0) / len(each)


def _computed(
    expert_ids_TLK, placement, dispatch, home_T, devices_per_node, position_T, step_tokens
) -> np.ndarray:
    load_LP = np.empty((placement.num_layers, placement.num_slots), np.int64)
    where = (devices_per_node, position_T, step_tokens)
    steps = walk(expert_ids_TLK, placement, dispatch, home_T, *where)
    for layer, step in enumerate(steps):
        # a device holds an expert once, so device and expert name the slot
        slot_ME = np.full((placement.num_devices, placement.num_experts), UNKNOWN)
        expert_P = placement.physical_to_logical_LP[layer]
        slot_P = np.arange(placement.num_slots)
        slot_ME[slot_P // placement.slots_per_device, expert_P] = slot_P
        real_TK = step.device_TK >= 0
        expert = expert_ids_TLK[:, layer].astype(np.int64)[real_TK]
        slot = slot_ME[step.device_TK[real_TK], expert]
        load_LP[layer] = np.bincount(slot, minlength=placement.num_slots)
    return load_LP


def computed_LM(
    expert_ids_TLK: Integer[np.ndarray, "T L K"],
    placement: Placement,
    dispatch: str = "exchange",
    home_T: Int[np.ndarray, " T"] | None = None,
    devices_per_node: DevicesPerNode | None = None,
    position_T: Int[np.ndarray, " T"] | None = None,
    step_tokens: int | None = None,
) -> Num[np.ndarray, "L M"]:
    """Rows that every device computes; see computed_LP."""
    where = (devices_per_node, position_T, step_tokens)
    load_LP = computed_LP(expert_ids_TLK, placement, dispatch, home_T, *where)
    return load_LP.reshape(len(load_LP), placement.num_devices, -1).sum(axis=2)


def devices_TK(
    expert_ids_TLK: Integer[np.ndarray, "T L K"],
    placement: Placement,
    layer: int,
    home_T: Int[np.ndarray, " T"] | None = None,
    devices_per_node: DevicesPerNode | None = None,
    position_T: Int[np.ndarray, " T"] | None = None,
) -> Integer[np.ndarray, "T K"]:
    """int64: the device of every assignment of one layer, -1 where there is no expert.

    With replicas every home has to be known; positions are the index where they are not given.
    """
    ids_TK = expert_ids_TLK[:, layer].astype(np.int64)
    if placement.has_replicas:
        if home_T is None or (home_T < 0).any():
            raise Refused("home_T", None, "the copy rule needs homes", "Give one per token")
        table = copies.candidates(placement, layer, devices_per_node)
        position_T = np.arange(len(ids_TK)) if position_T is None else position_T
        slot_TK = table.slots_TK(ids_TK, home_T, position_T)
        return np.where(slot_TK < 0, UNKNOWN, slot_TK // placement.slots_per_device)
    valid_TK = (ids_TK >= 0) & (ids_TK < placement.num_experts)
    device_E = placement.device_LE[layer].astype(np.int64)
    return np.where(valid_TK, device_E[np.where(valid_TK, ids_TK, 0)], UNKNOWN)


def first_of(device_TK: Integer[np.ndarray, "T K"]) -> np.ndarray:
    """bool [T, K]: the first assignment of its token on its device (or node)."""
    first_TK = device_TK >= 0
    for k in range(1, device_TK.shape[1]):
        for j in range(k):
            first_TK[:, k] &= device_TK[:, j] != device_TK[:, k]
    return first_TK


def _direct(
    device_TK: np.ndarray, sent_TK: np.ndarray, home_T: np.ndarray, devices: int
) -> Float[np.ndarray, "M M"] | Int[np.ndarray, "M M"]:
    """[home, device]: one row for each assignment in `sent_TK` that is not on its home."""
    home_T1 = home_T[:, None]
    rows_MM = _sent(home_T1, device_TK, sent_TK & (home_T1 >= 0), devices)
    expected = sent_TK & (home_T1 < 0)
    if expected.any():
        rows_M = np.bincount(device_TK[expected], minlength=devices)
        rows_MM = rows_MM + rows_M[None, :] / devices
    return _no_diagonal(rows_MM)


def _gathered(rows_T: np.ndarray, home_T: np.ndarray, devices: int) -> np.ndarray:
    """[home, device]: `rows_T` rows of every token for every other device."""
    known_T = home_T >= 0
    known_M = np.zeros(devices, np.int64)
    np.add.at(known_M, home_T[known_T], rows_T[known_T])
    expected = int(rows_T[~known_T].sum())
    from_M = known_M + expected / devices if expected else known_M
    return _no_diagonal(np.repeat(from_M[:, None], devices, axis=1))


@dataclasses.dataclass(frozen=True, eq=False)
class _Ways:
    """The two hops of hierarchical dispatch: home -> relay (another node), relay -> device.

    In home's own node the relay is home itself, which makes both hops one formula.
    """

    device_TK: np.ndarray
    home_T: np.ndarray
    nodes: Nodes

    def rows(self, sent_TK: np.ndarray, sent_node_TK: np.ndarray) -> np.ndarray:
        known_T = self.home_T >= 0
        total = self._hops(known_T, self.home_T[known_T], sent_TK, sent_node_TK)
        if not known_T.all():  # expectation: the mean over the places within a node and the nodes
            total = total + self._expected(~known_T, sent_TK, sent_node_TK)
        return _no_diagonal(total)

    def _hops(self, pick_T, home_T, sent_TK, sent_node_TK) -> np.ndarray:
        """Counted by what a token is: home, and node or device of the row."""
        nodes, devices = self.nodes, self.nodes.devices
        device_TK, home_T1 = self.device_TK[pick_T], home_T[:, None]
        to_MM = _sent(home_T1, device_TK, sent_TK[pick_T], devices)
        node_TK = nodes.node_of(device_TK)
        slow_MN = _sent(home_T1, node_TK, sent_node_TK[pick_T], devices, nodes.count)
        home_M1 = np.arange(devices)[:, None]
        entry_MN = nodes.relay(home_M1, np.arange(nodes.count))
        hops_MM = np.zeros((devices, devices), to_MM.dtype)
        np.add.at(hops_MM, (home_M1, entry_MN), slow_MN)
        np.add.at(hops_MM, (entry_MN[:, nodes.node_M], np.arange(devices)), to_MM)
        return hops_MM

    def _expected(self, pick_T, sent_TK, sent_node_TK) -> np.ndarray:
        nodes, device_TK = self.nodes, self.device_TK[pick_T]
        node_TK = nodes.node_of(device_TK)
        node_N = np.bincount(node_TK[sent_node_TK[pick_T]], minlength=nodes.count)
        to_M = np.bincount(device_TK[sent_TK[pick_T]], minlength=nodes.devices)
        every_M = np.arange(nodes.devices)
        relays_MM = nodes.relay(every_M[:, None], nodes.node_M[None, :]) == every_M[None, :]
        slow_MM = relays_MM * node_N[nodes.node_M][None, :]
        fast_MM = nodes.relayed_M[:, None] * to_M[None, :]
        return np.where(nodes.same_MM, fast_MM, slow_MM) / nodes.devices


def _sent(home_T1, to_TK, sent_TK, devices: int, ends: int | None = None) -> np.ndarray:
    """int64 [home, end]: rows for each `sent`; ends are devices, or so many."""
    ends = ends or devices
    at_TK = np.where(sent_TK, home_T1 * ends + to_TK, devices * ends)
    counts = np.bincount(at_TK.ravel(), minlength=devices * ends + 1)[:-1]
    return counts.reshape(devices, ends)


def _no_diagonal(rows_MM: np.ndarray) -> np.ndarray:
    rows_MM = rows_MM.copy()
    np.fill_diagonal(rows_MM, 0)
    return rows_MM


def _check(expert_ids_TLK, placement, dispatch, home_T, combine, devices_per_node) -> None:
    for field, value, allowed in (
        ("dispatch", dispatch, DISPATCHES),
        ("combine", combine, COMBINES),
    ):
        if value not in allowed:
            raise Refused(field, value, "not known", f"Use one of {', '.join(allowed)}")
    if expert_ids_TLK.ndim != 3 or expert_ids_TLK.shape[1] != placement.num_layers:
        raise Refused(
            "expert_ids shape",
            expert_ids_TLK.shape,
            f"[tokens, {placement.num_layers} layers of the placement, experts per token]",
            "Use the plan and the trace of one model",
        )
    if placement.has_replicas and (at_TLK := _strange(expert_ids_TLK, placement)).any():
        raise Refused(
            "expert_ids",
            int(expert_ids_TLK[at_TLK].max()),
            f"the placement has {placement.num_experts} experts per layer",
            "Use the plan and the trace of one model",
        )
    if home_T is not None and (
        home_T.shape != expert_ids_TLK.shape[:1]
        or (home_T.size and int(home_T.max()) >= placement.num_devices)
    ):
        raise Refused(
            "home_T",
            home_T.shape,
            f"one device below {placement.num_devices} per token",
            "Leave it out, or record homes on as many devices as are planned for",
        )
    if dispatch == "hierarchical" and (devices_per_node is None):
        raise Refused(
            "devices_per_node",
            None,
            "hierarchical dispatch needs to know the nodes",
            "Give the devices of a node",
        )
    _ = nodes_lib.of(placement.num_devices, devices_per_node)  # refuses what does not fit


def _strange(expert_ids_TLK: np.ndarray, placement: Placement) -> np.ndarray:
    """bool: neither an expert nor "no expert" (negative, or the largest value of the type)."""
    nothing = np.iinfo(expert_ids_TLK.dtype).max
    return (expert_ids_TLK >= placement.num_experts) & (expert_ids_TLK != nothing)
