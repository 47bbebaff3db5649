"""`convert`: plans, traces and counts of other programs."""

import argparse
import json

from moe_jax.placement import tables
from moe_jax.placement.commands import options as options_lib
from moe_jax.placement.commands import words
from moe_jax.placement.formats import convert as convert_lib
from moe_jax.placement.formats.convert import FORMATS
from moe_jax.placement.formats.counts import Counts
from moe_jax.placement.formats.hints import Hints, parse_layer_ids
from moe_jax.placement.plan import Plan
from moe_jax.routing.trace import Trace


def add(commands) -> None:
    """The sub-command and its options."""
    command = options_lib.command(commands, "convert", "plans, traces and counts of other programs")
    command.add_argument(
        "source",
        metavar="IN",
        help="file of any name, known by its content (also .pt), or a folder of all ranks' files",
    )
    command.add_argument(
        "target", metavar="OUT", help=".json .yaml .csv .npy .npz .jsonl .safetensors"
    )
    command.add_argument(
        "--format",
        choices=FORMATS,
        help="of OUT, where .json or .npz has several (default own; counts for a trace in .json)",
    )
    command.add_argument("--devices", type=int, help="of a plan whose file does not say it")
    command.add_argument("--num-experts", type=int, help="of a layer, likewise")
    command.add_argument(
        "--layer-ids",
        metavar="3-60",
        help="the model's numbers of the layers: picks rows where IN numbers them, else names them",
    )
    command.add_argument(
        "--pipeline-stages",
        type=int,
        help="of a Megatron-LM trace whose stages number their layers from 0",
    )
    command.add_argument(
        "--layer-base",
        type=int,
        choices=(0, 1),
        help="number of the model's first layer in a Megatron-LM trace: 1 in its routing replay's",
    )
    command.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> str:
    """Reads a plan, a trace or counts of any known format, and writes another."""
    options_lib.outputs_ok(options)
    layer_ids = None if options.layer_ids is None else parse_layer_ids(options.layer_ids)
    hints = Hints(
        options.devices,
        options.num_experts,
        layer_ids,
        options.pipeline_stages,
        options.layer_base,
    )
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
            f"Read {options.source}: {_describe_found(done.found)}",
            *(f"  note: {note}" for note in done.notes),
            f"Wrote {options.target} ({done.written})"
            + (f", digest {digest[:16]}" if digest else ""),
        ]
    )


def _describe_found(found: convert_lib.Found) -> str:
    value = found.value
    if isinstance(value, Plan):
        return f"{found.format} plan: {tables.sizes(value.placement)}"
    if isinstance(value, Trace):  # a foreign one has its format's name for a model
        name = "" if value.model == found.format else f"{found.format} "
        return name + words.describe(value)
    steps, layers, experts = value.count_SLE.shape
    return f"{found.format} counts: {steps} steps, {layers} layers x {experts} experts"
