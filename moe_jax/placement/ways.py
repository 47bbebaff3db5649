"""Rows and seconds of one layer from its contacts, homes being uniform: closed forms of cost.py.

Axes: P placements side by side, M devices, N nodes, G = M / N devices per node. touched_PM holds
the contacts (token, device), node_PN the contacts (token, node). Each home sends a share of 1 / M.

For dispatches whose layers are independent: exchange, hierarchical, gathered. tests/placement hold
these against the token-by-token counts.
"""

import numpy as np

from moe_jax.placement.topology import Topology


def rows(
    topology: Topology, dispatch: str, touched_PM, node_PN, slow_weight: float | None = None
) -> np.ndarray:
    """float64 [P]: rows both ways; a hierarchical one between nodes counts `slow_weight` times.

    The weight is that of the tiers' bandwidths if none is given.
    """
    devices, nodes, each = topology.num_devices, topology.num_nodes, topology.devices_per_node
    if dispatch == "hierarchical":
        ratio = topology.fast.bandwidth / topology.slow.bandwidth
        ratio = ratio if slow_weight is None else slow_weight
        slow_P = node_PN.sum(axis=1) * (2 * ratio * (nodes - 1) / nodes)
        return slow_P + touched_PM.sum(axis=1) * (2 * (each - 1) / each)
    return touched_PM.sum(axis=1) * (2 * (devices - 1) / devices)


def seconds(topology: Topology, dispatch: str, touched_PM, node_PN, tokens) -> np.ndarray:
    """float64 [P]: seconds out and back of contacts (and tokens, one or [P]) given in bytes."""
    nodes, each = topology.num_nodes, topology.devices_per_node
    devices = nodes * each
    if dispatch == "gathered":
        fast_P = np.full(len(touched_PM), tokens / devices * (each - 1))
        slow_P = np.full(len(touched_PM), tokens / devices * (devices - each))
    elif dispatch == "hierarchical":
        fast_P = _inside(touched_PM, nodes) / each
        slow_P = _other(node_PN).max(axis=1) / devices
        slow_P = np.maximum(slow_P, node_PN.max(axis=1) * ((nodes - 1) / devices))
    else:
        on_node_PN = touched_PM.reshape(-1, nodes, each).sum(axis=2)
        fast_P = _inside(touched_PM, nodes) / devices
        slow_P = _other(on_node_PN).max(axis=1) / devices
        slow_P = np.maximum(slow_P, touched_PM.max(axis=1) * ((devices - each) / devices))
    fast, slow = topology.fast, topology.slow
    fast_P = fast_P / fast.bandwidth + fast.latency * (fast_P > 0)
    slow_P = slow_P / slow.bandwidth + slow.latency * (slow_P > 0)
    return 2 * (fast_P + slow_P if dispatch == "hierarchical" else np.maximum(fast_P, slow_P))


def _inside(touched_PM: np.ndarray, nodes: int) -> np.ndarray:
    """float64 [P]: busiest device inside a node, if each home of the node sent every contact."""
    touched_PNG = touched_PM.reshape(len(touched_PM), nodes, -1)
    others_PNG = touched_PNG.sum(axis=2, keepdims=True) - touched_PNG
    received_PNG = touched_PNG * (touched_PNG.shape[2] - 1)
    return np.maximum(others_PNG, received_PNG).max(axis=(1, 2))


def _other(node_PN: np.ndarray) -> np.ndarray:
    return node_PN.sum(axis=1, keepdims=True) - node_PN
