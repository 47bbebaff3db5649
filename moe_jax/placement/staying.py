"""Replicas for transitions: slots and shares together, under the copy rule `stay` (shares.py).

Axes: T tokens, L MoE layers, E experts, K experts per token, M devices, N nodes, P slots.

From a plan without replicas, layer after layer, given where the layers before leave the tokens and
which copies the next layer has:

1. the slots that are spare are filled, all else fixed: one program (staying_program.py);
2. then, sweep after sweep, a few experts of each layer are freed, copies included, and placed anew;
   the answer is kept if the program says that it is better than the best shares for what is there.

Shares are rounded to 1/64 and hashed over positions, so loads are met within about a percent: the
programs aim a little below the cap, and lower where a layer misses it as counted. Nothing here is
proven to be best.
"""

import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from moe_jax.placement import clock, copies, shares, staying_program
from moe_jax.placement.limits.previous import holds_LEM
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.placement.staying_program import Answer, Given

AIM, LOWER = 0.993, 0.01  # of the cap: at first, and how much lower where it was missed
SETTLED = 6  # passes over layers that missed their cap, at most
FREED = 10  # experts of a layer placed anew at once
BINARIES = 512  # of a program, at most
SECONDS = 1.0  # of a program, which seldom takes as long
RELIEVED = 5  # times that a layer above its cap is placed anew
SWEEPS = 40
BASE_SHARE, BOUND_SHARE = 0.15, 0.15  # of the time, for the plan without replicas, for the bound
WIDER, NARROWER = 1.1, 0.98  # load cap of that plan, in caps: as a rule, and of large layers


@dataclasses.dataclass(frozen=True, eq=False)
class Counted:
    """What a placement does to the trace, homes before the first layer being uniform.

    Attributes:
      hops: weighted hops per token, as Problem.value_of.
      load_LM: rows computed, as cost.computed_LM where tokens stay.
      largest_L: of the loads, each over its device's speed.
    """

    hops: float
    load_LM: np.ndarray
    largest_L: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """A placement, and what it does."""

    placement: Placement
    counted: Counted


def counted(problem: Problem, placement: Placement) -> Counted:
    """Counts best experts along their way from every home at once, and all others once.

    The chance of a token to be on each device is carried from layer to layer: what has a copy
    there stays, the rest of a node goes where its share says. So this is the mean over all homes.
    """
    ids_TLK, nodes = problem.trace.expert_ids_TLK, problem.topology.nodes
    (tokens, layers, top_k), devices = ids_TLK.shape, problem.num_devices
    experts, hop_MM = problem.trace.num_experts, problem.hop_MM
    position_T = np.arange(tokens)
    part_TK = shares.part_TK(position_T, top_k)
    load_LM, total = np.zeros((layers, devices)), 0.0
    chance_MT, real_T = np.full((devices, tokens), 1.0 / devices), np.zeros(tokens, bool)
    for layer in range(layers):
        rule = copies.candidates(placement, layer, problem.topology.devices_per_node)
        assert isinstance(rule, copies.Stay)
        # of every expert and part; the last expert is none
        device_NX = rule.slot_NEW.reshape(len(rule.slot_NEW), -1) // placement.slots_per_device
        ids_TK = np.minimum(ids_TLK[:, layer].astype(np.int64), experts)
        at_TK = ids_TK * shares.PARTS + part_TK
        others_X = np.bincount(at_TK[:, 1:].ravel(), minlength=(experts + 1) * shares.PARTS)
        others_X = others_X[: device_NX.shape[1]]
        load_LM[layer] = np.bincount(device_NX[-1], weights=others_X, minlength=devices)
        best_T, before_T, real_T = ids_TK[:, 0], real_T, ids_TK[:, 0] < experts
        away_ME = np.append(rule.local_EM < 0, np.zeros((1, devices), bool), axis=0).T.astype(float)
        leaving_MT = chance_MT * away_ME[:, best_T]
        chance_MT -= leaving_MT
        for node in range(nodes.count):
            to_T = np.append(device_NX[node], np.zeros(shares.PARTS, np.int64))[at_TK[:, 0]]
            here = nodes.inside(node)
            from_MT = leaving_MT[here]
            chance_MT[to_T, position_T] += from_MT.sum(axis=0)
            total += np.einsum("mt,mt,t->", from_MT, hop_MM[here][:, to_T], before_T.astype(float))
        load_LM[layer] += chance_MT @ real_T.astype(float)
    moves = max(problem.top1_LEE.sum(), 1.0)
    hops = float(len(problem.top1_LEE) * total / moves)
    return Counted(hops, load_LM, (load_LM / problem.topology.speed_M).max(axis=1))


def flows(problem: Problem, placement: Placement, cap_L: np.ndarray) -> Placement:
    """The same slots with the shares that keep most, and as few as can be above the caps."""
    state = _State(problem, holds_LEM(placement), cap_L)
    for layer, given in state.walk():
        state.take(layer, state.flows(given, state.holds_LEM[layer]))
    return state.placement()


def search(
    problem: Problem,
    device_LE: np.ndarray,
    cap_L: np.ndarray,
    seed: int,
    deadline: float,
    end: float,
) -> Iterator[Found]:
    """Yields placements with all slots filled; the caller keeps what is better, within the cap.

    Args:
      problem: objective `exflow`, with `num_slots`.
      device_LE: a plan without replicas; it may be above the cap.
      cap_L: largest load of each layer.
      seed: of the experts that are freed.
      deadline: time.monotonic() after which the sweeps end.
      end: and after which layers that miss their cap are left.
    """
    state = _State(problem, device_LE[:, :, None] == np.arange(problem.num_devices), cap_L)
    rng = np.random.default_rng(seed)
    for sweep in range(SWEEPS + 1):
        if sweep and clock.late(deadline):
            return
        for layer, given in state.walk():
            if not sweep:
                state.fill(layer, given, deadline)
                state.relieve(layer, given, rng, deadline)
            elif not clock.late(deadline):
                state.improve(layer, given, rng, deadline)
            else:  # what came before it has changed
                state.take(layer, state.flows(given, state.holds_LEM[layer]))
        yield state.settled(rng, end)


class _State:
    """Slots and shares of every layer.

    Attributes:
      holds_LEM: bool, which device holds which expert.
      aim_L: what programs aim at, in caps.
    """

    def __init__(self, problem: Problem, held_LEM: np.ndarray, cap_L: np.ndarray):
        assert problem.num_slots is not None
        self._problem, self._cap_L = problem, cap_L
        self._slots = problem.num_slots // problem.num_devices
        self._nodes = problem.topology.nodes
        ids_TLK = problem.trace.expert_ids_TLK
        experts = problem.trace.num_experts
        best_TL = ids_TLK[:, :, 0].astype(np.int64)
        self._best_TL = np.where(best_TL < experts, best_TL, -1)
        best = [np.bincount(best_T[best_T >= 0], minlength=experts) for best_T in self._best_TL.T]
        self._others_LE = problem.load_LE - np.stack(best)
        self.holds_LEM, self.aim_L = held_LEM.copy(), np.full(len(held_LEM), AIM)
        self._expert_LP = [np.zeros(0, np.int64)] * len(held_LEM)
        self._share_LNP = [np.zeros((0, 0), np.int64)] * len(held_LEM)

    def walk(self) -> Iterator[tuple[int, Given]]:
        """Layer by layer, with what the rest means for it; shares have to be there when it ends."""
        device_T = None
        for layer in range(len(self.holds_LEM)):
            yield layer, self.given(layer, device_T)
            device_T = self._served(layer, device_T)

    def settled(self, rng: np.random.Generator, end: float) -> Found:
        """As it stands, after new shares for layers that miss their cap as counted."""
        started = time.monotonic()
        for passes in range(SETTLED):
            placement = self.placement()
            found = Found(placement, counted(self._problem, placement))
            over_L = found.counted.largest_L > self._cap_L * (1 + 1e-9)
            another = (time.monotonic() - started) / max(passes, 1)  # what a pass took, on average
            if not over_L.any() or clock.late(end - another):
                break
            self.aim_L[over_L] -= LOWER
            for layer, given in self.walk():
                if over_L[layer]:
                    self.take(layer, self.flows(given, self.holds_LEM[layer]))
                    self.relieve(layer, given, rng, end)  # else the whole plan is lost
        return found

    def given(self, layer: int, device_T: np.ndarray | None) -> Given:
        """What the rest of the model means for one layer, tokens being on `device_T`."""
        problem, nodes = self._problem, self._nodes
        experts, devices = problem.trace.num_experts, problem.num_devices
        best_T = self._best_TL[:, layer]
        real_T = best_T >= 0
        best_T = best_T[real_T]
        onward_TM = self._onward(layer)[real_T]
        count_E = np.maximum(np.bincount(best_T, minlength=experts), 1)
        onward_EM = _by(best_T, onward_TM, experts) / count_E[:, None]
        like_NM = problem.node_likeness * (nodes.node_M == np.arange(nodes.count)[:, None])
        here_EH = np.repeat(np.bincount(best_T, minlength=experts)[:, None] / devices, devices, 1)
        if device_T is None:  # tokens come from everywhere alike, and nothing was before
            stay_EM, like_NM = here_EH * onward_EM, np.zeros_like(like_NM)
        else:
            at_T = device_T[real_T]
            size = experts * devices
            pair_T = best_T * devices + at_T
            here_EH = np.bincount(pair_T, minlength=size).reshape(experts, devices).astype(float)
            kept_T = onward_TM[np.arange(len(at_T)), at_T]
            kept = np.bincount(pair_T, weights=kept_T, minlength=size)
            stay_EM = here_EH + kept.reshape(experts, devices)
        move_ENM = onward_EM[:, None, :] + like_NM[None]
        cap_M = self._cap_L[layer] * self.aim_L[layer] * problem.topology.speed_M
        return Given(here_EH, stay_EM, move_ENM, self._others_LE[layer], self._slots, cap_M)

    def _onward(self, layer: int) -> np.ndarray:
        """float64 [T, M]: what a token keeps after the layer if it is on a device."""
        devices = self._problem.num_devices
        if layer + 1 == len(self.holds_LEM):
            return np.zeros((len(self._best_TL), devices))
        holds_EM, like = self.holds_LEM[layer + 1], self._problem.node_likeness
        near_EM = holds_EM.astype(float)
        if like:
            on_node_EN = holds_EM @ (self._nodes.node_M[:, None] == np.arange(self._nodes.count))
            near_EM = np.maximum(near_EM, like * (on_node_EN > 0)[:, self._nodes.node_M])
        next_T = self._best_TL[:, layer + 1]
        return np.where(next_T[:, None] >= 0, near_EM[np.maximum(next_T, 0)], 0.0)

    def fill(self, layer: int, given: Given, deadline: float) -> None:
        """The spare slots, one by one and by a program, where it is small and there is time.

        Layers that are still to be filled have an even share of it.
        """
        holds_EM = self.holds_LEM[layer]
        ways = (_kept(given, holds_EM), _relieved(given, holds_EM))
        answers: list[Answer | None] = [self.flows(given, one_EM) for one_EM in ways]
        if holds_EM.size <= BINARIES and (left := clock.left(deadline)):
            limit = min(2 * SECONDS, left / (len(self.holds_LEM) - layer))
            answers.append(self._program(given, holds_EM, ~holds_EM, limit))
        found = [answer for answer in answers if answer is not None]
        self.take(layer, max(found, key=lambda answer: answer.value))

    def flows(self, given: Given, holds_EM: np.ndarray) -> Answer:
        none_EM = np.zeros_like(holds_EM)
        answer = self._program(given, holds_EM, none_EM, 60.0)
        assert answer is not None, "the excess makes every choice of slots solvable"
        return answer

    def _program(self, given: Given, holds_EM, free_EM, limit: float) -> Answer | None:
        answer = staying_program.solve(given, self._nodes, holds_EM, free_EM, limit)
        if answer is None or not answer.ended:
            clock.cut()
        return answer

    def relieve(self, layer: int, given: Given, rng: np.random.Generator, deadline: float) -> None:
        """A few experts anew, as long as loads are above the cap."""
        for _ in range(RELIEVED):
            now = self.flows(given, self.holds_LEM[layer])
            if now.excess <= 1e-6 * given.mean or clock.late(deadline):
                return
            self.improve(layer, given, rng, deadline)

    def improve(self, layer: int, given: Given, rng: np.random.Generator, deadline: float) -> None:
        """A few experts anew."""
        now = self.flows(given, self.holds_LEM[layer])
        experts, devices = self.holds_LEM[layer].shape
        count = min(FREED, max(BINARIES // devices, 2), experts)
        free_EM = np.zeros((experts, devices), bool)
        free_EM[rng.choice(experts, count, replace=False)] = True
        new = None
        if left := clock.left(deadline):
            new = self._program(given, self.holds_LEM[layer], free_EM, min(SECONDS, left))
        self.take(layer, now if new is None or new.value <= now.value else new)

    def take(self, layer: int, answer: Answer) -> None:
        self.holds_LEM[layer] = answer.holds_EM
        device_P, expert_P = np.nonzero(answer.holds_EM.T)
        weight_NP = np.concatenate(
            [answer.best_ENM[expert_P, :, device_P].T, answer.other_EM[expert_P, device_P][None]]
        )
        self._expert_LP[layer] = expert_P
        self._share_LNP[layer] = shares.quantised(weight_NP, expert_P)

    def _served(self, layer: int, device_T: np.ndarray | None) -> np.ndarray:
        """int64 [T]: where tokens are after the layer, as the rule serves them."""
        tokens, devices = len(self._best_TL), self._problem.num_devices
        home_T = np.arange(tokens) % devices if device_T is None else device_T
        rule = copies.staying(self._expert_LP[layer], self._share_LNP[layer], self._nodes)
        slot_T = rule.slots_TK(self._best_TL[:, layer, None], home_T, np.arange(tokens))[:, 0]
        return np.where(slot_T < 0, home_T, slot_T // self._slots)

    def placement(self) -> Placement:
        return Placement(
            np.stack(self._expert_LP),
            self._problem.trace.num_experts,
            self._problem.num_devices,
            np.stack(self._share_LNP),
        )


def _kept(given: Given, holds_EM: np.ndarray) -> np.ndarray:
    """Spare slots filled with the copies that keep most, on devices that can bear those tokens."""
    holds_EM, load_E = holds_EM.copy(), given.here_EH.sum(axis=1) + given.others_E
    load_M = load_E @ (holds_EM / holds_EM.sum(axis=1, keepdims=True))
    while (room_M := given.slots - holds_EM.sum(axis=0)).any():
        fits_EM = load_M + given.here_EH <= given.cap_M
        rate_EM = np.where(fits_EM, given.stay_EM, -given.here_EH)
        rate_EM = np.where(holds_EM | (room_M == 0), -np.inf, rate_EM)
        expert, device = np.unravel_index(int(rate_EM.argmax()), rate_EM.shape)
        here = given.here_EH[expert, device]
        load_M = load_M - here * holds_EM[expert] / holds_EM[expert].sum()
        load_M[device] += here
        holds_EM[expert, device] = True
    return holds_EM


def _relieved(given: Given, holds_EM: np.ndarray) -> np.ndarray:
    """Spare slots filled with the experts that have the largest load per copy."""
    holds_EM, load_E = holds_EM.copy(), given.here_EH.sum(axis=1) + given.others_E
    while (room_M := given.slots - holds_EM.sum(axis=0)).any():
        device = int(room_M.argmax())
        share_E = load_E / holds_EM.sum(axis=1)
        holds_EM[int(np.where(holds_EM[:, device], -1.0, share_E).argmax()), device] = True
    return holds_EM


def _by(best_T: np.ndarray, value_TM: np.ndarray, experts: int) -> np.ndarray:
    """float64 [E, M]: sums by best expert."""
    columns = [np.bincount(best_T, weights=column, minlength=experts) for column in value_TM.T]
    return np.stack(columns, axis=1)
