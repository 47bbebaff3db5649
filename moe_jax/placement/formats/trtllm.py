"""TensorRT-LLM's load balancer file: a fixed subset of YAML, read and written line by line.

    num_slots: 4
    initial_global_assignments:
      3: [0, 1, 2, 3]
      4: [1, 0, 3, 2]
    layer_updates_per_iter: 0

The lists stand on one line each, as TensorRT-LLM's own generator writes them; keys of the map are
the model's layer numbers. Anything else (anchors, block lists, other keys) is refused. The file
does not say the number of devices, unless `ep_size` does, as a generator that places by
co-occurrence writes it; TensorRT-LLM itself takes the three keys above only, so we write those.
"""

import re

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement.formats import raw
from moe_jax.placement.formats.hints import Hints
from moe_jax.placement.formats.plans import plan_by_layer
from moe_jax.placement.plan import Plan

ASSIGNMENTS = "initial_global_assignments"
_SCALAR = re.compile(r"(num_slots|layer_updates_per_iter|ep_size): *([0-9]{1,9})", re.ASCII)
_LAYER = re.compile(r" +([0-9]{1,6}): *\[([0-9, ]*)\]", re.ASCII)
_ENTRY = re.compile(r" *([0-9]{1,9}) *", re.ASCII)


def begins(text: str) -> bool:
    """The first line that is neither empty nor a comment has one of the keys."""
    lines = (_without_comment(full) for full in text.splitlines())
    line = next((line for line in lines if line), "")
    return line.startswith(f"{ASSIGNMENTS}:") or _SCALAR.match(line) is not None


def read_yaml(text: str, hints: Hints) -> Plan:
    """The plan of a load balancer file."""
    scalars, rows = _parse(text)
    if "num_slots" not in scalars:
        raise Refused("num_slots", None, "is missing", "Add num_slots: P")
    if not rows:
        raise Refused(ASSIGNMENTS, None, "no layer is assigned", "Add a list of slots per layer")
    slots = raw.whole_number(scalars["num_slots"], "num_slots", 1)
    for layer, row in rows.items():
        if len(row) != slots:
            raise Refused(
                f"{ASSIGNMENTS}[{layer}]",
                f"{len(row)} slots",
                f"num_slots is {slots}",
                "Correct it",
            )
    if scalars.get("layer_updates_per_iter", 0):
        hints.note("layer_updates_per_iter is above 0: the program moves experts as it runs")
    numbers = tuple(sorted(rows))
    table = np.array([rows[layer] for layer in numbers], np.int64)
    return plan_by_layer(table, numbers, "TensorRT-LLM", hints, scalars.get("ep_size"))


def yaml_text(plan: Plan) -> str:
    placement = plan.placement
    rows = sorted(zip(plan.layer_ids, placement.physical_to_logical_LP.tolist(), strict=True))
    lines = [f"  {layer}: [{', '.join(str(expert) for expert in row)}]" for layer, row in rows]
    return (
        f"num_slots: {placement.num_slots}\n{ASSIGNMENTS}:\n"
        + "\n".join(lines)
        + "\nlayer_updates_per_iter: 0\n"
    )


def _parse(text: str) -> tuple[dict[str, int], dict[int, list[int]]]:
    """Scalars by key, and the list of every layer."""
    scalars: dict[str, int] = {}
    rows: dict[int, list[int]] = {}
    in_map, seen_map = False, False
    for number, full in enumerate(text.splitlines(), start=1):
        line = _without_comment(full)
        if not line:
            continue
        if line == f"{ASSIGNMENTS}:" and not seen_map:
            in_map = seen_map = True
        elif match := _SCALAR.fullmatch(line):
            in_map = False
            if match[1] in scalars:
                raise Refused(f"line {number}", full, "this key stands twice", "Delete one line")
            scalars[match[1]] = int(match[2])
        elif in_map and (match := _LAYER.fullmatch(line)):
            layer = int(match[1])
            if layer in rows:
                raise Refused(f"line {number}", full, f"layer {layer} stands twice", "Delete one")
            rows[layer] = _entries(match[2], number)
        else:
            raise Refused(
                f"line {number}",
                full,
                f"num_slots, ep_size, layer_updates_per_iter, {ASSIGNMENTS} and "
                "`layer: [e, e, ...]` lines are read",
                "Write the list of a layer on one line, and leave other keys out",
            )
    return scalars, rows


def _without_comment(line: str) -> str:
    return re.sub(r"(^|\s)#.*", "", line).rstrip()


def _entries(text: str, number: int) -> list[int]:
    entries = []
    for part in text.split(","):
        match = _ENTRY.fullmatch(part)
        if not match:
            raise Refused(f"line {number}", part, "experts between commas", "Correct the list")
        entries.append(int(match[1]))
    return entries
