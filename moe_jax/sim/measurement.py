"""What one run of the model did on some text: answers, routing and counted rows.

`infer.py --measure=FILE.npz` writes such a file while the model runs; this module reads it, without
pickle and without jax, and promises that a `Measurement` is consistent in itself: every array has
the type, rank and size that the others imply, every expert and device exists, every count is a
natural number. Anything else is `Refused` with the entry's name.

Axes: B sequences, S positions, V vocabulary, T tokens that ran (prefill and decode), L layers,
K top_k, M devices of the expert axis, P physical expert slots (slot p on device p // (P / M)).
"""

import dataclasses
import json
import os
from typing import Any

import numpy as np

from moe_jax.config import MEASURED_COMBINES, MEASURED_DISPATCHES
from moe_jax.errors import Refused, plain
from moe_jax.routing import npz

FORMAT = "moe_jax.measurement"
VERSION = 2
_REMEASURE = "Write it again with infer.py --measure=FILE.npz"


@dataclasses.dataclass(frozen=True)
class Meta:
    """What was measured; `plan_digest` is the digest of the placement that the model ran with."""

    model: str
    num_experts: int
    top_k: int
    num_devices: int
    num_nodes: int  # of equal size, devices numbered node by node
    dispatch: str
    combine: str
    plan_digest: str
    logits_digest: str
    machine: str


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One measured run. Row counts are of the wire: a device sends nothing to itself."""

    path: str
    meta: Meta
    logits_BSV: np.ndarray  # float32: prefill logits on held-out text
    text_ids_BS: np.ndarray  # int32: prompt and greedy continuation
    expert_ids_TLK: np.ndarray  # uint8 or uint16, logical; the largest value means no expert
    home_T: np.ndarray  # int32: the device that held the token
    position_T: np.ndarray  # int32: what copies of experts take turns by
    dispatch_LMM: np.ndarray  # int64: rows that went out, [layer, source, destination]
    combine_LMM: np.ndarray  # int64: rows that came back
    padding_LMM: np.ndarray  # int64: rows of padding, both ways
    computed_LP: np.ndarray  # int64: rows computed by each physical expert

    @property
    def routed_TL(self) -> np.ndarray:
        """True where a token had at least one expert in a layer."""
        return (self.expert_ids_TLK != no_expert(self.expert_ids_TLK)).any(-1)

    @property
    def load_LM(self) -> np.ndarray:
        """Rows computed by each device."""
        num_layers, num_slots = self.computed_LP.shape
        num_devices = self.meta.num_devices
        return self.computed_LP.reshape(num_layers, num_devices, num_slots // num_devices).sum(-1)


def no_expert(expert_ids: np.ndarray) -> int:
    """The id that stands for "no expert": the largest of the type."""
    return int(np.iinfo(expert_ids.dtype).max)


def ratio_to_mean(load_LM: np.ndarray) -> np.ndarray:
    """Each device's load over the mean of its layer; 1 in a layer that computed nothing."""
    mean_L1 = load_LM.mean(1, keepdims=True)
    return np.where(mean_L1 > 0, load_LM / np.where(mean_L1 > 0, mean_L1, 1), 1.0)


# entry of the file -> (field of Measurement, allowed types, rank)
_ARRAYS: dict[str, tuple[str, tuple[type, ...], int]] = {
    "logits": ("logits_BSV", (np.float32,), 3),
    "text_ids": ("text_ids_BS", (np.int32,), 2),
    "expert_ids": ("expert_ids_TLK", (np.uint8, np.uint16), 3),
    "token_home": ("home_T", (np.int32,), 1),
    "token_position": ("position_T", (np.int32,), 1),
    "dispatch_LMM": ("dispatch_LMM", (np.int64,), 3),
    "combine_LMM": ("combine_LMM", (np.int64,), 3),
    "padding_LMM": ("padding_LMM", (np.int64,), 3),
    "computed_LP": ("computed_LP", (np.int64,), 2),
}


def read(path: str | os.PathLike) -> Measurement:
    """Reads and validates a measurement."""
    path = os.fspath(path)
    entries = _load_entries(path)
    arrays = {
        field: _typed(path, name, entries[name], types, rank)
        for name, (field, types, rank) in _ARRAYS.items()
    }
    measurement = Measurement(path=path, meta=_read_meta(path, entries["meta"]), **arrays)
    _check_sizes(measurement)
    _check_values(measurement)
    return measurement


def _load_entries(path: str) -> dict[str, np.ndarray]:
    try:
        entries = npz.read_npz(path, ("meta", *_ARRAYS))
    except Refused as error:  # the reader speaks of traces
        raise Refused(f"measurement {path}", error.value, error.rule, _REMEASURE) from None
    missing = [name for name in ("meta", *_ARRAYS) if name not in entries]
    if missing:
        raise Refused("measurement", path, f"the entry {missing[0]!r} is missing", _REMEASURE)
    return entries


def _read_meta(path: str, entry: np.ndarray) -> Meta:
    try:
        raw = json.loads(str(entry[()]))
    except (ValueError, RecursionError):
        raw = None
    if entry.ndim or entry.dtype.kind != "U" or not isinstance(raw, dict):
        raise Refused(
            f"{path}: meta", entry.dtype.str, "must be one string with a JSON object", _REMEASURE
        )
    if (raw.get("format"), raw.get("version")) != (FORMAT, VERSION):
        found = (raw.get("format"), raw.get("version"))
        raise Refused(
            f"{path}: meta.format, version", found, f"must be {(FORMAT, VERSION)}", _REMEASURE
        )
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Meta):
        value = raw.get(field.name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (whole if field.type is int else isinstance(value, str)):
            rule = "must be a whole number of at least 1" if field.type is int else "must be text"
            raise Refused(f"{path}: meta.{field.name}", value, rule, _REMEASURE)
        values[field.name] = plain(value) if isinstance(value, str) else value
    meta = Meta(**values)
    for name, known in (("dispatch", MEASURED_DISPATCHES), ("combine", MEASURED_COMBINES)):
        if getattr(meta, name) not in known:
            rule = f"is compared where it is {' or '.join(known)}"
            fix = f"Measure a run with one of them (model.{name})"
            raise Refused(f"{path}: meta.{name}", getattr(meta, name), rule, fix)
    if meta.num_devices % meta.num_nodes:
        rule = f"must divide the {meta.num_devices} devices"
        raise Refused(f"{path}: meta.num_nodes", meta.num_nodes, rule, _REMEASURE)
    return meta


def _typed(path: str, name: str, array: np.ndarray, types: tuple, rank: int) -> np.ndarray:
    if array.dtype not in [np.dtype(t) for t in types] or array.ndim != rank:
        allowed = " or ".join(np.dtype(t).name for t in types)
        found = f"{array.dtype.name} of rank {array.ndim}"
        raise Refused(f"{path}: {name}", found, f"must be {allowed} of rank {rank}", _REMEASURE)
    return array


def _check_sizes(measured: Measurement) -> None:
    num_tokens, num_layers, _ = measured.expert_ids_TLK.shape
    num_devices = measured.meta.num_devices
    num_slots = measured.computed_LP.shape[-1]
    if 0 in measured.logits_BSV.shape:
        found, rule = measured.logits_BSV.shape, "must hold something to compare"
        raise Refused(f"{measured.path}: logits.shape", found, rule, _REMEASURE)
    pairs = (num_layers, num_devices, num_devices)
    expected = {
        "expert_ids": (max(num_tokens, 1), max(num_layers, 1), measured.meta.top_k),
        "token_home": (num_tokens,),
        "token_position": (num_tokens,),
        "dispatch_LMM": pairs,
        "combine_LMM": pairs,
        "padding_LMM": pairs,
        "computed_LP": (num_layers, num_slots),
        "text_ids": (measured.logits_BSV.shape[0], measured.text_ids_BS.shape[1]),
    }
    for name, shape in expected.items():
        found = getattr(measured, _ARRAYS[name][0]).shape
        if found != shape:
            rule = f"must have the shape {shape}, which the other entries imply"
            raise Refused(f"{measured.path}: {name}.shape", found, rule, _REMEASURE)
    if num_slots < measured.meta.num_experts or num_slots % num_devices:
        rule = (
            f"the slots must hold all {measured.meta.num_experts} experts "
            f"and divide evenly over {num_devices} devices"
        )
        raise Refused(f"{measured.path}: computed_LP slots", num_slots, rule, _REMEASURE)


def _check_values(measured: Measurement) -> None:
    ids_TLK, num_experts = measured.expert_ids_TLK, measured.meta.num_experts
    allowed = f"must be below {num_experts}, or {no_expert(ids_TLK)} for no expert"
    _refuse_first(
        measured.path,
        "expert_ids",
        ids_TLK,
        (ids_TLK >= num_experts) & (ids_TLK != no_expert(ids_TLK)),
        allowed,
    )
    home_T, num_devices = measured.home_T, measured.meta.num_devices
    outside = (home_T < 0) | (home_T >= num_devices)
    _refuse_first(
        measured.path, "token_home", home_T, outside, f"must be a device 0..{num_devices - 1}"
    )
    position_T, rule = measured.position_T, "a position is at least 0"
    _refuse_first(measured.path, "token_position", position_T, position_T < 0, rule)
    if not measured.routed_TL.any():
        rule = "no token has an expert: there is nothing to count"
        raise Refused(f"{measured.path}: expert_ids", "none", rule, _REMEASURE)
    if np.isnan(measured.logits_BSV).any():
        rule = "logits are numbers: a model that fails alike proves nothing"
        raise Refused(f"{measured.path}: logits", float("nan"), rule, "Mend the model first")
    own = np.eye(num_devices, dtype=bool)
    for name in ("dispatch_LMM", "combine_LMM", "padding_LMM", "computed_LP"):
        counts = getattr(measured, name)
        _refuse_first(measured.path, name, counts, counts < 0, "a count is at least 0")
        if name in ("dispatch_LMM", "combine_LMM"):
            rule = "a device sends no row to itself: the diagonal is 0"
            _refuse_first(measured.path, name, counts, own & (counts != 0), rule)


def _refuse_first(path: str, name: str, array: np.ndarray, bad: np.ndarray, rule: str) -> None:
    """Refuses the first entry of `array` where `bad` is true."""
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        where = ", ".join(map(str, index))
        raise Refused(f"{path}: {name}[{where}]", int(array[index]), rule, _REMEASURE)
