"""What the sub-commands do, once options are parsed. Each returns the text (or JSON) to print.

`solve` and `compare` plan on a random half of the sequences (--seed) and judge on the other half;
what they print about a plan is always from the half it has not seen.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

from moe_jax import files
from moe_jax.errors import Refused
from moe_jax.placement import compare as compare_lib
from moe_jax.placement import copies, evidence, solve, tables, verdict_text
from moe_jax.placement import evaluate as evaluate_lib
from moe_jax.placement import topology as topology_lib
from moe_jax.placement import verdict as verdict_lib
from moe_jax.placement.formats import convert as convert_lib
from moe_jax.placement.formats.counts import Counts
from moe_jax.placement.formats.hints import Hints, parse_layer_ids
from moe_jax.placement.plan import Placement, Plan, check_fits
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.placement.progress import Ticker
from moe_jax.placement.seconds import Work
from moe_jax.placement.topology import Topology
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Halves, Trace


def solve_command(options: argparse.Namespace) -> str:
    """Plans, judges, writes the plan."""
    files_ok(options.out)
    trace = trace_lib.load(options.trace, options.num_experts)
    halves = split(trace, options.seed)
    problem = problem_of(options, halves.plan_half if halves else trace)
    with Ticker() as ticker:
        placement, report = solve.solve_problem(
            problem, options.seed, options.time_limit, ticker.tell
        )
    held_out = None
    if halves:
        held_out = evidence.judge(halves.judge_half, placement, problem.topology)
    plan = Plan(
        placement,
        trace.layer_ids,
        problem.topology.to_json(),
        provenance(trace, problem, report, options.seed, bool(halves)),
    )
    plan.write(options.out)
    if options.json:
        return json.dumps(
            {
                **{k: v for k, v in report.to_json().items() if k != "history"},
                "plan_digest": placement.digest,
                "out": str(options.out),
                "planned_on": planned_on(problem.trace, bool(halves)),
                "held_out": held_out.to_json() if held_out else None,
            }
        )
    return solve_text(options, trace, problem, placement, report, halves, held_out)


def evaluate_command(options: argparse.Namespace) -> str:
    """True figures of plans on a whole trace."""
    trace = trace_lib.load(options.trace, options.num_experts)
    plans = [Plan.read(path) for path in options.plans]
    machines = [evaluation_topology(options, plan) for plan in plans]
    for plan, topology in zip(plans, machines, strict=True):
        check_fits(
            plan,
            num_layers=trace.num_layers,
            num_experts=trace.num_experts,
            num_devices=topology.num_devices,
        )
    evaluated = [
        evaluate_lib.evaluate(path, plan, trace, topology, work_of(options))
        for path, plan, topology in zip(options.plans, plans, machines, strict=True)
    ]
    if options.json:
        answers = [one.to_json() for one in evaluated]
        return json.dumps({"trace_digest": trace.digest, "plans": answers})
    return f"{describe(trace)}\n\n{evaluate_lib.text(evaluated)}"


def compare_command(options: argparse.Namespace) -> str:
    """All baselines and the planner, held-out."""
    trace = trace_lib.load(options.trace, options.num_experts)
    halves = split(trace, options.seed)
    if halves is None:
        raise Refused(
            "sequences",
            1,
            "compare judges on sequences that were not planned on",
            "Record two or more sequences",
        )
    plan, judge = compare_lib.halves_of(halves, problem_of(options, trace))
    with Ticker() as ticker:
        made = compare_lib.methods(plan, judge, options.seed, options.time_limit, ticker.tell)
    if options.out_plans:
        write_plans(options, made, trace, plan)
    solved = made[-1].report
    assert solved is not None
    if options.json:
        return json.dumps(
            {
                "objective_name": plan.objective,
                "dispatch": plan.dispatch,
                "unit": solved.unit,
                "planned_on": planned_on(plan.trace, True),
                "held_out_sequences": judge.trace.num_sequences,
                "methods": [method.to_json() for method in made],
            }
        )
    return "\n".join(
        [
            describe(trace),
            f"Planned on {halves.plan_half.num_sequences} sequences, every figure below is from "
            f"the other {halves.judge_half.num_sequences} (seed {options.seed}).",
            "",
            compare_lib.print_table(made, plan),
            "",
            f"  objective {plan.objective} ({solved.unit}), dispatch {plan.dispatch}, "
            f"{plan.topology.name}",
            tables.legend(),
            *compare_lib.notes(made),
            "",
            f"{made[-1].name} on the planning half: {solved.objective:.6g}, proven bound "
            f"{solved.bound:.6g}, gap {100 * solved.gap:.1f} %"
            + (f" ({solved.note})." if plan.has_replicas else "."),
        ]
    )


def verdict_command(options: argparse.Namespace) -> str:
    """Whether a better placement is worth it."""
    if options.out:
        files_ok(options.out)
        if options.split == "name":
            raise Refused(
                "out", options.out, "split=name judges one plan per group", "Leave --out out"
            )
    settings = verdict_lib.Settings(
        options.split, options.seed, options.time_limit, options.steps, options.expert_bytes
    )
    trace = trace_lib.load(options.trace, options.num_experts)
    problem = problem_of(options, trace)
    before = in_use(options.before, trace, problem.topology) if options.before else None

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with Ticker() as ticker:
        found = verdict_lib.verdict(problem, before, settings, ticker.tell, say)
    if options.out:
        judged_plan(trace, problem, found).write(options.out)
    if options.json:
        sizes = {"dispatch": problem.dispatch, "objective_name": problem.objective}
        return json.dumps({"trace_digest": trace.digest, **sizes, **found.to_json()})
    name = pathlib.Path(options.before).name if options.before else "contiguous"
    machine = f"{problem.dispatch} dispatch on {problem.topology.name}, planned for"
    return (
        f"{describe(trace)}\n{name} now; {machine} {problem.objective}.\n"
        f"{verdict_text.text(found, name)}"
    )


def judged_plan(trace: Trace, problem: Problem, found: verdict_lib.Verdict) -> Plan:
    """The plan that was judged, whatever the verdict; the verdict travels with it."""
    origin = {
        "trace_digest": trace.digest,
        "planned_on": f"split {found.settings.split}: {found.planned} sequences",
        "solver": "greedy + integer programs (HiGHS), devices numbered so that least moves",
        "seed": found.settings.seed,
        "objective_name": problem.objective,
        "dispatch": problem.dispatch,
        "verdict": found.answer,
        "reason": found.reason,
    }
    return Plan(found.placement, trace.layer_ids, problem.topology.to_json(), origin)


def in_use(path: str, trace: Trace, topology: Topology) -> Placement:
    """The placement of a plan file, which has to fit the trace and the machine."""
    plan = Plan.read(path)
    check_fits(
        plan,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        num_devices=topology.num_devices,
    )
    _ = plan.placement.device_LE  # refuses replicas
    return plan.placement


def convert_command(options: argparse.Namespace) -> str:
    """Reads a plan, a trace or counts of any known format, and writes another."""
    files_ok(options.target)
    layer_ids = None if options.layer_ids is None else parse_layer_ids(options.layer_ids)
    hints = Hints(options.devices, options.num_experts, layer_ids)
    done = convert_lib.convert(options.source, options.target, options.format, hints)
    value = done.found.value
    digest = None if isinstance(value, Counts) else value.digest
    if options.json:
        return json.dumps(
            {
                "kind": done.found.kind,
                "in_format": done.found.format,
                "out": str(options.target),
                "out_format": done.written,
                "digest": digest,
                "notes": done.notes,
            }
        )
    return "\n".join(
        [
            f"Read {options.source}: {done.found.format} {describe_found(value)}",
            *(f"  note: {note}" for note in done.notes),
            f"Wrote {options.target} ({done.written})"
            + (f", digest {digest[:16]}" if digest else ""),
        ]
    )


def describe_found(value: Plan | Trace | Counts) -> str:
    if isinstance(value, Plan):
        return f"plan: {tables.sizes(value.placement)}"
    if isinstance(value, Trace):
        return describe(value)
    steps, layers, experts = value.count_SLE.shape
    return f"counts: {steps} steps, {layers} layers x {experts} experts"


def problem_of(options: argparse.Namespace, trace: Trace) -> Problem:
    """The problem that the options describe."""
    return Problem(
        trace,
        topology_of(options),
        options.objective,
        options.dispatch,
        work_of(options),
        LoadCap.parse(options.load_cap) if options.load_cap else None,
        options.slots,
    )


def topology_of(options: argparse.Namespace) -> Topology:
    if options.topology:
        topology = topology_lib.preset(options.topology)
        if options.devices not in (None, topology.num_devices):
            raise Refused(
                "devices",
                options.devices,
                f"topology {topology.name} has {topology.num_devices} devices",
                "Leave --devices out, or choose another topology",
            )
        return topology
    if options.devices is None:
        raise Refused("devices", None, "the number of devices is needed", "Give --devices=8")
    if options.devices < 1:
        raise Refused("devices", options.devices, "at least 1", "Give --devices=8")
    return topology_lib.nodes_by_devices(options.nodes, options.devices)


def evaluation_topology(options: argparse.Namespace, plan: Plan) -> Topology:
    """The topology asked for, else the plan's own, else a flat one."""
    if options.topology or options.devices or options.nodes > 1:
        devices = options.devices or (None if options.topology else plan.placement.num_devices)
        return topology_of(argparse.Namespace(**{**vars(options), "devices": devices}))
    if plan.topology:
        return topology_lib.from_json(plan.topology, "plan topology")
    return topology_lib.flat(plan.placement.num_devices)


def work_of(options: argparse.Namespace) -> Work:
    fields = [field.name for field in dataclasses.fields(Work)]
    return Work(**{name: getattr(options, name) for name in fields})


def split(trace: Trace, seed: int) -> Halves | None:
    """Halves by sequences; None, said on stderr, where there is one sequence only."""
    if trace.num_sequences > 1:
        return trace_lib.split(trace, seed)
    print("The trace has one sequence only: there is no held-out half.", file=sys.stderr)
    return None


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
        **copy_rule(problem.has_replicas),
    }


def copy_rule(has_replicas: bool) -> dict[str, str]:
    """The rule that figures of a plan with replicas hold under (copies.py), for its file."""
    return {"copy_rule": copies.RULE} if has_replicas else {}


def planned_on(trace: Trace, halved: bool) -> str:
    part = "a random half" if halved else "all"
    return f"{part} of the sequences: {trace.num_sequences}, {trace.num_tokens} tokens"


def solve_text(options, trace, problem, placement, report, halves, held_out) -> str:
    lines = [
        describe(trace),
        f"Planned on {planned_on(problem.trace, bool(halves))}.",
        f"  {report.objective_name} for {report.dispatch} dispatch on {problem.topology.name}: "
        f"{report.objective:.6g} {report.unit}",
        f"  proven bound {report.bound:.6g}, gap {100 * report.gap:.2f} %; greedy start "
        f"{report.greedy:.6g}; {report.seconds:.1f} s"
        + (f" ({report.note})" if report.note else ""),
    ]
    if held_out is not None:
        lines += [
            f"Judged on the other {halves.judge_half.num_sequences} sequences "
            f"(value [95 % interval over sequences]):",
            tables.intervals(held_out),
        ]
    lines.append(f"Wrote {options.out}: {tables.sizes(placement)}, digest {placement.digest[:16]}")
    return "\n".join(lines)


def describe(trace: Trace) -> str:
    what = f"{trace.model} " if trace.model else ""
    return (
        f"{what}trace: {trace.num_tokens:,} tokens in {trace.num_sequences} sequences, "
        f"{trace.num_layers} layers x {trace.num_experts} experts, top-{trace.top_k}"
    )


def write_plans(options, made: list[compare_lib.Method], trace: Trace, plan: Problem) -> None:
    for method in made:
        if method.duplicates:
            continue  # no valid plan
        name = "".join(c if c.isalnum() else "_" for c in method.name.split(" (")[0].lower())
        origin = {"trace_digest": trace.digest, "solver": method.name, "seed": options.seed}
        origin |= copy_rule(method.placement.has_replicas)
        if method.report is not None:
            origin = provenance(trace, plan, method.report, options.seed, True)
        written = Plan(method.placement, trace.layer_ids, plan.topology.to_json(), origin)
        written.write(pathlib.Path(options.out_plans) / f"{name}.json")


def files_ok(path: str) -> None:
    """Refuses an output that cannot be written, before the work is done."""
    out = pathlib.Path(path)
    if out.is_dir():
        raise Refused("out", path, "is a folder", "Give the name of a file")
    try:
        with files.atomic_write(out.parent / f".{out.name}.probe"):
            pass
        (out.parent / f".{out.name}.probe").unlink()
    except OSError as error:
        raise Refused("out", path, f"cannot be written ({error.strerror})", "Choose another") from (
            error
        )
