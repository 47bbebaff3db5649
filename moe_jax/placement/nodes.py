"""Which node each device is in, and its place there; nodes may hold different numbers of devices.

Axes: M devices, N nodes. Devices are numbered node by node.

Promise: `Nodes` is what everything that asks "same node?", "which place?", "who relays?" reads.
`devices_per_node` is one number where all nodes are alike, else one number per node.

Relay: hierarchical dispatch sends a row into a node through one device, that with home's place; in
a node of n devices, place p of a larger one becomes p mod n. In home's own node it is home itself.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from moe_jax.errors import Refused

MOST = 2**16  # devices of a node, and nodes

DevicesPerNode = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Nodes:
    """Devices by node.

    Attributes:
      size_N: int64, devices of every node.
    """

    size_N: np.ndarray

    @property
    def count(self) -> int:
        return len(self.size_N)

    @functools.cached_property
    def devices(self) -> int:
        return int(self.size_N.sum())

    @property
    def equal(self) -> bool:
        """All nodes have as many devices."""
        return bool((self.size_N == self.size_N[0]).all())

    @functools.cached_property
    def first_N(self) -> np.ndarray:
        """int64: the first device of every node."""
        return np.cumsum(self.size_N) - self.size_N

    @functools.cached_property
    def node_M(self) -> np.ndarray:
        """int64: the node of every device."""
        return np.repeat(np.arange(self.count), self.size_N)

    @functools.cached_property
    def place_M(self) -> np.ndarray:
        """int64: the place of every device within its node."""
        return np.arange(self.devices) - self.first_N[self.node_M]

    @functools.cached_property
    def same_MM(self) -> np.ndarray:
        """bool: two devices of one node."""
        return self.node_M[:, None] == self.node_M[None, :]

    @functools.cached_property
    def relayed_M(self) -> np.ndarray:
        """int64: homes, on all nodes, whose way into a node leads over each device of it."""
        entry_MN = self.relay(np.arange(self.devices)[:, None], np.arange(self.count))
        return np.bincount(entry_MN.ravel(), minlength=self.devices)

    def inside(self, node: int) -> slice:
        """The devices of a node."""
        return slice(int(self.first_N[node]), int(self.first_N[node] + self.size_N[node]))

    def relay(self, home, node) -> np.ndarray:
        """int64: the device over which rows of `home` enter `node`; arrays that broadcast."""
        return np.asarray(self.first_N[node] + self.place_M[home] % self.size_N[node])

    def node_of(self, device) -> np.ndarray:
        """int64: the node of each device; where a device is negative (none), so is its node."""
        return np.where(device < 0, -1, self.node_M[np.maximum(device, 0)])

    def sums(self, value_PM: np.ndarray) -> np.ndarray:
        """[P, N]: sums over the devices of every node."""
        return np.add.reduceat(value_PM, self.first_N, axis=1)


def of(devices: int, devices_per_node: DevicesPerNode | None) -> Nodes:
    """The nodes of `devices` devices; None: all in one node.

    Raises:
      Refused: the nodes do not make up the devices.
    """
    each = devices if devices_per_node is None else devices_per_node
    if isinstance(each, tuple):
        if sum(each) != devices:
            raise Refused(
                "devices_per_node",
                list(each),
                f"their sum is {sum(each)}, and there are {devices} devices",
                "Correct one of them",
            )
        return Nodes(np.array(each, np.int64))
    if each < 1 or devices % each:
        raise Refused(
            "devices_per_node",
            each,
            f"equal nodes need a divisor of the {devices} devices",
            "Give a divisor, or the devices of every node: [8, 4]",
        )
    return Nodes(np.full(devices // each, each, np.int64))


def checked(num_nodes: Any, devices_per_node: Any) -> DevicesPerNode:
    """`devices_per_node` in its one form: a number where nodes are alike, else a tuple.

    Raises:
      Refused: not whole numbers from 1 to MOST, or not one for each of the `num_nodes` nodes.
    """
    if not isinstance(devices_per_node, (list, tuple)):
        _whole("devices_per_node", devices_per_node)
        return devices_per_node
    if len(devices_per_node) != num_nodes:
        raise Refused(
            "devices_per_node",
            list(devices_per_node)[:20],
            f"{len(devices_per_node)} numbers for {num_nodes} nodes",
            "Give one number per node, or one for all",
        )
    for size in devices_per_node:
        _whole("devices_per_node", size)
    alike = len(set(devices_per_node)) == 1
    return devices_per_node[0] if alike else tuple(devices_per_node)


def _whole(field: str, value) -> None:
    if type(value) is not int or not 1 <= value <= MOST:
        raise Refused(field, value, f"a whole number from 1 to {MOST}", "Correct it")
