"""The least that the busiest link or device of an exchange carries, wherever the contacts lie.

Axes: M devices, N nodes, R links (or devices that send or receive), X devices or nodes.

Homes being uniform, what each link carries is linear in the contacts (ways.py): A c with c_x
contacts on x, sum c = C. For every weighting y >= 0 of the links with sum y = 1

    max_r (A c)_r >= y A c >= C min_x (y A)_x,

the value of a matrix game; the best y is a linear program (HiGHS), but the bound is evaluated from
y, so it holds whatever the solver returns. Equal devices on equal nodes have the mean as value.
"""

import dataclasses

import numpy as np
from scipy import optimize

from moe_jax.placement.nodes import Nodes
from moe_jax.placement.topology import Topology

PROGRAM_SECONDS = 2.0


def least_busiest(on_links_RX: np.ndarray) -> float:
    """The least maximum over the rows, per contact, over all ways to spread contacts on columns."""
    if not on_links_RX.any():
        return 0.0
    rows, columns = on_links_RX.shape
    scale, spread_R = float(on_links_RX.max()), on_links_RX.mean(axis=1)
    busiest_R = spread_R >= spread_R.max() * (1 - 1e-9)
    found = [_least(on_links_RX, np.ones(rows)), _least(on_links_RX, busiest_R.astype(float))]
    if max(found) >= spread_R.max() * (1 - 1e-9):
        return max(found)  # the best there is: contacts spread evenly reach it
    result = optimize.linprog(
        np.append(np.zeros(rows), -1.0),
        A_ub=np.column_stack([-on_links_RX.T / scale, np.ones(columns)]),
        b_ub=np.zeros(columns),
        A_eq=np.append(np.ones(rows), 0.0)[None, :],
        b_eq=[1.0],
        bounds=[*[(0, None)] * rows, (None, None)],
        method="highs",
        options={"time_limit": PROGRAM_SECONDS},
    )
    if result.x is not None:
        found.append(_least(on_links_RX, np.maximum(result.x[:rows], 0.0)))
    return max(found)


def _least(on_links_RX: np.ndarray, weight_R: np.ndarray) -> float:
    total = float(weight_R.sum())
    return float((weight_R @ on_links_RX).min()) / total if total > 0 else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Way:
    """One direction of an exchange, in bytes of a link per byte of contacts.

    Attributes:
      fast_RM: links inside nodes, by the device of the contact.
      slow_RX: between nodes, by its device; in hierarchical dispatch by its node.
    """

    fast_RM: np.ndarray
    slow_RX: np.ndarray


def ways(topology: Topology, dispatch: str) -> list[Way]:
    """Out and back, for `exchange` and `hierarchical`."""
    nodes, devices = topology.nodes, topology.num_devices
    hierarchical = dispatch == "hierarchical"
    homes_M = nodes.relayed_M if hierarchical else np.ones(devices, np.int64)
    slow = _to_nodes(nodes) if hierarchical else _to_devices(nodes)
    if topology.torus is None:
        one = Way(_inside(nodes, homes_M), slow)
        return [one, one]
    tables = (topology.torus.shared_KG, topology.torus.answered_KG)
    share = int(homes_M[0]) / devices  # nodes of a torus are equal
    return [Way(np.kron(np.eye(nodes.count), table_KG * share), slow) for table_KG in tables]


def _inside(nodes: Nodes, homes_M: np.ndarray) -> np.ndarray:
    """Every device sends for `homes_M` homes, and receives from its node's other devices."""
    other_MM = nodes.same_MM & ~np.eye(nodes.devices, dtype=bool)
    sent_MM = other_MM * homes_M[:, None]
    received_M = (other_MM * homes_M).sum(axis=1)
    return np.concatenate([sent_MM, np.diag(received_M)]) / nodes.devices


def _to_devices(nodes: Nodes) -> np.ndarray:
    """Every device sends to those of other nodes, and receives from them."""
    far_MM = ~nodes.same_MM
    return np.concatenate([far_MM, np.diag(far_MM.sum(axis=1))]) / nodes.devices


def _to_nodes(nodes: Nodes) -> np.ndarray:
    """Every device sends to other nodes, and the busiest relay of a node receives."""
    far_MN = nodes.node_M[:, None] != np.arange(nodes.count)
    most_N = np.maximum.reduceat(nodes.relayed_M, nodes.first_N) - 1
    return np.concatenate([far_MN, np.diag(most_N)]) / nodes.devices
