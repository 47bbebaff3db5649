"""`compare`: all baselines and the planner on one half of the sequences, judged on the other."""

import argparse
import json
import pathlib

from moe_jax.errors import Refused
from moe_jax.placement import compare as compare_lib
from moe_jax.placement import compare_text
from moe_jax.placement.baselines import registry
from moe_jax.placement.commands import every, inputs, limits, words
from moe_jax.placement.commands import options as options_lib
from moe_jax.placement.plan import Plan
from moe_jax.placement.problem import Problem
from moe_jax.placement.progress import Ticker
from moe_jax.placement.report import build, page
from moe_jax.routing.trace import Trace


def add(commands) -> None:
    """The sub-command and its options."""
    command = options_lib.command(commands, "compare", "baselines, greedy and planner, held-out")
    options_lib.trace_options(command)
    options_lib.split_option(command)
    options_lib.report_option(command)
    options_lib.machine_options(command)
    options_lib.objective_options(command)
    command.add_argument(
        "--methods",
        metavar="NAME,NAME",
        help="these baselines and the planner only: "
        + ", ".join([*(one.key for one in registry.ALL), "greedy"])
        + " (default: all that apply)",
    )
    command.add_argument("--out-plans", metavar="DIR", help="write every method's plan there")
    every.add(command)
    limits.add_pins(command.add_argument_group("what stays where it is"))
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> str:
    """All baselines and the planner, held-out."""
    options_lib.outputs_ok(options)
    trace = inputs.trace(options)
    halves = options_lib.split(trace, options.seed, options.split)
    if halves is None:
        raise Refused(
            "sequences",
            1,
            "compare judges on sequences that were not planned on",
            "Record two or more sequences",
        )
    if options.every:
        return every.run(options, trace, halves)
    problem = limits.pinned(options, options_lib.problem_of(options, trace))
    plan, judge = compare_lib.halves_of(halves, problem)
    with Ticker() as ticker:
        made = compare_lib.methods(
            plan, judge, options.seed, options.time_limit, ticker.tell, keys_of(options.methods)
        )
    if options.out_plans:
        _write_plans(options, made, trace, plan)
    if options.report:
        _write_page(options, made, trace, plan, judge)
    solved = made[-1].report
    assert solved is not None
    if options.json:
        return json.dumps(
            {
                "objective_name": plan.objective,
                "dispatch": plan.dispatch,
                "unit": solved.unit,
                "planned_on": words.planned_on(plan.trace, options.split),
                "held_out_sequences": judge.trace.num_sequences,
                "report": options.report,
                "methods": [method.to_json() for method in made],
            }
        )
    return "\n".join(
        [
            words.describe(trace),
            f"Planned on {words.planned_on(plan.trace, options.split)}; every figure below is from "
            f"the other {halves.judge_half.num_sequences} sequences (seed {options.seed}).",
            "",
            compare_text.text(made, judge),
            "",
            f"  objective {plan.objective} ({solved.unit}), dispatch {plan.dispatch}, "
            f"{plan.topology.name}",
            compare_text.legend(made, judge),
            "",
            f"{made[-1].name} on the planning half: {solved.objective:.6g}, proven bound "
            f"{solved.bound:.6g}, gap {100 * solved.gap:.1f} %"
            + (f" ({solved.note})." if solved.note else "."),
            *([f"Wrote {options.report}: figures before and after"] if options.report else []),
        ]
    )


def keys_of(methods: str | None) -> list[str] | None:
    """The names in `--methods`."""
    return None if methods is None else [key.strip() for key in methods.split(",") if key.strip()]


def _write_page(
    options, made: list[compare_lib.Method], trace: Trace, plan: Problem, judge: Problem
) -> None:
    first, last = made[0], made[-1]
    done = build.Done(
        trace=trace,
        judge=judge,
        held_out=True,
        planned=plan.trace,
        before=first.placement,
        after=last.placement,
        before_name=first.name,
        seed=options.seed,
        command=options_lib.typed(options),
        report=last.report,
        others=tuple((method.name, method.held_out_objective) for method in made),
    )
    page.write(build.page(done), options.report)


def _write_plans(options, made: list[compare_lib.Method], trace: Trace, plan: Problem) -> None:
    for method in made:
        if not method.made.valid:
            continue
        name = "".join(c if c.isalnum() else "_" for c in method.name.split(" (")[0].lower())
        origin = {"trace_digest": trace.digest, "solver": method.name, "seed": options.seed}
        if method.report is not None:
            origin = words.provenance(trace, plan, method.report, options.seed, options.split)
        origin |= words.copy_rule(method.placement)
        written = Plan(method.placement, trace.layer_ids, plan.topology.to_json(), origin)
        written.write(pathlib.Path(options.out_plans) / f"{name}.json")
