"""What it costs to go from one placement to another: bytes, seconds, and steps to earn them back.

Axes: L MoE layers, E experts, M devices.

Numbers of devices are free where no home is tied to them: `relabelled` gives the groups of the new
placement other numbers so that most experts stay where they are (an exact assignment problem), and
changes neither rows nor seconds, whatever the objective is:
- exchange, hierarchical, gathered: homes are uniform and a layer's rows depend on that layer alone,
  so each layer is numbered by itself. (What it gives up is the numbering along the chain that
  `solve` adds for free: it pays nothing in these dispatches.)
- coherent dispatch, and the objective exflow: a token goes from device to device over all layers,
  so there is one numbering for all of them.
- shuffled dispatch: devices keep their numbers, which decide between homes of equal worth.
Devices of a node stay together in either case, and only devices and nodes that are alike change
places; on a torus, and for `hops`, none do. Of two numberings the placement keeps the one it
has unless the other moves less. With replicas this holds but for the order of copies, which the
copy rule takes them in; shares of copies (shares.py) go with them, and those of a node with it.

Pins are worth more than all moves together: a placement that keeps them still does afterwards.

Seconds are those of the links alone: the busiest device of the slower tier, all experts at once.
A server that stands still meanwhile, or moves layer by layer, needs longer. Experts that change
their slot within a device stay in its memory and are not counted.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from moe_jax.placement import chain, cost
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.limits.previous import arrivals_L, holds_LEM, placement_of, shares_moved
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.placement.topology import Topology


@dataclasses.dataclass(frozen=True)
class Move:
    """The cost of a move.

    Attributes:
      experts: experts that change device, over all layers; with replicas, copies that appear.
      of_experts: experts there are, over all layers; with replicas, slots.
      bytes: what they weigh.
      seconds: to send them over the links.
    """

    experts: int
    of_experts: int
    bytes: int
    seconds: float

    def steps(self, saved: float) -> float | None:
        """Steps after which `saved` seconds per step have paid for the move; None: they never do.

        A move of nothing is paid for at once, if anything is saved.
        """
        return self.seconds / saved if saved > 0 else None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def move(before: Placement, after: Placement, topology: Topology, expert_bytes: int) -> Move:
    """Every copy of an expert on a device without one is sent there once; see `_bytes_MM`."""
    bytes_MM = _bytes_MM(before, after, topology, expert_bytes)
    moved = int(arrivals_L(before, after).sum())
    seconds = float(seconds_lib.exchange_seconds(bytes_MM[None], topology, False)[0])
    return Move(moved, after.num_layers * after.num_slots, moved * expert_bytes, seconds)


def relabelled(
    problem: Problem, before: Placement, after: Placement, *, alike: bool = False
) -> Placement:
    """`after` with the device numbers that move least; see the head of this file.

    Args:
      alike: one numbering for all layers in any case: transitions and other dispatches count as
        before, too.
    """
    if problem.dispatch == "shuffled" or problem.topology.torus is not None:
        return after
    new_LEM = holds_LEM(after)
    by_layer = not alike and problem.separable and problem.dispatch not in cost.TIED
    device_LM = _devices_LM(problem, holds_LEM(before), new_LEM, by_layer)
    found = placement_of(_renumbered(new_LEM, device_LM))
    if after.share_LNP is None:
        return found
    share_LNP = shares_moved(after, found.physical_to_logical_LP, device_LM)
    assert share_LNP is not None
    nodes = problem.topology.nodes
    turned_LNP = share_LNP.copy()
    for layer, device_M in enumerate(device_LM):
        turned_LNP[layer, nodes.node_M[device_M[nodes.first_N]]] = share_LNP[layer, : nodes.count]
    return dataclasses.replace(found, share_LNP=turned_LNP)


def numbered(
    problem: Problem, worth_LEM: np.ndarray, new_LEM: Bool[np.ndarray, "L E M"]
) -> Bool[np.ndarray, "L E M"]:
    """Who holds what, under the device numbers that keep most pins, and then are worth most.

    Args:
      problem: pins, which devices may change places, and whether layers by themselves.
      worth_LEM: what it is worth to have this expert on this device, 0 to 1.
      new_LEM: who holds what so far.
    """
    return _renumbered(new_LEM, _devices_LM(problem, worth_LEM, new_LEM, problem.separable))


def _devices_LM(
    problem: Problem, worth_LEM: np.ndarray, new_LEM: np.ndarray, by_layer: bool
) -> np.ndarray:
    """int64 [L, M]: the number that every device gets, in each layer or in all; see `numbered`."""
    worth_LEM = worth_LEM.astype(float)
    if problem.pins is not None:  # a pin outweighs all else
        worth_LEM = worth_LEM + (worth_LEM.size + 1) * problem.pins.held_LEM
    worth_LMM = worth_LEM.transpose(0, 2, 1) @ new_LEM.astype(float)
    if not by_layer:
        worth_LMM = np.tile(worth_LMM.sum(axis=0), (len(new_LEM), 1, 1))
    return np.stack([numbering(problem, worth_MM) for worth_MM in worth_LMM])


def _renumbered(new_LEM: np.ndarray, device_LM: np.ndarray) -> np.ndarray:
    """bool [L, E, M]: the same under other numbers of devices."""
    found_LEM = np.empty_like(new_LEM)
    for found_EM, new_EM, device_M in zip(found_LEM, new_LEM, device_LM, strict=True):
        found_EM[:, device_M] = new_EM
    return found_LEM


def numbering(problem: Problem, worth_MM: np.ndarray) -> np.ndarray:
    """int64 [M]: the device that each group gets, for most worth; as they are if none is better.

    Args:
      problem: which devices and nodes may change places.
      worth_MM: [device, group], what a group is worth on a device.
    """
    devices, each = problem.num_devices, problem.topology.devices_per_node
    if problem.labels_count:
        return np.arange(devices)
    # a chain of two layers whose "experts" are devices: what stays is what the labelling keeps
    as_they_are = np.tile(np.arange(devices), (2, 1))
    unlimited = np.full(2, np.inf)
    nothing_LE = np.zeros((2, devices))
    pair = chain.Chain(
        worth_MM[None], devices, each, 0.0, nothing_LE, unlimited, None, problem.kind_M
    )
    device_of_M = chain.align(pair, as_they_are)[1]
    if worth_MM[device_of_M, np.arange(devices)].sum() <= np.trace(worth_MM):
        return as_they_are[0]
    return device_of_M


def _bytes_MM(
    before: Placement, after: Placement, topology: Topology, expert_bytes: int
) -> Float[np.ndarray, "M M"]:
    """[source, destination]; of several sources one in the node, then the one that sent least."""
    devices, node_M = before.num_devices, topology.node_M
    bytes_MM, sent_M = np.zeros((devices, devices)), np.zeros(devices)
    old_LEM = holds_LEM(before)
    for layer, expert, device in np.argwhere(holds_LEM(after) & ~old_LEM):
        sources = np.flatnonzero(old_LEM[layer, expert])
        far = node_M[sources] != node_M[device]
        source = int(sources[np.lexsort((sent_M[sources], far))[0]])
        bytes_MM[source, device] += expert_bytes
        sent_M[source] += expert_bytes
    return bytes_MM
