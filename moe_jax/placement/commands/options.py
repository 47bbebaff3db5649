"""Options that sub-commands share, and what they mean: machine, sizes, objective, halves."""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

from moe_jax import files
from moe_jax.errors import Refused
from moe_jax.placement import solve, windows
from moe_jax.placement import topology as topology_lib
from moe_jax.placement.commands import inputs
from moe_jax.placement.cost import DISPATCHES
from moe_jax.placement.hops import DISPATCHERS
from moe_jax.placement.plan import Placement, Plan, check_fits
from moe_jax.placement.problem import OBJECTIVES, LoadCap, Problem
from moe_jax.placement.seconds import Work
from moe_jax.placement.topology import Topology
from moe_jax.routing.trace import Halves, Trace

STEADY = 0.003
SEQUENCE = "sequence"  # the default of --split
INPUTS = ("trace", "source", "topology", "previous", "before", "plan")  # beside files of pins
OUTPUTS = ("out", "out_plan", "target", "report")
REPLACED = (  # a plan may take the place of the one that it began with
    ("out", "previous"),
    ("out", "before"),
    ("out_plan", "plan"),
)
CALLED = {"source": "in", "target": "out"}


def typed(options: argparse.Namespace) -> str:
    """The command line, as one types it."""
    return shlex.join(["python", "-m", "moe_jax.placement", *options.arguments])


def command(commands_, name: str, text: str) -> argparse.ArgumentParser:
    return commands_.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )


def trace_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "trace", metavar="TRACE", help="routing trace, of any program that convert reads"
    )
    command.add_argument(
        "--num-experts", type=int, help="experts per layer, for traces that do not say it"
    )
    command.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )


def machine_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("machine and model sizes")
    group.add_argument("--devices", type=int, help="expert-parallel devices, all nodes together")
    group.add_argument("--nodes", type=int, help="equal nodes (default 1)")
    group.add_argument(
        "--node-sizes", metavar="8,4", help="devices of every node, where nodes are not equal"
    )
    group.add_argument(
        "--topology", metavar="NAME", help="a name of placement/topologies, or a path"
    )
    group.add_argument(
        "--device-flops",
        metavar="F",
        help="operations per second of a device in expert matmuls, or of each: 4e14,4e14,2e14,2e14",
    )
    sizes = Work()
    for name, text in (
        ("d_model", "values of a row"),
        ("d_ff", "hidden size of an expert"),
        ("value_bytes", "bytes of a value on the wire"),
        ("kv_values", "key and value entries per token and layer, for coherent dispatch"),
        ("batch_tokens", "tokens of a step over all devices"),
        ("num_shared_experts", "experts that every token uses at home, besides the routed ones"),
        ("d_ff_shared", "hidden size of a shared expert, 0: as --d-ff"),
        ("num_dense_layers", "layers without experts, for the seconds of a whole step"),
        ("d_ff_dense", "hidden size of a dense layer"),
    ):
        default = getattr(sizes, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=default,
            help=f"{text} (default {default})",
        )


def check_seed(options: argparse.Namespace) -> None:
    """Of commands that have one. argparse would make a usage error of a refusal."""
    if getattr(options, "seed", 0) < 0:
        raise Refused("seed", options.seed, "a whole number of at least 0", "Use 0 if in doubt")


def objective_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what to minimise")
    group.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="seconds",
        help="seconds of a layer (default), rows on the wire, MoETuner's two stages, ExFlow's "
        "transitions, the topology ILP's hops, largest load",
    )
    group.add_argument(
        "--dispatcher",
        choices=DISPATCHERS,
        default="uniform",
        help="for --objective=hops, where tokens are when a layer begins: on all devices alike "
        "(default), or on one device, neighbouring layers together, the next layer's collecting",
    )
    group.add_argument(
        "--dispatch",
        choices=DISPATCHES,
        default="exchange",
        help="how rows travel: what a placement can save depends on it (default exchange)",
    )
    group.add_argument(
        "--load-cap",
        metavar="C",
        help="largest device load of a layer: 1.1 (over the mean), 1.1x (over what is reachable), "
        "1.1held (over the mean, as expected on other sequences, mean over layers), 9000rows (of a "
        "device in a step of --batch-tokens)",
    )
    group.add_argument(
        "--slots",
        type=int,
        metavar="P",
        help="expert slots of a layer, a multiple of the devices; above the number of experts the "
        "spare ones hold replicas (default: one slot per expert)",
    )
    group.add_argument(
        "--device-slots",
        metavar="5,5,...",
        help="slots that the memory of every device holds, in place of --slots; all alike, as "
        "every device has as many, else it says what the smallest one allows",
    )
    group.add_argument(
        "--time-limit", type=float, default=60.0, help="seconds; 0 is greedy only (default 60)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the halves and of the search")
    group.add_argument(
        "--steady",
        type=float,
        default=STEADY,
        metavar="SHARE",
        help="for seconds and load: give up so much of a mean device's time on the planning "
        f"sequences for loads that stay even on others, told by resampling (default {STEADY}; 0: "
        "the best on the planning sequences)",
    )


def problem_of(
    options: argparse.Namespace, trace: Trace, topology: Topology | None = None
) -> Problem:
    """The problem that the options describe; on another machine if one is given."""
    solve.check_time_limit(options.time_limit)
    topology = topology or topology_of(options)
    return Problem(
        trace,
        topology,
        options.objective,
        options.dispatch,
        work_of(options),
        LoadCap.parse(options.load_cap) if options.load_cap else None,
        slots_of(options, trace.num_experts, topology.num_devices),
        dispatcher=options.dispatcher,
        steady=options.steady,
    )


def slots_of(options: argparse.Namespace, experts: int, devices: int) -> int | None:
    """Slots of a layer from --slots or --device-slots; None: one per expert.

    Devices of unequal memory are refused: arrays of experts have one shape on all devices, and a
    slot that stays empty takes its memory all the same. So the smallest device decides.
    """
    typed = options.device_slots
    if typed is None:
        return options.slots
    field = "device_slots"
    try:
        each = [int(word) for word in typed.split(",")]
    except ValueError:
        each = []
    if len(each) != devices or min(each) < 1:
        rule = f"{devices} whole numbers of at least 1, one for every device"
        raise Refused(field, typed, rule, "Correct it")
    least, needed = min(each), -(-experts // devices)
    if options.slots not in (None, devices * least):
        fix = "Give one of the two"
        raise Refused(field, typed, f"--slots={options.slots} says something else", fix)
    if least < needed:
        rule = f"{experts} experts on {devices} devices need {needed} slots on every one of them"
        raise Refused(field, typed, rule, _more_room(each, experts))
    if max(each) > least:
        rule = (
            "every device has as many slots: experts are arrays of one shape on all of them, and "
            "an empty slot takes its memory all the same"
        )
        fix = f"Use --slots={devices * least}, which the smallest device holds"
        raise Refused(field, typed, rule, fix)
    return devices * least


def _more_room(each: list[int], experts: int) -> str:
    """The most devices that hold all experts when smaller ones are left out."""
    roomy = sorted(each, reverse=True)
    for count in range(len(roomy) - 1, 0, -1):
        if experts % count == 0 and roomy[count - 1] * count >= experts:
            return f"Plan for the {count} devices with most room: they hold {experts // count} each"
    return "Use more devices, or devices with more memory"


def topology_of(options: argparse.Namespace) -> Topology:
    """The machine that the options describe."""
    return with_flops(_topology_of(options), options)


def with_flops(topology: Topology, options: argparse.Namespace) -> Topology:
    """The machine with the speeds of --device-flops, if they are given."""
    if options.device_flops is None:
        return topology
    try:
        flops = [float(one) for one in options.device_flops.split(",")]
    except ValueError:
        flops = [0.0]
    each = flops[0] if len(flops) == 1 else tuple(flops)
    return dataclasses.replace(topology, device_flops=each)


def _topology_of(options: argparse.Namespace) -> Topology:
    if options.topology:
        topology = topology_lib.preset(options.topology)
        if options.devices not in (None, topology.num_devices):
            raise Refused(
                "devices",
                options.devices,
                f"topology {topology.name} has {topology.num_devices} devices",
                "Leave --devices out, or choose another topology",
            )
        if options.node_sizes or options.nodes not in (None, topology.num_nodes):
            name = "node_sizes" if options.node_sizes else "nodes"
            raise Refused(
                name,
                getattr(options, name),
                f"topology {topology.name} has {topology.num_nodes} nodes of its own",
                f"Leave --{name.replace('_', '-')} out, or choose another topology",
            )
        return topology
    if options.node_sizes:
        return _uneven(options)
    if options.devices is None:
        raise Refused("devices", None, "the number of devices is needed", "Give --devices=8")
    if options.devices < 1:
        raise Refused("devices", options.devices, "at least 1", "Give --devices=8")
    nodes = 1 if options.nodes is None else options.nodes
    return topology_lib.nodes_by_devices(nodes, options.devices)


def _uneven(options: argparse.Namespace) -> Topology:
    try:
        sizes = [int(size) for size in options.node_sizes.split(",")]
    except ValueError:
        sizes = [0]
    topology = topology_lib.uneven(tuple(sizes))
    for field, given in (("devices", topology.num_devices), ("nodes", topology.num_nodes)):
        asked = getattr(options, field)
        if asked not in (None, given):
            raise Refused(field, asked, f"--node-sizes makes {given}", f"Leave --{field} out")
    return topology


def evaluation_topology(options: argparse.Namespace, plan: Plan) -> Topology:
    """The topology asked for, else the plan's own, else a flat one; with the speeds asked for."""
    if options.topology or options.node_sizes or options.devices is not None:
        return topology_of(options)
    if options.nodes is not None:
        own = topology_lib.nodes_by_devices(options.nodes, plan.placement.num_devices)
    elif plan.topology:
        own = topology_lib.from_json(plan.topology, "plan topology")
    else:
        own = topology_lib.flat(plan.placement.num_devices)
    return with_flops(own, options)


def devices_said(options: argparse.Namespace) -> int | None:
    """The number of devices that the options name, if they do."""
    if options.topology or options.node_sizes:
        return topology_of(options).num_devices
    return options.devices


def work_of(options: argparse.Namespace) -> Work:
    fields = [field.name for field in dataclasses.fields(Work)]
    return Work(**{name: getattr(options, name) for name in fields})


def in_use(path: str, trace: Trace, topology: Topology) -> Placement:
    """The placement of a plan file, which has to fit the trace and the machine."""
    return fitting(inputs.plan(path, trace, topology.num_devices), trace, topology)


def fitting(plan: Plan, trace: Trace, topology: Topology) -> Placement:
    """Its placement; refused where it is for another model or machine."""
    check_fits(
        plan,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        num_devices=topology.num_devices,
    )
    check_layers(plan, trace)
    return plan.placement


def check_layers(plan: Plan, trace: Trace) -> None:
    """Refuses a plan of other layers, or of these in another order: its rows are taken as they are.

    How many there are is for others to check.
    """
    if plan.layer_ids != trace.layer_ids and plan.placement.num_layers == trace.num_layers:
        rule = f"the plan has the layers {_numbers(plan.layer_ids)}"
        raise Refused("trace layers", _numbers(trace.layer_ids), rule, "Use those of one model")


def _numbers(layer_ids: Sequence[int]) -> str:
    """Of layers: a range where they are one, else as they stand."""
    first, last, count = layer_ids[0], layer_ids[-1], len(layer_ids)
    if tuple(layer_ids) == tuple(range(first, last + 1)):
        return f"{first} to {last}"
    return ", ".join(map(str, layer_ids[:8])) + (f", ... ({count} in all)" if count > 8 else "")


def split_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--split",
        default=SEQUENCE,
        metavar="HOW",
        help="planned on and judged on: random halves of the sequences (sequence, the default), "
        "the first and the second half of them (time), or all groups of names but one and that one "
        "(name:GROUP; a group is the part of a name before the first / - or :)",
    )


def split(trace: Trace, seed: int, how: str = SEQUENCE) -> Halves | None:
    """What is planned on and judged on; None, said on stderr, where there is one sequence only.

    A split by names, or by what is no split, is refused there as elsewhere.
    """
    if trace.num_sequences > 1 or how not in (SEQUENCE, "time"):
        window = windows.window(trace, how, seed)
        return Halves(window.plan, window.judge)
    print("The trace has one sequence only: there is no held-out half.", file=sys.stderr)
    return None


def report_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--report", metavar="PAGE.html", help="write a page with figures before and after there"
    )


def outputs_ok(options: argparse.Namespace) -> None:
    """Refuses outputs that cannot be written, or would replace an input or one another."""
    given = [(field, getattr(options, field, None)) for field in INPUTS]
    given += [("pin", pin) for pin in getattr(options, "pin", None) or ()]
    taken = [(field, _real(field, path)) for field, path in given if path]
    for field in OUTPUTS:
        if (path := getattr(options, field, None)) is None:
            continue
        called, out = CALLED.get(field, field), _real(field, path)
        files_ok(path, called)
        for other, used in taken:
            if out == used and (field, other) not in REPLACED:
                rule = f"is the {CALLED.get(other, other)} as well"
                raise Refused(called, path, rule, "Choose another")
            if used in out.parents:
                rule = f"lies in the folder that is the {CALLED.get(other, other)}"
                raise Refused(called, path, rule, "Choose another")
        taken.append((field, out))
    if folder := getattr(options, "out_plans", None):
        folder_ok(folder, "out_plans")
        for other, used in taken:
            if _real("out_plans", folder) in (used, *used.parents):
                rule = f"is or holds the {CALLED.get(other, other)}"
                raise Refused("out_plans", folder, rule, "Choose another")


def _real(field: str, path: str) -> pathlib.Path:
    """Of a file or folder, links followed; of a topology, which may be a name, its file."""
    known = topology_lib.file_of(path) if field == "topology" else None
    return pathlib.Path(os.path.realpath(path if known is None else known))


def files_ok(path: str, field: str) -> None:
    """Refuses an output that cannot be written, before the work is done; leaves nothing behind."""
    out = pathlib.Path(path)
    if out.is_dir():
        raise Refused(field, path, "is a folder", "Give the name of a file")
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        files.check_regular(out)
        with files.atomic_write(out.parent / f".{out.name}.probe"):
            pass
        (out.parent / f".{out.name}.probe").unlink()
    except OSError as error:
        raise Refused(field, path, f"cannot be written ({error.strerror})", "Choose another") from (
            error
        )
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # not made, or of others by now
                folder.rmdir()


def folder_ok(path: str, field: str) -> None:
    """The same for a folder of plans."""
    if pathlib.Path(path).exists() and not pathlib.Path(path).is_dir():
        raise Refused(field, path, "is no folder", "Choose another")
    files_ok(os.path.join(path, "plan.json"), field)
