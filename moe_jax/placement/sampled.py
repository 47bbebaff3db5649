"""A layer with copies, valued on a sample of tokens: what it costs, and what a change would.

Axes: n sampled tokens, K experts per token, E experts, M devices, X candidates.

Every sampled token has a home, and the copy rule says where its experts are computed. Loads are
expected loads of uniform homes; where homes follow the layer before (coherent, shuffled dispatch)
they are those of the sample. Values are only good to choose by: what is kept is counted on the
whole trace (spare.better).
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.placement import copies, cost, row_homes
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.nodes import Nodes
from moe_jax.placement.problem import Problem

WORK = 2**22  # assignments that a pass over all candidates of a layer may look at
SAMPLE = 8192  # tokens, at most
FIRST = 1e6  # what an overload of 1 counts, in values of the objective


def size(problem: Problem) -> int:
    """How many tokens are sampled."""
    most = max(WORK // (problem.num_devices * problem.trace.top_k**2), 256)
    return min(SAMPLE, most, problem.trace.num_tokens)


def drawn(problem: Problem, seed: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Sampled tokens, in order, and their homes before the first layer."""
    trace, devices = problem.trace, problem.num_devices
    rng = np.random.default_rng(seed)
    count = size(problem)
    token_n = np.sort(rng.choice(trace.num_tokens, count, replace=False))
    home_n = rng.permutation(np.arange(count) % devices)
    if problem.dispatch == "shuffled":
        home_T = row_homes.first(trace.num_tokens, devices, problem.work.batch_tokens)
        home_n = home_T[token_n]
    return token_n, home_n


class Changes(NamedTuple):
    """What becomes more or less with each candidate.

    Attributes:
      rows_X2MM: out and back.
      load_XM: of devices.
      ahead_X2MM: rows of the next layer, its experts being where they are now.
    """

    rows_X2MM: Float[np.ndarray, "X 2 M M"]
    load_XM: Float[np.ndarray, "X M"]
    ahead_X2MM: Float[np.ndarray, "X 2 M M"]


class Layer:
    """One layer: who holds what, and where the sampled tokens' experts are computed.

    Attributes:
      holds_EM: bool, which device holds which expert.
      home_n: where tokens are when the layer begins.
      device_nK: where their experts are computed, -1 where there is none.
      following: the next layer, where homes follow this one; None: it does not matter.
      cap: the largest load over its device's speed.
      sharpness: of the slowest device and link in `seconds` (seconds.largest).
    """

    def __init__(self, problem: Problem, layer: int, token_n, home_n, holds_EM, cap: float):
        self._problem, self._layer, self.cap = problem, layer, cap
        self._position_n, self.home_n = token_n, home_n
        ids_nLK = problem.trace.expert_ids_TLK[token_n].astype(np.int64)
        self._ids_nK = ids_nLK[:, layer]
        self._ids_nK[self._ids_nK >= problem.trace.num_experts] = -1
        self._tokens: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.following: Layer | None = None
        self.sharpness = math.inf
        self.holds_EM = holds_EM
        self.device_nK = self._served()

    def hold(self, expert: int, holds_M: Bool[np.ndarray, " M"]) -> None:
        """From now on these devices hold the expert."""
        self.holds_EM[expert] = holds_M
        pick, k_n = self._with(expert)
        self.device_nK[pick, k_n] = self._served_by(holds_M[None], pick, k_n)[0]

    def begin_at(self, home_n: Int[np.ndarray, " n"]) -> None:
        """Tokens are somewhere else when the layer begins."""
        self.home_n = home_n
        self.device_nK = self._served()

    def homes_after(self) -> Int[np.ndarray, " n"]:
        """Where tokens begin the next layer."""
        if self._problem.dispatch == "shuffled":
            return self._homes_T()[self._position_n]
        return self.home_n if self._problem.separable else self.next_n

    @property
    def next_n(self) -> Int[np.ndarray, " n"]:
        """Where tokens are after the layer, if they stay."""
        return np.where(self.device_nK[:, 0] >= 0, self.device_nK[:, 0], self.home_n)

    def _homes_T(self) -> Int[np.ndarray, " T"]:
        """Where shuffled dispatch puts all tokens of the trace after the layer."""
        problem = self._problem
        first_E = np.append(self.holds_EM.argmax(axis=1), cost.UNKNOWN)
        ids_TK = problem.trace.expert_ids_TLK[:, self._layer].astype(np.int64)
        device_TK = first_E[np.minimum(ids_TK, problem.trace.num_experts)]
        return row_homes.balanced(device_TK, problem.num_devices, problem.work.batch_tokens)

    def rows(self) -> Float[np.ndarray, "2 M M"]:
        """Rows out and back, scaled to the trace."""
        return self._rows(self.device_nK[None], slice(None))[0]

    def loads(self) -> Float[np.ndarray, " M"]:
        """Rows that devices compute."""
        if self._problem.separable:
            return self._problem.load_LE[self._layer] @ _share(self.holds_EM, self._nodes)
        device_a = self.device_nK[self.device_nK >= 0]
        return self._of_sample(device_a[None])[0]

    def changes(self, expert: int, holds_XM: Bool[np.ndarray, "X M"]) -> Changes:
        """What is different if the expert is held like that."""
        pick, k_n = self._with(expert)
        device_Xn = self._served_by(holds_XM, pick, k_n)
        device_XnK = np.tile(self.device_nK[pick], (len(holds_XM), 1, 1))
        device_XnK[:, np.arange(len(pick)), k_n] = device_Xn
        rows_X2MM = self._rows(device_XnK, pick) - self._rows(self.device_nK[pick][None], pick)
        load_XM = self._moved(expert, holds_XM, device_Xn, self.device_nK[pick, k_n])
        ahead_X2MM = np.zeros_like(rows_X2MM)
        if self.following is not None:
            best = k_n == 0
            ahead_X2MM = self.following.from_homes(pick[best], device_Xn[:, best])
        return Changes(rows_X2MM, load_XM, ahead_X2MM)

    def from_homes(self, pick: np.ndarray, home_Xn: np.ndarray) -> Float[np.ndarray, "X 2 M M"]:
        """What is different if these tokens begin elsewhere, their experts being where they are."""
        device_nK, rows_X2MM = self.device_nK[pick], np.zeros((len(home_Xn), 2, *self._square))
        first_nK, candidates = cost.first_of(device_nK), len(home_Xn)
        wide = (candidates, *device_nK.shape)
        device_XnK, first_XnK = np.broadcast_to(device_nK, wide), np.broadcast_to(first_nK, wide)
        rows_X2MM[:, 0] = _pairs(home_Xn[:, :, None], device_XnK, first_XnK, self._square[0])
        home_1n = self.home_n[pick][None, :, None]
        rows_X2MM[:, 0] -= _pairs(home_1n, device_nK[None], first_nK[None], self._square[0])
        return rows_X2MM * self._scale

    def value(self, rows_X2MM, load_XM) -> Float[np.ndarray, " X"]:
        """The objective of the layer; an overload counts more than anything else."""
        problem = self._problem
        full_X = (load_XM / problem.topology.speed_M).max(axis=1)
        over_X = np.maximum(full_X / self.cap - 1, 0.0)
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
                self.sharpness,
            ).total_L
        return value_X + FIRST * over_X

    @property
    def _nodes(self) -> Nodes:
        return self._problem.topology.nodes

    @property
    def _square(self) -> tuple[int, int]:
        return self._problem.num_devices, self._problem.num_devices

    @property
    def _scale(self) -> float:
        return self._problem.trace.num_tokens / len(self.home_n)

    def _with(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that have the expert, and which of theirs it is."""
        if expert not in self._tokens:
            pick, k_n = np.nonzero(self._ids_nK == expert)
            self._tokens[expert] = pick, k_n
        return self._tokens[expert]

    def _served_by(self, holds_XM, pick: np.ndarray, k_n: np.ndarray) -> np.ndarray:
        """int64 [X, n]: where these tokens' expert is computed if it is held like that."""
        table, home_n = copies.held(holds_XM, self._nodes), self.home_n[pick]
        turn_Xn = (self._position_n[pick] + k_n) % table.count_EM[:, home_n]
        return table.slot_EMR[np.arange(len(holds_XM))[:, None], home_n, turn_Xn]

    def _served(self) -> Int[np.ndarray, "n K"]:
        table = copies.held(self.holds_EM, self._nodes)
        return table.slots_TK(self._ids_nK, self.home_n, self._position_n)

    def _moved(self, e: int, holds_XM, device_Xn, device_n) -> Float[np.ndarray, "X M"]:
        """What changes in loads if expert e is held like that, its tokens being at device_Xn."""
        if self._problem.separable:
            held_XM = np.concatenate([holds_XM, self.holds_EM[e][None]])
            share_XM = _share(held_XM, self._nodes) * self._problem.load_LE[self._layer, e]
            return share_XM[:-1] - share_XM[-1]
        return self._of_sample(device_Xn) - self._of_sample(device_n[None])

    def _of_sample(self, device_Xa: Int[np.ndarray, "X a"]) -> Float[np.ndarray, "X M"]:
        """Assignments by device, scaled to the trace."""
        candidates, devices = len(device_Xa), self._problem.num_devices
        index_Xa = device_Xa + np.arange(candidates)[:, None] * devices
        count_X = np.bincount(index_Xa.ravel(), minlength=candidates * devices)
        return count_X.reshape(candidates, devices) * self._scale

    def _rows(self, device_XnK, pick) -> Float[np.ndarray, "X 2 M M"]:
        """Rows out and back of some tokens, scaled to the trace."""
        problem, devices = self._problem, self._problem.num_devices
        home_n = self.home_n[pick]
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
            there_XMM = _pairs(home_Xn[:, :, None], device_XnK, first_XnK, devices)
            back_XMM = there_XMM.transpose(0, 2, 1)
            if problem.dispatch == "coherent":
                end_Xn = np.where(device_XnK[:, :, 0] >= 0, device_XnK[:, :, 0], home_Xn)
                back_XMM = _pairs(end_Xn[:, :, None], device_XnK, first_XnK, devices)
                back_XMM = back_XMM.transpose(0, 2, 1)
        return np.stack([there_XMM, back_XMM], axis=1) * self._scale


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
