"""From one file to another: plans to plans, traces to traces, counts to counts.

What a file is follows from its content (content.py); what is written from the extension of the
output, and `--format` where that has several meanings. Of a `.npy` the content does not tell all:
it is counts where its name has `logical_count` in it, SGLang's ids of a trace where it has three
axes, and with two axes a trace of ExFlow where a trace is asked for (an output `.npz` or
`.jsonl`), else a map of sglang-jax.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.errors import Refused
from moe_jax.placement.formats import (
    content,
    megatron,
    plans,
    raw,
    torchfile,
    trace_files,
    traces,
    trtllm,
)
from moe_jax.placement.formats import counts as counts_lib
from moe_jax.placement.formats.counts import Counts
from moe_jax.placement.formats.hints import Hints, agree
from moe_jax.placement.plan import FORMAT, MAP, Plan
from moe_jax.routing import npz
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace

FORMATS = ("own", "sglang", "vllm", "tensorrt-llm", "exflow", "sglang-jax", "megatron")
_DUMPS = "expert_distribution_recorder_*.pt"  # one of each rank
_DUMP = (traces.IDS, traces.SEQ_LENS, traces.SLOTS, traces.TOKENS, counts_lib.COUNT)
# Extension of the output -> formats of a plan; the first one is the default.
_PLAN_SUFFIXES = {
    ".json": ("own", "sglang", "vllm"),
    ".yaml": ("tensorrt-llm",),
    ".yml": ("tensorrt-llm",),
    ".csv": ("exflow",),
    ".npy": ("sglang-jax",),
}
_TRACE_SUFFIXES = {
    ".npz": ("own", "sglang"),
    ".jsonl": ("megatron",),
    ".npy": ("exflow",),
    ".json": ("sglang",),  # only where it is asked for: else `.json` is the counts of a trace
}


@dataclasses.dataclass(frozen=True)
class Found:
    """What a file held: `value`, and the name of its format."""

    value: Plan | Trace | Counts
    format: str

    @property
    def kind(self) -> str:
        return type(self.value).__name__.lower()


@dataclasses.dataclass(frozen=True)
class Converted:
    """A finished conversion, for reports."""

    found: Found
    written: str
    notes: tuple[str, ...]


def convert(
    source: str | os.PathLike, target: str | os.PathLike, written: str | None, hints: Hints
) -> Converted:
    """Reads, checks, writes whole or not at all."""
    suffix = pathlib.Path(target).suffix.lower()
    found = read(source, hints, wants_trace=suffix in (".npz", ".jsonl"))
    _check_heard(found, hints)
    if isinstance(found.value, Plan):
        name = _write_plan(found.value, target, suffix, written, hints)
    elif suffix in _TRACE_SUFFIXES and not _counts_are_meant(found.value, suffix, written):
        name = _write_trace(found.value, target, suffix, written, hints)
    else:
        name = _write_counts(found.value, target, suffix, written, hints)
    return Converted(found, name, tuple(hints.notes))


def _check_heard(found: Found, hints: Hints) -> None:
    """Refuses options that nothing reads for a file of this kind."""
    of_megatron = found.format == "Megatron-LM", "Megatron-LM's traces"
    for option, (is_read, of) in {
        "devices": (isinstance(found.value, Plan), "plans"),
        "pipeline_stages": of_megatron,
        "layer_base": of_megatron,
    }.items():
        given = getattr(hints, option)
        if given is not None and not is_read:
            whose = "our own" if found.format == "own" else f"{found.format}'s"
            rule = f"is only read for {of}, and this is {whose} {found.kind}"
            raise Refused(option, given, rule, f"Leave --{option.replace('_', '-')} out")


def _counts_are_meant(value: Trace | Counts, suffix: str, written: str | None) -> bool:
    return suffix == ".json" and (isinstance(value, Counts) or written != "sglang")


def read(source: str | os.PathLike, hints: Hints, wants_trace: bool = False) -> Found:
    """The plan, trace or counts in a file, or in a folder of the files of all ranks."""
    path = pathlib.Path(source)
    if path.is_dir() and counts_lib.rank_files(path):
        return Found(counts_lib.read_safetensors(path, hints), "TensorRT-LLM")
    if path.is_dir() and (dumps := sorted(path.glob(_DUMPS))):
        return Found(_read_dumps(dumps, hints), "SGLang")
    kind = "jsonl" if path.is_dir() else content.kind_of(path)
    if kind == "jsonl":
        return Found(megatron.read_megatron(path, hints), "Megatron-LM")
    if kind == "npz":
        return _read_npz(path, hints)
    if kind == "torch":
        return _read_pt(path, hints)
    if kind == "npy":
        return _read_npy(npz.read_npy(path), path.stem, hints, wants_trace)
    if kind == "safetensors":
        return Found(counts_lib.read_safetensors(path, hints), "TensorRT-LLM")
    if kind == "json":
        return _read_json(path, hints)
    if kind == "yaml":
        return Found(trtllm.read_yaml(raw.read_text(path), hints), "TensorRT-LLM")
    return Found(plans.read_exflow(raw.read_text(path), hints), "ExFlow")


def _read_dumps(paths: list[pathlib.Path], hints: Hints) -> Trace | Counts:
    """What the first of them holds, so that each is read once."""
    fields = ((one.name, raw.json_object(torchfile.read(one), str(one))) for one in paths)
    first = next(fields)
    dumps = itertools.chain([first], fields)
    if counts_lib.COUNT in first[1]:
        return counts_lib.read_sglang_dumps(dumps, hints)
    return traces.read_sglang_ranks(dumps, hints, raw.int_saved)


def read_plan(source: str | os.PathLike, hints: Hints) -> Plan:
    """A plan of any format; anything else, and what is wrong with it, is `Refused`.

    The hints are for files of other programs: our own say everything.
    """
    path = pathlib.Path(source)
    if not path.is_dir() and content.kind_of(path) == "json":
        fields = raw.parse_json(raw.read_text(path), str(path))
        if isinstance(fields, dict) and fields.get("format") == FORMAT:
            return Plan.read(path)
    found = read(path, hints)
    if not isinstance(found.value, Plan):
        what = "holds counts" if isinstance(found.value, Counts) else "is a trace"
        raise Refused("plan", str(path), what, "Give a plan")
    return found.value


def _read_npz(path: pathlib.Path, hints: Hints) -> Found:
    arrays = npz.read_npz(path, _DUMP)
    if traces.IDS in arrays:
        return Found(traces.read_sglang_arrays(arrays, hints), "SGLang")
    if counts_lib.COUNT in arrays:
        return Found(counts_lib.read_sglang_array(arrays[counts_lib.COUNT], hints), "SGLang")
    trace = trace_lib.load(path, hints.num_experts)
    _check_own_layers(tuple(trace.layer_ids), hints)
    return Found(trace, "own")


def _read_npy(array: np.ndarray, stem: str, hints: Hints, wants_trace: bool) -> Found:
    if "logical_count" in stem:
        return Found(counts_lib.read_sglang_array(array, hints), "SGLang")
    if array.ndim == 3:
        return Found(traces.read_sglang_arrays({traces.IDS: array}, hints), "SGLang")
    if wants_trace:
        return Found(traces.read_exflow(array, hints), "ExFlow")
    return Found(plans.read_sglang_jax(array, hints), "sglang-jax")


def _read_json(path: pathlib.Path, hints: Hints) -> Found:
    fields = raw.json_object(raw.parse_json(raw.read_text(path), str(path)), str(path))
    if fields.get("format") == FORMAT:
        plan = Plan.read(path)
        agree("devices", hints.devices, plan.placement.num_devices)
        agree("num_experts", hints.num_experts, plan.placement.num_experts)
        _check_own_layers(tuple(plan.layer_ids), hints)
        return Found(plan, "own")
    if traces.IDS in fields or "records" in fields:
        return Found(traces.read_sglang_dump(fields, hints), "SGLang")
    if megatron.IDS in fields:  # a single line
        return Found(megatron.read_megatron(path, hints), "Megatron-LM")
    if MAP in fields and counts_lib.COUNT in fields:
        raise Refused(
            str(path),
            f"{MAP} and {counts_lib.COUNT}",
            "versions of SGLang differ in which one they take",
            "Leave one of them out",
        )
    if counts_lib.COUNT in fields:
        return Found(counts_lib.read_sglang_json(fields, hints), "SGLang")
    if any(key in fields for key in plans.VLLM_KEYS):
        return Found(plans.read_vllm(fields, hints), "vLLM")
    if MAP in fields:
        return Found(plans.read_sglang(fields, hints), "SGLang")
    raise Refused(
        str(path),
        sorted(fields)[:8],
        f"one of {MAP}, {plans.RANKS}, {traces.IDS}, records, {counts_lib.COUNT} is needed",
        "Give a plan, a trace or counts",
    )


def _read_pt(path: pathlib.Path, hints: Hints) -> Found:
    """What SGLang's recorder dumps, or a map that its `--init-expert-location` reads."""
    fields = raw.json_object(torchfile.read(path), str(path))
    if traces.IDS in fields or "records" in fields:
        return Found(traces.read_sglang_dump(fields, hints, raw.int_saved), "SGLang")
    if counts_lib.COUNT in fields:
        count = raw.tensor(fields[counts_lib.COUNT], counts_lib.COUNT)
        return Found(counts_lib.read_sglang_array(count, hints), "SGLang")
    if MAP in fields:
        return Found(plans.read_sglang_jax(raw.tensor(fields[MAP], MAP), hints), "SGLang")
    raise Refused(
        str(path),
        sorted(fields)[:8],
        f"one of records, {traces.IDS}, {counts_lib.COUNT}, {MAP} is needed",
        "Give a dump of SGLang's recorder",
    )


def _check_own_layers(numbers: tuple[int, ...], hints: Hints) -> None:
    if hints.layer_ids not in (None, numbers):
        raise Refused(
            "layer_ids", hints.layer_ids, "our own files number their layers", "Leave it out"
        )


def _write_plan(
    plan: Plan, target: str | os.PathLike, suffix: str, written: str | None, hints: Hints
) -> str:
    if suffix not in _PLAN_SUFFIXES:
        raise Refused(
            "out", str(target), "a plan is written as .json, .yaml, .csv or .npy", "Change the name"
        )
    name = written or _PLAN_SUFFIXES[suffix][0]
    if name not in _PLAN_SUFFIXES[suffix]:
        raise Refused(
            "format",
            name,
            f"{suffix} files are {' or '.join(_PLAN_SUFFIXES[suffix])}",
            "Change --format or the name of the output",
        )
    if name == "own":
        plan.write(target)
        return name
    if name == "sglang-jax":
        table = plans.rows_by_layer(plan, hints)
        with files.atomic_write(target) as file:
            np.save(file, table, allow_pickle=False)
    else:
        _write_text(target, [_plan_text(plan, name, hints)])
    if name not in ("vllm", "exflow"):
        hints.note(f"the number of devices is lost: {plan.placement.num_devices}")
    if plan.placement.share_LNP is not None:
        hints.note("the shares of its copies are lost: other programs choose copies by their rules")
    if plan.topology or plan.provenance:
        hints.note("topology and provenance are lost")
    return name


def _plan_text(plan: Plan, name: str, hints: Hints) -> str:
    if name == "sglang":
        return plans.sglang_text(plan, hints)
    if name == "vllm":
        return plans.vllm_text(plan, hints)
    if name == "tensorrt-llm":
        return trtllm.yaml_text(plan)
    return plans.exflow_text(plan, hints)


def _write_trace(
    value: Trace | Counts,
    target: str | os.PathLike,
    suffix: str,
    written: str | None,
    hints: Hints,
) -> str:
    if isinstance(value, Counts):
        raise Refused(
            counts_lib.COUNT,
            value.count_SLE.shape,
            "counts do not say which experts a token chose together or one after the other, so "
            "they do not make a trace",
            "Record every token (SGLang: --expert-distribution-recorder-mode=per_token)",
        )
    names = _TRACE_SUFFIXES[suffix]
    name = written or names[0]
    if name not in names:
        rule = f"traces in {suffix} files are {' or '.join(names)}"
        raise Refused("format", name, rule, "Change --format or the name of the output")
    if name == "own":
        trace_lib.save(value, target)
    elif name == "megatron":
        with files.atomic_write(target, "w") as file:
            file.writelines(trace_files.megatron_lines(value, hints))
    elif suffix == ".json":
        _write_text(target, trace_files.sglang_pieces(value, hints))
    elif name == "sglang":
        arrays: dict[str, Any] = dict(trace_files.sglang_arrays(value, hints))
        with files.atomic_write(target) as file:
            np.savez_compressed(file, **arrays)
    else:
        with files.atomic_write(target) as file:
            np.save(file, trace_files.exflow_array(value, hints), allow_pickle=False)
    return name


def _write_counts(
    value: Trace | Counts,
    target: str | os.PathLike,
    suffix: str,
    written: str | None,
    hints: Hints,
) -> str:
    """Counts, or the counts of a trace."""
    names = {".json": "sglang", ".safetensors": "tensorrt-llm"}
    if suffix not in names or written not in (None, names[suffix]):
        raise Refused(
            "out",
            f"{target}, format {written}",
            "a trace is written as .npz, .jsonl, .npy or, with --format=sglang, .json; counts as "
            ".json (sglang) or .safetensors (tensorrt-llm)",
            "Change the name of the output or --format",
        )
    if isinstance(value, Trace):
        value = counts_lib.of_trace(value)
        hints.note("only counts are written, all tokens as one step: the trace cannot come back")
        if suffix == ".json":
            hints.note("--format=sglang writes the experts of every token")
    if suffix == ".json":
        _write_text(target, [counts_lib.sglang_text(value, hints)])
    else:
        counts_lib.write_safetensors(target, value, hints)
    return names[suffix]


def _write_text(target: str | os.PathLike, pieces: Iterable[str]) -> None:
    """No more than is read back."""
    length = 0
    with files.atomic_write(target, "w") as file:
        for piece in pieces:
            length += len(piece)
            if length > raw.MAX_TEXT:
                rule = f"more than the {raw.MAX_TEXT} bytes of text that are read back"
                raise Refused("out", str(target), rule, "Write another format (a trace: .npz)")
            file.write(piece)
