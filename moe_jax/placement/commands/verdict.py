"""`verdict`: is a better placement worth it, the cost of the move counted?"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

from moe_jax.errors import Refused
from moe_jax.placement import verdict as verdict_lib
from moe_jax.placement import verdict_text, windows
from moe_jax.placement.commands import inputs, interrupt, limits, words
from moe_jax.placement.commands import options as options_lib
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import Problem
from moe_jax.placement.progress import Ticker
from moe_jax.placement.report import build, page
from moe_jax.placement.verdict import Settings
from moe_jax.placement.windows import SPLITS
from moe_jax.routing.trace import Trace

TONES = {
    verdict_lib.RECOMMENDED: "good",
    verdict_lib.NOT_RECOMMENDED: "bad",
    verdict_lib.NOT_ENOUGH: "open",
}


def add(commands) -> None:
    """The sub-command and its options."""
    command = options_lib.command(
        commands, "verdict", "is a better placement worth it? the move counted"
    )
    options_lib.trace_options(command)
    options_lib.report_option(command)
    options_lib.machine_options(command)
    options_lib.objective_options(command)
    _judging(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> str:
    """Whether a better placement is worth it."""
    options_lib.outputs_ok(options)
    for name in ("out", "report"):
        if getattr(options, name) and options.split == "name":
            rule = "split=name judges one plan per group"
            raise Refused(name, getattr(options, name), rule, f"Leave --{name} out")
    settings = verdict_lib.Settings(
        options.split,
        options.seed,
        options.time_limit,
        options.steps,
        options.expert_bytes,
        options.min_gain / 100,
    )
    trace = inputs.trace(options)
    problem = limits.pinned(options, options_lib.problem_of(options, trace))
    before = options_lib.in_use(options.before, trace, problem.topology) if options.before else None
    if options.move_budget is not None:
        now = before or verdict_lib.contiguous(problem)
        problem = limits.budgeted(options, problem, now)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    plans: list[Placement] = []
    try:
        with Ticker() as ticker:
            found = verdict_lib.verdict(problem, before, settings, ticker.tell, say, plans.append)
    except KeyboardInterrupt as stop:
        if not options.out or not plans:
            raise
        _unjudged(trace, problem, settings, plans[-1]).write(options.out)
        left = f"wrote the best plan so far to {options.out}, not judged"
        raise interrupt.Stopped(left) from stop
    if options.out:
        _judged_plan(trace, problem, found).write(options.out)
    if options.report:
        _write_page(options, problem, before, found)
    if options.json:
        sizes = {"dispatch": problem.dispatch, "objective_name": problem.objective}
        return json.dumps({"trace_digest": trace.digest, **sizes, **found.to_json()})
    name = pathlib.Path(options.before).name if options.before else "contiguous"
    machine = f"{problem.dispatch} dispatch on {problem.topology.name}, planned for"
    held = words.pins(problem, before or verdict_lib.contiguous(problem), name)
    return (
        f"{words.describe(trace)}\n{name} now; {machine} {problem.objective}.{held}\n"
        f"{verdict_text.text(found, name)}"
        + (f"\nWrote {options.report}: figures before and after" if options.report else "")
    )


def _judging(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("how it is judged")
    group.add_argument(
        "--split",
        choices=SPLITS,
        default="sequence",
        help="planned on and judged on: random halves of the sequences (default), the first and "
        "the second half, or every group of names by a plan from the others",
    )
    group.add_argument("--before", metavar="PLAN", help="what is in use (default contiguous)")
    group.add_argument("--out", metavar="PLAN.json", help="write the plan that was judged there")
    settings = Settings()
    group.add_argument(
        "--steps",
        type=int,
        default=settings.steps,
        help=f"within which the move has to pay for itself (default {settings.steps})",
    )
    group.add_argument(
        "--min-gain",
        type=float,
        default=0.0,
        metavar="PERCENT",
        help="of a layer's time that the plan has to save, else it is not recommended (default 0)",
    )
    limits.add_budget(group, "--before")
    limits.add_pins(group)


def _write_page(
    options: argparse.Namespace,
    problem: Problem,
    before: Placement | None,
    found: verdict_lib.Verdict,
) -> None:
    trace = problem.trace
    (window,) = windows.windows(trace, options.split, options.seed)
    if before is None:
        before = verdict_lib.contiguous(problem)
    done = build.Done(
        trace=trace,
        judge=dataclasses.replace(problem.unrestricted, trace=window.judge, load_cap=None),
        held_out=True,
        planned=window.plan,
        before=before,
        after=found.placement,
        before_name=pathlib.Path(options.before).name if options.before else "contiguous",
        seed=options.seed,
        command=options_lib.typed(options),
        report=found.search,
        answer=(
            f"Verdict: {found.answer}. {found.reason[0].upper()}{found.reason[1:]}.",
            TONES[found.answer],
        ),
    )
    page.write(build.page(done), options.report)


def _judged_plan(trace: Trace, problem: Problem, found: verdict_lib.Verdict) -> Plan:
    """The plan that was judged, whatever the verdict; the verdict travels with it."""
    origin = {
        "planned_on": f"split {found.settings.split}: {found.planned} sequences",
        **_origin(trace, problem, found.settings),
        "verdict": found.answer,
        "reason": found.reason,
    }
    return Plan(found.placement, trace.layer_ids, problem.topology.to_json(), origin)


def _unjudged(trace: Trace, problem: Problem, settings: Settings, placement: Placement) -> Plan:
    """The plan that would have been judged, as far as it had come at Ctrl-C."""
    origin = {
        "planned_on": f"split {settings.split}",
        **_origin(trace, problem, settings),
        "interrupted": True,
    }
    return Plan(placement, trace.layer_ids, problem.topology.to_json(), origin)


def _origin(trace: Trace, problem: Problem, settings: Settings) -> dict[str, Any]:
    return {
        "trace_digest": trace.digest,
        "solver": "as of solve; devices numbered so that least moves",
        "seed": settings.seed,
        "objective_name": problem.objective,
        "dispatch": problem.dispatch,
        **words.limits(problem),
    }
