"""`homes`: which device should hold which sequence, for a plan or jointly with one.

Learned and planned on a random half of the sequences (--seed), judged on the other half. Ctrl-C
leaves the best plan so far in --out-plan, and no rules: those are what is judged.
"""

import argparse
import dataclasses
import json
import time

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement import solve as solve_lib
from moe_jax.placement.commands import inputs, interrupt, words
from moe_jax.placement.commands import options as options_lib
from moe_jax.placement.homes import assign, joint, report, tally
from moe_jax.placement.homes.file import MOST_RULES, HomeRules
from moe_jax.placement.homes.joint import Joint
from moe_jax.placement.homes.judge import Arrivals
from moe_jax.placement.homes.report import Found, Study
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import Problem
from moe_jax.placement.progress import Ticker
from moe_jax.placement.solution import Interrupted, Report
from moe_jax.placement.topology import Topology
from moe_jax.routing.trace import Trace

SLACK = 0.05  # of the tokens of a device, in planning; more where sequences do not fit
START_SHARE = 0.4  # of the time for the plan that the joint search starts from


def add(commands) -> None:
    """The sub-command and its options."""
    command = options_lib.command(
        commands, "homes", "which device should hold which sequence, for a plan or with one"
    )
    options_lib.trace_options(command)
    options_lib.machine_options(command)
    options_lib.objective_options(command)
    group = command.add_argument_group("homes")
    group.add_argument(
        "--plan", metavar="PLAN", help="where experts are (default: solved here, and --joint)"
    )
    group.add_argument(
        "--joint", action="store_true", help="improve experts and homes together, from --plan on"
    )
    group.add_argument("--batch", type=int, default=64, help="arriving together (default 64)")
    group.add_argument(
        "--imbalance",
        type=int,
        default=4,
        help="arriving one by one: sequences a device may be ahead of another (default 4)",
    )
    group.add_argument(
        "--arrival",
        choices=("random", "file"),
        default="random",
        help="order of the held-out sequences (default random)",
    )
    group.add_argument(
        "--prefill",
        default="16,64,256",
        metavar="N,...",
        help="first tokens after which a home may be decided (default 16,64,256)",
    )
    group.add_argument(
        "--tokens",
        default="16,64,256",
        metavar="N,...",
        help="first tokens whose identities are known on arrival, where the trace has them "
        "(default 16,64,256)",
    )
    group.add_argument(
        "--name-fields",
        type=int,
        default=2,
        help="fields of a sequence's name (split at / : |) that are known on arrival (default 2)",
    )
    group.add_argument("--out", metavar="HOMES.json", help="write the rules there")
    group.add_argument("--out-plan", metavar="PLAN.json", help="write the plan they are for there")
    command.set_defaults(run=run)


@dataclasses.dataclass(frozen=True, eq=False)
class _Planned:
    """Experts before and after, and how they came about; `solved` where they were solved here."""

    before_LE: np.ndarray
    after_LE: np.ndarray
    home_S: np.ndarray
    slack: float
    joint: Joint | None
    solved: Report | None
    given: Plan | None

    @property
    def interrupted(self) -> bool:
        """By Ctrl-C: this is the best until then."""
        parts = self.joint, self.solved
        return any(part is not None and part.interrupted for part in parts)


def run(options: argparse.Namespace) -> str:
    """Homes for a plan, or with one; every rule judged."""
    options_lib.outputs_ok(options)
    settings = Study(
        _numbers("prefill", options.prefill),
        options.name_fields,
        _numbers("tokens", options.tokens),
        Arrivals(
            options.batch, options.imbalance, options.seed if options.arrival == "random" else None
        ),
        options.seed,
    )
    trace = inputs.trace(options)
    halves = options_lib.split(trace, options.seed)
    if halves is None:
        raise Refused(
            "sequences", 1, "rules are judged on sequences of their own", "Record two or more"
        )
    given = None
    if options.plan:
        given = inputs.plan(options.plan, trace, options_lib.devices_said(options))
        if given.placement.has_replicas:
            fix = "Give a plan that was made without --slots, or leave --plan out"
            raise Refused("plan", options.plan, tally.WITHOUT_COPIES, fix)
    problem = options_lib.problem_of(options, halves.plan_half, _machine(options, given))
    problem = solve_lib.resolved(problem)
    tally.check(problem)
    planned = _planned(options, problem, given)
    placement = Placement.from_device_LE(planned.after_LE, problem.num_devices)
    origin = _origin(options, trace, problem, planned)
    if options.out_plan:
        Plan(placement, trace.layer_ids, problem.topology.to_json(), origin).write(options.out_plan)
    best = "the best plan so far to " if planned.interrupted else ""
    left = f"wrote {best}{options.out_plan}, no homes for it" if options.out_plan else ""
    with interrupt.leaving(left):
        if planned.interrupted:
            raise KeyboardInterrupt
        halved = halves.judge_half, planned.before_LE, planned.after_LE
        found = report.study(problem, *halved, settings)
    if options.out:
        _rules(problem, placement, found, origin).write(options.out)
    if options.json:
        return json.dumps(
            {"plan_digest": placement.digest, "planned": origin["homes"], **found.to_json()}
        )
    return _text(options, trace, problem, planned, found, halves.judge_half)


def _machine(options: argparse.Namespace, given: Plan | None) -> Topology:
    """The plan's own machine where the command line names none."""
    if given is None:
        return options_lib.topology_of(options)
    return options_lib.evaluation_topology(options, given)


def _planned(options: argparse.Namespace, problem: Problem, given: Plan | None) -> _Planned:
    deadline = time.monotonic() + options.time_limit
    solved = None
    if given is None:
        share = START_SHARE * options.time_limit
        try:
            with Ticker() as ticker:
                found = solve_lib.solve_problem(problem, options.seed, share, ticker.tell)
        except Interrupted as stop:
            found = stop.solution
        placement, solved = found
    else:
        placement = options_lib.fitting(given, problem.trace, problem.topology)
    before_LE = placement.device_LE.astype(np.int64)
    if given is not None and not problem.all_allowed(before_LE):
        rule = "a device of it computes more than --load-cap allows on these sequences"
        raise Refused("plan", options.plan, rule, "Leave --load-cap out, or raise it")
    len_S = problem.trace.seq_len.astype(np.int64)
    slack = max(SLACK, assign.least_slack(len_S, problem.num_devices))

    def seat(cost_SM: np.ndarray) -> assign.Seated:
        return assign.within_tokens(cost_SM, len_S, slack)

    stopped = solved is not None and solved.interrupted
    if (given is None or options.joint) and not stopped:
        both = joint.solve(problem, before_LE, options.seed, deadline, seat)
        if solved is not None and not solved.finished:  # it began with a plan that was cut short
            both = dataclasses.replace(both, finished=False)
        return _Planned(before_LE, both.device_LE, both.home_S, slack, both, solved, given)
    contacts = tally.count(problem.trace, before_LE, problem.topology)
    home_S = seat(tally.cost_SM(contacts, tally.prices_of(problem))).home_S
    return _Planned(before_LE, before_LE, home_S, slack, None, solved, given)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        firsts = sorted({int(part) for part in text.split(",") if part})
    except ValueError:
        firsts = [0]
    if any(first < 1 for first in firsts) or len(firsts) > MOST_RULES:
        raise Refused(
            option, text, f"up to {MOST_RULES} whole numbers from 1", f"Use --{option}=16,64"
        )
    return tuple(firsts)


def _origin(options, trace: Trace, problem: Problem, planned: _Planned) -> dict:
    """For the plan and for the rules: what was planned with which homes."""
    homes = {
        "planned_with": "the homes of the planning half that the search found, fixed per sequence",
        "capacity": f"at most {1 + planned.slack:.4f} times the mean of the tokens",
        "sequences_per_device": np.bincount(planned.home_S, minlength=problem.num_devices).tolist(),
    }
    if planned.joint is not None:
        names = ("uniform", "seated", "numbered", "value", "homes_gap", "finished")
        homes |= {name: getattr(planned.joint, name) for name in names}
    if planned.solved is not None:
        origin = words.provenance(
            trace, problem, planned.solved, options.seed, options_lib.SEQUENCE
        )
    else:
        origin = {
            "trace_digest": trace.digest,
            "planned_on": words.planned_on(problem.trace, options_lib.SEQUENCE),
            "seed": options.seed,
            "objective_name": problem.objective,
            "dispatch": problem.dispatch,
        }
    if planned.joint is not None:  # bound and gap were those of uniform homes
        origin |= {"objective": planned.joint.value, "bound": 0.0, "gap": 1.0}
        origin["solver"] = "experts and homes in turn (assignment, layer search)"
    if planned.interrupted:
        origin["interrupted"] = True
    return {**origin, "homes": homes}


def _rules(problem: Problem, placement: Placement, found: Found, origin: dict) -> HomeRules:
    return HomeRules(
        placement.digest,
        problem.num_devices,
        problem.trace.num_layers,
        problem.trace.num_experts,
        problem.dispatch,
        found.name,
        found.tokens,
        found.prefill,
        {key: origin[key] for key in ("trace_digest", "planned_on", "seed")},
    )


def _text(options, trace, problem, planned: _Planned, found: Found, judge: Trace) -> str:
    unit = problem.unit
    lines = [
        words.describe(trace),
        f"{problem.dispatch} dispatch on {problem.topology.name}; planned and learned on "
        f"{words.planned_on(problem.trace, options_lib.SEQUENCE)}.",
    ]
    if planned.joint is not None:
        both = planned.joint
        lines += [
            f"Experts and homes together, {unit} on that half (no device above "
            f"{1 + planned.slack:.3f} of the mean tokens):",
            f"  experts alone, homes uniform     {both.uniform:.5g}",
            f"  + the best homes for them        {both.seated:.5g}",
            f"  + devices of each layer renumbered {both.numbered:.5g}",
            f"  + single experts moved           {both.value:.5g}"
            + ("" if both.finished else "  (cut short for lack of time)"),
            f"  proven gap of the homes, given the experts: {100 * both.homes_gap:.3f} % of rows",
        ]
    arrivals = f"{options.batch} together (equal numbers on devices), or one by one (a device at "
    lines += [
        f"Judged on the other {judge.num_sequences} sequences; they arrive {arrivals}"
        f"most {options.imbalance} ahead), in {options.arrival} order:",
        "",
        report.table(found, problem),
        "",
        report.LEGEND,
        *(f"  not tried: {note}" for note in found.notes),
        "",
        report.summary(found),
    ]
    lines += [f"Wrote {path}" for path in (options.out_plan, options.out) if path]
    return "\n".join(lines)
