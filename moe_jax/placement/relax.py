"""The proven lower bound of a `Problem`'s objective: the arguments of bounds.py, put together.

Axes: L MoE layers, M devices, G devices per node. A sum is at least the sum of its terms' minima,
a maximum over devices at least their mean; so fewest contacts (token, device) and (token, node),
smallest largest load, and most transitions that can stay are all that is needed.
"""

import dataclasses
import time

import numpy as np

from moe_jax.placement import bounds
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.problem import Problem

SAFETY = 1 - 1e-9  # of sums of rounded numbers


def lower_bound(problem: Problem, deadline: float, steps: int = 300) -> float:
    """No placement has a smaller objective; at the deadline it stops refining, and stays true."""
    if problem.objective == "exflow":
        return SAFETY * problem.hops(_most_kept(problem, problem.top1_LEE, deadline, steps))
    if problem.objective == "load":
        mean_L = np.maximum(problem.load_LE.sum(axis=1) / problem.num_devices, 1e-300)
        return SAFETY * float((_load_lower_L(problem) / mean_L).mean())
    contacts = _contacts(problem, deadline, steps)
    if problem.objective == "rows":
        there_L, back_L = _least_rows(problem, contacts)
        return SAFETY * float((there_L + back_L).sum()) / problem.token_layers
    return SAFETY * float(_seconds_lower_L(problem, contacts).mean())


@dataclasses.dataclass(frozen=True, eq=False)
class _Contacts:
    """Fewest (token, device) and (token, node) contacts by layer; most best experts met next."""

    device_L: np.ndarray
    node_L: np.ndarray
    met_L: np.ndarray


def _contacts(problem: Problem, deadline: float, steps: int) -> _Contacts:
    layers, topology = problem.trace.num_layers, problem.topology
    tokens_L = problem.tokens_of_size_LK[:, 1:].sum(axis=1).astype(float)
    device_L, node_L, met_L = tokens_L.copy(), tokens_L.copy(), np.zeros(layers)
    if problem.dispatch == "gathered":
        return _Contacts(device_L, node_L, met_L)
    kinds = 1 + (topology.num_nodes > 1) + (problem.dispatch == "coherent")
    clock = _Shares(deadline, layers * kinds)
    for layer in range(layers):
        affinity_EE = problem.coactivation_LEE[layer]
        sizes_K = problem.tokens_of_size_LK[layer]
        device_L[layer] = bounds.contacts_lower(
            affinity_EE, sizes_K, problem.num_devices, clock.next(), steps
        )
        if topology.num_nodes > 1:
            node_L[layer] = bounds.contacts_lower(
                affinity_EE, sizes_K, topology.num_nodes, clock.next(), steps
            )
        if problem.dispatch == "coherent" and layer:
            met = bounds.stays_upper(
                problem.best_to_all_LEE[layer - 1], problem.num_devices, clock.next(), steps
            )
            met_L[layer] = min(met, tokens_L[layer])
    return _Contacts(device_L, node_L, met_L)


def _least_rows(problem: Problem, contacts: _Contacts) -> tuple[np.ndarray, np.ndarray]:
    """Fewest (weighted) rows out and back, by layer, over the whole trace."""
    devices, topology = problem.num_devices, problem.topology
    if problem.dispatch == "coherent":
        tokens_L = problem.tokens_of_size_LK[:, 1:].sum(axis=1)
        there_L = contacts.device_L - contacts.met_L
        there_L[0] = contacts.device_L[0] * (devices - 1) / devices
        return np.maximum(there_L, 0), np.maximum(contacts.device_L - tokens_L, 0)
    if problem.dispatch == "hierarchical":
        nodes, each = topology.num_nodes, topology.devices_per_node
        slow_L = contacts.node_L * (nodes - 1) / nodes * problem.tier_ratio
        way_L = slow_L + contacts.device_L * (each - 1) / each
        return way_L, way_L
    way_L = contacts.device_L * (devices - 1) / devices
    return way_L, way_L


def _seconds_lower_L(problem: Problem, contacts: _Contacts) -> np.ndarray:
    topology, work = problem.topology, problem.work
    tokens = problem.trace.num_tokens
    compute_L = seconds_lib.compute_seconds(_load_lower_L(problem), topology, work, tokens)
    to_bytes = work.batch_tokens / tokens * work.row_bytes / problem.num_devices
    nodes, each = topology.num_nodes, topology.devices_per_node
    fast, slow = topology.fast, topology.slow
    if problem.dispatch == "coherent":
        # a tier's share is free: at best both are busy all the time
        wire = fast.bandwidth + (slow.bandwidth if nodes > 1 else 0.0)
        gather = seconds_lib.gather_seconds(topology, work)
        there_L, back_L = _least_rows(problem, contacts)
        return compute_L + gather + (there_L + back_L) * to_bytes / wire
    if problem.dispatch == "gathered":
        from_L = problem.tokens_of_size_LK[:, 1:].sum(axis=1) * to_bytes
        fast_L, slow_L = from_L * (each - 1), from_L * (nodes - 1) * each
    elif problem.dispatch == "hierarchical":
        fast_L = contacts.device_L * to_bytes * (each - 1) / each
        slow_L = contacts.node_L * to_bytes * (nodes - 1) / nodes
    else:
        fast_L = contacts.device_L * to_bytes * (each - 1) / problem.num_devices
        slow_L = contacts.device_L * to_bytes * (nodes - 1) / nodes
    fast_L = fast_L / fast.bandwidth + fast.latency * (fast_L > 0)
    slow_L = slow_L / slow.bandwidth + slow.latency * (slow_L > 0)
    way_L = fast_L + slow_L if problem.dispatch == "hierarchical" else np.maximum(fast_L, slow_L)
    return compute_L + 2 * way_L


def _load_lower_L(problem: Problem) -> np.ndarray:
    return np.array([bounds.load_lower(load_E, problem.num_devices) for load_E in problem.load_LE])


def _most_kept(problem: Problem, keep_LEE: np.ndarray, deadline: float, steps: int) -> float:
    """Most (likeness-weighted) transitions that can stay: each pair of layers by itself."""
    like, nodes = problem.node_likeness, problem.topology.num_nodes
    clock = _Shares(deadline, len(keep_LEE) * (1 + (nodes > 1)))
    total = 0.0
    for keep_EE in keep_LEE:
        total += (1 - like) * bounds.stays_upper(keep_EE, problem.num_devices, clock.next(), steps)
        if nodes > 1:
            total += like * bounds.stays_upper(keep_EE, nodes, clock.next(), steps)
    return total


class _Shares:
    """Deadlines that give each of `parts` equal shares of what time is left."""

    def __init__(self, deadline: float, parts: int):
        self._deadline, self._left = deadline, parts

    def next(self) -> float:
        now = time.monotonic()
        share = max(self._deadline - now, 0.0) / max(self._left, 1)
        self._left -= 1
        return now + share
