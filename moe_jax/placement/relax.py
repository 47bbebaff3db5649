"""The proven lower bound of a `Problem`'s objective: the arguments of bounds.py, put together.

Axes: L MoE layers, M devices. A sum is at least the sum of its terms' minima, a maximum over
devices at least their mean; so fewest contacts (token, device) and (token, node), smallest largest
load, and most transitions that can stay are all that is needed. Where nodes differ in size, a
contact with a node counts as one with the node that costs least, and what fits into a node is what
fits into the largest; contacts with nodes of their own sizes are bounded by uneven_bound.py.
"""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from moe_jax.placement import (
    bounds,
    contact_bound,
    cost,
    hops,
    semidefinite,
    uneven_bound,
    wire_bound,
)
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.contact_bound import TokenSets
from moe_jax.placement.layout import Groups, Layout
from moe_jax.placement.problem import Problem

SAFETY = 1 - 1e-9  # of sums of rounded numbers
STEPS = 3000  # of a relaxation, at most
APART = 0.25  # of the time for coherent rows, for layers by themselves
CHOICES = 4  # what pairs of layers take before their first step, over finding their sets
BEGIN = 0.3  # of the time, that this may be


def lower_bound(problem: Problem, deadline: float, steps: int = STEPS) -> float:
    """No placement has a smaller objective; at the deadline it stops refining, and stays true."""
    if problem.objective == "exflow":
        return SAFETY * problem.hops(_most_stays(problem, problem.top1_LEE, deadline, steps))
    if problem.objective == "hops":  # without caps; _Run proves more where there are any
        device_LE = hops.hops_optimal(problem.load_LE, problem.topology.hops_MM, problem.dispatcher)
        return SAFETY * problem.value(device_LE)
    if problem.objective == "moetuner":
        return SAFETY * _tuner_lower(problem, deadline, steps)
    if problem.objective == "load":
        mean_L = problem.mean_L
        over_L = _load_lower_L(problem) / np.maximum(mean_L, 1e-300)
        return SAFETY * float(np.where(mean_L > 0, over_L, 1.0).mean())
    contacts = _contacts(problem, deadline, steps)
    if problem.objective == "rows":
        return SAFETY * max(_least_rows(problem, contacts), 0.0) / problem.token_layers
    return SAFETY * float(_seconds_lower_L(problem, contacts).mean())


@dataclasses.dataclass(frozen=True, eq=False)
class _Contacts:
    """What rows are made of.

    Attributes:
      device_L, node_L: fewest (token, device) and (token, node) contacts by layer.
      tied: fewest rows both ways of all layers together, in coherent and shuffled dispatch; or 0.
      weighted_L: least of what contacts with nodes of different sizes cost, as _node_costs; or 0.
    """

    device_L: np.ndarray
    node_L: np.ndarray
    tied: float
    weighted_L: np.ndarray | float = 0.0


def _contacts(problem: Problem, deadline: float, steps: int) -> _Contacts:
    nodes = problem.topology.num_nodes
    tokens_L = problem.tokens_of_size_LK[:, 1:].sum(axis=1).astype(float)
    if problem.dispatch == "gathered":
        return _Contacts(tokens_L, tokens_L, 0.0)
    if problem.dispatch == "coherent":
        return _Contacts(tokens_L, tokens_L, _least_coherent(problem, deadline, steps))
    if problem.dispatch == "shuffled":  # a token saves one row each way at most: to its home
        device_L = _fewest_L(problem, problem.num_devices, deadline, steps)
        return _Contacts(tokens_L, tokens_L, float(2 * (device_L - tokens_L).sum()))
    clock = _Shares(deadline, 1 + (nodes > 1))
    device_L = _fewest_L(problem, problem.num_devices, clock.next(), steps)
    if nodes > 1:
        end = clock.next()
        rows = problem.objective == "rows" and problem.dispatch == "hierarchical"
        if rows and not problem.topology.nodes.equal:
            costs_N, _ = _node_costs(problem)
            pairs_L = _from_pairs_L(problem, nodes)
            return _Contacts(device_L, pairs_L, 0.0, _uneven_L(problem, costs_N, end))
        return _Contacts(device_L, _fewest_L(problem, nodes, end, steps), 0.0)
    return _Contacts(device_L, tokens_L, 0.0)


def _fewest_L(problem: Problem, count: int, deadline: float, steps: int) -> np.ndarray:
    """Fewest contacts with `count` devices or nodes, by layer."""
    if not _alike(problem, count):
        found_L = _from_pairs_L(problem, count)
        return np.maximum(found_L, _uneven_L(problem, np.ones(count), deadline))
    sets = [[TokenSets(one.expert_QK, one.count_Q)] for one in problem.sets]
    fewest_L = contact_bound.fewest(sets, _groups(problem, count, 1), deadline, steps)
    return np.maximum(fewest_L, _from_pairs_L(problem, count))


def _uneven_L(problem: Problem, weight_N: np.ndarray, deadline: float) -> np.ndarray:
    """Least weighted contacts with nodes of different sizes, by layer; 0 where there is no time."""
    sets = [TokenSets(one.expert_QK, one.count_Q) for one in problem.sets]
    size_N = problem.slots * problem.topology.nodes.size_N
    return uneven_bound.fewest_L(sets, problem.trace.num_experts, size_N, weight_N, deadline)


def _node_costs(problem: Problem) -> tuple[np.ndarray, float]:
    """Costs of contacts in hierarchical rows one way, times M.

    Of the first contact with a device of each node, the row to the node included, what it costs
    above any other contact; and what any contact costs at least.
    """
    devices, nodes = problem.num_devices, problem.topology.nodes
    most_N = np.maximum.reduceat(nodes.relayed_M, nodes.first_N)
    base = float(devices - most_N.max())
    return (devices - nodes.size_N) * problem.tier_ratio + (devices - most_N) - base, base


def _from_pairs_L(problem: Problem, count: int) -> np.ndarray:
    counted = zip(problem.coactivation_LEE, problem.tokens_of_size_LK, strict=True)
    most = _most_slots(problem, count)
    return np.array([bounds.contacts_lower(pairs, sizes, count, most) for pairs, sizes in counted])


def _alike(problem: Problem, count: int) -> bool:
    """The `count` devices or nodes hold equally many experts: what the relaxation asks for."""
    return count == problem.num_devices or problem.topology.nodes.equal


def _most_slots(problem: Problem, count: int) -> int:
    """Experts on one of `count` devices, or on the largest of `count` nodes."""
    if count == problem.num_devices:
        return problem.slots
    return problem.slots * int(problem.topology.nodes.size_N.max())


def _least_coherent(problem: Problem, deadline: float, steps: int) -> float:
    """Fewest rows both ways of coherent dispatch.

    A token waits on the device of its best expert of the layer before. With it in the set a layer
    sends one row to each device but the waiting one, and gets back one from each but where the
    token goes on: contacts - 1 both times. In the first layer tokens wait anywhere.

    Without the waiting expert a set has no more contacts, so layer by layer contacts of its own
    sets less 1, out and back, are a bound too: far smaller programs, which prove most of it in the
    time that pairs of layers take to begin. The latter come first, where they have time for that,
    and leave APART of it to them.
    """
    devices = problem.num_devices
    back = [TokenSets(one.expert_QK, one.count_Q) for one in problem.sets]
    tokens_L = np.array([one.weight_Q.sum() for one in back])
    both_ways = 1 + (devices - 1) / devices

    def apart(own_L: np.ndarray) -> float:
        return float(both_ways * own_L[0] - tokens_L[0] + 2 * (own_L - tokens_L)[1:].sum())

    now = time.monotonic()
    together = _coherent_pairs(problem, back, now + (1 - APART) * (deadline - now), steps)
    own_L = contact_bound.fewest(
        [[one] for one in back], _groups(problem, devices, 1), deadline, steps
    )
    return max(together, apart(own_L), apart(_from_pairs_L(problem, devices)))


def _coherent_pairs(
    problem: Problem, back: Sequence[TokenSets], deadline: float, steps: int
) -> float:
    """With the waiting experts, all layers in one relaxation; 0 where it has no time to begin."""
    layers, none = len(back), problem.trace.num_experts
    if layers == 1:
        return 0.0
    devices, started = problem.num_devices, time.monotonic()
    cliques = [_tied(problem, 1, back[1])]
    spent = time.monotonic() - started
    if CHOICES * spent * (layers - 1) > BEGIN * (deadline - started):
        return 0.0
    cliques += [_tied(problem, layer, back[layer]) for layer in range(2, layers)]
    weight_Q = back[0].weight_Q * (1 + (devices - 1) / devices)
    on_clique_QK = np.where(back[0].node_QK < none, back[0].node_QK, 2 * none)
    cliques[0].append(TokenSets(on_clique_QK, weight_Q))
    fewest = contact_bound.fewest(cliques, _groups(problem, devices, 2), deadline, steps)
    tokens_L = np.array([one.weight_Q.sum() for one in back])
    return float(fewest.sum() - 2 * tokens_L.sum() + tokens_L[0])


def _tied(problem: Problem, layer: int, back: TokenSets) -> list[TokenSets]:
    """The sets of a layer on the nodes of the clique that it ends.

    Out, with the best expert of the layer before; and back, without.
    """
    experts, none = problem.trace.num_experts, 2 * problem.trace.num_experts
    ids_TLK = problem.trace.expert_ids_TLK[:, layer - 1 : layer + 1].astype(np.int64)
    before_T = np.where(ids_TLK[:, 0, 0] < experts, ids_TLK[:, 0, 0], none)
    node_TK = np.sort(np.where(ids_TLK[:, 1] < experts, ids_TLK[:, 1] + experts, none), axis=1)
    node_TK = np.column_stack([before_T, node_TK])[node_TK[:, 0] < none]
    node_QK, count_Q = np.unique(node_TK, axis=0, return_counts=True)
    return [
        TokenSets(node_QK, count_Q.astype(float)),
        TokenSets(back.node_QK + experts, back.weight_Q),  # "none" is E there, 2 E here
    ]


def _groups(problem: Problem, count: int, width: int) -> Groups:
    """`count` devices or nodes, whose caps are those of their devices together."""
    layout = Layout(problem.trace.num_layers, problem.trace.num_experts, width)
    speed_M = problem.topology.speed_M
    fastest = speed_M.max() if count == problem.num_devices else _sums_of_nodes(problem, speed_M)
    cap_L = problem.cap_L * fastest
    return Groups(layout, count, problem.load_LE, cap_L)


def _sums_of_nodes(problem: Problem, value_M: np.ndarray) -> float:
    """The largest sum over the devices of a node."""
    return float(problem.topology.nodes.sums(value_M[None]).max())


def _least_rows(problem: Problem, contacts: _Contacts) -> float:
    """Fewest (weighted) rows of all layers and both ways, over the whole trace."""
    devices = problem.num_devices
    if problem.dispatch in cost.TIED:
        return contacts.tied
    if problem.dispatch == "hierarchical":
        # every contact with a node is one with a device of it, and the other ones come on top
        cost_N, base = _node_costs(problem)
        more_L = np.maximum(contacts.device_L, contacts.node_L) * base
        rows_L = np.maximum(contacts.node_L * cost_N.min(), contacts.weighted_L) + more_L
        return float(2 * rows_L.sum() / devices)
    return float(2 * contacts.device_L.sum() * (devices - 1) / devices)


def _seconds_lower_L(problem: Problem, contacts: _Contacts) -> np.ndarray:
    topology, work = problem.topology, problem.work
    tokens = problem.trace.num_tokens
    compute_L = _least_compute_L(problem)
    devices, nodes = problem.num_devices, topology.nodes
    to_bytes = work.batch_tokens / tokens * work.row_bytes / devices
    fast, slow = topology.fast, topology.slow
    if problem.dispatch in cost.TIED:
        # a tier's share is free: at best both are busy all the time
        wire = fast.bandwidth * _links(problem) + (slow.bandwidth if nodes.count > 1 else 0.0)
        gather = seconds_lib.attention_seconds(topology, work, problem.dispatch)
        rows = contacts.tied / problem.trace.num_layers  # of a layer, on average
        return compute_L + gather + rows * to_bytes / wire
    if problem.dispatch == "gathered":
        return compute_L + 2 * _gathered_L(problem)
    per_byte = work.batch_tokens / tokens * work.row_bytes
    return compute_L + _ways_L(problem, contacts.device_L * per_byte, contacts.node_L * per_byte)


def _gathered_L(problem: Problem) -> np.ndarray:
    """Seconds of one way, the same under every placement."""
    topology, work, nodes = problem.topology, problem.work, problem.topology.nodes
    rows_L = problem.tokens_of_size_LK[:, 1:].sum(axis=1) / problem.num_devices
    bytes_L = rows_L * (problem.rows_per_step * work.row_bytes)
    links, hops = 1, 1
    if (torus := topology.torus) is not None:
        links, hops = max(int(torus.links_G.min()), 1), int(torus.hops_GG.max())
    fast_L = bytes_L * (nodes.size_N.max() - 1) / links
    slow_L = bytes_L * (problem.num_devices - nodes.size_N.min())
    fast_L = fast_L / topology.fast.bandwidth + topology.fast.latency * hops * (fast_L > 0)
    return np.maximum(
        fast_L, slow_L / topology.slow.bandwidth + topology.slow.latency * (slow_L > 0)
    )


def _ways_L(problem: Problem, device_L: np.ndarray, node_L: np.ndarray) -> np.ndarray:
    """Least seconds out and back of contacts with devices and nodes, in bytes."""
    topology, torus = problem.topology, problem.topology.torus
    hops = 1 if torus is None else int(torus.hops_GG.max(axis=0).min())
    first, then = topology.fast.latency * hops, topology.slow.latency
    total_L = np.zeros(len(device_L))
    for way in wire_bound.ways(topology, problem.dispatch):
        fast_RM = way.fast_RM / topology.fast.bandwidth
        slow_RX = way.slow_RX / topology.slow.bandwidth
        fast = wire_bound.least_busiest(fast_RM)
        slow = wire_bound.least_busiest(slow_RX)
        fast_L = device_L * fast + first * (device_L * fast > 0)
        if problem.dispatch == "hierarchical":
            total_L += fast_L + node_L * slow + then * (node_L * slow > 0)
            continue
        both = wire_bound.least_busiest(np.concatenate([fast_RM, slow_RX]))
        both_L = device_L * both + min(first, then) * (device_L * both > 0)
        slow_L = device_L * slow + then * (device_L * slow > 0)
        total_L += np.maximum(np.maximum(fast_L, slow_L), both_L)
    return total_L


def _links(problem: Problem) -> float:
    """Links that leave a device into its node, on average; every row takes one at least."""
    torus = problem.topology.torus
    return 1.0 if torus is None else max(float(torus.links_G.mean()), 1.0)


def _least_compute_L(problem: Problem) -> np.ndarray:
    """Seconds of the slowest device's experts, shared ones included."""
    work, topology = problem.work, problem.topology
    row_flops = problem.rows_per_step * work.row_flops
    return _load_lower_L(problem, problem.shared_load) * (row_flops / topology.mean_flops)


def _load_lower_L(problem: Problem, extra: float = 0.0) -> np.ndarray:
    speed_M = None if problem.even_speed else problem.topology.speed_M
    devices = problem.num_devices
    return np.array([bounds.load_lower(e, devices, speed_M, extra) for e in problem.load_LE])


def _most_stays(problem: Problem, keep_LEE: np.ndarray, deadline: float, steps: int) -> float:
    """Most (likeness-weighted) transitions that can stay."""
    # Where links between nodes are the faster ones, leaving a device costs what leaving a node does
    # or more: below 0 the most that is kept in nodes would be no limit from above.
    like, nodes = max(problem.node_likeness, 0.0), problem.topology.num_nodes
    clock = _Shares(deadline, 1 + (nodes > 1))
    nothing_LEE = np.zeros((len(keep_LEE) + 1, *keep_LEE.shape[1:]))
    counts = [(1 - like, problem.num_devices)] + ([(like, nodes)] if nodes > 1 else [])
    total = 0.0
    for share, count in counts:
        if not _alike(problem, count):
            total += share * bounds.most_stays(keep_LEE, _most_slots(problem, count))
            continue
        groups = _groups(problem, count, 2)
        weight_N = groups.layout.flat(nothing_LEE, keep_LEE)
        kept = semidefinite.most_kept(groups, weight_N, clock.next(), steps)
        total += share * float(kept.sum())
    return total


def _tuner_lower(problem: Problem, deadline: float, steps: int) -> float:
    """Devices above the mean work as much more as those below it less, and the fullest is above by
    what bounds.py proves. The slowest of pairs takes at least all their bytes over all their
    bandwidth: of all pairs, and of those between nodes.
    """
    tuner, nodes = problem.tuner, problem.topology.num_nodes
    layers, devices = problem.load_LE.shape[0], problem.num_devices
    mean_L = tuner.work_LE.sum(axis=1) / devices
    fullest_L = np.array([bounds.load_lower(work_E, devices) for work_E in tuner.work_LE])
    deviation = 2 * np.maximum(fullest_L * SAFETY - mean_L, 0.0).sum()
    if layers == 1 or devices == 1:
        return float(deviation / layers)
    clock, slowest = _Shares(deadline, 1 + (nodes > 1)), 0.0
    nothing_LEE = np.zeros((layers, *tuner.flow_lEE.shape[1:]))
    counts = [(devices, np.arange(devices))]
    if nodes > 1:
        counts.append((nodes, problem.topology.node_M))
    for count, group_M in counts:
        apart_MM = group_M[:, None] != group_M[None, :]
        if _alike(problem, count):
            groups = _groups(problem, count, 2)
            weight_N = groups.layout.flat(nothing_LEE, tuner.flow_lEE)
            kept = float(semidefinite.most_kept(groups, weight_N, clock.next(), steps).sum())
        else:
            kept = bounds.most_stays(tuner.flow_lEE, _most_slots(problem, count))
        away = max(tuner.flow_lEE.sum() * SAFETY - kept, 0.0)
        slowest = max(slowest, away / tuner.bandwidth_MM[apart_MM].sum())
    return float((deviation + slowest) / layers)


class _Shares:
    """Deadlines that give each of `parts` equal shares of what time is left."""

    def __init__(self, deadline: float, parts: int):
        self._deadline, self._left = deadline, parts

    def next(self) -> float:
        now = time.monotonic()
        share = max(self._deadline - now, 0.0) / max(self._left, 1)
        self._left -= 1
        return now + share
