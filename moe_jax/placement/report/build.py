"""From what a command did to the page about it: looks at both placements, draws every figure."""

import dataclasses

from moe_jax.placement import paired, paired_copies
from moe_jax.placement.paired import Gain
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.placement.report import (
    curve,
    dots,
    headline,
    load,
    methods,
    times,
    traffic,
    transitions,
    view,
)
from moe_jax.placement.report.headline import Result
from moe_jax.placement.report.markup import short
from moe_jax.placement.report.page import Page
from moe_jax.placement.report.parts import Section, percent, quantity
from moe_jax.placement.solution import Report
from moe_jax.routing import affinity
from moe_jax.routing.trace import Trace

GOALS = {
    "seconds": "the time of a layer",
    "rows": "rows on the wire",
    "exflow": "best experts that stay on their device from layer to layer",
    "moetuner": "MoETuner's sum of uneven work and slowest pairs of devices",
    "hops": "hops from tokens to their experts and back",
    "load": "an even load",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Done:
    """What a command did.

    Attributes:
      trace: the whole trace.
      judge: the problem on the sequences that judge.
      held_out: these were not planned on.
      planned: the sequences that were planned on.
      before, after: the placements; before_name says which one was there.
      seed: of the halves and the search.
      command: the command line, as it was typed.
      report: of the search, where there was one.
      others: name and held-out objective of every method that was compared, the planner last.
      answer: the verdict, where one was asked for, and its tone.
    """

    trace: Trace
    judge: Problem
    held_out: bool
    planned: Trace
    before: Placement
    after: Placement
    before_name: str
    seed: int
    command: str
    report: Report | None = None
    others: tuple[tuple[str, float], ...] = ()
    answer: tuple[str, str] | None = None


def page(done: Done) -> Page:
    """Counts on the judging sequences what the page draws, and puts it together."""
    judge = done.judge
    before = view.view("before", judge, done.before)
    after = view.view("after", judge, done.after)
    gains = _gains(done)
    aim = judge.objective, judge.dispatch, gains
    result = Result(before, after, *aim, held_out=done.held_out, weighted=judge.weighted)
    sentence, tone = done.answer or headline.answer(result)
    lines = [sentence, headline.beside(result), _objective(done, before, after), _bound(done)]
    if done.answer is None and done.held_out:
        lines.append(headline.ASK_VERDICT)
    return Page(
        setting=_setting(done),
        headline=headline.headline(result),
        answer=tuple(filter(None, lines)),
        tone=tone,
        sections=tuple(_sections(done, result)),
        origin=_origin(done),
    )


def _sections(done: Done, result: Result) -> list[Section]:
    judge, before, after = done.judge, result.before, result.after
    layers = [str(layer) for layer in done.trace.layer_ids]
    sections = [headline.section(result, judge.topology.num_nodes)]
    if done.others:
        sections.append(methods.section(done.others, judge.unit))
    sections += [
        traffic.section(before, after, judge.topology, judge.dispatch),
        load.section(before, after, layers),
        times.section(before, after, layers),
    ]
    if len(layers) > 1:
        pair = view.typical_pair(after)
        best = dataclasses.replace(
            judge.trace,
            expert_ids_TLK=judge.trace.expert_ids_TLK[:, pair : pair + 2],
            expert_weights_TLK=None,
            layer_ids=(),
        )
        transition_EE = affinity.transitions_top1_LEE(best)[0]
        names = (layers[pair], layers[pair + 1])
        sections.append(transitions.section(before, after, dots.Pair(pair, names, transition_EE)))
    if done.report is not None and done.report.history:
        sections.append(curve.section(done.report))
    return sections


def _gains(done: Done) -> dict[str, Gain]:
    if not done.held_out:
        return {}
    weight_BS = paired.weights(done.judge.trace.num_sequences, done.seed)
    samples = [
        paired_copies.sample(done.judge, one, weight_BS) for one in (done.before, done.after)
    ]
    return paired.gains(*samples)


def _setting(done: Done) -> str:
    trace, judge, planned = done.trace, done.judge, done.planned
    what = f"{short(trace.model)}: " if trace.model else ""
    judged = (
        "judged on the same"
        if not done.held_out
        else (
            f"judged on {judge.trace.num_sequences:,} others with {judge.trace.num_tokens:,} tokens"
        )
    )
    return (
        f"{what}{trace.num_layers} layers x {trace.num_experts} experts, top-{trace.top_k}, on "
        f"{judge.num_devices} devices ({judge.topology.name}), {judge.dispatch} dispatch, "
        f"planned for {GOALS[judge.objective]} on "
        f"{planned.num_sequences:,} sequences with {planned.num_tokens:,} tokens, {judged}. "
        f"Before: {short(done.before_name)}."
    )


def _objective(done: Done, before: view.View, after: view.View) -> str:
    unit, where = done.judge.unit, "held out" if done.held_out else "in-sample"
    return (
        f"Objective, {where}: {quantity(before.objective, unit)} before, "
        f"{quantity(after.objective, unit)} after."
    )


def _bound(done: Done) -> str:
    report = done.report
    if report is None:
        return ""
    reached = quantity(report.objective, report.unit)
    stopped = " The search was interrupted by Ctrl-C." if report.interrupted else ""
    if report.bound <= 0:
        return f"On the sequences planned on it reaches {reached}; no bound is proven.{stopped}"
    return (
        f"On the sequences planned on it reaches {reached}, and no plan reaches less than "
        f"{quantity(report.bound, report.unit)} (proven): at most {percent(report.gap)} is left "
        f"to find.{stopped}"
    )


def _origin(done: Done) -> tuple[tuple[str, str], ...]:
    judge, report = done.judge, done.report
    machine = judge.topology
    entries = {
        "command": done.command,
        "trace digest": done.trace.digest,
        "trace": f"{done.trace.num_tokens:,} tokens in {done.trace.num_sequences:,} sequences",
        "corpus": short(done.trace.corpus),
        "plan digest, after": done.after.digest,
        "plan digest, before": done.before.digest,
        "seed": str(done.seed),
        "machine": f"{machine.name}: {machine.shape} devices, "
        f"{machine.fast.bandwidth / 1e9:g} GB/s and {1e6 * machine.fast.latency:g} µs inside a "
        f"node, {machine.slow.bandwidth / 1e9:g} GB/s and {1e6 * machine.slow.latency:g} µs "
        f"between nodes, {machine.tera} TFLOP/s a device",
        "sizes": ", ".join(f"{k} {v:,}" for k, v in dataclasses.asdict(judge.work).items()),
        "slots of a layer": f"{done.after.num_slots} for {done.after.num_experts} experts",
    }
    if report is not None:
        ended = "ended by itself" if report.finished else report.note or "cut short"
        entries["search"] = f"{report.seconds:.1f} s, {ended}"
    return tuple((key, value) for key, value in entries.items() if value)
