"""Transitions along the layers: exact re-assignment of a layer, and a pool of partitions joined.

Axes: L layers, E experts, M devices, C partitions of one layer in the pool.

Only adjacent layers interact, so layers form a chain. With both neighbours fixed the best labels
of one layer are an assignment problem (ilp.assign). With the *partitions* of all layers fixed, the
best relative labelling of two adjacent ones is an M x M assignment that no other layer enters;
hence for a pool of C partitions per layer the best choice of partitions and labels together is an
exact dynamic program over the chain: states are partitions, edge weights are best labellings.

On nodes x devices a transition that stays in its node keeps `node_likeness` of what staying on its
device keeps. The best labelling of two partitions that keeps nodes together is then an assignment
of nodes (each to one of its size) whose weights are assignments of devices, still exact.
"""

import dataclasses
import functools

import numpy as np
from scipy import optimize

from moe_jax.placement import clock, ilp, priced
from moe_jax.placement import nodes as nodes_lib
from moe_jax.placement.nodes import DevicesPerNode, Nodes

LARGE = 100  # variables of a layer above which caps are priced, not programmed


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """Transitions to keep together, and what must hold.

    Attributes:
      keep_LEE: float64 [L - 1, E, E], gained when e of layer l and f of layer l + 1 share a device.
      num_devices: M, numbered node by node.
      devices_per_node: M on a flat machine; one number per node where nodes differ.
      node_likeness: the share that is gained on another device of the same node.
      load_LE: float64.
      cap_L: largest device load of each layer; inf where there is none.
      speed_M: a device may be loaded up to its speed times the cap; None: all are 1.
      kind_M: labels may only go to devices of the same kind; None: all are alike.
    """

    keep_LEE: np.ndarray
    num_devices: int
    devices_per_node: DevicesPerNode
    node_likeness: float
    load_LE: np.ndarray
    cap_L: np.ndarray
    speed_M: np.ndarray | None = None
    kind_M: np.ndarray | None = None

    @property
    def num_layers(self) -> int:
        return len(self.keep_LEE) + 1

    @functools.cached_property
    def cap_LM(self) -> np.ndarray:
        """float64 [L, M]: largest load of every device."""
        speed_M = np.ones(self.num_devices) if self.speed_M is None else self.speed_M
        return self.cap_L[:, None] * speed_M

    @functools.cached_property
    def nodes(self) -> Nodes:
        return nodes_lib.of(self.num_devices, self.devices_per_node)

    @functools.cached_property
    def likeness_MM(self) -> np.ndarray:
        return likeness(self.nodes, self.node_likeness)

    @functools.cached_property
    def alike_nodes(self) -> list[tuple[int, int, np.ndarray | None]]:
        """Nodes that may change places, and which of their devices may not (None: all may)."""
        nodes, found = self.nodes, []
        kind_M = np.zeros(nodes.devices, np.int64) if self.kind_M is None else self.kind_M
        for node, group in np.ndindex(nodes.count, nodes.count):
            here_D, there_D = kind_M[nodes.inside(node)], kind_M[nodes.inside(group)]
            if np.array_equal(np.sort(here_D), np.sort(there_D)):
                apart_DD = here_D[:, None] != there_D
                found.append((node, group, apart_DD if apart_DD.any() else None))
        return found

    def value(self, device_LE: np.ndarray) -> float:
        """What the labels keep."""
        like_LEE = self.likeness_MM[device_LE[:-1, :, None], device_LE[1:, None, :]]
        return float((self.keep_LEE * like_LEE).sum())

    def ahead_EM(self, layer: int, part_E: np.ndarray) -> np.ndarray:
        """float64 [E, M]: what experts of layer - 1 keep with each group of `layer`."""
        return self.keep_LEE[layer - 1] @ np.eye(self.num_devices)[part_E]

    def own(self, layer: int, part_E: np.ndarray) -> float:
        """What a partition keeps by itself; here nothing."""
        return 0.0

    def over_L(self, device_LE: np.ndarray) -> np.ndarray:
        """bool [L]: does a device pass the layer's cap?"""
        onehot_MM = np.eye(self.num_devices)
        load_LM = np.einsum("le,lem->lm", self.load_LE, onehot_MM[device_LE])
        return (load_LM > self.cap_LM * (1 + 1e-9)).any(axis=1)

    def benefit_EM(self, device_LE: np.ndarray, layer: int, before: bool, after: bool):
        """float64 [E, M]: what an expert keeps on each device, given its neighbours."""
        total_EM = np.zeros((self.keep_LEE.shape[1], self.num_devices))
        onehot_MM = np.eye(self.num_devices)
        if before and layer:
            total_EM += self.keep_LEE[layer - 1].T @ onehot_MM[device_LE[layer - 1]]
        if after and layer + 1 < self.num_layers:
            total_EM += self.keep_LEE[layer] @ onehot_MM[device_LE[layer + 1]]
        return total_EM @ self.likeness_MM


def sweep(chain: Chain, first_E: np.ndarray, deadline: float) -> np.ndarray:
    """Greedy: layer after layer, each exactly, given the layer before it."""
    device_LE = np.tile(first_E, (chain.num_layers, 1))
    for layer in range(1, chain.num_layers):
        benefit_EM = chain.benefit_EM(device_LE, layer, before=True, after=False)
        device_LE[layer] = _reassigned(chain, benefit_EM, layer, device_LE[layer], deadline)
    return device_LE


def alternate(chain: Chain, device_LE: np.ndarray, deadline: float) -> np.ndarray:
    """Re-assigns each layer given both neighbours until nothing improves."""
    device_LE = device_LE.copy()
    layers = [*range(chain.num_layers), *reversed(range(1, chain.num_layers - 1))]
    todo = np.ones(chain.num_layers, bool)  # neighbours have changed since, or never looked at
    while todo.any():
        for layer in layers:
            if not todo[layer]:
                continue
            if clock.late(deadline):
                return device_LE
            todo[layer] = False
            benefit_EM = chain.benefit_EM(device_LE, layer, before=True, after=True)
            new_E = _reassigned(chain, benefit_EM, layer, device_LE[layer], deadline)
            experts = np.arange(len(new_E))
            gain = (benefit_EM[experts, new_E] - benefit_EM[experts, device_LE[layer]]).sum()
            if gain > 1e-9 * (1.0 + abs(benefit_EM).sum()):
                device_LE[layer] = new_E
                todo[max(layer - 1, 0) : layer + 2] = True
                todo[layer] = False
    return device_LE


class Pool:
    """Partitions per layer, without labels and without doubles, and the best chain through them."""

    def __init__(self, chain: Chain, size: int):
        self._chain, self._size = chain, size
        self._found: list[dict[bytes, int]] = [{} for _ in range(chain.num_layers)]
        self._parts: list[np.ndarray] = []  # by number
        self._ahead: list[np.ndarray] = []  # by number, what the layer before keeps with it, if any
        self._own: list[float] = []  # by number, what it keeps by itself
        self._kept: dict[tuple[int, int], float] = {}  # by the best labels of two, once computed

    def add(self, device_LE: np.ndarray) -> None:
        """Takes in the partitions of labels; the oldest leave when the pool is full."""
        for layer, device_E in enumerate(device_LE):
            canonical_E = _canonical(self._chain, device_E)
            known, key = self._found[layer], canonical_E.tobytes()
            number = known.pop(key, None)
            if number is None:
                number = len(self._parts)
                self._parts.append(canonical_E)
                self._own.append(self._chain.own(layer, canonical_E))
                ahead_EM = self._chain.ahead_EM(layer, canonical_E) if layer else np.empty((0, 0))
                self._ahead.append(ahead_EM)
            known[key] = number
            if len(known) > self._size:
                del known[next(iter(known))]

    def best_chain(self, deadline: float) -> np.ndarray | None:
        """int64 [L, E]: the best labels over all choices of partitions; None if time ran out."""
        pools = [list(found.values()) for found in self._found]
        own_C = [np.array([self._own[number] for number in pool]) for pool in pools]
        value_C, edges = own_C[0], []
        for layer in range(1, len(pools)):
            if clock.late(deadline):
                return None
            weight_CC = self._edge(pools[layer - 1], pools[layer])
            total_CC = value_C[:, None] + weight_CC
            edges.append(total_CC.argmax(axis=0))
            value_C = total_CC.max(axis=0) + own_C[layer]
        chosen = [int(value_C.argmax())]
        for back_C in reversed(edges):
            chosen.append(int(back_C[chosen[-1]]))
        parts = [self._parts[pool[c]] for pool, c in zip(pools, reversed(chosen), strict=True)]
        return align(self._chain, np.stack(parts))

    def _edge(self, before: list[int], after: list[int]) -> np.ndarray:
        """float64 [C, C]: what the best labelling of each pair of partitions keeps."""
        onehot_MM, weight_CC = np.eye(self._chain.num_devices), np.empty((len(before), len(after)))
        for c, one in enumerate(before):
            new = [d for d, other in enumerate(after) if (one, other) not in self._kept]
            if new:
                before_ME = onehot_MM[self._parts[one]].T
                ahead_CEM = np.stack([self._ahead[after[d]] for d in new])
                for d, blocks_MM in zip(new, before_ME @ ahead_CEM, strict=True):
                    self._kept[one, after[d]] = _best_labels(self._chain, blocks_MM).kept
            weight_CC[c] = [self._kept[one, other] for other in after]
        return weight_CC


def align(chain: Chain, part_LE: np.ndarray) -> np.ndarray:
    """Labels the groups of each layer so that it keeps most of the layer before it (exact)."""
    device_LE = part_LE.copy()
    for layer in range(1, len(part_LE)):
        blocks_MM = _blocks(chain, layer, device_LE[layer - 1], part_LE[layer])
        device_LE[layer] = _best_labels(chain, blocks_MM).device_of_group_M[part_LE[layer]]
    return device_LE


def likeness(nodes: Nodes, node_likeness: float) -> np.ndarray:
    """float64 [M, M]: 1 on one device, `node_likeness` on one node, else 0."""
    like_MM = np.where(nodes.same_MM, node_likeness, 0.0)
    np.fill_diagonal(like_MM, 1.0)
    return like_MM


@dataclasses.dataclass(frozen=True, eq=False)
class _Labels:
    kept: float
    device_of_group_M: np.ndarray


def _best_labels(chain: Chain, blocks_MM: np.ndarray) -> _Labels:
    """The device of each group of the later layer; blocks_MM [device before, group after]."""
    nodes, like = chain.nodes, chain.node_likeness
    if nodes.count == 1 and chain.kind_M is None:
        return _assigned(blocks_MM)
    weight_NN = np.full((nodes.count, nodes.count), -np.inf)  # of nodes that are not alike
    inner: dict[tuple[int, int], _Labels] = {}
    for node, group, apart_DD in chain.alike_nodes:
        tile_DD = blocks_MM[nodes.inside(node), nodes.inside(group)]
        free_DD = tile_DD if apart_DD is None else np.where(apart_DD, -np.inf, tile_DD)
        inner[node, group] = labels = _assigned(free_DD)
        weight_NN[node, group] = (1 - like) * labels.kept + like * tile_DD.sum()
    outer = _assigned(weight_NN)
    device_M = np.empty(chain.num_devices, np.int64)
    for group, node in enumerate(outer.device_of_group_M):
        within_D = inner[node, group].device_of_group_M
        device_M[nodes.inside(group)] = nodes.first_N[node] + within_D
    return _Labels(outer.kept, device_M)


def _assigned(weight_MM: np.ndarray) -> _Labels:
    rows, columns = optimize.linear_sum_assignment(weight_MM, True)
    device_M = np.empty(len(rows), np.int64)
    device_M[columns] = rows
    return _Labels(float(weight_MM[rows, columns].sum()), device_M)


def _reassigned(chain: Chain, benefit_EM, layer: int, now_E: np.ndarray, deadline: float):
    cap_M = chain.cap_LM[layer]
    if not np.isfinite(cap_M).any():
        return ilp.assign(benefit_EM)
    if not (left := clock.left(deadline)):
        return now_E
    if benefit_EM.size > LARGE:
        new_E = priced.assign(benefit_EM, chain.load_LE[layer], cap_M)
    else:
        new_E = ilp.assign_capped(benefit_EM, chain.load_LE[layer], cap_M, left)
    return now_E if new_E is None else new_E


def _blocks(chain: Chain, layer: int, before_E: np.ndarray, part_E: np.ndarray) -> np.ndarray:
    """float64 [M, M]: transitions from each device of layer - 1 to each group of layer."""
    return np.eye(chain.num_devices)[before_E].T @ chain.ahead_EM(layer, part_E)


def _canonical(chain: Chain, device_E: np.ndarray) -> np.ndarray:
    """One form per partition: nodes, and devices in them, in the order of their first experts.

    Where devices or nodes differ it stays as it is: a partition may be in the pool more than once.
    """
    nodes = chain.nodes
    if not nodes.equal or chain.kind_M is not None:
        return device_E
    _, first_node_N = np.unique(nodes.node_M[device_E], return_index=True)
    _, first_M = np.unique(device_E, return_index=True)
    device_M = np.argsort(np.lexsort((first_M, first_node_N[nodes.node_M])))
    return device_M[device_E]
