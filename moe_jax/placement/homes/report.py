"""All rules for homes, learned on one half of a trace and judged on the other, and their table."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from moe_jax.placement import tables
from moe_jax.placement.evidence import MIN_SEQUENCES, Figure
from moe_jax.placement.homes import rules, tally
from moe_jax.placement.homes.judge import Arrivals, Bench, Judged
from moe_jax.placement.homes.rules import NameRule, PrefillRule, TokenRule
from moe_jax.placement.problem import Problem
from moe_jax.routing.trace import Trace


@dataclasses.dataclass(frozen=True)
class Study:
    """What is judged.

    Attributes:
      prefill: numbers of first tokens after which homes are decided.
      name_fields: fields of a name that are known on arrival.
      tokens: numbers of first tokens whose identities are known on arrival.
      arrivals: of the held-out sequences.
      seed: of cross-validation.
    """

    prefill: tuple[int, ...] = (16, 64, 256)
    name_fields: int = 2
    tokens: tuple[int, ...] = (16, 64, 256)
    arrivals: Arrivals = dataclasses.field(default_factory=Arrivals)
    seed: int = 0

    def __post_init__(self):
        rules.check_fields(self.name_fields)


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The rules that were learned, how they did, and what could not be tried."""

    judged: tuple[Judged, ...]
    name: NameRule | None
    tokens: tuple[TokenRule, ...]
    prefill: tuple[PrefillRule, ...]
    notes: tuple[str, ...]

    @property
    def best(self) -> Judged | None:
        """The rule (no oracle) that saves the largest share of rows, of those that help; which are
        none where few sequences judge."""
        able = [one for one in self.judged if one.rule != "oracle" and one.helps]
        return max(able, key=lambda one: one.rows.share.value, default=None)

    def to_json(self) -> dict[str, Any]:
        best = self.best
        return {
            "rules": [one.to_json() for one in self.judged],
            "best": None if best is None else {"rule": best.rule, "arrival": best.arrival},
            "notes": list(self.notes),
        }


def study(
    problem: Problem,
    judge: Trace,
    before_LE: Int[np.ndarray, "L E"],
    after_LE: Int[np.ndarray, "L E"],
    settings: Study,
) -> Found:
    """Learns every rule on the problem's trace, judges it on `judge`.

    Args:
      problem: with the half that was planned on.
      judge: the other half.
      before_LE: the placement that is compared with, homes uniform.
      after_LE: the placement that rules place sequences for.
      settings: what is tried.
    """
    held_out = dataclasses.replace(problem, trace=judge)
    price, machine, plan = tally.prices_of(problem), problem.topology, problem.trace
    judged: list[Judged] = []
    notes: list[str] = []
    bench = Bench(held_out, before_LE, after_LE, 0, settings.arrivals)
    judged.append(bench.round_robin())
    by_name = None
    if plan.seq_name is None:
        notes.append("names: the trace has none")
    else:
        by_name = rules.learn_name(
            plan, after_LE, machine, price, settings.name_fields, settings.seed
        )
        judged += bench.rule(by_name)
    by_tokens: tuple[TokenRule, ...] = ()
    if plan.token_ids_T is None:
        notes.append("identities of tokens: the trace has no token_ids (infer.py --record_tokens)")
    else:
        by_tokens = rules.learn_tokens(problem, after_LE, settings.tokens)
        for rule in by_tokens:
            judged += bench.rule(rule)
    judged.append(bench.rule(rules.oracle(plan, after_LE, machine, price, 0))[0])
    learned = []
    for first in settings.prefill:
        if min(int(plan.seq_len.max()), int(judge.seq_len.max())) <= first:
            notes.append(f"prefill {first}: no sequence is that long")
            continue
        bench = Bench(held_out, before_LE, after_LE, first, settings.arrivals)
        judged += bench.rule(rules.raw_prefill(plan, after_LE, machine, price, first))
        learned.append(rules.learn_prefill(plan, after_LE, machine, price, first, settings.seed))
        judged += bench.rule(learned[-1])
        judged.append(bench.rule(rules.oracle(plan, after_LE, machine, price, first))[0])
    return Found(tuple(judged), by_name, by_tokens, tuple(learned), tuple(notes))


HEADS = ("rule", "arrival", "from token", "sequences", "rows", "saved", "95 % interval", "hits")
SLOW_HEADS = ("between nodes",)
LAST_HEADS = ("of the way", "us", "saved", "95 % interval")


def table(found: Found, problem: Problem) -> str:
    """One row per rule and way of arriving."""
    slow = problem.topology.num_nodes > 1
    heads = (*HEADS, *(SLOW_HEADS if slow else ()), *LAST_HEADS)
    rows = []
    for one in found.judged:
        cells = [
            one.rule,
            one.arrival,
            str(one.first),
            str(one.sequences),
            f"{one.rows.before:.3f} -> {one.rows.after:.3f}",
            *_share(one.rows.share),
            f"{one.chance:.3f} -> {one.hits.value:.3f}",
        ]
        if slow:
            cells.append(f"{one.slow_rows.before:.3f} -> {one.slow_rows.after:.3f}")
        cells += [
            f"{100 * one.reached.value:.1f} %",
            f"{1e6 * one.seconds.before:.0f} -> {1e6 * one.seconds.after:.0f}",
            *_share(one.seconds.share),
        ]
        rows.append(cells)
    return tables.table(heads, rows)


LEGEND = """\
  rows      per token and layer, both ways: in use with uniform homes -> under the rule, same tokens
  hits      share of tokens and layers with an expert at home: by chance -> under the rule
  of the way  from chance to an expert at home in every layer
  us        microseconds per layer and step, likewise
  n tokens  identities of the first n, known on arrival: what such tokens cost in the other half
  learned   linear in how often the first tokens chose each expert; without it, their own rows
  oracle    homes from the very tokens that are judged: a limit, no rule
  none      homes in turn: what the plan does by itself"""


def summary(found: Found) -> str:
    """In words: what homes bring, if anything."""
    best = found.best
    if best is None or best.rule == "none":
        most = max(one.sequences for one in found.judged)
        if most < MIN_SEQUENCES:
            return (
                f"Only {most} sequences judge, and at least {MIN_SEQUENCES} are needed to say "
                "whether a rule for homes saves rows: record more."
            )
        return (
            "No rule for homes saves rows beyond the interval: on this trace it does not matter "
            "which device holds a sequence, or nothing that is known in time says which."
        )
    share, plan = best.rows.share, found.judged[0].rows.share
    tried = sum(one.rule != "oracle" for one in found.judged)
    return (
        f"Best rule, of {tried} ways judged on these same sequences: {best.rule}, {best.arrival}: "
        f"{100 * share.value:.1f} % fewer rows "
        f"[{100 * share.low:.1f}, {100 * share.high:.1f}], {100 * best.reached.value:.0f} % of the "
        f"way to an expert at home in every layer; the plan alone {100 * plan.value:.1f} %."
    )


def _share(share: Figure) -> tuple[str, str]:
    return f"{100 * share.value:.1f} %", f"[{100 * share.low:.1f}, {100 * share.high:.1f}]"
