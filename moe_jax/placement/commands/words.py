"""What commands say of traces and plans, in text and in plan files."""

import dataclasses
from typing import Any

from moe_jax.errors import plain
from moe_jax.placement import copies, seconds
from moe_jax.placement.limits import previous
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.placement.solution import Report
from moe_jax.routing.trace import Trace


def describe(trace: Trace) -> str:
    what = f"{plain(trace.model)} " if trace.model else ""
    return (
        f"{what}trace: {trace.num_tokens:,} tokens in {trace.num_sequences} sequences, "
        f"{trace.num_layers} layers x {trace.num_experts} experts, top-{trace.top_k}"
    )


def planned_on(trace: Trace, split: str | None) -> str:
    """Which part of the sequences; split as typed, None: there is no other part."""
    part = {None: "all", "sequence": "a random half", "time": "the first half"}.get(split)
    if part is None:
        part = f"all but {str(split).partition(':')[2]}"
    return f"{part} of the sequences: {trace.num_sequences}, {trace.num_tokens} tokens"


def provenance(
    trace: Trace, problem: Problem, report: Report, seed: int, split: str | None
) -> dict[str, Any]:
    """Where a plan comes from, for its file."""
    return {
        "trace_digest": trace.digest,
        "tokens": problem.trace.num_tokens,
        "planned_on": planned_on(problem.trace, split),
        "solver": "greedy, search and integer programs (HiGHS), or all placements",
        "seed": seed,
        "objective_name": report.objective_name,
        "dispatch": report.dispatch,
        "unit": report.unit,
        "objective": report.objective,
        "bound": report.bound,
        "gap": report.gap,
        "seconds": report.seconds,
        **({"interrupted": True} if report.interrupted else {}),
        **limits(problem),
    }


def limits(problem: Problem) -> dict[str, Any]:
    """The plan that was in use, what might move away from it, and how many pins there are."""
    origin: dict[str, Any] = {}
    if problem.previous is not None:
        origin["previous_digest"] = problem.previous.placement.digest
        origin["moves_allowed"] = problem.previous.moves
    if problem.pins is not None:
        origin["pins"] = int(problem.pins.held_LEM.sum())
    return origin


def cap(problem: Problem) -> list[str]:
    """What a cap of other sequences is on those planned on; nothing for other caps."""
    found = problem.load_cap
    if found is None or not found.held:
        return []
    return [
        f"  load cap {found}: {found.planned.factor:.4f} over the mean here, as other sequences "
        f"are expected to add {found.unseen:.4f} to the fullest device, mean over layers"
    ]


def pins(problem: Problem, placement: Placement, name: str) -> str:
    """How many pins plans keep, and how many of them `placement` breaks; "" without any."""
    if problem.pins is None:
        return ""
    broken = problem.pins.broken(previous.holds_LEM(placement))
    kept = "keeps them" if not broken else f"breaks {broken} of them"
    return f" {int(problem.pins.held_LEM.sum())} pins, of every plan that is made; {name} {kept}."


def step(problem: Problem, placement: Placement, judge: Trace | None) -> str:
    """A whole step before (contiguous) and after, on the trace that judges."""
    judged = problem.unrestricted
    if judge is not None:
        judged = dataclasses.replace(judged, trace=judge, load_cap=None)
    layers, work = judged.trace.num_layers, judged.work
    sizes = (layers, judged.trace.num_experts, judged.num_devices)

    def spent(one: Placement) -> float:
        return seconds.step_seconds(judged.value_of(one), layers, judged.topology, work)

    where = "" if judge is None else ", on the other half"
    head = f"  a step of {layers} MoE and {work.num_dense_layers} dense layers without attention"
    after = spent(placement)
    if judged.needs_copies:
        return f"{head}{where}: {1e3 * after:.4g} ms planned"
    before = spent(Placement.contiguous(*sizes))
    return (
        f"{head}{where}: {1e3 * before:.4g} ms contiguous, {1e3 * after:.4g} ms planned "
        f"({100 * (1 - after / before):.1f} % less)"
    )


def copy_rule(placement: Placement) -> dict[str, str]:
    """The rule that figures of a plan with replicas hold under (copies.py), for its file."""
    return {"copy_rule": copies.rule_of(placement)} if placement.has_replicas else {}
