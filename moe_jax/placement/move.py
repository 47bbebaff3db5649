"""What it costs to go from one placement to another: bytes, seconds, and steps to earn them back.

Axes: L MoE layers, E experts, M devices.

Numbers of devices are free where no home is tied to them: `relabelled` gives the groups of the new
placement other numbers so that most experts stay where they are (an exact assignment problem), and
changes neither rows nor seconds:
- exchange, hierarchical, gathered: homes are uniform and a layer's rows depend on that layer alone,
  so each layer is numbered by itself. (What it gives up is the numbering along the chain that
  `solve` adds for free: it pays nothing in these dispatches.)
- coherent dispatch, and the objective exflow: a token goes from device to device over all layers,
  so there is one numbering for all of them.
Devices of a node stay together in either case, and only devices and nodes that are alike change
places. Of two numberings the placement keeps the one it
has unless the other moves less.

Seconds are those of the links alone: the busiest device of the slower tier, all experts at once.
A server that stands still meanwhile, or moves layer by layer, needs longer. Experts that change
their slot within a device stay in its memory and are not counted.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from moe_jax.placement import chain
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.placement.topology import Topology


@dataclasses.dataclass(frozen=True)
class Move:
    """The cost of a move.

    Attributes:
      experts: experts that change device, over all layers.
      of_experts: experts there are, over all layers.
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
    """Every expert whose device changes is sent once, from the old device to the new one."""
    bytes_MM = _bytes_MM(before, after, expert_bytes)
    moved = int((before.device_LE != after.device_LE).sum())
    seconds = float(seconds_lib.exchange_seconds(bytes_MM[None], topology, False)[0])
    return Move(moved, before.device_LE.size, moved * expert_bytes, seconds)


def relabelled(problem: Problem, before: Placement, after: Placement) -> Placement:
    """`after` with the device numbers that move least; see the head of this file."""
    old_LE, new_LE = before.device_LE, after.device_LE.copy()
    if problem.separable:
        for layer, new_E in enumerate(after.device_LE):
            new_LE[layer] = _numbered(problem, old_LE[layer], new_E)
    else:
        new_LE = _numbered(problem, old_LE, new_LE)
    return Placement.from_device_LE(new_LE, problem.num_devices)


def _numbered(problem: Problem, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """`new` under the numbering of its groups that leaves most entries as in `old`."""
    shared_MM = np.zeros((problem.num_devices, problem.num_devices))
    np.add.at(shared_MM, (old.ravel(), new.ravel()), 1.0)
    return numbering(problem, shared_MM)[new]


def numbering(problem: Problem, worth_MM: np.ndarray) -> np.ndarray:
    """int64 [M]: the device that each group gets, for most worth; as they are if none is better.

    Args:
      problem: which devices and nodes may change places.
      worth_MM: [device, group], what a group is worth on a device.
    """
    devices, each = problem.num_devices, problem.topology.devices_per_node
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


def _bytes_MM(before: Placement, after: Placement, expert_bytes: int) -> Float[np.ndarray, "M M"]:
    """[source, destination]"""
    bytes_MM = np.zeros((before.num_devices, before.num_devices))
    np.add.at(bytes_MM, (before.device_LE.ravel(), after.device_LE.ravel()), float(expert_bytes))
    np.fill_diagonal(bytes_MM, 0.0)
    return bytes_MM
