"""Windows of a trace: what is planned on, what is judged on, and a trace without affinity.

Axes: T tokens, L MoE layers, K experts per token. No sequence is ever in both parts of a window.

Splits
- sequence: random halves of the sequences. What does a plan bring on more text of the same kind?
- time: the first half of the sequences plans, the second judges. When does a plan go stale?
- name: one window per group of sequences, which judges what was planned on all the others. Does a
  plan carry over to text of a kind that it has not seen? The group of a sequence is the part of
  its name before the first `/`, `-` or `:`, whichever comes first (`mmlu/physics` -> `mmlu`).
- name:GROUP: of these windows the one that GROUP judges.

`without_affinity` is the null model: every expert keeps its number of tokens in every layer and
rank, every token its number of experts, and everything else is random. To shuffle whole tokens of
a layer would leave the experts of a token together, and co-activation is all that dispatches which
return home can use; so ranks are shuffled apart, by exchanges that never put an expert twice on
one token.
"""

import dataclasses
import re

import numpy as np

from moe_jax.errors import Refused
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace

SPLITS = ("sequence", "time", "name")
MOST_GROUPS = 32  # each is a plan of its own
EXCHANGES = 8  # offered to every expert of every token; one that is taken makes it random


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """One part of a trace to plan on, another to judge on; in both some token has an expert."""

    name: str
    plan: Trace
    judge: Trace

    def __post_init__(self):
        trace_lib.check_routed(self.plan, f"what is planned on ({self.name})")
        trace_lib.check_routed(self.judge, f"what is judged on ({self.name})")


def windows(trace: Trace, split: str, seed: int) -> list[Window]:
    """The windows of a split; see the head of this file."""
    if split not in SPLITS:
        raise Refused("split", split, "not known", f"Use one of {', '.join(SPLITS)}")
    if split == "name":
        return _by_name(trace)
    if split == "time" and trace.num_sequences > 1:
        cut = (trace.num_sequences + 1) // 2
        all_S = np.arange(trace.num_sequences)
        return [Window("second half", trace.select(all_S[:cut]), trace.select(all_S[cut:]))]
    halves = trace_lib.split(trace, seed)  # refuses a single sequence
    return [Window("other half", halves.plan_half, halves.judge_half)]


def window(trace: Trace, split: str, seed: int) -> Window:
    """One window: `sequence`, `time`, or `name:GROUP`, the one that GROUP judges."""
    way, _, group = split.partition(":")
    if way not in SPLITS or (way == "name") != bool(group):
        raise Refused("split", split, "not known", "Use sequence, time or name:GROUP")
    found = {one.name: one for one in windows(trace, way, seed)}
    if way != "name":
        return next(iter(found.values()))
    if group not in found:
        names = ", ".join(found)
        raise Refused("split", split, f"the groups of the names are {names}", "Use one of them")
    return found[group]


def group_of(name: str) -> str:
    """The part before the first `/`, `-` or `:`."""
    return re.split("[/:-]", name, maxsplit=1)[0]


def quarters(trace: Trace) -> list[Trace]:
    """The sequences in order, in up to four parts."""
    parts = np.array_split(np.arange(trace.num_sequences), 4)
    return [trace.select(part_S) for part_S in parts if part_S.size]


def part(trace: Trace, share: float, seed: int) -> Trace:
    """A random share of the sequences, at least one; smaller shares lie within larger ones."""
    order_S = np.random.default_rng(seed).permutation(trace.num_sequences)
    return trace.select(np.sort(order_S[: max(int(share * trace.num_sequences), 1)]))


def without_affinity(trace: Trace, seed: int) -> Trace:
    """The same popularity of every expert, layer by layer and rank by rank, and nothing else."""
    rng = np.random.default_rng(seed)
    ids_TLK = trace.expert_ids_TLK.copy()
    for layer in range(trace.num_layers):
        ids_TLK[:, layer] = _exchanged(ids_TLK[:, layer], trace.no_expert, rng)
    return dataclasses.replace(trace, expert_ids_TLK=ids_TLK, expert_weights_TLK=None)


def _exchanged(ids_TK: np.ndarray, no_expert: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens in random pairs exchange the experts of one rank, many times over."""
    token_T, half = np.arange(len(ids_TK)), len(ids_TK) // 2
    ids_KT = np.ascontiguousarray(ids_TK.T)  # one layer as rows: an order of magnitude faster
    for _ in range(EXCHANGES):
        order_T = rng.permutation(len(token_T))
        token_T, ids_KT = token_T[order_T], ids_KT[:, order_T]
        one_KH, rest_KT = ids_KT[:, :half], ids_KT[:, half:]
        for k in range(len(ids_KT)):  # other pairs for every rank, so that ranks part company
            shift = int(rng.integers(max(half, 1)))
            token_T[half:] = np.roll(token_T[half:], shift)
            rest_KT[:] = np.roll(rest_KT, shift, axis=1)
            _exchange(one_KH, rest_KT[:, :half], k, no_expert)
    exchanged_TK = np.empty_like(ids_TK)
    exchanged_TK[token_T] = ids_KT.T
    return exchanged_TK


def _exchange(one_KH: np.ndarray, other_KH: np.ndarray, k: int, no_expert: int) -> None:
    """In place, rank k, unless an expert would be twice on a token or is none."""
    mine_H, theirs_H = one_KH[k].copy(), other_KH[k].copy()
    taken_H = ~((one_KH == theirs_H).any(axis=0) | (other_KH == mine_H).any(axis=0))
    taken_H &= (mine_H != no_expert) & (theirs_H != no_expert)
    one_KH[k] = np.where(taken_H, theirs_H, mine_H)
    other_KH[k] = np.where(taken_H, mine_H, theirs_H)


def _by_name(trace: Trace) -> list[Window]:
    if trace.seq_name is None:
        raise Refused(
            "seq_name",
            None,
            "split=name needs the names of the sequences",
            "Record them (seq_name in the trace), or use --split=sequence",
        )
    groups = np.array([group_of(name) for name in trace.seq_name])
    names = sorted(set(groups.tolist()))
    if not 2 <= len(names) <= MOST_GROUPS:
        raise Refused(
            "seq_name",
            names,
            f"2 to {MOST_GROUPS} groups, these are {len(names)}; a group is the part of a name "
            "before the first / - or :",
            "Name the sequences group/name, or use --split=sequence",
        )
    return [
        Window(
            name,
            trace.select(np.flatnonzero(groups != name)),
            trace.select(np.flatnonzero(groups == name)),
        )
        for name in names
    ]
