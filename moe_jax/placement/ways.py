"""Rows and seconds of one layer from its contacts, homes being uniform: closed forms of cost.py.

Axes: P placements side by side, M devices, N nodes. touched_PM holds the contacts (token, device),
node_PN the contacts (token, node). Each home sends a share of 1 / M. In hierarchical dispatch a
device relays for `relayed_M` homes, itself among them (nodes.py).

For dispatches whose layers are independent: exchange, hierarchical, gathered. tests/placement hold
these against the token-by-token counts.
"""

import numpy as np

from moe_jax.placement.nodes import Nodes
from moe_jax.placement.topology import Topology
from moe_jax.placement.torus import Torus


def rows(
    topology: Topology, dispatch: str, touched_PM, node_PN, slow_weight: float | None = None
) -> np.ndarray:
    """float64 [P]: rows both ways; a hierarchical one between nodes counts `slow_weight` times.

    The weight is that of the tiers' bandwidths if none is given.
    """
    devices, nodes = topology.num_devices, topology.nodes
    if dispatch == "hierarchical":
        ratio = topology.fast.bandwidth / topology.slow.bandwidth
        ratio = ratio if slow_weight is None else slow_weight
        slow_P = node_PN @ (2 * ratio * (devices - nodes.size_N) / devices)
        return slow_P + touched_PM @ (2 * (devices - nodes.relayed_M) / devices)
    return touched_PM.sum(axis=1) * (2 * (devices - 1) / devices)


def seconds(topology: Topology, dispatch: str, touched_PM, node_PN, tokens) -> np.ndarray:
    """float64 [P]: seconds out and back of contacts (and tokens, one or [P]) given in bytes."""
    devices, nodes = topology.num_devices, topology.nodes
    if dispatch == "gathered":
        fast_P = np.full(len(touched_PM), tokens / devices * (nodes.size_N.max() - 1))
        slow_P = np.full(len(touched_PM), tokens / devices * (devices - nodes.size_N.min()))
    elif dispatch == "hierarchical":
        fast_P = _inside(touched_PM, nodes, nodes.relayed_M) / devices
        slow_P = _other(node_PN).max(axis=1) / devices
        most_N = np.maximum.reduceat(nodes.relayed_M, nodes.first_N)
        slow_P = np.maximum(slow_P, (node_PN * ((most_N - 1) / devices)).max(axis=1))
    else:
        on_node_PN = nodes.sums(touched_PM)
        fast_P = _inside(touched_PM, nodes, np.ones(devices, np.int64)) / devices
        slow_P = _other(on_node_PN).max(axis=1) / devices
        far_M = (devices - nodes.size_N)[nodes.node_M]
        slow_P = np.maximum(slow_P, (touched_PM * (far_M / devices)).max(axis=1))
    fast, slow = topology.fast, topology.slow
    slow_P = slow_P / slow.bandwidth + slow.latency * (slow_P > 0)
    fast_P = fast_P / fast.bandwidth + fast.latency * (fast_P > 0)
    ways = [fast_P, fast_P]  # out and back
    if topology.torus is not None:
        ways = _on_torus(topology, topology.torus, dispatch, touched_PM, tokens)
    if dispatch == "hierarchical":
        return ways[0] + ways[1] + 2 * slow_P
    return np.maximum(ways[0], slow_P) + np.maximum(ways[1], slow_P)


def _on_torus(
    topology: Topology, torus: Torus, dispatch: str, touched_PM, tokens
) -> list[np.ndarray]:
    """float64 [P], out and back: seconds of the busiest link inside nodes, of the longest way."""
    devices, fast, copies = topology.num_devices, topology.fast, len(touched_PM)
    if dispatch == "gathered":
        received = np.broadcast_to(tokens / devices * (torus.size - 1), copies)
        links, hops = max(int(torus.links_G.min()), 1), int(torus.hops_GG.max())
        way_P = received / (links * fast.bandwidth) + fast.latency * hops * (received > 0)
        return [way_P, way_P]
    touched_XG = touched_PM.reshape(-1, torus.size)  # X: placements and nodes
    homes = topology.num_nodes if dispatch == "hierarchical" else 1  # that a device sends for
    hops_P = torus.furthest(touched_XG > 0).reshape(copies, -1).max(axis=1)
    ways = []
    for on_links_KG in (torus.shared_KG, torus.answered_KG):
        busiest_X = (touched_XG @ on_links_KG.T).max(axis=1) * (homes / devices)
        busiest_P = busiest_X.reshape(copies, -1).max(axis=1)
        ways.append(busiest_P / fast.bandwidth + fast.latency * hops_P)
    return ways


def _inside(touched_PM: np.ndarray, nodes: Nodes, homes_M: np.ndarray) -> np.ndarray:
    """float64 [P]: the busiest device inside its node, if every home sent every contact.

    Device m sends within its node for `homes_M[m]` homes.
    """
    others_PM = nodes.sums(touched_PM)[:, nodes.node_M] - touched_PM
    from_M = nodes.sums(homes_M[None])[0, nodes.node_M] - homes_M
    return np.maximum(others_PM * homes_M, touched_PM * from_M).max(axis=1)


def _other(node_PN: np.ndarray) -> np.ndarray:
    return node_PN.sum(axis=1, keepdims=True) - node_PN
