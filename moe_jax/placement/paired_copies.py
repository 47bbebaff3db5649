"""paired.py for placements of either kind: with replicas every figure is the mean over all homes.

Axes: B bootstrap samples, S sequences, T tokens, K experts per token, M devices, X = M x M pairs.

The copy rule needs to know where a token is, so each home is followed through the layers by itself,
as cost.py does; tokens keep their positions when their sequence is drawn again.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from moe_jax.placement import cost, evidence, paired
from moe_jax.placement.cost import Step
from moe_jax.placement.paired import Samples
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem


def sample(problem: Problem, placement: Placement, weight_BS: Float[np.ndarray, "B S"]) -> Samples:
    """Judges a placement on every sample of the problem's trace."""
    if not placement.has_replicas:
        return paired.sample(problem, placement, weight_BS)
    return home_by_home(problem, placement, weight_BS)


def home_by_home(
    problem: Problem, placement: Placement, weight_BS: Float[np.ndarray, "B S"]
) -> Samples:
    """As `paired.sample`, by counting for every home; right without replicas too, but slower."""
    trace = problem.trace
    tokens_B = weight_BS @ trace.seq_len.astype(float)
    scale_B = problem.work.batch_tokens / np.maximum(tokens_B, 1.0)
    layers = paired.Layers(problem, weight_BS, scale_B)
    seconds_B, load_B, rows_B, active_B = (np.zeros(len(weight_BS)) for _ in range(4))
    for steps in zip(*_walks(problem, placement), strict=True):
        counts = _Counts(problem, steps)
        load_BM = weight_BS @ counts.load_SM
        load_B += layers.fullest(load_BM)
        seconds_B += layers.computing(load_BM)
        layer_active_B = layers.active(counts.device_TK)
        active_B += layer_active_B
        if problem.dispatch == "gathered":
            wire = layers.returning(counts.device_TK, layer_active_B)
        else:
            wire = layers.sent(weight_BS @ counts.out_SX, weight_BS @ counts.back_SX)
        rows_B += wire.rows_B
        seconds_B += wire.seconds_B
    count = trace.num_layers
    rows_B /= np.maximum(active_B, 1e-300)
    return Samples(tokens_B, seconds_B / count, rows_B, load_B / count)


def _walks(problem: Problem, placement: Placement) -> list[Iterator[Step]]:
    """From each home; from those that shuffled dispatch begins with."""
    trace, step_tokens = problem.trace, problem.work.batch_tokens
    homes = [np.full(trace.num_tokens, home) for home in range(problem.num_devices)]
    if problem.dispatch == "shuffled":
        homes = cost.homes(placement, trace.num_tokens, None, problem.dispatch, step_tokens)
    where = (problem.topology.devices_per_node, None, step_tokens)
    tokens = (trace.expert_ids_TLK, placement, problem.dispatch)
    return [cost.walk(*tokens, home_T, *where) for home_T in homes]


class _Counts:
    """One layer's counts by sequence, the mean over homes.

    Attributes:
      load_SM: rows that devices compute.
      out_SX, back_SX: rows from a device to another, out to the experts and back from them.
      device_TK: where assignments are computed, for the last home.
    """

    def __init__(self, problem: Problem, steps: Sequence[Step]):
        trace, devices = problem.trace, problem.num_devices
        self._nodes = problem.topology.nodes
        self._sequence_T = np.repeat(np.arange(trace.num_sequences), trace.seq_len)
        self._sequences = trace.num_sequences
        self.load_SM = np.zeros((trace.num_sequences, devices))
        self.out_SX, self.back_SX = np.zeros((2, trace.num_sequences, devices**2))
        for step in steps:
            self.device_TK = step.device_TK
            self.load_SM += self._by_sequence(self.device_TK, devices) / len(steps)
            if problem.dispatch == "hierarchical":
                out_SX = self._relayed(step.home_T)
                back_SX = _turned(out_SX, devices)
            else:
                out_SX = self._direct(step.home_T)
                back_SX = _turned(self._direct(step.next_T), devices)
            self.out_SX += out_SX / len(steps)
            self.back_SX += back_SX / len(steps)

    def _by_sequence(self, index_TK: np.ndarray, size: int) -> np.ndarray:
        return evidence.per_sequence(index_TK, self._sequence_T, (self._sequences, size))

    def _direct(self, home_T: np.ndarray) -> np.ndarray:
        """[S, X]: one row to each device of a token."""
        first_TK = cost.first_of(self.device_TK)
        return self._pairs(home_T[:, None], self.device_TK, first_TK)

    def _relayed(self, home_T: np.ndarray) -> np.ndarray:
        """[S, X]: one row to each node of a token, and from its relay to each of its devices."""
        node_TK = self._nodes.node_of(self.device_TK)
        relay_TK = self._nodes.relay(home_T[:, None], node_TK)
        slow_SX = self._pairs(home_T[:, None], relay_TK, cost.first_of(node_TK))
        return slow_SX + self._pairs(relay_TK, self.device_TK, cost.first_of(self.device_TK))

    def _pairs(self, source, destination, sent_TK: np.ndarray) -> np.ndarray:
        devices = self._nodes.devices
        moved_TK = sent_TK & (source != destination)
        index_TK = np.where(moved_TK, source * devices + destination, -1)
        return self._by_sequence(index_TK, devices**2)


def _turned(rows_SX: np.ndarray, devices: int) -> np.ndarray:
    """The same rows the other way."""
    return rows_SX.reshape(-1, devices, devices).transpose(0, 2, 1).reshape(rows_SX.shape)
