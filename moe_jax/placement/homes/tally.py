"""What a sequence costs on each device that could hold it: exact, and linear in its contacts.

Axes: S sequences, T tokens, L MoE layers, K experts per token, M devices (`home` where it is the
device that holds the sequence), N nodes.

A contact is a (token, device) or (token, node) pair that has an expert of the token. For dispatches
that return home the rows of a sequence depend on its home only through its contacts:
- exchange: every contact is a row out and a row back, unless the device is home;
- hierarchical: every node but home's own is a row each way over the slow tier, and every device is
  one inside its node, unless it has home's place there (it is then the relay itself, cost.py).
So `rows of s at home h` = touched_S @ device_HM[h] + nodes_S @ node_HN[h] with the `Prices` of a
topology. Partial sums (one row back per device); no replicas, whose copy rule depends on homes.
tests/placement/test_homes.py holds all of it against cost.rows, token by token.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Integer, Num

from moe_jax.errors import Refused
from moe_jax.placement import cost, evidence
from moe_jax.placement.problem import Problem
from moe_jax.placement.topology import Topology
from moe_jax.routing.trace import Trace

DISPATCHES = ("exchange", "hierarchical")
WITHOUT_COPIES = "homes are planned without replicas, whose copy rule depends on homes"


@dataclasses.dataclass(frozen=True, eq=False)
class Contacts:
    """Contacts of every sequence.

    Attributes:
      touched_SLM: tokens with an expert on the device.
      node_SLN: tokens with an expert on the node.
      load_SLM: rows computed.
      active_SL: tokens with an expert.
    """

    touched_SLM: Integer[np.ndarray, "S L M"]
    node_SLN: Integer[np.ndarray, "S L N"]
    load_SLM: Integer[np.ndarray, "S L M"]
    active_SL: Integer[np.ndarray, "S L"]


@dataclasses.dataclass(frozen=True, eq=False)
class Prices:
    """What one contact costs a sequence of each home, both ways, in rows.

    Attributes:
      device_HM: contact with a device.
      node_HN: contact with a node.
    """

    device_HM: Float[np.ndarray, "M M"]
    node_HN: Float[np.ndarray, "M N"]


def check(problem: Problem) -> None:
    """Refuses questions to which homes are no answer."""
    if problem.dispatch not in DISPATCHES:
        why = {
            "coherent": "tokens do not return: the home matters to the first layer only",
            "shuffled": "every layer chooses homes anew, by its experts",
            "gathered": "every token goes everywhere, wherever it lives",
        }
        raise Refused(
            "dispatch",
            problem.dispatch,
            why[problem.dispatch],
            f"Use --dispatch={' or --dispatch='.join(DISPATCHES)}",
        )
    if problem.objective not in ("rows", "seconds"):
        raise Refused(
            "objective",
            problem.objective,
            "homes change rows and seconds only",
            "Use --objective=seconds or --objective=rows",
        )
    if problem.has_replicas:
        fix = "Leave --slots out"
        if problem.needs_copies:
            fix += f", and take devices that divide the {problem.trace.num_experts} experts"
        raise Refused("slots", problem.num_slots, WITHOUT_COPIES, fix)


def prices(topology: Topology, dispatch: str, slow_weight: float = 1.0) -> Prices:
    """A row between nodes counts `slow_weight` times."""
    devices, node_M = topology.num_devices, topology.node_M
    other_HN = node_M[:, None] != np.arange(topology.num_nodes)
    if dispatch == "hierarchical" and topology.num_nodes == devices:  # a node is a device
        return Prices(2.0 * slow_weight * other_HN, np.zeros(other_HN.shape))
    if dispatch == "hierarchical":
        home_M = np.arange(devices)
        other_HM = topology.nodes.relay(home_M[:, None], node_M) != home_M
        return Prices(2.0 * other_HM, 2.0 * slow_weight * other_HN)
    row_HM = np.where(node_M[:, None] == node_M, 2.0, 2.0 * slow_weight)
    np.fill_diagonal(row_HM, 0.0)
    return Prices(row_HM, np.zeros(other_HN.shape))


def prices_of(problem: Problem) -> Prices:
    """As the problem's objective counts rows: `seconds` by the bandwidth of their tier, always."""
    tiers = problem.dispatch == "hierarchical" or problem.objective == "seconds"
    return prices(problem.topology, problem.dispatch, problem.tier_ratio if tiers else 1.0)


def count(trace: Trace, device_LE: Integer[np.ndarray, "L E"], topology: Topology) -> Contacts:
    """Contacts of every sequence of a trace."""
    shape_M = (trace.num_sequences, topology.num_devices)
    shape_N = (trace.num_sequences, topology.num_nodes)
    sequence_T = np.repeat(np.arange(trace.num_sequences), trace.seq_len)
    touched, nodes, load, active = [], [], [], []
    for layer, device_E in enumerate(device_LE.astype(np.int64)):
        ids_TK = np.minimum(trace.expert_ids_TLK[:, layer].astype(np.int64), trace.num_experts)
        device_TK = np.append(device_E, cost.UNKNOWN)[ids_TK]
        node_TK = topology.nodes.node_of(device_TK)
        touched.append(evidence.per_sequence(_once(device_TK), sequence_T, shape_M))
        nodes.append(evidence.per_sequence(_once(node_TK), sequence_T, shape_N))
        load.append(evidence.per_sequence(device_TK, sequence_T, shape_M))
        some_TK = np.where((device_TK >= 0).any(axis=1, keepdims=True), 0, cost.UNKNOWN)
        active.append(evidence.per_sequence(some_TK, sequence_T, (trace.num_sequences, 1))[:, 0])
    return Contacts(
        np.stack(touched, 1), np.stack(nodes, 1), np.stack(load, 1), np.stack(active, 1)
    )


def cost_SM(contacts: Contacts, price: Prices) -> Float[np.ndarray, "S M"]:
    """Rows of every sequence, all layers together, for every home."""
    touched_SM, node_SN = contacts.touched_SLM.sum(axis=1), contacts.node_SLN.sum(axis=1)
    return touched_SM @ price.device_HM.T + node_SN @ price.node_HN.T


def hits_S(contacts: Contacts, home_S: Int[np.ndarray, " S"]) -> Integer[np.ndarray, " S"]:
    """Tokens, over layers, that have an expert at home."""
    return contacts.touched_SLM.sum(axis=1)[np.arange(len(home_S)), home_S]


def wire_LMM(
    touched_LHM: Num[np.ndarray, "L M M"],
    node_LHN: Num[np.ndarray, "L M N"],
    topology: Topology,
    dispatch: str,
) -> Num[np.ndarray, "L M M"]:
    """Rows out, [source, destination], from the contacts of each home's tokens.

    The way back is the transpose. Homes that are uniform are a share of 1 / M each.
    """
    if dispatch == "hierarchical":
        out_LMM = _relayed(touched_LHM, node_LHN, topology)
    else:
        out_LMM = touched_LHM.copy()
    diagonal_M = np.arange(topology.num_devices)
    out_LMM[:, diagonal_M, diagonal_M] = 0
    return out_LMM


def _relayed(touched_LHM, node_LHN, topology: Topology) -> np.ndarray:
    """Home -> the device of its place in each node -> devices of that node."""
    out_LMM = np.zeros_like(touched_LHM)
    for node in range(topology.num_nodes):
        inside = np.flatnonzero(topology.node_M == node)
        for home in range(topology.num_devices):  # in its own node home is the relay: the diagonal
            relay = topology.nodes.relay(home, node)
            out_LMM[:, relay, inside] += touched_LHM[:, home, inside]
            out_LMM[:, home, relay] += node_LHN[:, home, node]
    return out_LMM


def tokens_between(trace: Trace, start: int, stop: int | None = None) -> Trace:
    """Tokens `start` to `stop` of every sequence that is longer than `start`."""
    keep_S = np.flatnonzero(trace.seq_len > start)
    if not keep_S.size:
        raise Refused(
            "tokens",
            start,
            f"the longest sequence has {int(trace.seq_len.max())} tokens",
            "Use fewer tokens of the prefill",
        )
    longer = trace.select(keep_S)
    position_T = np.arange(longer.num_tokens) - np.repeat(
        np.cumsum(longer.seq_len) - longer.seq_len, longer.seq_len
    )
    keep_T = position_T >= start
    if stop is not None:
        keep_T &= position_T < stop
    length_S = np.minimum(longer.seq_len, longer.seq_len if stop is None else stop) - start
    weights, tokens = longer.expert_weights_TLK, longer.token_ids_T
    return dataclasses.replace(
        longer,
        expert_ids_TLK=longer.expert_ids_TLK[keep_T],
        seq_len=length_S,
        expert_weights_TLK=None if weights is None else weights[keep_T],
        token_ids_T=None if tokens is None else tokens[keep_T],
    )


def _once(device_TK: np.ndarray) -> np.ndarray:
    """Each device of a token once, -1 elsewhere."""
    return np.where(cost.first_of(device_TK), device_TK, cost.UNKNOWN)
