"""What a placement puts on the wire: rows per (source, destination) pair, token by token.

Axes: T tokens, L MoE layers, K experts per token, M devices, P slots; a row is one token's
activation (d_model values). Entry [l, s, d] of a count is the rows of layer l that device s sends
to device d; what stays on its device is not on the wire, so diagonals are zero. `home_T` names the
device that holds each token (-1: not known). Known homes give exact integers; unknown ones give the
expectation over homes drawn uniformly, in closed form. S: the devices of a token's experts.

Dispatches
- gathered: every token goes to every other device, and partial sums come back: fixed.
- exchange: home sends one row to each device of S, which answers with one row (`partial`: its
  experts' sum) or one per expert there (`exact`: summed at home in rank order, bit-identical).
- hierarchical: one row to each remote node, to the device with home's place in that node, and from
  there one row to each further device of S in the node; answers take the same way back.
- coherent (ExFlow, arXiv 2401.08383): the token does not return; it goes on from the device of its
  best expert, known as soon as the layer is routed. Layer l sends from where layer l - 1 left it.

A token without an expert in a layer sends nothing there, in any dispatch, and stays where it is.
"""

import dataclasses
from typing import no_type_check

import numpy as np
from jaxtyping import Float, Int, Integer, Num

from moe_jax.errors import Refused
from moe_jax.placement.plan import Placement

DISPATCHES = ("exchange", "hierarchical", "coherent", "gathered")
COMBINES = ("partial", "exact")
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
    devices_per_node: int | None = None,
) -> Rows:
    """Counts the rows of every layer; see the head of this file.

    Args:
      expert_ids_TLK: experts of every token; ids outside 0..E-1 mean "no expert".
      placement: without replicas.
      dispatch: one of DISPATCHES.
      home_T: device of every token before layer 0, -1 where unknown; None: all unknown.
      combine: one of COMBINES; it does not matter to `gathered`.
      devices_per_node: needed for `hierarchical`; devices are numbered node by node.
    """
    _check(expert_ids_TLK, placement, dispatch, home_T, combine, devices_per_node)
    devices = placement.num_devices
    tokens, layers, _ = expert_ids_TLK.shape
    unknown = home_T is None or bool((home_T < 0).any())
    home_T = np.full(tokens, UNKNOWN) if home_T is None else home_T.astype(np.int64)
    there, back = [], []
    for layer in range(layers):
        device_TK = devices_TK(expert_ids_TLK, placement, layer)
        next_T = home_T
        if dispatch == "gathered":
            out_MM = _gathered(device_TK, home_T, devices)
            back_MM = out_MM.T
        elif dispatch == "hierarchical":
            assert devices_per_node is not None
            first_TK, node_TK = first_of(device_TK), device_TK // devices_per_node
            ways = _Ways(device_TK, home_T, devices, devices_per_node)
            out_MM = ways.rows(first_TK, first_of(np.where(device_TK < 0, UNKNOWN, node_TK)))
            back_MM = out_MM.T
            if combine == "exact":
                every_TK = device_TK >= 0
                back_MM = ways.rows(every_TK, every_TK).T
        else:
            first_TK = first_of(device_TK)
            if dispatch == "coherent":
                next_T = np.where(device_TK[:, 0] >= 0, device_TK[:, 0], home_T)
            out_MM = _direct(device_TK, first_TK, home_T, devices)
            sent_TK = first_TK if combine == "partial" else device_TK >= 0
            back_MM = _direct(device_TK, sent_TK, next_T, devices).T
        there.append(out_MM)
        back.append(back_MM)
        home_T = next_T
    kind = np.float64 if unknown else np.int64
    return Rows(np.stack(there).astype(kind), np.stack(back).astype(kind))


def computed_LP(
    expert_ids_TLK: Integer[np.ndarray, "T L K"], placement: Placement
) -> Int[np.ndarray, "L P"]:
    """Rows that every physical expert computes (int64)."""
    _refuse_replicas(placement)
    experts = placement.num_experts
    load_LE = []
    for layer in range(expert_ids_TLK.shape[1]):
        ids = expert_ids_TLK[:, layer].astype(np.int64).ravel()
        ids = ids[(ids >= 0) & (ids < experts)]
        load_LE.append(np.bincount(ids, minlength=experts))
    return np.take_along_axis(np.stack(load_LE), placement.physical_to_logical_LP, axis=1)


def computed_LM(
    expert_ids_TLK: Integer[np.ndarray, "T L K"], placement: Placement
) -> Int[np.ndarray, "L M"]:
    """Rows that every device computes (int64)."""
    load_LP = computed_LP(expert_ids_TLK, placement)
    return load_LP.reshape(len(load_LP), placement.num_devices, -1).sum(axis=2)


def devices_TK(
    expert_ids_TLK: Integer[np.ndarray, "T L K"], placement: Placement, layer: int
) -> Integer[np.ndarray, "T K"]:
    """int64: the device of every assignment of one layer, -1 where there is no expert."""
    _refuse_replicas(placement)
    ids_TK = expert_ids_TLK[:, layer].astype(np.int64)
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
    home_TK = np.broadcast_to(home_T[:, None], device_TK.shape)
    known_TK = sent_TK & (home_TK >= 0)
    rows_MM = _pairs(home_TK[known_TK], device_TK[known_TK], devices)
    expected = sent_TK & (home_TK < 0)
    if expected.any():
        rows_M = np.bincount(device_TK[expected], minlength=devices)
        rows_MM = rows_MM + rows_M[None, :] / devices
    return _no_diagonal(rows_MM)


def _gathered(device_TK: np.ndarray, home_T: np.ndarray, devices: int) -> np.ndarray:
    home_T = home_T[(device_TK >= 0).any(axis=1)]
    known_M = np.bincount(home_T[home_T >= 0], minlength=devices)
    expected = int((home_T < 0).sum())
    from_M = known_M + expected / devices if expected else known_M
    return _no_diagonal(np.repeat(from_M[:, None], devices, axis=1))


@dataclasses.dataclass(frozen=True, eq=False)
class _Ways:
    """The two hops of hierarchical dispatch: home -> relay (another node), relay -> device.

    The relay has home's place within the node of the device; in home's own node it is home itself,
    which makes both hops one formula.
    """

    device_TK: np.ndarray
    home_T: np.ndarray
    devices: int
    per_node: int

    def rows(self, sent_TK: np.ndarray, sent_node_TK: np.ndarray) -> np.ndarray:
        known_T = self.home_T >= 0
        total = self._hops(known_T, self.home_T[known_T], sent_TK, sent_node_TK)
        if not known_T.all():  # expectation: the mean over the places within a node and the nodes
            total = total + self._expected(~known_T, sent_TK, sent_node_TK)
        return _no_diagonal(total)

    def _hops(self, pick_T, home_T, sent_TK, sent_node_TK) -> np.ndarray:
        device_TK, home_TK = (
            self.device_TK[pick_T],
            np.broadcast_to(home_T[:, None], self.device_TK[pick_T].shape),
        )
        relay_TK = device_TK // self.per_node * self.per_node + home_TK % self.per_node
        slow, fast = sent_node_TK[pick_T], sent_TK[pick_T]
        return _pairs(home_TK[slow], relay_TK[slow], self.devices) + _pairs(
            relay_TK[fast], device_TK[fast], self.devices
        )

    def _expected(self, pick_T, sent_TK, sent_node_TK) -> np.ndarray:
        nodes, each = self.devices // self.per_node, self.per_node
        device_TK = self.device_TK[pick_T]
        node_N = np.bincount(device_TK[sent_node_TK[pick_T]] // each, minlength=nodes)
        to_M = np.bincount(device_TK[sent_TK[pick_T]], minlength=self.devices)
        home, other = np.divmod(np.arange(self.devices), each)
        same_place = other[:, None] == other[None, :]
        same_node = home[:, None] == home[None, :]
        slow_MM = same_place * node_N[home][None, :] / self.devices
        fast_MM = same_node * to_M[None, :] / each
        return np.where(same_node, 0.0, slow_MM) + fast_MM


def _pairs(source: np.ndarray, destination: np.ndarray, devices: int) -> np.ndarray:
    counts = np.bincount(source * devices + destination, minlength=devices * devices)
    return counts.reshape(devices, devices)


def _no_diagonal(rows_MM: np.ndarray) -> np.ndarray:
    rows_MM = rows_MM.copy()
    np.fill_diagonal(rows_MM, 0)
    return rows_MM


def _refuse_replicas(placement: Placement) -> None:
    if placement.has_replicas:
        raise Refused(
            "placement slots",
            placement.num_slots,
            f"rows are counted for one slot per expert, {placement.num_experts} in all",
            "Plan without replicas",
        )


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
    if dispatch == "hierarchical" and (
        devices_per_node is None or placement.num_devices % devices_per_node
    ):
        raise Refused(
            "devices_per_node",
            devices_per_node,
            f"hierarchical dispatch needs a divisor of the {placement.num_devices} devices",
            "Give the devices of a node",
        )
