"""`solve` for counts: the least largest load, planned on half of the steps, judged on the rest."""

import argparse
import dataclasses
import json

from moe_jax.errors import Refused
from moe_jax.placement import balance, tables
from moe_jax.placement import solve as solve_lib
from moe_jax.placement.commands import options as options_lib
from moe_jax.placement.formats.counts import Counts
from moe_jax.placement.plan import Plan

UNFIT = (
    "counts do not say which experts a token chose together, so rows, transitions and seconds "
    "have no value"
)


def solve(options: argparse.Namespace, counts: Counts) -> str:
    """Plans, judges, writes the plan."""
    _check(options)
    topology = options_lib.topology_of(options)
    plan_LE, judge_LE = balance.split(counts.count_SLE, options.seed)
    experts, devices = counts.count_SLE.shape[2], topology.num_devices
    sizes = devices, options_lib.slots_of(options, experts, devices)
    found = balance.solve(plan_LE, *sizes, topology.num_nodes, options.time_limit)
    planned_on = _planned_on(len(counts.count_SLE), judge_LE is not None)
    origin = {
        "planned_on": planned_on,
        "solver": "packing + integer programs (HiGHS) on counts",
        "seed": options.seed,
        "objective_name": "load",
        "unit": "max / mean",
        "objective": found.objective,
        "bound": found.bound,
        "gap": found.gap,
        "seconds": found.seconds,
    }
    plan = Plan(found.placement, counts.layer_ids, topology.to_json(), origin)
    plan.write(options.out)
    judged = plan_LE if judge_LE is None else judge_LE
    rows = {
        **balance.others(plan_LE, *sizes),
        "planner": found.placement,
    }
    spreads = {name: balance.spread(judged, placement) for name, placement in rows.items()}
    if options.json:
        mine = dataclasses.asdict(spreads["planner"])
        return json.dumps(
            {
                **origin,
                "plan_digest": plan.digest,
                "out": str(options.out),
                "held_out": None if judge_LE is None else {"load_max_over_mean": mine},
                "methods": {name: dataclasses.asdict(one) for name, one in spreads.items()},
            }
        )
    steps, layers, experts = counts.count_SLE.shape
    table = [[name, f"{one.mean:.4f}", f"{one.worst:.4f}"] for name, one in spreads.items()]
    head = "the same steps" if judge_LE is None else "the other steps"
    return "\n".join(
        [
            f"counts: {steps} steps, {layers} layers x {experts} experts; nothing but loads can be "
            "said",
            f"Planned on {planned_on}.",
            f"  load on {topology.name}: {found.objective:.6g} max / mean; proven bound "
            f"{found.bound:.6g}, gap {100 * found.gap:.2f} %; {found.seconds:.1f} s",
            "",
            tables.table([head, "load", "worst"], table),
            "  load, worst: largest device load over the mean, mean of the layers and worst layer; "
            "copies share their expert's load evenly",
            f"Wrote {options.out}: {tables.sizes(found.placement)}, digest {plan.digest[:16]}",
        ]
    )


def _check(options: argparse.Namespace) -> None:
    """Refuses what counts cannot answer."""
    if options.objective != "load":
        raise Refused("objective", options.objective, UNFIT, "Use --objective=load, or a trace")
    for name, rule in (
        ("report", "the page draws traffic, and counts have none"),
        ("load_cap", "the plan's loads are as even as possible already"),
        ("previous", "moves are limited where plans are made from traces"),
        ("move_budget", "moves are limited where plans are made from traces"),
        ("expert_bytes", "moves are counted where plans are made from traces"),
        ("pin", "pins are kept where plans are made from traces"),
    ):
        if getattr(options, name):
            raise Refused(
                name, getattr(options, name), rule, f"Leave --{name} out".replace("_", "-")
            )
    if options.steady != options_lib.STEADY:
        rule = "loads of other sequences are told where plans are made from traces"
        raise Refused("steady", options.steady, rule, "Leave --steady out")
    if options.split != options_lib.SEQUENCE:
        rule = "counts have steps, of which a random half plans"
        raise Refused("split", options.split, rule, "Leave --split out, or give a trace")
    if isinstance(options_lib.topology_of(options).device_flops, tuple):
        rule = "plans from counts are for devices of one speed"
        raise Refused("device_flops", options.device_flops, rule, "Give a trace, or one speed")
    solve_lib.check_time_limit(options.time_limit)


def _planned_on(steps: int, halved: bool) -> str:
    if not halved:
        return "the one step there is: there is no held-out half"
    return f"a random half of the {steps} steps"
