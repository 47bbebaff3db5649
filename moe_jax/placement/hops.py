"""Hops between where tokens are and where their experts are: the topology ILP (arXiv 2508.09229).

Axes: L MoE layers, E experts, M devices.

Every assignment of a token to an expert goes from the dispatcher of the layer to the expert's
device, and from there to its collector: load_LE[l, e] (hops[dispatcher, m] + hops[m, collector])
if expert e is on device m. The cost is linear in the placement, so every layer is an assignment
problem of its own: solved exactly, under load caps as an integer program (HiGHS). What that leaves
out: hops are not time, and a token with several experts on a device counts several times; `rows`
and `seconds` count it once.

With replicas the copy that serves an assignment follows from where the token is sent from
(copies.py), so an expert's cost depends on its own copies alone: hops_counts.py counts it exactly,
hops_copies.py searches, hops_bound.py bounds.

Dispatchers
- uniform: tokens live on all devices alike and return there (every device dispatches and collects
  a share of 1 / M).
- blocks: attention of neighbouring layers lies on one device, layer l on device l M // L, and the
  next layer's device collects (the last layer's own).
"""

import dataclasses

import numpy as np

from moe_jax.placement import clock, ilp

DISPATCHERS = ("uniform", "blocks")


@dataclasses.dataclass(frozen=True, eq=False)
class Costs:
    """What every expert costs on every device, in whole numbers.

    Attributes:
      whole_LEM: int64, hops of all its assignments, times `parts`.
      parts: M where every device dispatches a share, else 1.
    """

    whole_LEM: np.ndarray
    parts: int

    def layer_value(self, layer: int, device_E: np.ndarray) -> float:
        """Hops of one layer."""
        cost_EM = self.whole_LEM[layer]
        return int(cost_EM[np.arange(len(cost_EM)), device_E].sum()) / self.parts


def costs(load_LE: np.ndarray, hops_MM: np.ndarray, dispatcher: str) -> Costs:
    """See the head of this file.

    Args:
      load_LE: whole numbers, assignments of every expert.
      hops_MM: whole numbers, from device to device.
      dispatcher: one of DISPATCHERS.
    """
    return costs_of(load_LE, ways(hops_MM, len(load_LE), dispatcher))


def costs_of(load_LE: np.ndarray, each: "list[Ways]") -> Costs:
    """The same, from the ways of every layer."""
    way_LM = np.stack([one.way_HM.sum(axis=0) for one in each])
    parts = len(each[0].home_H)
    return Costs(load_LE.astype(np.int64)[:, :, None] * way_LM[:, None, :], parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Ways:
    """Of one layer; H homes of its tokens, each for an equal share of them.

    Attributes:
      home_H: int64, the device that tokens are sent from; the copy rule goes by it.
      way_HM: hops from there to a device and on to the collector.
    """

    home_H: np.ndarray
    way_HM: np.ndarray


def ways(hops_MM: np.ndarray, layers: int, dispatcher: str) -> list[Ways]:
    """By layer; `dispatcher` is one of DISPATCHERS."""
    devices = len(hops_MM)
    if dispatcher == "uniform":
        return [Ways(np.arange(devices), hops_MM + hops_MM.T)] * layers
    return [between(hops_MM, *block(layer, layers, devices)) for layer in range(layers)]


def block(layer: int, layers: int, devices: int) -> tuple[int, int]:
    """The dispatcher and the collector of a layer, for `blocks`."""
    return layer * devices // layers, min(layer + 1, layers - 1) * devices // layers


def between(hops_MM: np.ndarray, at: int, to: int) -> Ways:
    """One device dispatches, one collects."""
    return Ways(np.array([at]), (hops_MM[at] + hops_MM[:, to])[None])


@dataclasses.dataclass(frozen=True, eq=False)
class Optimum:
    """Labels and what they cost at least.

    Attributes:
      device_LE: int64.
      bound: of the hops of all layers; proven.
    """

    device_LE: np.ndarray
    bound: float


def solved(
    cost: Costs, load_LE: np.ndarray, cap_LM: np.ndarray, start_LE: np.ndarray, deadline: float
) -> Optimum:
    """The fewest hops, no device loaded above its cap.

    A layer whose program finds nothing in time keeps `start_LE`; its bound is then the optimum
    without caps.
    """
    device_LE, bound = start_LE.astype(np.int64), 0
    for layer, cost_EM in enumerate(cost.whole_LEM):
        free_E = ilp.assign(-cost_EM.astype(float))
        least = int(cost_EM[np.arange(len(free_E)), free_E].sum())
        load_M = np.bincount(free_E, weights=load_LE[layer], minlength=cost_EM.shape[1])
        if (load_M <= cap_LM[layer] * (1 + 1e-9)).all():
            device_LE[layer] = free_E
        elif left := clock.left(deadline):
            left /= len(device_LE) - layer
            found = ilp.fewest_capped(cost_EM, load_LE[layer], cap_LM[layer], left)
            if found is None:
                bound += least
                continue
            least = max(least, int(found.bound))
            now = cost.layer_value(layer, device_LE[layer])
            if cost.layer_value(layer, found.device) < now:
                device_LE[layer] = found.device
        bound += least
    return Optimum(device_LE, bound / cost.parts)


def hops_optimal(
    load_LE: np.ndarray, hops_MM: np.ndarray, dispatcher: str = "uniform"
) -> np.ndarray:
    """int64 [L, E]: the topology ILP's optimum without load caps, equal groups: a baseline."""
    cost = costs(load_LE, hops_MM, dispatcher)
    return np.stack([ilp.assign(-cost_EM.astype(float)) for cost_EM in cost.whole_LEM])
