"""Plans as other programs read them: SGLang, vLLM, sglang-jax, ExFlow. TensorRT-LLM: trtllm.py.

Axes: L layers, E logical experts, P slots (physical experts), M devices.

- SGLang hands every key of the file to a function that knows `physical_to_logical_map` only, so its
  file has this one key.
- SGLang and sglang-jax index the map by the number of the model's layer, dense layers included. A
  plan of layers 3..60 is therefore written with 61 rows; rows of layers that are not in the plan
  hold expert p mod E in slot p, which is what these programs do without a plan.
- vLLM's map and ExFlow's ids count the MoE layers only, from 0, in the model's order.
- ExFlow's CSV says on which device an expert lies, not in which slot: a plan with replicas cannot
  be written, and the order of the experts inside a device is lost.
- `expert_to_ep_rank` is one list over experts where all layers agree (the form that vLLM's
  `--expert-placement-file` proposes), else one list per layer; with replicas it is left out.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement.formats import raw
from moe_jax.placement.formats.hints import Hints, agree
from moe_jax.placement.plan import MAP, Placement, Plan, check_divides

RANKS = "expert_to_ep_rank"
VLLM_KEYS = (RANKS, "ep_size", "num_logical_experts", "num_physical_experts")
MAX_ROWS = 4096  # layers of a model: a layer number beyond it is a slip, not a file to write
CSV_HEAD = "Expert,Node"
_CSV_LINE = re.compile(r"([0-9]{1,9}),([0-9]{1,9})", re.ASCII)


def read_sglang(fields: dict[str, Any], hints: Hints) -> Plan:
    """SGLang's `--init-expert-location` JSON."""
    slots_LP = raw.int_table(fields.get(MAP), MAP, ("layers", "slots"))
    return plan_by_layer(slots_LP, tuple(range(len(slots_LP))), "SGLang", hints)


def read_sglang_jax(array: np.ndarray, hints: Hints) -> Plan:
    """sglang-jax's `.npy`."""
    slots_LP = raw.int_array(array, MAP, ("layers", "slots"))
    return plan_by_layer(slots_LP, tuple(range(len(slots_LP))), "sglang-jax", hints)


def plan_by_layer(
    slots_LP: np.ndarray,
    numbers: tuple[int, ...],
    name: str,
    hints: Hints,
    devices: int | None = None,
) -> Plan:
    """A plan of a format whose rows carry the model's layer numbers; `devices` if it says so."""
    rows, layer_ids = hints.select_layers(numbers)
    slots_LP = slots_LP[rows]
    experts = hints.experts_in_map(slots_LP)
    placement = Placement(slots_LP, experts, hints.devices_of(devices, name))
    return Plan(placement, layer_ids, provenance={"format": name})


def read_vllm(fields: dict[str, Any], hints: Hints) -> Plan:
    """vLLM's mapping: slots, ranks, or both, which then have to agree."""
    said: dict[str, int] = {
        key: raw.whole_number(fields[key], key, 1)
        for key in ("ep_size", "num_logical_experts", "num_physical_experts", "num_moe_layers")
        if key in fields
    }
    slots_LP = None
    if MAP in fields:
        slots_LP = raw.int_table(fields[MAP], MAP, ("layers", "slots"))
    layers = said.get("num_moe_layers") if slots_LP is None else len(slots_LP)
    rank_LE = _read_ranks(fields.get(RANKS), hints, layers)
    devices = said.get("ep_size")
    if devices is None and rank_LE is not None and hints.devices is None:
        devices = int(rank_LE.max()) + 1
        hints.note(f"{devices} devices: the largest rank + 1")
    devices = hints.devices_of(devices, "vLLM")
    if slots_LP is not None:
        experts = hints.experts_in_map(slots_LP)
        placement = Placement(slots_LP, experts, devices)
        _check_ranks(rank_LE, placement)
    elif rank_LE is not None:
        placement = placement_of_ranks(rank_LE, devices, RANKS)
        agree("num_experts", hints.num_experts, placement.num_experts)
    else:
        raise Refused(MAP, None, f"or {RANKS} is needed", "Give a vLLM mapping")
    for key, has in (
        ("num_moe_layers", placement.num_layers),
        ("num_logical_experts", placement.num_experts),
        ("num_physical_experts", placement.num_slots),
    ):
        if said.get(key, has) != has:
            raise Refused(key, said[key], f"the map has {has}", "Write the file again")
    rows, layer_ids = hints.name_layers(placement.num_layers)
    return Plan(_of_rows(placement, rows), layer_ids, provenance={"format": "vLLM"})


def _read_ranks(value: Any, hints: Hints, num_layers: int | None) -> np.ndarray | None:
    """int64 [L, E]; a flat list holds for all layers."""
    if value is None:
        return None
    if isinstance(value, list) and value and isinstance(value[0], list):
        return raw.int_table(value, RANKS, ("layers", "experts"))
    rank_E = raw.int_table(value, RANKS, ("experts",))
    layers = num_layers
    if layers is None and hints.layer_ids is not None:
        layers = len(hints.layer_ids)
    if layers is None or layers > MAX_ROWS:
        raise Refused(
            RANKS,
            f"one list of {len(rank_E)} ranks",
            "it holds for all layers and does not say how many there are",
            "Add --layer-ids=0-23",
        )
    return np.tile(rank_E, (layers, 1))


def placement_of_ranks(rank_LE: np.ndarray, devices: int, field: str) -> Placement:
    """Experts of a device in ascending id; every device has to hold equally many."""
    if rank_LE.min() < 0 or rank_LE.max() >= devices:
        raise Refused(
            field,
            int(rank_LE.min() if rank_LE.min() < 0 else rank_LE.max()),
            f"devices go from 0 to {devices - 1}",
            "Correct the file or --devices",
        )
    experts = rank_LE.shape[1]
    check_divides(experts, devices)
    for row, rank_E in enumerate(rank_LE):
        count_M = np.bincount(rank_E, minlength=devices)
        if count_M.max() * devices > experts:
            device = int(count_M.argmax())
            raise Refused(
                f"{field}, layer {row}",
                f"{count_M[device]} experts on device {device}",
                f"every device holds the same number of experts, {experts // devices}",
                "Correct the file or --devices",
            )
    return Placement.from_device_LE(rank_LE, devices)


def _check_ranks(rank_LE: np.ndarray | None, placement: Placement) -> None:
    if rank_LE is None:
        return
    if placement.has_replicas or not np.array_equal(rank_LE, placement.device_LE):
        raise Refused(
            RANKS, "contradicts", f"{MAP} puts experts on other ranks", f"Leave {RANKS} out"
        )


def read_exflow(text: str, hints: Hints) -> Plan:
    """ExFlow's CSV `Expert,Node`; global id = layer * E + expert."""
    lines = text.splitlines()
    if not lines or lines[0] != CSV_HEAD:
        raise Refused("line 1", lines[0] if lines else "", CSV_HEAD, "Give an ExFlow CSV")
    device_of: dict[int, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        match = _CSV_LINE.fullmatch(line)
        if not match:
            raise Refused(f"line {number}", line, "expert,node as whole numbers", "Correct it")
        expert, device = int(match[1]), int(match[2])
        if expert in device_of:
            raise Refused(f"line {number}", line, "this expert has a line already", "Delete one")
        device_of[expert] = device
    count = len(device_of)
    if count == 0 or max(device_of) != count - 1:
        missing = next(i for i in range(count + 1) if i not in device_of)
        raise Refused("Expert", missing, "has no line, later ids have one", "Add the line")
    if hints.num_experts is None:
        raise Refused(
            "num_experts",
            None,
            f"{count} lines do not say how many experts a layer has",
            "Add --num-experts=64",
        )
    if hints.num_experts < 1 or count % hints.num_experts:
        raise Refused(
            "num_experts", hints.num_experts, f"divides the {count} lines", "Correct --num-experts"
        )
    device_LE = np.array([device_of[i] for i in range(count)]).reshape(-1, hints.num_experts)
    if hints.devices is None:
        hints.note(f"{int(device_LE.max()) + 1} devices: the largest Node + 1")
    devices = int(device_LE.max()) + 1 if hints.devices is None else hints.devices
    placement = placement_of_ranks(device_LE, hints.devices_of(devices, "ExFlow"), "Node")
    rows, layer_ids = hints.name_layers(len(device_LE))
    return Plan(_of_rows(placement, rows), layer_ids, provenance={"format": "ExFlow"})


def sglang_text(plan: Plan, hints: Hints) -> str:
    return "{\n" + _rows(MAP, rows_by_layer(plan, hints)) + "\n}\n"


def vllm_text(plan: Plan, hints: Hints) -> str:
    placement = _in_model_order(plan)
    _note_positions(plan, hints)
    fields = {
        "num_moe_layers": placement.num_layers,
        "num_logical_experts": placement.num_experts,
        "num_physical_experts": placement.num_slots,
        "num_redundant_experts": placement.num_slots - placement.num_experts,
        "ep_size": placement.num_devices,
    }
    lines = [f' "{key}": {value}' for key, value in fields.items()]
    lines.append(_rows(MAP, placement.physical_to_logical_LP))
    if placement.has_replicas:
        hints.note(f"no {RANKS}: an expert with replicas has several")
    elif (placement.device_LE == placement.device_LE[0]).all():
        lines.append(f' "{RANKS}": {json.dumps(placement.device_LE[0].tolist())}')
    else:
        lines.append(_rows(RANKS, placement.device_LE))
        hints.note(f"{RANKS} differs between layers: one list per layer")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def exflow_text(plan: Plan, hints: Hints) -> str:
    placement = _in_model_order(plan)
    if placement.has_replicas:
        raise Refused(
            "num_slots",
            placement.num_slots,
            f"an ExFlow CSV has one device per expert, and {placement.num_experts} experts",
            "Solve a plan without replicas, or choose another format",
        )
    again = Placement.from_device_LE(placement.device_LE, placement.num_devices)
    if again != placement:
        hints.note("the order of the experts inside a device is lost")
    _note_positions(plan, hints)
    lines = [f"{expert},{device}" for expert, device in enumerate(placement.device_LE.ravel())]
    return f"{CSV_HEAD}\n" + "\n".join(lines) + "\n"


def rows_up_to(layer_ids: Sequence[int]) -> int:
    """Rows of a table with one for every layer of the model up to the last of these.

    Raises:
      Refused: more than `MAX_ROWS`.
    """
    rows = max(layer_ids) + 1
    if rows > MAX_ROWS:
        raise Refused("layer_ids", rows - 1, f"at most {MAX_ROWS - 1}", "Number the layers anew")
    return rows


def rows_by_layer(plan: Plan, hints: Hints) -> np.ndarray:
    """int32 [rows, P]: the map with a row for every layer of the model up to the last planned."""
    placement = plan.placement
    rows = rows_up_to(plan.layer_ids)
    filler_P = np.arange(placement.num_slots, dtype=np.int32) % placement.num_experts
    slots_LP = np.tile(filler_P, (rows, 1))
    slots_LP[list(plan.layer_ids)] = placement.physical_to_logical_LP
    if rows > placement.num_layers:
        hints.note(
            f"{rows - placement.num_layers} rows of layers that are not in the plan hold expert "
            f"p mod {placement.num_experts} in slot p"
        )
    return slots_LP


def _in_model_order(plan: Plan) -> Placement:
    """For formats that do not number their rows: whoever reads them counts the model's layers."""
    return _of_rows(plan.placement, np.argsort(plan.layer_ids))


def _of_rows(placement: Placement, rows: np.ndarray) -> Placement:
    """These layers of it, in this order, without the shares of its copies."""
    slots_LP = placement.physical_to_logical_LP[rows]
    return Placement(slots_LP, placement.num_experts, placement.num_devices)


def _note_positions(plan: Plan, hints: Hints) -> None:
    if plan.layer_ids != tuple(range(plan.placement.num_layers)):
        hints.note("the model's layer numbers are lost: layers count from 0, in rising order")


def _rows(key: str, table: np.ndarray) -> str:
    return f' "{key}": [\n  ' + ",\n  ".join(json.dumps(row) for row in table.tolist()) + "\n ]"
