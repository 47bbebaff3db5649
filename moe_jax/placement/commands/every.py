"""`compare --every`: one line for every dispatch, machine and load cap."""

import argparse
import json

from moe_jax.errors import Refused
from moe_jax.placement import every as every_lib
from moe_jax.placement import topology as topology_lib
from moe_jax.placement.commands import options as options_lib
from moe_jax.placement.commands import words
from moe_jax.placement.cost import DISPATCHES
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.placement.progress import Ticker
from moe_jax.routing.trace import Halves, Trace


def add(command: argparse.ArgumentParser) -> None:
    """The options of `--every`."""
    group = command.add_argument_group("every combination instead of one table")
    group.add_argument(
        "--every",
        action="store_true",
        help="one line for every dispatch, machine and load cap: the best baseline, the planner, "
        "and their ratio on both halves; --devices, --dispatch and --load-cap do not matter, "
        "--time-limit is that of one combination",
    )
    group.add_argument(
        "--machines",
        default="flat8,2x4,flat4",
        help="for --every: flat8 (one node), 2x4 (nodes x devices) or presets of --topology "
        "(default flat8,2x4,flat4)",
    )
    group.add_argument(
        "--caps", default="none,1.1x", help="for --every: load caps, or none (default none,1.1x)"
    )
    group.add_argument(
        "--dispatches",
        default=",".join(DISPATCHES),
        help=f"for --every (default {','.join(DISPATCHES)})",
    )


def run(options: argparse.Namespace, trace: Trace, halves: Halves) -> str:
    """The table of all combinations, or one JSON object."""
    for name in ("report", "out_plans", "methods", "slots", "device_slots"):
        if getattr(options, name) is not None:
            field = name.replace("_", "-")
            rule = "--every compares plans without copies, and writes nothing"
            raise Refused(field, getattr(options, name), rule, f"Leave out --{field} or --every")
    if options.topology or options.node_sizes or options.nodes is not None:
        field = "topology" if options.topology else "node-sizes" if options.node_sizes else "nodes"
        given = getattr(options, field.replace("-", "_"))
        raise Refused(field, given, "--every has machines of its own", "Name them in --machines")
    machines = [
        options_lib.with_flops(every_lib.machine(name), options)
        for name in _split(options.machines)
    ]
    caps = _split(options.caps)
    for cap in caps:
        if cap != "none":
            LoadCap.parse(cap)
    work = options_lib.work_of(options)
    like = Problem(
        trace,
        topology_lib.flat(1),
        options.objective,
        work=work,
        dispatcher=options.dispatcher,
        steady=options.steady,
    )
    with Ticker() as ticker:
        lines = every_lib.lines(
            halves,
            like,
            machines,
            caps,
            _split(options.dispatches),
            options.seed,
            options.time_limit,
            ticker.tell,
            options.pin or (),
        )
        done = list(lines)
    if options.json:
        return json.dumps(
            {"objective_name": options.objective, "lines": [one.to_json() for one in done]}
        )
    head = (
        f"Planned on {words.planned_on(halves.plan_half, options.split)}; held out are the other "
        f"{halves.judge_half.num_sequences} sequences (seed {options.seed}), "
        f"{options.time_limit:g} s each; objective {options.objective}; ratio: ours over theirs."
    )
    return "\n".join([words.describe(trace), head, "", every_lib.text(done)])


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
