"""Where every expert of every layer lives: `Placement` (the map) and `Plan` (the file).

Axes: L MoE layers, E logical experts per layer, P physical experts (slots), M devices, R the
largest number of replicas of an expert. Slot p lives on device p // (P / M).

A Placement that exists is valid: every expert at least once per layer, none twice on one device,
the same number of slots on every device. Its digest is the SHA-256 of a canonical byte form, so
two programs that agree on the digest agree on every slot. A Plan adds what people and loaders need
to know: the model's layer numbers, the topology, and where the placement comes from.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.errors import Refused
from moe_jax.placement import shares
from moe_jax.placement.formats import raw
from moe_jax.placement.formats.hints import shown_layers
from moe_jax.routing import checks

FORMAT = "moe_jax.placement"
VERSION = 1
MAP = "physical_to_logical_map"  # the key that SGLang reads
CONVERT = "python -m moe_jax.placement convert IN plan.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Which logical expert every slot holds.

    Attributes:
      physical_to_logical_LP: int32 [L, P], read-only.
      num_experts: E, logical experts per layer.
      num_devices: M.
      share_LNP: shares of the copy rule `stay` (shares.py), or None: the rule `local` (copies.py).
    """

    physical_to_logical_LP: np.ndarray
    num_experts: int
    num_devices: int
    share_LNP: np.ndarray | None = None

    def __post_init__(self):
        for field in ("num_experts", "num_devices"):
            object.__setattr__(self, field, _positive(field, getattr(self, field)))
        slots_LP = np.asarray(self.physical_to_logical_LP)
        _check_map(slots_LP, self.num_experts, self.num_devices)
        slots_LP = np.ascontiguousarray(slots_LP, np.int32).copy()
        slots_LP.flags.writeable = False
        object.__setattr__(self, "physical_to_logical_LP", slots_LP)
        if self.share_LNP is not None:
            share_LNP = shares.checked(self.share_LNP, slots_LP, self.num_experts)
            object.__setattr__(self, "share_LNP", share_LNP if share_LNP.any() else None)

    @classmethod
    def contiguous(cls, num_layers: int, num_experts: int, num_devices: int) -> "Placement":
        """Expert e in slot e: what a program does when nobody planned."""
        check_divides(num_experts, num_devices)
        row_P = np.arange(num_experts, dtype=np.int32)
        return cls(np.tile(row_P, (num_layers, 1)), num_experts, num_devices)

    @classmethod
    def from_device_LE(cls, device_LE: np.ndarray, num_devices: int) -> "Placement":
        """From the device of every expert; slots of a device hold its experts in ascending id."""
        device_LE = np.asarray(device_LE)
        slots_LP = np.argsort(device_LE, axis=1, kind="stable").astype(np.int32)
        plan = cls(slots_LP, device_LE.shape[1], num_devices)
        if not np.array_equal(plan.device_LE, device_LE):
            raise Refused(
                "device_LE",
                "uneven",
                "every device holds the same number of experts",
                "Give each of the devices 0..M-1 E / M experts per layer",
            )
        return plan

    @property
    def num_layers(self) -> int:
        return self.physical_to_logical_LP.shape[0]

    @property
    def num_slots(self) -> int:
        """P: physical experts of a layer."""
        return self.physical_to_logical_LP.shape[1]

    @property
    def slots_per_device(self) -> int:
        return self.num_slots // self.num_devices

    @property
    def share_nodes(self) -> int | None:
        """N of the shares: nodes of the machine that they are for; None: there are no shares."""
        return None if self.share_LNP is None else self.share_LNP.shape[1] - 1

    @property
    def has_replicas(self) -> bool:
        return self.num_slots > self.num_experts

    @functools.cached_property
    def num_replicas_LE(self) -> np.ndarray:
        """int32 [L, E]: in how many slots an expert lives."""
        counts = [np.bincount(row, minlength=self.num_experts) for row in self._rows()]
        return _read_only(np.array(counts, np.int32))

    @functools.cached_property
    def logical_to_physical_LER(self) -> np.ndarray:
        """int32 [L, E, R]: the slots of an expert in ascending order, padded with -1."""
        replicas = int(self.num_replicas_LE.max())
        table_LER = np.full((self.num_layers, self.num_experts, replicas), -1, np.int32)
        for layer, row_P in enumerate(self._rows()):
            slot_P = np.argsort(row_P, kind="stable")
            expert_P = row_P[slot_P]
            first_E = np.searchsorted(expert_P, np.arange(self.num_experts))
            table_LER[layer, expert_P, np.arange(self.num_slots) - first_E[expert_P]] = slot_P
        return _read_only(table_LER)

    @functools.cached_property
    def device_LE(self) -> np.ndarray:
        """int32 [L, E]: the device of every expert, where there are no replicas."""
        if self.has_replicas:
            raise Refused(
                "num_slots",
                self.num_slots,
                "device_LE exists only without replicas",
                "Use logical_to_physical_LER",
            )
        return _read_only(self.logical_to_physical_LER[:, :, 0] // self.slots_per_device)

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the sizes, the map and the shares if any, little-endian, row by row."""
        sizes = (self.num_layers, self.num_slots, self.num_experts, self.num_devices)
        total = hashlib.sha256(f"{FORMAT} {VERSION} {sizes}\n".encode())
        total.update(self.physical_to_logical_LP.astype("<i4").tobytes())
        if self.share_LNP is not None:
            total.update(f"{shares.FIELD} {self.share_LNP.shape}\n".encode())
            total.update(self.share_LNP.astype("<i4").tobytes())
        return total.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placement) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def _rows(self):
        return self.physical_to_logical_LP


@dataclasses.dataclass(frozen=True)
class Plan:
    """A placement as it travels between programs.

    Attributes:
      placement: the map.
      layer_ids: the model's own numbers of the layers; 0..L-1 by default.
      topology: the machine it was planned for, as plain JSON data.
      provenance: trace digest, tokens, solver, objective, bound, gap, seconds: plain JSON data.
    """

    placement: Placement
    layer_ids: Sequence[int] = ()
    topology: dict[str, Any] = dataclasses.field(default_factory=dict)
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        layer_ids = checks.valid_layer_ids(self.layer_ids, self.placement.num_layers)
        object.__setattr__(self, "layer_ids", layer_ids)

    @property
    def digest(self) -> str:
        return self.placement.digest

    def write(self, path: str | os.PathLike) -> None:
        """Writes JSON whole or not at all, one layer of the map per line."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "num_experts": self.placement.num_experts,
            "num_devices": self.placement.num_devices,
            "layer_ids": self.layer_ids,
            "topology": self.topology,
            "provenance": self.provenance,
            "digest": self.digest,
        }
        rows = [json.dumps(row) for row in self.placement.physical_to_logical_LP.tolist()]
        if self.placement.share_LNP is not None:
            head[shares.FIELD] = self.placement.share_LNP.tolist()
        lines = [f' "{key}": {json.dumps(value, allow_nan=False)}' for key, value in head.items()]
        lines.append(f' "{MAP}": [\n  ' + ",\n  ".join(rows) + "\n ]")
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        with files.atomic_write(path, "w") as file:
            file.write(text)

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Plan":
        """Reads and checks a plan file; anything wrong is `Refused`, naming the first bad entry."""
        fields = _read_json(path)
        for field, wanted in (("format", FORMAT), ("version", VERSION)):
            if type(fields.get(field)) is not type(wanted) or fields[field] != wanted:
                fix = "Solve the plan again with this program"
                if "format" not in fields:
                    fix += f", or make one of another program's file: {CONVERT}"
                rule = f"this program reads {FORMAT} version {VERSION}"
                raise Refused(field, fields.get(field), rule, fix)
        num_devices = _positive("num_devices", fields.get("num_devices"))
        slots_LP = _read_map(fields.get(MAP))
        num_experts = _positive("num_experts", fields.get("num_experts", int(slots_LP.max()) + 1))
        share_LNP = shares.read(fields.get(shares.FIELD))
        placement = Placement(slots_LP, num_experts, num_devices, share_LNP)
        if fields.get("digest") != placement.digest:
            raise Refused(
                "digest",
                fields.get("digest"),
                f"the map's digest is {placement.digest}",
                "The file was changed or damaged: solve the plan again",
            )
        for field in ("topology", "provenance"):
            if not isinstance(fields.get(field, {}), dict):
                raise Refused(field, fields[field], "a JSON object", "Solve the plan again")
        return cls(
            placement,
            checks.valid_layer_ids(fields.get("layer_ids", ()), placement.num_layers),
            fields.get("topology", {}),
            fields.get("provenance", {}),
        )


def check_fits(plan: Plan, *, num_layers: int, num_experts: int, num_devices: int) -> None:
    """Refuses a plan that was made for another model or another number of devices."""
    check_sizes(plan.placement, "plan", num_layers, num_experts, num_devices)


def check_sizes(
    placement: Placement, name: str, num_layers: int, num_experts: int, num_devices: int
) -> None:
    """As `check_fits`; `name` is what the message calls the placement."""
    for field, has, needs in (
        ("layers", placement.num_layers, num_layers),
        ("num_experts", placement.num_experts, num_experts),
        ("num_devices", placement.num_devices, num_devices),
    ):
        if has != needs:
            raise Refused(
                f"{name} {field}",
                has,
                f"the plan is for another model or mesh: here it is {needs}",
                "Solve a plan of this model for this number of devices, or give one",
            )


def of_model(plan: Plan, layer_ids: Sequence[int]) -> Plan:
    """The plan of a model's layers, with the model's own numbers of them.

    0..L-1 is taken for any: so are the layers of a file numbered that does not say which they are.

    Args:
      plan: of as many layers.
      layer_ids: the model's numbers of its MoE layers, or none (a model without them).

    Raises:
      Refused: a plan of other layers, or of these in another order.
    """
    here = checks.valid_layer_ids(tuple(layer_ids), plan.placement.num_layers)
    if plan.layer_ids not in (here, tuple(range(len(here)))):
        raise Refused(
            "plan layer_ids",
            shown_layers(tuple(plan.layer_ids)),
            f"the plan is for another model: here the MoE layers are {shown_layers(here)}",
            "Solve a plan of this model, or correct layer_ids in the file if it is one",
        )
    return dataclasses.replace(plan, layer_ids=here)


def check_divides(num_slots: int, num_devices: int) -> None:
    """Refuses a number of devices that does not divide the slots, and offers those that do."""
    _positive("num_devices", num_devices)
    if num_slots % num_devices or num_devices > num_slots:
        divisors = [m for m in range(1, num_slots + 1) if num_slots % m == 0]
        nearest = sorted(sorted(divisors, key=lambda m: abs(m - num_devices))[:2])
        raise Refused(
            "num_devices",
            num_devices,
            f"must divide the {num_slots} expert slots of a layer",
            "Use " + " or ".join(str(m) for m in nearest),
        )


def _positive(field: str, value: Any) -> int:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not 1 <= value < 2**31:
        raise Refused(field, value, "a whole number of at least 1", f"Correct {field}")
    return int(value)


def _check_map(slots_LP: np.ndarray, num_experts: int, num_devices: int) -> None:
    if slots_LP.ndim != 2 or 0 in slots_LP.shape or slots_LP.dtype.kind not in "iu":
        raise Refused(
            MAP,
            f"{slots_LP.dtype} {slots_LP.shape}",
            "a table of whole numbers [layers, slots]",
            "Give one row per layer and one entry per slot",
        )
    num_slots = slots_LP.shape[1]
    if num_experts > num_slots:
        raise Refused(
            MAP,
            f"{num_slots} slots per layer",
            f"every one of the {num_experts} experts needs a slot",
            "Solve the plan again",
        )
    check_divides(num_slots, num_devices)
    bad = (slots_LP < 0) | (slots_LP >= num_experts)
    if bad.any():
        layer, slot = (int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
        raise Refused(
            f"{MAP}[{layer}][{slot}]",
            int(slots_LP[layer, slot]),
            f"experts go from 0 to {num_experts - 1}",
            "Solve the plan again",
        )
    device_P = np.arange(num_slots) // (num_slots // num_devices)
    for layer, row_P in enumerate(slots_LP.astype(np.int64)):
        missing = np.flatnonzero(np.bincount(row_P, minlength=num_experts) == 0)
        if missing.size:
            raise Refused(
                f"{MAP}[{layer}]",
                f"no slot for expert {missing[0]}",
                "every expert lives in at least one slot of its layer",
                "Solve the plan again",
            )
        _, first = np.unique(device_P * num_experts + row_P, return_index=True)
        if len(first) < num_slots:
            slot = int(np.setdiff1d(np.arange(num_slots), first)[0])
            raise Refused(
                f"{MAP}[{layer}][{slot}]",
                int(row_P[slot]),
                f"device {device_P[slot]} holds this expert already",
                "Solve the plan again",
            )


def _read_json(path: str | os.PathLike) -> dict[str, Any]:
    path = pathlib.Path(path)
    if not path.is_file():
        raise Refused("plan", str(path), "the file does not exist", "Give the path of a plan .json")
    try:
        text = path.read_text(encoding="utf-8")
        fields = json.loads(text, parse_constant=_no_constant, parse_float=raw.finite)
    except (ValueError, RecursionError, OSError) as error:
        why = " ".join(str(error).split())[:120]
        raise Refused(
            "plan", str(path), f"not a whole JSON file ({why})", "Solve the plan again"
        ) from error
    if not isinstance(fields, dict):
        raise Refused("plan", str(path), "a plan is a JSON object", "Solve the plan again")
    return fields


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _read_map(rows: Any) -> np.ndarray:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise Refused(MAP, rows, "a list with one list of slots per layer", "Solve the plan again")
    for layer, row in enumerate(rows):
        if len(row) != len(rows[0]) or not row:
            raise Refused(
                f"{MAP}[{layer}]",
                f"{len(row)} slots",
                f"layer 0 has {len(rows[0])} slots",
                "Give every layer the same, non-zero number of slots",
            )
        for slot, expert in enumerate(row):
            if type(expert) is not int or not -(2**31) <= expert < 2**31:
                raise Refused(
                    f"{MAP}[{layer}][{slot}]",
                    expert,
                    "experts are whole numbers",
                    "Solve the plan again",
                )
    return np.array(rows, np.int32)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
