"""Spare slots filled greedily: the copy that saves most of the objective, one after the other.

Axes: n sampled tokens, K experts per token, E experts, M devices, X candidates.

`filled` starts from a plan without replicas. Candidates of a layer: an expert on one more device
that has room, or on all such devices at once (an expert on every device costs no rows at all, which
single copies do not show). The one with the largest saving per slot is taken, negative savings too:
slots are equal on all devices, so all are filled. What is above a load cap goes first.

Savings are counted on a sample of tokens, each with a home drawn at random, under the copy rule;
loads are expected loads. Where tokens stay (coherent dispatch) layers are filled in order and homes
are where the filled layers leave the tokens. Transitions and hops have searches of their own
(staying.py, hops_copies.py).
Only the choice is sampled: values of the result are counted on the whole trace. Nothing here is
proven to be best.
"""

import dataclasses
import time
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.errors import Refused
from moe_jax.placement import at_speeds, copies, cost, hops_copies, replication
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.limits.previous import placement_of
from moe_jax.placement.nodes import Nodes
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import LoadCap, Problem

ROUNDS = 1000  # of swaps for balance: until none helps
USUAL = 1.1  # the relative cap in place of rows that are out of reach without replicas
WIDER = (1.15, 1.4)  # load caps of further bases, in those of the problem
WORK = 2**22  # assignments that a pass over all candidates of a layer may look at
SAMPLE = 8192  # tokens, at most
AGAIN = 8  # experts whose savings are counted anew after each choice
FIRST = 1e6  # what an overload of 1 counts, in values of the objective


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
            now = time.monotonic()
            end = now + (deadline - now) / (trace.num_layers - layer)
            cap = float(cap_L[layer])
            held.append(hops_copies.filled_EM(problem, layer, holds_EM, cap, seed, end))
        return placement_of(np.stack(held))
    assert problem.num_slots is not None
    rng = np.random.default_rng(seed)
    most = max(WORK // (devices * trace.top_k**2), 256)
    size = min(SAMPLE, most, trace.num_tokens)
    token_n = np.sort(rng.choice(trace.num_tokens, size, replace=False))
    home_n = rng.permutation(np.arange(size) % devices)
    rows = []
    for layer in range(trace.num_layers):
        one = _Layer(problem, layer, token_n, home_n, device_LE[layer], cap_L[layer])
        one.fill(problem.num_slots // devices, deadline)
        rows.append(np.nonzero(one.holds_EM.T)[1])
        if not problem.separable:
            home_n = one.next_n
    return Placement(np.stack(rows), trace.num_experts, devices)


def without(problem: Problem) -> Problem:
    """The same problem without replicas; a cap out of reach there is taken as a relative one."""
    same = dataclasses.replace(problem, num_slots=None)
    if same.load_cap is None:
        return same
    reached_L = same.largest_L(same.packed_LE)  # no exact program for a mere start of a search
    cap_L = same.load_cap.largest_L(same.mean_L, reached_L, same.rows_per_step)
    if (reached_L > cap_L * (1 + 1e-9)).any():
        factor = USUAL if same.load_cap.rows else same.load_cap.factor
        return dataclasses.replace(same, load_cap=LoadCap(factor, relative=True))
    return same


def bases(problem: Problem) -> list[Problem]:
    """Problems without replicas whose plans are worth filling: with the cap, and with wider ones.

    Copies take load off the fullest devices, so that a base may be above the cap.
    """
    first = without(problem)
    cap = first.load_cap
    if cap is None:
        return [first]
    wider = [dataclasses.replace(cap, factor=cap.factor * f) for f in WIDER]
    return [first, *(without(dataclasses.replace(problem, load_cap=one)) for one in wider)]


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
    return _mixed(by_node, plan, worst[1] <= worst[0])


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
            f"layer {problem.trace.layer_ids[layer]} could not be balanced better than "
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
        _mixed(new.placement, best.placement, take_L),
        np.where(better_L, new.value_L, best.value_L),
    )


def _capped(problem: Problem, plan: Placement, within: Placement, cap_L: np.ndarray) -> Placement:
    """`plan`, its layers above the cap replaced by those of `within`, which has none.

    Where tokens stay, the loads of a layer depend on the layers before it: until none is above.
    """
    taken_L, mixed = np.zeros(len(cap_L), bool), plan
    while (over_L := largest_L(problem, mixed) > cap_L * (1 + 1e-9)).any():
        if not (over_L & ~taken_L).any():
            return within
        taken_L |= over_L
        mixed = _mixed(within, plan, taken_L)
    return mixed


def _mixed(first: Placement, second: Placement, take_L: np.ndarray) -> Placement:
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


class _Layer:
    """One layer being filled."""

    def __init__(self, problem: Problem, layer: int, token_n, home_n, device_E, cap: float):
        self._problem, self._layer, self._cap = problem, layer, cap
        self._position_n, self._home_n = token_n, home_n
        ids_nLK = problem.trace.expert_ids_TLK[token_n].astype(np.int64)
        self._ids_nK = ids_nLK[:, layer]
        self._ids_nK[self._ids_nK >= problem.trace.num_experts] = -1
        self.holds_EM = device_E[:, None] == np.arange(problem.num_devices)
        self._device_nK = self._served(self.holds_EM)

    @property
    def next_n(self) -> Int[np.ndarray, " n"]:
        """Where tokens are after the layer, if they stay."""
        return np.where(self._device_nK[:, 0] >= 0, self._device_nK[:, 0], self._home_n)

    def fill(self, slots: int, deadline: float) -> None:
        experts, devices = self.holds_EM.shape
        saving_EX = np.full((experts, devices + 1), -np.inf)
        stale = np.arange(experts)
        while (room_M := slots - self.holds_EM.sum(axis=0)).any():
            if time.monotonic() > deadline:
                self._relieve(room_M)
                continue
            rows_XMM = self._rows(self._device_nK[None], slice(None))
            now = self._value(rows_XMM, self._loads(self.holds_EM)[None])[0]
            for e in stale:
                saving_EX[e] = self._savings(e, room_M > 0, rows_XMM, now)
            e, x = np.unravel_index(int(saving_EX.argmax()), saving_EX.shape)
            if not np.isfinite(saving_EX[e, x]):
                stale = np.arange(experts)
                saving_EX[:] = -np.inf
                continue
            taken_M = (room_M > 0) & ~self.holds_EM[e]
            if x < devices:
                taken_M &= np.arange(devices) == x
            self.holds_EM[e] |= taken_M
            self._device_nK = self._served(self.holds_EM)
            full_M = slots == self.holds_EM.sum(axis=0)
            stale = np.union1d(np.argsort(-saving_EX.max(axis=1), kind="stable")[:AGAIN], [e])
            saving_EX[:, :devices][:, full_M] = -np.inf
            saving_EX[:, devices] = -np.inf
            saving_EX[e] = -np.inf

    def _relieve(self, room_M: np.ndarray) -> None:
        """The expert with the largest load per copy, on the device with most room."""
        share_E = self._problem.load_LE[self._layer] / self.holds_EM.sum(axis=1)
        device = int(room_M.argmax())
        self.holds_EM[int(np.where(self.holds_EM[:, device], -1.0, share_E).argmax()), device] = (
            True
        )

    def _savings(self, e, room_M, rows_MM, now) -> Float[np.ndarray, " X"]:
        """Saving per slot of expert e on each device, and on all that have room."""
        devices = len(room_M)
        free_M = room_M & ~self.holds_EM[e]
        saving_X = np.full(devices + 1, -np.inf)
        if not free_M.any():
            return saving_X
        added_XM = np.concatenate([np.eye(devices, dtype=bool)[free_M], free_M[None]])
        added_XM = added_XM if free_M.sum() > 1 else added_XM[:1]
        at_X = np.append(np.flatnonzero(free_M), devices)[: len(added_XM)]
        holds_XM = self.holds_EM[e] | added_XM
        here_nK = self._ids_nK == e
        pick = np.flatnonzero(here_nK.any(axis=1))
        k_n = here_nK[pick].argmax(axis=1)
        table = copies.held(holds_XM, self._nodes)
        home_n = self._home_n[pick]
        turn_Xn = (self._position_n[pick] + k_n) % table.count_EM[:, home_n]
        device_Xn = table.slot_EMR[np.arange(len(at_X))[:, None], home_n, turn_Xn]
        device_XnK = np.tile(self._device_nK[pick], (len(at_X), 1, 1))
        device_XnK[:, np.arange(len(pick)), k_n] = device_Xn
        rows_XMM = rows_MM + self._rows(device_XnK, pick)
        rows_XMM -= self._rows(self._device_nK[pick][None], pick)
        load_M = self._loads(self.holds_EM)
        load_XM = load_M + _share(holds_XM, self._nodes) * self._problem.load_LE[self._layer, e]
        load_XM -= (
            _share(self.holds_EM[e][None], self._nodes) * (self._problem.load_LE[self._layer, e])
        )
        saving_X[at_X] = (now - self._value(rows_XMM, load_XM)) / added_XM.sum(axis=1)
        return saving_X

    @property
    def _nodes(self) -> Nodes:
        return self._problem.topology.nodes

    def _loads(self, holds_EM) -> Float[np.ndarray, " M"]:
        return self._problem.load_LE[self._layer] @ _share(holds_EM, self._nodes)

    def _served(self, holds_EM) -> Int[np.ndarray, "n K"]:
        table = copies.held(holds_EM, self._nodes)
        return table.slots_TK(self._ids_nK, self._home_n, self._position_n)

    def _rows(self, device_XnK, pick) -> Float[np.ndarray, "X 2 M M"]:
        """Rows out and back of some tokens, scaled to the trace."""
        problem, devices = self._problem, self._problem.num_devices
        home_n = self._home_n[pick]
        shape = device_XnK.shape
        home_Xn = np.broadcast_to(home_n, shape[:2])
        first_XnK = cost.first_of(device_XnK.reshape(-1, shape[2])).reshape(shape)
        if problem.dispatch == "gathered":
            there_XMM = back_XMM = np.zeros((shape[0], devices, devices))
        elif problem.dispatch == "hierarchical":
            node_XnK = self._nodes.node_of(device_XnK)
            first_node = cost.first_of(node_XnK.reshape(-1, shape[2])).reshape(shape)
            home_XnK = np.broadcast_to(home_n[:, None], shape)
            entry_XnK = self._nodes.relay(home_XnK, node_XnK)
            there_XMM = _pairs(home_XnK, entry_XnK, first_node, devices)
            there_XMM += _pairs(entry_XnK, device_XnK, first_XnK, devices)
            back_XMM = there_XMM.transpose(0, 2, 1)
        else:
            end_Xn = home_Xn
            if problem.dispatch == "coherent":
                end_Xn = np.where(device_XnK[:, :, 0] >= 0, device_XnK[:, :, 0], home_Xn)
            wide = [np.broadcast_to(a[:, :, None], shape) for a in (home_Xn, end_Xn)]
            there_XMM = _pairs(wide[0], device_XnK, first_XnK, devices)
            back_XMM = _pairs(wide[1], device_XnK, first_XnK, devices).transpose(0, 2, 1)
        scale = problem.trace.num_tokens / len(self._home_n)
        return np.stack([there_XMM, back_XMM], axis=1) * scale

    def _value(self, rows_X2MM, load_XM) -> Float[np.ndarray, " X"]:
        """The objective of the layer; an overload counts more than anything else."""
        problem = self._problem
        full_X = (load_XM / problem.topology.speed_M).max(axis=1)
        over_X = np.maximum(full_X / self._cap - 1, 0.0)
        if problem.objective == "rows":
            weighted = rows_X2MM * problem.row_weight_MM
            value_X = weighted.sum(axis=(1, 2, 3)) / problem.trace.num_tokens
        else:
            rows = cost.Rows(rows_X2MM[:, 0], rows_X2MM[:, 1])
            value_X = seconds_lib.seconds(
                rows,
                load_XM,
                problem.topology,
                problem.work,
                problem.dispatch,
                problem.trace.num_tokens,
            ).total_L
        return value_X + FIRST * over_X


def _share(holds_EM: Bool[np.ndarray, "E M"], nodes: Nodes) -> Float[np.ndarray, "E M"]:
    """The share of an expert's rows that each device computes, homes being uniform."""
    near_EN = nodes.sums(holds_EM.astype(float))
    homes_N = nodes.size_N / nodes.devices
    own_EM = holds_EM * (homes_N / np.maximum(near_EN, 1))[:, nodes.node_M]
    far_E1 = (near_EN == 0) @ homes_N[:, None]
    return own_EM + far_E1 * holds_EM / holds_EM.sum(1, keepdims=True)


def _pairs(source, destination, sent, devices: int) -> Float[np.ndarray, "X M M"]:
    """Rows by source and destination, one for each `sent`, by candidate; no diagonal."""
    candidate = np.arange(len(sent)).reshape(-1, *[1] * (sent.ndim - 1))
    index = (candidate * devices + source) * devices + destination
    counts = np.bincount(index[sent], minlength=len(sent) * devices**2)
    rows_XMM = counts.reshape(-1, devices, devices).astype(float)
    rows_XMM[:, np.arange(devices), np.arange(devices)] = 0.0
    return rows_XMM
