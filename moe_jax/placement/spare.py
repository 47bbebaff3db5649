"""Spare slots filled greedily: the copy that saves most of the objective, one after the other.

Axes: n sampled tokens, K experts per token, E experts, M devices, X candidates.

`filled` starts from a plan without replicas. Candidates of a layer: an expert on one more device
that has room, or on all such devices at once (an expert on every device costs no rows at all, which
single copies do not show). The one with the largest saving per slot is taken, negative savings too:
slots are equal on all devices, so all are filled. What is above a load cap goes first.

Savings are counted on a sample of tokens, each with a home drawn at random, under the copy rule;
loads are expected loads (sampled.py). Where homes follow the layer before (coherent, shuffled
dispatch) layers are filled in order: homes are where the filled layers leave the tokens. Then
copies are exchanged while there is time (exchanges.py). Transitions and hops have searches of their
own (staying.py, hops_copies.py). Only the choice is sampled: values of the result are counted on
the whole trace. Nothing here is proven to be best.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moe_jax.errors import Refused
from moe_jax.placement import at_speeds, clock, hops_copies, replication, sampled
from moe_jax.placement.limits.previous import placement_of
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import LoadCap, Problem

ROUNDS = 1000  # of swaps for balance: until none helps
USUAL = 1.1  # the relative cap in place of rows that are out of reach without replicas
AGAIN = 8  # experts whose savings are counted anew after each choice


def filled(
    problem: Problem,
    device_LE: Int[np.ndarray, "L E"],
    cap_L: Float[np.ndarray, " L"],
    seed: int,
    deadline: float,
) -> Placement:
    """The plan `device_LE` with its spare slots filled; past the deadline, by loads alone."""
    trace, devices = problem.trace, problem.num_devices
    if problem.objective == "hops":
        held = []
        for layer, holds_EM in enumerate(device_LE[:, :, None] == np.arange(devices)):
            end = clock.share(deadline, 1 / (trace.num_layers - layer))
            cap = float(cap_L[layer])
            held.append(hops_copies.filled_EM(problem, layer, holds_EM, cap, seed, end))
        return placement_of(np.stack(held))
    assert problem.num_slots is not None
    token_n, home_n = sampled.drawn(problem, seed)
    rows = []
    for layer in range(trace.num_layers):
        holds_EM = device_LE[layer][:, None] == np.arange(devices)
        one = sampled.Layer(problem, layer, token_n, home_n, holds_EM, cap_L[layer])
        _fill(one, problem.load_LE[layer], problem.num_slots // devices, deadline)
        rows.append(np.nonzero(one.holds_EM.T)[1])
        home_n = one.homes_after()
    return Placement(np.stack(rows), trace.num_experts, devices)


def without(problem: Problem) -> Problem:
    """The same problem without replicas; a cap out of reach there is taken as a relative one."""
    same = dataclasses.replace(problem, num_slots=None)
    if same.load_cap is None:
        return same
    cap = same.load_cap.planned
    same = dataclasses.replace(same, load_cap=cap)
    reached_L = same.largest_L(same.packed_LE)  # no exact program for a mere start of a search
    cap_L = cap.largest_L(same.mean_L, reached_L, same.rows_per_step)
    if (reached_L > cap_L * (1 + 1e-9)).any():
        factor = USUAL if cap.rows else cap.factor
        return dataclasses.replace(same, load_cap=LoadCap(factor, relative=True))
    return same


def first_copies(placement: Placement) -> Int[np.ndarray, "L E"]:
    """The device of every expert's first copy."""
    slot_LE = placement.logical_to_physical_LER[:, :, 0].astype(np.int64)
    return slot_LE // placement.slots_per_device


def balanced(problem: Problem) -> Placement:
    """The plan for balance alone; where copies that share a node balance better, those."""
    load_LE, devices, nodes = problem.load_LE, problem.num_devices, problem.topology.num_nodes
    slots, experts = problem.num_slots, problem.trace.num_experts
    assert slots is not None
    plan = replication.balanced_slots(load_LE, slots, devices, rounds=ROUNDS)
    if not problem.even_speed:
        plan = at_speeds.dealt_anew(plan, load_LE, problem.topology.speed_M)
    if nodes == 1 or experts % nodes or not problem.topology.nodes.equal:
        return plan
    if slots * nodes > experts * devices:  # more than a node's experts on each of its devices
        return plan
    by_node = replication.balanced_slots(load_LE, slots, devices, nodes, experts, rounds=ROUNDS)
    worst = [largest_L(problem, one) for one in (plan, by_node)]
    return mixed(by_node, plan, worst[1] <= worst[0])


def caps(problem: Problem, reached_L: Float[np.ndarray, " L"]) -> Float[np.ndarray, " L"]:
    """Largest device load that is allowed in each layer, given what balance alone reaches."""
    if problem.load_cap is None:
        return np.full(problem.trace.num_layers, np.inf)
    mean_L, scale = problem.mean_L, problem.rows_per_step
    cap_L = problem.load_cap.largest_L(mean_L, reached_L, scale)
    ratio_L = reached_L / np.maximum(mean_L, 1e-300)
    if (over_L := reached_L > cap_L * (1 + 1e-9)).any():
        layer = int(np.where(over_L, ratio_L, 0).argmax())
        raise Refused(
            "load_cap",
            str(problem.load_cap),
            f"layer {problem.trace.layer_ids[layer]} was not balanced better than "
            f"{ratio_L[layer]:.4f} with {problem.num_slots} slots",
            problem.load_cap.advice(reached_L[layer], mean_L[layer], scale),
        )
    return cap_L


class Valued(NamedTuple):
    """A plan and its counted objective: by layer where layers are independent, else as a whole."""

    placement: Placement
    value_L: np.ndarray

    @property
    def value(self) -> float:
        return float(self.value_L.mean())


class Judged(NamedTuple):
    """A plan as counted, all layers together.

    Attributes:
      placement: the slots that were asked for; for `exflow` with the best shares for them.
      value: the objective, in the problem's unit; inf above a cap.
      reached_L: float64, the largest load of each layer, over its device's speed; only under caps.
      fits: no device passes a layer's cap.
    """

    placement: Placement
    value: float
    reached_L: np.ndarray
    fits: bool


def valued(problem: Problem, plan: Placement) -> Valued:
    """Counts the objective of a plan."""
    if problem.separable:
        return Valued(plan, problem.counted_L(plan))
    return Valued(plan, np.array([problem.value_of(plan)]))


def better(problem: Problem, best: Valued, plan: Placement, cap_L: np.ndarray) -> Valued:
    """The better of both, layer by layer where layers are independent, with the caps kept."""
    if np.isfinite(cap_L).any():
        plan = _capped(problem, plan, best.placement, cap_L)
    new = valued(problem, plan)
    better_L = new.value_L < best.value_L
    take_L = better_L if problem.separable else np.full(problem.trace.num_layers, better_L.all())
    return Valued(
        mixed(new.placement, best.placement, take_L),
        np.where(better_L, new.value_L, best.value_L),
    )


def _capped(problem: Problem, plan: Placement, within: Placement, cap_L: np.ndarray) -> Placement:
    """`plan`, its layers above the cap replaced by those of `within`, which has none.

    Where tokens stay, the loads of a layer depend on the layers before it: until none is above.
    """
    taken_L, now = np.zeros(len(cap_L), bool), plan
    while (over_L := largest_L(problem, now) > cap_L * (1 + 1e-9)).any():
        if not (over_L & ~taken_L).any():
            return within
        taken_L |= over_L
        now = mixed(within, plan, taken_L)
    return now


def mixed(first: Placement, second: Placement, take_L: np.ndarray) -> Placement:
    """Layers of the first plan where `take_L`, of the second elsewhere."""
    slots_LP = np.where(
        take_L[:, None], first.physical_to_logical_LP, second.physical_to_logical_LP
    )
    return Placement(slots_LP, first.num_experts, first.num_devices)


def largest_L(problem: Problem, plan: Placement) -> Float[np.ndarray, " L"]:
    """Largest device load of each layer, counted under the copy rule."""
    if problem.objective == "hops":  # its dispatchers say where tokens are
        return (problem.counted_hops(plan).load_LM / problem.topology.speed_M).max(axis=1)
    return (problem.computed_LM(plan) / problem.topology.speed_M).max(axis=1)


def _fill(layer: sampled.Layer, load_E: np.ndarray, slots: int, deadline: float) -> None:
    """Copies, one after the other, until every device holds so many."""
    holds_EM = layer.holds_EM
    experts, devices = holds_EM.shape
    saving_EX = np.full((experts, devices + 1), -np.inf)
    stale = np.arange(experts)
    while (room_M := slots - holds_EM.sum(axis=0)).any():
        if clock.late(deadline):
            _relieve(layer, load_E, int(room_M.argmax()))
            continue
        rows_2MM, load_M = layer.rows(), layer.loads()
        at = _At(rows_2MM, load_M, float(layer.value(rows_2MM[None], load_M[None])[0]))
        for e in stale:
            saving_EX[e] = _savings(layer, int(e), room_M > 0, at)
        e, x = np.unravel_index(int(saving_EX.argmax()), saving_EX.shape)
        if not np.isfinite(saving_EX[e, x]):
            stale = np.arange(experts)
            saving_EX[:] = -np.inf
            continue
        taken_M = (room_M > 0) & ~holds_EM[e]
        if x < devices:
            taken_M &= np.arange(devices) == x
        layer.hold(int(e), holds_EM[e] | taken_M)
        full_M = slots == holds_EM.sum(axis=0)
        stale = np.union1d(np.argsort(-saving_EX.max(axis=1), kind="stable")[:AGAIN], [e])
        saving_EX[:, :devices][:, full_M] = -np.inf
        saving_EX[:, devices] = -np.inf
        saving_EX[e] = -np.inf


def _relieve(layer: sampled.Layer, load_E: np.ndarray, device: int) -> None:
    """The expert with the largest load per copy, on a device."""
    share_E = load_E / layer.holds_EM.sum(axis=1)
    expert = int(np.where(layer.holds_EM[:, device], -1.0, share_E).argmax())
    layer.hold(expert, layer.holds_EM[expert] | (np.arange(layer.holds_EM.shape[1]) == device))


class _At(NamedTuple):
    """A layer's rows, loads and value as it stands."""

    rows_2MM: np.ndarray
    load_M: np.ndarray
    value: float


def _savings(layer: sampled.Layer, e: int, room_M: np.ndarray, at: _At) -> Float[np.ndarray, " X"]:
    """Saving per slot of expert e on each device, and on all that have room."""
    devices = len(room_M)
    free_M = room_M & ~layer.holds_EM[e]
    saving_X = np.full(devices + 1, -np.inf)
    if not free_M.any():
        return saving_X
    added_XM = np.concatenate([np.eye(devices, dtype=bool)[free_M], free_M[None]])
    added_XM = added_XM if free_M.sum() > 1 else added_XM[:1]
    at_X = np.append(np.flatnonzero(free_M), devices)[: len(added_XM)]
    found = layer.changes(e, layer.holds_EM[e] | added_XM)
    after_X = layer.value(at.rows_2MM + found.rows_X2MM, at.load_M + found.load_XM)
    saving_X[at_X] = (at.value - after_X) / added_XM.sum(axis=1)
    return saving_X
