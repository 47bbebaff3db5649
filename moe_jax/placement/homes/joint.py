"""Sequences and experts placed together: each side solved given the other, until nothing improves.

Axes: S sequences, L MoE layers, E experts, M devices (H: homes, P: parts of experts that share a
device, whatever its number), N nodes.

After Sem-MoE (ICLR 2026) and NetMoE, which alternate likewise. One round is
  1. homes, given the experts: an assignment problem over the sequences (assign.py), exact where
     devices hold equal numbers of them;
  2. device numbers, given the homes: in each layer parts of experts are numbered anew, an exact
     assignment per layer (on nodes: of places within each node, then of nodes). Loads stay;
  3. experts, given homes and numbers: layerwise.py on contacts priced by homes (experts.py).
Steps 1 and 2 cost milliseconds and never raise the rows, so they run to their end first, from
several random starts; step 3 then moves single experts, and 1 and 2 follow. What comes back is the
best by the exact objective with homes; rows as prices_of weighs them can only fall.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize

from moe_jax.placement import clock, layerwise
from moe_jax.placement import nodes as nodes_lib
from moe_jax.placement.homes import assign, experts, tally
from moe_jax.placement.homes.assign import Seated
from moe_jax.placement.homes.tally import Contacts, Prices
from moe_jax.placement.nodes import DevicesPerNode, Nodes
from moe_jax.placement.problem import Problem

STARTS = 8
TURNS = 50  # of homes and numbers; they end by themselves long before
ROUNDS = 10
RUNGS = (1.2, 1.1, 1.04)  # load caps tried for `seconds`, over what is reachable
LEAST = 1e-3  # a round that gains a smaller share is the last one

Seater = Callable[[Float[np.ndarray, "S M"]], Seated]


@dataclasses.dataclass(frozen=True, eq=False)
class Joint:
    """Experts and the homes they were planned with.

    Attributes:
      device_LE: device of every expert.
      home_S: device of every sequence.
      uniform: objective of the start, homes being uniform.
      seated: objective of the start with its best homes (step 1 alone).
      numbered: objective after steps 1 and 2.
      value: objective of this placement with these homes.
      homes_gap: proven, of the homes given these experts, in rows.
      finished: nothing improved any more, and no deadline cut any of the search: a seed gives one
        result.
      interrupted: by Ctrl-C; this is the best until then.
    """

    device_LE: Int[np.ndarray, "L E"]
    home_S: Int[np.ndarray, " S"]
    uniform: float
    seated: float
    numbered: float
    value: float
    homes_gap: float
    finished: bool
    interrupted: bool = False


def solve(
    problem: Problem,
    start_LE: Int[np.ndarray, "L E"],
    seed: int,
    deadline: float,
    seat: Seater = assign.equal,
) -> Joint:
    """Improves a placement and homes for the problem's trace together.

    Args:
      problem: trace, machine, objective; homes of its trace are what is planned.
      start_LE: a placement that keeps the load cap.
      seed: of the random starts and the search.
      deadline: time.monotonic() at which the search ends.
      seat: homes for costs: `assign.equal`, or one that keeps another capacity.
    """
    tally.check(problem)
    rng, price = np.random.default_rng(seed), tally.prices_of(problem)
    contacts = tally.count(problem.trace, start_LE, problem.topology)
    first = seat(tally.cost_SM(contacts, price))
    seated = experts.with_homes(problem, first.home_S).exact(start_LE)
    best = at = _At(start_LE, first, seated)  # `seconds` may rise where rows fall
    relabelled, interrupted = seated, False
    with clock.watched() as watch:
        try:
            rounds = _rounds(problem, contacts, price, at, seat, rng, deadline)
            for number, at in enumerate(rounds):
                relabelled = relabelled if number else at.value
                best = min(best, at, key=lambda one: one.value)
        except KeyboardInterrupt:
            interrupted = True
    return Joint(
        best.device_LE,
        best.seated.home_S,
        problem.value(start_LE),
        seated,
        relabelled,
        best.value,
        best.seated.gap,
        not watch.cut and not interrupted,
        interrupted,
    )


class _At(NamedTuple):
    """Where the search is: the best so far."""

    device_LE: np.ndarray
    seated: Seated
    value: float


def _rounds(
    problem: Problem,
    contacts: Contacts,
    price: Prices,
    start: _At,
    seat: Seater,
    rng: np.random.Generator,
    deadline: float,
) -> Iterator[_At]:
    """After steps 1 and 2, and after every round."""
    best_LE, best = numbered(
        problem, contacts, price, start.device_LE, start.seated, seat, rng, deadline
    )
    value = experts.with_homes(problem, best.home_S).exact(best_LE)
    yield _At(best_LE, best, value)
    for _ in range(ROUNDS):
        if clock.late(deadline):
            return
        next_LE = _moved(experts.with_homes(problem, best.home_S), best_LE, rng, deadline)
        contacts = tally.count(problem.trace, next_LE, problem.topology)
        next_LE, found = _turns(problem, contacts, price, next_LE, best, seat)
        now = experts.with_homes(problem, found.home_S).exact(next_LE)
        last = not now < value * (1 - LEAST)
        if now < value:
            best_LE, best, value = next_LE, found, now
        yield _At(best_LE, best, value)
        if last:
            return


def numbered(
    problem: Problem,
    contacts: Contacts,
    price: Prices,
    start_LE: np.ndarray,
    first: Seated,
    seat: Seater,
    rng: np.random.Generator,
    deadline: float,
) -> tuple[np.ndarray, Seated]:
    """Steps 1 and 2 from the homes given and from random ones: the fewest rows."""
    best_LE, best = _turns(problem, contacts, price, start_LE, first, seat)
    sequences = problem.trace.num_sequences
    for _ in range(STARTS):
        if clock.late(deadline):
            break
        drawn_SM = rng.random((sequences, problem.num_devices))
        start = dataclasses.replace(seat(drawn_SM), value=np.inf, bound=0.0)
        next_LE, found = _turns(problem, contacts, price, start_LE, start, seat)
        if found.value < best.value:
            best_LE, best = next_LE, found
    return best_LE, best


def _turns(
    problem: Problem,
    contacts: Contacts,
    price: Prices,
    device_LE: np.ndarray,
    start: Seated,
    seat: Seater,
) -> tuple[np.ndarray, Seated]:
    """Numbers for the homes, homes for the numbers, until the rows stay."""
    best = start
    for _ in range(TURNS):
        number_LP = numbers_LP(
            contacts, price, best.home_S, problem.topology.devices_per_node, problem.kind_M
        )
        next_LE = np.take_along_axis(number_LP, device_LE.astype(np.int64), axis=1)
        if not problem.all_allowed(next_LE):  # nodes of other kinds
            break
        renumbered = _renumbered(contacts, number_LP, problem.topology.nodes)
        found = seat(tally.cost_SM(renumbered, price))
        if not found.value < best.value * (1 - 1e-12):
            break
        best, contacts, device_LE = found, renumbered, next_LE
    return device_LE, best


def numbers_LP(
    contacts: Contacts,
    price: Prices,
    home_S: Int[np.ndarray, " S"],
    devices_per_node: DevicesPerNode,
    kind_M: Int[np.ndarray, " M"] | None = None,
) -> Int[np.ndarray, "L P"]:
    """The device that every part should be, layer by layer: the fewest rows for these homes.

    Devices of a node stay together; where nodes cost nothing by themselves any device of the same
    kind will do (`kind_M`; None: all are alike).
    """
    devices = contacts.touched_SLM.shape[2]
    nodes = nodes_lib.of(devices, devices_per_node)
    onehot_SH = np.eye(devices)[home_S]
    of_home_LHP = np.einsum("sh,slp->lhp", onehot_SH, contacts.touched_SLM, optimize=True)
    cost_LPM = np.einsum("lhp,hm->lpm", of_home_LHP, price.device_HM, optimize=True)
    if not price.node_HN.any():
        if kind_M is not None:
            cost_LPM = np.where(kind_M[:, None] == kind_M, cost_LPM, np.inf)
        return np.stack([_assigned(cost_PM)[0] for cost_PM in cost_LPM])
    of_home_LHN = np.einsum("sh,sln->lhn", onehot_SH, contacts.node_SLN, optimize=True)
    cost_LNN = np.einsum("lhp,hn->lpn", of_home_LHN, price.node_HN, optimize=True)
    return np.stack(
        [
            _by_node(cost_PM, cost_NN, nodes)
            for cost_PM, cost_NN in zip(cost_LPM, cost_LNN, strict=True)
        ]
    )


def _by_node(cost_PM: np.ndarray, cost_NN: np.ndarray, nodes: Nodes) -> np.ndarray:
    """Which place in its node every part takes, and which node (of its size) its node becomes.

    The two are independent: a device's price depends on its place and the size of its node only.
    """
    same_NN = nodes.size_N[:, None] == nodes.size_N
    node_N, _ = _assigned(np.where(same_NN, cost_NN, np.inf))
    number_P = np.empty(nodes.devices, np.int64)
    for node, first in enumerate(nodes.first_N):
        inside = slice(first, first + nodes.size_N[node])
        number_P[inside] = nodes.first_N[node_N[node]] + _assigned(cost_PM[inside, inside])[0]
    return number_P


def _assigned(cost: np.ndarray) -> tuple[np.ndarray, float]:
    row, column = optimize.linear_sum_assignment(cost)
    return column, float(cost[row, column].sum())


def _renumbered(contacts: Contacts, number_LP: np.ndarray, nodes: Nodes) -> Contacts:
    part_LM = np.argsort(number_LP, axis=1)
    node_LN = nodes.node_M[part_LM[:, nodes.first_N]]
    # without prices of their own nodes may be torn apart, and their contacts are not asked for
    node_SLN = contacts.node_SLN
    if nodes.count > 1 and (nodes.node_M[part_LM] == node_LN[:, nodes.node_M]).all():
        node_SLN = np.take_along_axis(contacts.node_SLN, node_LN[None], axis=2)
    return dataclasses.replace(
        contacts,
        touched_SLM=np.take_along_axis(contacts.touched_SLM, part_LM[None], axis=2),
        node_SLN=node_SLN,
    )


def _moved(homed, device_LE: np.ndarray, rng, deadline: float) -> np.ndarray:
    """Step 3: every layer searched from where it is, kept if it is better by the exact value."""
    device_LE, layers = device_LE.copy(), len(device_LE)
    factors = layerwise.LADDER[:1] if homed.objective == "rows" else RUNGS
    for layer in range(layers):
        if clock.late(deadline):
            break
        share = clock.share(deadline, 1 / (layers - layer))
        start_E = device_LE[layer]
        next_E = layerwise.best_of_layer(homed, layer, start_E, factors, rng, share).device_E
        better = homed.exact_value(layer, next_E) < homed.exact_value(layer, start_E)
        if better and homed.allowed(layer, next_E):
            device_LE[layer] = next_E
    return device_LE
