"""Options of plans that start from where people are: the plan in use, what may move, pins."""

import argparse
import dataclasses
import pathlib
from typing import Any

from moe_jax.errors import Refused
from moe_jax.placement import move as move_lib
from moe_jax.placement import tables
from moe_jax.placement.commands import inputs
from moe_jax.placement.commands import options as options_lib
from moe_jax.placement.limits import pins as pins_lib
from moe_jax.placement.limits.previous import MoveBudget, Previous
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.placement.solution import Report

SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of all experts, in the table of budgets


def add(command: argparse.ArgumentParser) -> None:
    """--previous, --move-budget, --expert-bytes and --pin, of `solve`."""
    group = command.add_argument_group("starting from where you are")
    group.add_argument(
        "--previous",
        metavar="PLAN.json",
        help="the plan in use: the new one is numbered like it and moves as little as it can; "
        "prints what other budgets would bring",
    )
    add_budget(group, "--previous")
    add_pins(group)


def add_pins(group) -> None:
    """--pin."""
    group.add_argument(
        "--pin",
        action="append",
        metavar="LAYER:EXPERT:DEVICE",
        help="this expert stays on this device (LAYER is the model's number, * is every layer), "
        "or a file of such lines; may be given again",
    )


def add_budget(group, previous: str) -> None:
    """--move-budget and --expert-bytes, counted from what the option `previous` names."""
    group.add_argument(
        "--move-budget",
        metavar="BYTES",
        help=f"move at most so much away from {previous}: 2GB, 500MB, 0, or 10%% of the bytes of "
        "all experts; a copy that appears on a device counts, one that disappears does not "
        "(default: no limit)",
    )
    group.add_argument(
        "--expert-bytes",
        type=int,
        metavar="BYTES",
        help="that move with one expert of one layer (default: 3 x d_model x d_ff values)",
    )


def budgeted(options: argparse.Namespace, problem: Problem, now: Placement) -> Problem:
    """The problem with what is in use, and the budget of the options."""
    budget = None if options.move_budget is None else MoveBudget.parse(options.move_budget)
    previous = Previous.of(now, budget, expert_bytes(options, problem))
    return dataclasses.replace(problem, previous=previous)


def limited(options: argparse.Namespace, problem: Problem) -> Problem:
    """The problem with the plan in use and the pins that the options name."""
    trace = problem.trace
    if options.previous is None:
        for name in ("move_budget", "expert_bytes"):
            if (value := getattr(options, name)) is not None:
                rule = "counts what moves away from the plan in use"
                raise Refused(name, value, rule, "Give --previous=PLAN.json as well")
    else:
        plan = inputs.plan(options.previous, trace, problem.num_devices)
        options_lib.check_layers(plan, trace)
        problem = budgeted(options, problem, plan.placement)
    return pinned(options, problem)


def pinned(options: argparse.Namespace, problem: Problem) -> Problem:
    """The problem with the pins that the options name."""
    if not options.pin:
        return problem
    sizes = (problem.trace.num_experts, problem.num_devices, problem.trace.layer_ids)
    return dataclasses.replace(problem, pins=pins_lib.parse(options.pin, *sizes))


def expert_bytes(options: argparse.Namespace, problem: Problem) -> int:
    """What one expert of one layer weighs."""
    given = options.expert_bytes
    return problem.work.expert_bytes if given is None else given


def before_name(options: argparse.Namespace) -> str:
    return pathlib.Path(options.previous).name if options.previous else "contiguous"


def to_json(
    options: argparse.Namespace, problem: Problem, placement: Placement
) -> dict[str, Any] | None:
    """What moves, where there is a plan in use."""
    if problem.previous is None:
        return None
    weight = expert_bytes(options, problem)
    move = move_lib.move(problem.previous.placement, placement, problem.topology, weight)
    return {"budget_bytes": problem.previous.moves * weight, **move.to_json()}


def text(
    options: argparse.Namespace, problem: Problem, placement: Placement, report: Report
) -> list[str]:
    """What moves, and what other budgets would bring; nothing without a plan in use."""
    if problem.previous is None:
        return []
    weight = expert_bytes(options, problem)
    move = move_lib.move(problem.previous.placement, placement, problem.topology, weight)
    what = "copies appear" if placement.has_replicas else "experts move"
    lines = [
        f"From {before_name(options)}: {move.experts} of {move.of_experts} {what}, "
        f"{move.bytes / 1e9:.3g} GB of {problem.previous.moves * weight / 1e9:.3g} GB allowed, "
        f"{1e3 * move.seconds:.3g} ms over the links."
    ]
    if not report.tradeoff:
        return lines
    return [
        *lines,
        "What other budgets would bring, as found on the way:",
        _budgets(problem, report, move.of_experts, weight),
    ]


def _budgets(problem: Problem, report: Report, experts: int, weight: int) -> str:
    first = report.tradeoff[0][1] if report.tradeoff else report.objective
    rows: list[list[str]] = []
    for share in SHARES:
        within = [step for step in report.tradeoff if step[0] <= share * experts]
        if not within:
            continue
        moves, value = within[-1]
        saved = (first - value) / first if first > 0 else 0.0
        row = [str(moves), f"{moves * weight / 1e9:.3g}", f"{value:.6g}", f"{100 * saved:.1f} %"]
        if not rows or rows[-1][1:] != row:
            rows.append([f"{100 * share:g} %", *row])
    heads = ["of all experts", "moves", "GB", problem.unit, "saved"]
    return tables.table(heads, rows)
