"""`evaluate`: true figures of plans that exist, on a whole trace."""

import argparse
import json

from moe_jax.placement import evaluate as evaluate_lib
from moe_jax.placement.commands import inputs, words
from moe_jax.placement.commands import options as options_lib
from moe_jax.placement.cost import DISPATCHES
from moe_jax.placement.proxies import Pairs


def add(commands) -> None:
    """The sub-command and its options."""
    command = options_lib.command(
        commands, "evaluate", "true rows, locality, load, seconds of plans"
    )
    options_lib.trace_options(command)
    command.add_argument("plans", nargs="+", metavar="PLAN", help="plans of any format of convert")
    command.add_argument(
        "--pairs", choices=DISPATCHES, help="print the rows from device to device in this dispatch"
    )
    options_lib.machine_options(command)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> str:
    """True figures of plans on a whole trace."""
    trace = inputs.trace(options)
    devices = options_lib.devices_said(options)
    plans = [inputs.plan(path, trace, devices) for path in options.plans]
    machines = [options_lib.evaluation_topology(options, plan) for plan in plans]
    for plan, topology in zip(plans, machines, strict=True):
        options_lib.fitting(plan, trace, topology)
    pairs = Pairs.of(trace)
    evaluated = [
        evaluate_lib.evaluate(path, plan, trace, pairs, topology, options_lib.work_of(options))
        for path, plan, topology in zip(options.plans, plans, machines, strict=True)
    ]
    if options.json:
        answers = [one.to_json(options.pairs) for one in evaluated]
        return json.dumps({"trace_digest": trace.digest, "plans": answers})
    heads = [words.describe(trace), *evaluate_lib.machines(evaluated)]
    return "\n".join([*heads, "", evaluate_lib.text(evaluated, options.pairs)])
