"""What commands say of traces and plans, in text and in plan files."""

from typing import Any

from moe_jax.placement import copies, solve
from moe_jax.placement.problem import Problem
from moe_jax.routing.trace import Trace


def describe(trace: Trace) -> str:
    what = f"{trace.model} " if trace.model else ""
    return (
        f"{what}trace: {trace.num_tokens:,} tokens in {trace.num_sequences} sequences, "
        f"{trace.num_layers} layers x {trace.num_experts} experts, top-{trace.top_k}"
    )


def planned_on(trace: Trace, halved: bool) -> str:
    part = "a random half" if halved else "all"
    return f"{part} of the sequences: {trace.num_sequences}, {trace.num_tokens} tokens"


def provenance(
    trace: Trace, problem: Problem, report: solve.Report, seed: int, halved: bool
) -> dict[str, Any]:
    """Where a plan comes from, for its file."""
    return {
        "trace_digest": trace.digest,
        "tokens": problem.trace.num_tokens,
        "planned_on": planned_on(problem.trace, halved),
        "solver": "greedy + integer programs (HiGHS)",
        "seed": seed,
        "objective_name": report.objective_name,
        "dispatch": report.dispatch,
        "unit": report.unit,
        "objective": report.objective,
        "bound": report.bound,
        "gap": report.gap,
        "seconds": report.seconds,
        **({"interrupted": True} if report.interrupted else {}),
        **copy_rule(problem.has_replicas),
    }


def copy_rule(has_replicas: bool) -> dict[str, str]:
    """The rule that figures of a plan with replicas hold under (copies.py), for its file."""
    return {"copy_rule": copies.RULE} if has_replicas else {}
