"""`solve`: plans on a part of the sequences (--split, --seed), judges on the other part, writes.

What is printed about a plan is always from the half it has not seen. Ctrl-C ends the search and
writes the best plan so far, marked as interrupted.
"""

import argparse
import dataclasses
import json

from moe_jax.errors import Refused
from moe_jax.placement import compare, evidence, tables
from moe_jax.placement import solve as solve_lib
from moe_jax.placement.commands import counts, inputs, interrupt, limits, words
from moe_jax.placement.commands import options as options_lib
from moe_jax.placement.formats.counts import Counts
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import Problem
from moe_jax.placement.progress import Ticker
from moe_jax.placement.report import build, page
from moe_jax.placement.solution import Interrupted, Report, Solution
from moe_jax.routing.trace import Halves


def add(commands) -> None:
    """The sub-command and its options."""
    command = options_lib.command(
        commands, "solve", "plan on half of the sequences, judge on the other half"
    )
    options_lib.trace_options(command)
    options_lib.split_option(command)
    command.add_argument("--out", required=True, metavar="PLAN.json", help="where the plan goes")
    options_lib.report_option(command)
    options_lib.machine_options(command)
    options_lib.objective_options(command)
    limits.add(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> str:
    """Plans, judges, writes the plan."""
    options_lib.outputs_ok(options)
    trace = inputs.trace_or_counts(options)
    if isinstance(trace, Counts):
        return counts.solve(options, trace)
    halves = options_lib.split(trace, options.seed, options.split)
    problem = options_lib.problem_of(options, halves.plan_half if halves else trace)
    problem = solve_lib.resolved(limits.limited(options, problem))
    if options.report and problem.previous is None and problem.needs_copies:
        rule = f"drawn from contiguous, and the devices do not divide {trace.num_experts} experts"
        raise Refused("report", options.report, rule, "Leave --report out, or give --previous")
    placement, report = _best_found(options, problem)
    plan = Plan(
        placement,
        trace.layer_ids,
        problem.topology.to_json(),
        words.provenance(trace, problem, report, options.seed, _split(options, halves))
        | words.copy_rule(placement),
    )
    plan.write(options.out)
    with interrupt.leaving(f"wrote {options.out}, not judged"):
        held_out = None
        if halves:
            held_out = evidence.judge(
                halves.judge_half,
                placement,
                problem.topology,
                step_tokens=problem.work.batch_tokens,
                dispatch=problem.dispatch,
            )
    if options.report:
        with interrupt.leaving(f"wrote {options.out}, not {options.report}"):
            _write_page(options, trace, problem, placement, report, halves)
    answer = _text(options, trace, problem, placement, report, halves, held_out)
    if options.json:
        answer = json.dumps(
            {
                **{k: v for k, v in report.to_json().items() if k != "history"},
                "move": limits.to_json(options, problem, placement),
                "load_cap": dataclasses.asdict(problem.load_cap) if problem.load_cap else None,
                "plan_digest": placement.digest,
                "out": str(options.out),
                "report": options.report,
                "planned_on": words.planned_on(problem.trace, _split(options, halves)),
                "stays": dataclasses.asdict(stays) if (stays := _stays(problem, report)) else None,
                "held_out": held_out.to_json() if held_out else None,
            }
        )
    if report.interrupted:
        raise interrupt.Stopped(f"wrote the best plan so far to {options.out}", answer)
    return answer


def _split(options: argparse.Namespace, halves: Halves | None) -> str | None:
    return options.split if halves else None


def _best_found(options: argparse.Namespace, problem: Problem) -> Solution:
    """What the search found, whether it came to its end or to Ctrl-C."""
    try:
        with Ticker() as ticker:
            return solve_lib.solve_problem(problem, options.seed, options.time_limit, ticker.tell)
    except Interrupted as stop:
        return stop.solution


@dataclasses.dataclass(frozen=True)
class Stays:
    """`exflow` on one node as others state it: transitions that stay on their device.

    Attributes:
      share: of all transitions, on the sequences planned on.
      most: proven; no placement keeps more.
      gap: (most - share) / most.
    """

    share: float
    most: float
    gap: float


def _stays(problem: Problem, report: Report) -> Stays | None:
    if problem.objective != "exflow" or problem.has_replicas or problem.topology.num_nodes > 1:
        return None
    pairs = problem.trace.num_layers - 1
    share, most = 1 - report.objective / pairs, 1 - report.bound / pairs
    return Stays(share, most, (most - share) / most if most > 0 else 0.0)


def _text(options, trace, problem, placement, report, halves, held_out) -> str:
    first = "plan in use" if problem.previous else "greedy start"
    lines = [
        words.describe(trace),
        f"Planned on {words.planned_on(problem.trace, _split(options, halves))}.",
        f"  {report.objective_name} for {report.dispatch} dispatch on {problem.topology.name}: "
        f"{report.objective:.6g} {report.unit}",
        f"  proven bound {report.bound:.6g}, gap {100 * report.gap:.2f} %; "
        f"{first} {report.greedy:.6g}; {report.seconds:.1f} s"
        + (f" ({report.note})" if report.note else ""),
    ]
    if (stays := _stays(problem, report)) is not None:
        lines.append(
            f"  stays on its device: {stays.share:.4f} of the transitions; no plan keeps more than "
            f"{stays.most:.4f} (gap {100 * stays.gap:.1f} %)"
        )
    lines += words.cap(problem)
    lines += limits.text(options, problem, placement, report)
    if problem.objective == "seconds":
        lines.append(words.step(problem, placement, halves.judge_half if halves else None))
    if held_out is not None:
        lines += [
            f"Judged on the other {halves.judge_half.num_sequences} sequences "
            f"(value [95 % interval over sequences]):",
            tables.intervals(held_out),
        ]
    lines.append(f"Wrote {options.out}: {tables.sizes(placement)}, digest {placement.digest[:16]}")
    if options.report:
        lines.append(f"Wrote {options.report}: figures before and after")
    return "\n".join(lines)


def _write_page(options, trace, problem, placement, report, halves) -> None:
    judge = compare.halves_of(halves, problem)[1] if halves else problem
    if problem.previous is not None:
        before = problem.previous.placement
    else:
        before = Placement.contiguous(trace.num_layers, trace.num_experts, problem.num_devices)
    done = build.Done(
        trace=trace,
        judge=judge,
        held_out=bool(halves),
        planned=problem.trace,
        before=before,
        after=placement,
        before_name=limits.before_name(options),
        seed=options.seed,
        command=options_lib.typed(options),
        report=report,
    )
    page.write(build.page(done), options.report)
