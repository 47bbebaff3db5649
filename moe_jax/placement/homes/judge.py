"""Rules for homes judged on sequences that nothing was planned or learned on.

Axes: S sequences, L MoE layers, M devices, N nodes, B bootstrap samples (the first is the trace).

Promise: `before` is the placement in use with homes drawn uniformly; every figure of a rule is
exact for the homes that the rule gave, and paired with `before` on the same tokens (those after the
rule's `first`) of the same resampled sequences (paired.py holds the interval). Sequences that have
ended before the rule could say something are left out. Homes are given once, in the order of
arrival; what is resampled is which sequences count, so batches stay as they are.

`reached`: with a home by chance a token finds an expert there in (distinct devices / M) of the
layers; at best in all. Reached is the share of that way.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from moe_jax.placement import paired
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.cost import Rows
from moe_jax.placement.evidence import MIN_SEQUENCES, Figure
from moe_jax.placement.homes import assign, tally
from moe_jax.placement.homes.rules import Rule
from moe_jax.placement.homes.tally import Contacts
from moe_jax.placement.paired import Gain
from moe_jax.placement.problem import Problem
from moe_jax.routing.trace import Trace


@dataclasses.dataclass(frozen=True)
class Judged:
    """One rule, one way of arriving.

    Attributes:
      rule: its label.
      arrival: `batches`, `one by one`, or `round robin` (no rule).
      first: tokens before the home is decided; not judged.
      sequences, tokens: that were judged.
      rows: per token and layer, both ways, against `before`.
      slow_rows: those between nodes.
      seconds: per layer and step.
      chance: share of token-layers with an expert at home, by chance.
      hits: the same under the rule.
      reached: (hits - chance) / (1 - chance).
    """

    rule: str
    arrival: str
    first: int
    sequences: int
    tokens: int
    rows: Gain
    slow_rows: Gain
    seconds: Gain
    chance: float
    hits: Figure
    reached: Figure

    @property
    def helps(self) -> bool:
        """Fewer rows, beyond the interval and of enough sequences; not more seconds beyond it."""
        fewer = self.sequences >= MIN_SEQUENCES and self.rows.difference.low > 0
        return fewer and self.seconds.difference.high >= 0

    def to_json(self) -> dict[str, Any]:
        gains = {name: getattr(self, name).to_json() for name in ("rows", "slow_rows", "seconds")}
        return {**dataclasses.asdict(self), **gains, "helps": self.helps}


@dataclasses.dataclass(frozen=True)
class Arrivals:
    """How sequences arrive.

    Attributes:
      batch: so many together, assigned together.
      imbalance: one by one: sequences that a device may be ahead of another.
      seed: of the order; None: the order of the file.
    """

    batch: int = 64
    imbalance: int = 4
    seed: int | None = 0

    def __post_init__(self):
        assign.check_batch(self.batch)
        assign.check_imbalance(self.imbalance)

    def order_S(self, sequences: int) -> Int[np.ndarray, " S"]:
        if self.seed is None:
            return np.arange(sequences)
        return np.random.default_rng(self.seed).permutation(sequences)


class Bench:
    """The held-out sequences from one token on, for several rules."""

    def __init__(self, problem: Problem, before_LE, after_LE, first: int, arrivals: Arrivals):
        """`problem.trace` is the held-out half."""
        self.whole = problem.trace.select(
            arrivals.order_S(problem.trace.num_sequences)
        )  # in order of arrival
        self.whole = self.whole.select(np.flatnonzero(self.whole.seq_len > first))
        self._trace = tally.tokens_between(self.whole, first)
        self._problem, self._first, self._arrivals = problem, first, arrivals
        topology = problem.topology
        self._weight_BS = paired.weights(self._trace.num_sequences, 0)
        self._after = tally.count(self._trace, after_LE, topology)
        self._before = _Sampled(problem, self._trace, self._weight_BS)
        self._before.run(tally.count(self._trace, before_LE, topology), None)

    def round_robin(self) -> Judged:
        """Homes that know nothing: the plan alone."""
        homes_S = np.arange(self._trace.num_sequences) % self._problem.num_devices
        return self._judged("none", "round robin", homes_S)

    def rule(self, rule: Rule) -> tuple[Judged, Judged]:
        """In batches, and one by one."""
        cost_SM = rule.cost_SM(self.whole)
        together_S = assign.in_batches(cost_SM, self._arrivals.batch)
        single_S = assign.online(cost_SM, rule.price_M, self._arrivals.imbalance)
        return (
            self._judged(rule.label, "batches", together_S),
            self._judged(rule.label, "one by one", single_S),
        )

    def _judged(self, label: str, arrival: str, home_S: Int[np.ndarray, " S"]) -> Judged:
        before, after = self._before, _Sampled(self._problem, self._trace, self._weight_BS)
        after.run(self._after, home_S)
        touched_S = self._after.touched_SLM.sum(axis=(1, 2)) / self._problem.num_devices
        active_B = np.maximum(self._weight_BS @ self._after.active_SL.sum(axis=1), 1e-300)
        chance_B = self._weight_BS @ touched_S / active_B
        hits_B = self._weight_BS @ tally.hits_S(self._after, home_S) / active_B
        return Judged(
            label,
            arrival,
            self._first,
            self._trace.num_sequences,
            self._trace.num_tokens,
            paired.gain(before.rows_B, after.rows_B),
            paired.gain(before.slow_B, after.slow_B),
            paired.gain(before.seconds_B, after.seconds_B),
            float(chance_B[0]),
            _figure(hits_B),
            _figure((hits_B - chance_B) / np.maximum(1 - chance_B, 1e-300)),
        )


class _Sampled:
    """Rows and seconds of one placement with given or uniform homes, on every sample."""

    rows_B: Float[np.ndarray, " B"]
    slow_B: Float[np.ndarray, " B"]
    seconds_B: Float[np.ndarray, " B"]

    def __init__(self, problem: Problem, trace: Trace, weight_BS: np.ndarray):
        self._problem, self._weight_BS = problem, weight_BS
        self._tokens_B = np.maximum(weight_BS @ trace.seq_len.astype(float), 1.0)

    def run(self, contacts: Contacts, home_S: Int[np.ndarray, " S"] | None) -> None:
        """Homes None: uniform, exactly."""
        problem = self._problem
        active_B = np.maximum(self._weight_BS @ contacts.active_SL.sum(axis=1), 1e-300)
        even = tally.prices(problem.topology, problem.dispatch)
        double = tally.prices(problem.topology, problem.dispatch, slow_weight=2.0)
        rows_S, slow_S = (_at_home(tally.cost_SM(contacts, p), home_S) for p in (even, double))
        self.rows_B = self._weight_BS @ rows_S / active_B
        self.slow_B = self._weight_BS @ (slow_S - rows_S) / active_B
        layers = contacts.active_SL.shape[1]
        each = [self._layer_seconds(contacts, layer, home_S) for layer in range(layers)]
        self.seconds_B = np.mean(each, axis=0)

    def _layer_seconds(self, contacts: Contacts, layer: int, home_S) -> np.ndarray:
        problem = self._problem
        out_BMM = tally.wire_LMM(
            self._by_home(contacts.touched_SLM[:, layer], home_S),
            self._by_home(contacts.node_SLN[:, layer], home_S),
            problem.topology,
            problem.dispatch,
        )
        step_B = problem.work.batch_tokens / self._tokens_B
        out_BMM = out_BMM * step_B[:, None, None]
        load_BM = (self._weight_BS @ contacts.load_SLM[:, layer]) * step_B[:, None]
        return seconds_lib.seconds(
            Rows(out_BMM, out_BMM.transpose(0, 2, 1)),
            load_BM,
            problem.topology,
            problem.work,
            problem.dispatch,
            problem.work.batch_tokens,
        ).total_L

    def _by_home(self, count_SM: np.ndarray, home_S) -> np.ndarray:
        """float64 [B, H, M]: contacts of each home's sequences, as often as they were drawn."""
        devices = self._problem.num_devices
        if home_S is None:
            mean_BM = self._weight_BS @ count_SM / devices
            return np.repeat(mean_BM[:, None, :], devices, axis=1)
        held = [home_S == home for home in range(devices)]
        return np.stack([self._weight_BS[:, h_S] @ count_SM[h_S] for h_S in held], axis=1)


def _at_home(cost_SM: np.ndarray, home_S) -> np.ndarray:
    return cost_SM.mean(axis=1) if home_S is None else cost_SM[np.arange(len(home_S)), home_S]


def _figure(value_B: np.ndarray) -> Figure:
    low, high = np.percentile(value_B[1:], [2.5, 97.5])
    return Figure(float(value_B[0]), float(low), float(high))
