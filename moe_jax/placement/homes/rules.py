"""Rules that say where a new sequence should live, from what is known when that is decided.

Axes: S sequences, T tokens, L MoE layers, E experts, M devices, F features.

A rule predicts what a token of the sequence would cost at every home (rows, all layers together).
- `NameRule`: the name of the sequence (`data set/subject`): the effects of its fields add up, a
  field that the planning half has not seen adds nothing. Known on arrival.
- `PrefillRule`: the experts of the first n tokens, through a linear map learned on the planning
  half. Decides where the sequence *decodes*; the n tokens themselves are not counted.
- `TokenRule`: the identities of the first n tokens, a prompt: what recorded tokens of each identity
  cost at every home (identities.py), on average. Known on arrival, so all tokens are judged. Only
  where the trace has identities.
- `raw_prefill`: the cost of those n tokens themselves: needs nothing but the plan.
- `oracle`: the tokens that are judged. An upper limit; no server knows them.

`price_M`, learned with the rule, is what a place on each device is worth, for arrivals one by one.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from moe_jax.errors import Refused
from moe_jax.placement.homes import assign, identities, ridge, tally
from moe_jax.placement.homes.ridge import Linear
from moe_jax.placement.homes.tally import Prices
from moe_jax.placement.problem import Problem
from moe_jax.placement.topology import Topology
from moe_jax.routing.trace import Trace

MOST_FIELDS = 8


@runtime_checkable
class Rule(Protocol):
    """What judge.py asks of a rule; read-only."""

    @property
    def label(self) -> str: ...

    @property
    def first(self) -> int:
        """Tokens that have to be routed before the rule can say something."""
        ...

    @property
    def price_M(self) -> Float[np.ndarray, " M"]: ...

    def cost_SM(self, trace: Trace) -> Float[np.ndarray, "S M"]:
        """Predicted; every sequence is longer than `first`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class NameRule:
    """Fields of the name.

    Attributes:
      fields: the first so many fields of a name count.
      words: `0:mmlu`, `1:physics`: the fields that are known, one per row of the weights.
    """

    fields: int
    words: tuple[str, ...]
    linear: Linear
    price_M: Float[np.ndarray, " M"]
    first: int = 0

    @property
    def label(self) -> str:
        return "name"

    def cost_SM(self, trace: Trace) -> Float[np.ndarray, "S M"]:
        if trace.seq_name is None:
            raise Refused("seq_name", None, "the sequences have no names", "Use another rule")
        return self.for_names(trace.seq_name)

    def for_names(self, names: Sequence[str]) -> Float[np.ndarray, "S M"]:
        return self.linear(_has_words(names, self.words, self.fields))


@dataclasses.dataclass(frozen=True, eq=False)
class TokenRule:
    """Identities of the first tokens.

    Attributes:
      known: so many first tokens count; all of a sequence that has fewer.
      token_F: ascending, the identities that were recorded. Others cost the same everywhere.
      cost_FM: rows of a token, less the mean over homes.
    """

    known: int
    token_F: Int[np.ndarray, " F"]
    cost_FM: Float[np.ndarray, "F M"]
    price_M: Float[np.ndarray, " M"]
    first: int = 0

    @property
    def label(self) -> str:
        return f"{self.known} tokens"

    def cost_SM(self, trace: Trace) -> Float[np.ndarray, "S M"]:
        head = tally.tokens_between(trace, 0, self.known)
        if head.token_ids_T is None:
            raise Refused("token_ids", None, "the trace has none", "Use another rule")
        at_T = np.searchsorted(self.token_F, head.token_ids_T)
        known_T = np.append(self.token_F, -1)[at_T] == head.token_ids_T
        cost_XM = np.concatenate([self.cost_FM, np.zeros((1, self.cost_FM.shape[1]))])
        at_T = np.where(known_T, at_T, len(self.token_F))
        return identities.mean_SM(cost_XM, at_T, head.seq_len)


@dataclasses.dataclass(frozen=True, eq=False)
class PrefillRule:
    """Experts of the first tokens; the features are how often each was chosen, per token."""

    first: int
    num_layers: int
    num_experts: int
    linear: Linear
    price_M: Float[np.ndarray, " M"]

    @property
    def label(self) -> str:
        return f"prefill {self.first}, learned"

    def cost_SM(self, trace: Trace) -> Float[np.ndarray, "S M"]:
        return self.linear(used_SF(tally.tokens_between(trace, 0, self.first)))


@dataclasses.dataclass(frozen=True, eq=False)
class Counted:
    """What tokens cost under the plan, all together: the first `last`, or all from `first` on.

    Not for each token: what is saved is counted in rows, and long sequences have more of them.
    """

    label: str
    first: int
    last: int | None
    device_LE: Int[np.ndarray, "L E"]
    topology: Topology
    price: Prices
    price_M: Float[np.ndarray, " M"]

    def cost_SM(self, trace: Trace) -> Float[np.ndarray, "S M"]:
        start = 0 if self.last is not None else self.first
        counted = tally.tokens_between(trace, start, self.last)
        return tally.cost_SM(tally.count(counted, self.device_LE, self.topology), self.price)


def learn_name(
    trace: Trace, device_LE, topology: Topology, price: Prices, fields: int, seed: int
) -> NameRule:
    """From the sequences of a trace that has names."""
    check_fields(fields)
    if trace.seq_name is None:
        raise Refused("seq_name", None, "the sequences have no names", "Leave this rule out")
    words = tuple(sorted({w for name in trace.seq_name for w in words_of(name, fields)}))
    x_SF = _has_words(trace.seq_name, words, fields)
    y_SM = _per_token(trace, device_LE, topology, price)
    linear = ridge.fit(x_SF, y_SM, trace.seq_len.astype(float), seed)
    return NameRule(fields, words, linear, ridge.rounded(assign.prices_M(linear(x_SF))))


def learn_tokens(
    problem: Problem, device_LE: Int[np.ndarray, "L E"], knowns: Sequence[int]
) -> tuple[TokenRule, ...]:
    """For each number of first tokens, from all tokens of a trace that has identities."""
    if problem.trace.token_ids_T is None:
        raise Refused("token_ids", None, "the trace has none", "Leave this rule out")
    token_F, at_T = np.unique(problem.trace.token_ids_T, return_inverse=True)
    cost_FM = ridge.rounded(identities.cost_VM(problem, at_T, device_LE, len(token_F)))
    token_F, found = token_F.astype(np.int64), []
    for known in knowns:
        rule = TokenRule(known, token_F, cost_FM, np.zeros(problem.num_devices))
        price_M = ridge.rounded(assign.prices_M(rule.cost_SM(problem.trace)))
        found.append(dataclasses.replace(rule, price_M=price_M))
    return tuple(found)


def learn_prefill(
    trace: Trace, device_LE, topology: Topology, price: Prices, first: int, seed: int
) -> PrefillRule:
    """From the sequences that are longer than `first`."""
    after = tally.tokens_between(trace, first)
    x_SF = used_SF(tally.tokens_between(_longer(trace, first), 0, first))
    y_SM = _per_token(after, device_LE, topology, price)
    linear = ridge.fit(x_SF, y_SM, after.seq_len.astype(float), seed)
    price_M = ridge.rounded(assign.prices_M(linear(x_SF)))
    return PrefillRule(first, trace.num_layers, trace.num_experts, linear, price_M)


def raw_prefill(trace: Trace, device_LE, topology: Topology, price: Prices, first: int) -> Counted:
    """Only its prices come from the trace."""
    return _counted(f"prefill {first}", trace, device_LE, topology, price, first, first)


def oracle(trace: Trace, device_LE, topology: Topology, price: Prices, first: int) -> Counted:
    return _counted("oracle", trace, device_LE, topology, price, first, None)


def _counted(label, trace, device_LE, topology, price, first, last) -> Counted:
    rule = Counted(label, first, last, device_LE, topology, price, np.zeros(topology.num_devices))
    price_M = assign.prices_M(rule.cost_SM(_longer(trace, first)))
    return dataclasses.replace(rule, price_M=price_M)


def check_fields(fields: int) -> None:
    if not 1 <= fields <= MOST_FIELDS:
        raise Refused("name_fields", fields, f"from 1 to {MOST_FIELDS}", "Use 2")


def words_of(name: str, fields: int) -> list[str]:
    """The first fields of a name, separated by / : or |, each with its place: `0:mmlu`."""
    parts = re.split("[/:|]", name)[:fields]
    return [f"{at}:{part}" for at, part in enumerate(parts)]


def used_SF(trace: Trace) -> Float[np.ndarray, "S F"]:
    """How often a token of each sequence chose each expert of each layer; F = L * E."""
    experts, sequences = trace.num_experts, trace.num_sequences
    sequence_T = np.repeat(np.arange(sequences), trace.seq_len)
    used_SLE = np.empty((sequences, trace.num_layers, experts))
    for layer in range(trace.num_layers):
        ids_TK = np.minimum(trace.expert_ids_TLK[:, layer].astype(np.int64), experts)
        bin_TK = sequence_T[:, None] * (experts + 1) + ids_TK
        counts = np.bincount(bin_TK.ravel(), minlength=sequences * (experts + 1))
        used_SLE[:, layer] = counts.reshape(sequences, experts + 1)[:, :experts]
    used_SLE /= trace.seq_len[:, None, None]
    return used_SLE.reshape(sequences, -1)


def _has_words(names: Sequence[str], words: Sequence[str], fields: int) -> np.ndarray:
    column = {word: f for f, word in enumerate(words)}
    x_SF = np.zeros((len(names), len(words)))
    for s, name in enumerate(names):
        for word in words_of(name, fields):
            if word in column:
                x_SF[s, column[word]] = 1.0
    return x_SF


def _per_token(trace: Trace, device_LE, topology: Topology, price: Prices) -> np.ndarray:
    rows_SM = tally.cost_SM(tally.count(trace, device_LE, topology), price)
    return rows_SM / trace.seq_len[:, None]


def _longer(trace: Trace, first: int) -> Trace:
    return trace.select(np.flatnonzero(trace.seq_len > first))
