"""How often every expert was chosen, step by step: SGLang's and TensorRT-LLM's statistics.

Axes: S steps, L layers, E experts.

Counts are enough to balance loads, and for nothing else: they do not say which experts a token
chose together, nor which it chose in the next layer. So counts become other counts, a trace can
become counts (one step), and counts never become a trace.

- SGLang: `logical_count` [S, L, E] (or [L, E]) as `.npz`, JSON, or a `.npy` of this name; rows are
  the model's layers, so rows without any count are dense layers. Its `--init-expert-location` reads
  the JSON.
- TensorRT-LLM: safetensors, one vector [E] per key `"{iteration}_{layer}"`; the files of all ranks
  in a folder are added up, as its own tools do.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement.formats import raw, safetensors
from moe_jax.placement.formats.hints import Hints
from moe_jax.placement.formats.plans import rows_up_to
from moe_jax.routing import affinity
from moe_jax.routing.trace import Trace

COUNT = "logical_count"
_KEY = re.compile(r"([0-9]{1,9})_([0-9]{1,6})", re.ASCII)


@dataclasses.dataclass(frozen=True, eq=False)
class Counts:
    """Tokens per expert.

    Attributes:
      count_SLE: int64 [S, L, E].
      layer_ids: the model's numbers of the layers.
    """

    count_SLE: np.ndarray
    layer_ids: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        return self.count_SLE.shape[2]


def of_trace(trace: Trace) -> Counts:
    """A whole trace as one step."""
    return Counts(affinity.load_LE(trace)[None], tuple(trace.layer_ids))


def read_sglang_json(fields: dict[str, Any], hints: Hints) -> Counts:
    value = fields[COUNT]
    axes = ["steps", "layers", "experts"]
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, list) and first and not isinstance(first[0], list):
        axes = axes[1:]
    return _by_layer(raw.int_table(value, COUNT, axes), hints)


def read_sglang_array(array: np.ndarray, hints: Hints) -> Counts:
    axes = ["steps", "layers", "experts"][-2 if array.ndim == 2 else -3 :]
    return _by_layer(raw.int_array(array, COUNT, axes), hints)


def read_sglang_dumps(dumps: Iterable[tuple[str, dict[str, Any]]], hints: Hints) -> Counts:
    """Dumps (name, fields) of one recording, in order: each goes on with the steps."""
    names: list[str] = []
    parts: list[np.ndarray] = []
    for name, fields in dumps:
        if COUNT not in fields:
            raise Refused(name, f"no {COUNT}", f"as in {names[0]}", "Give one recording's dumps")
        part = raw.tensor(fields[COUNT], f"{name}.{COUNT}")
        if parts and (part.ndim != 3 or part.shape[1:] != parts[0].shape[1:]):
            raise Refused(name, part.shape, f"as in {names[0]}", "Give one recording's dumps")
        names.append(name)
        parts.append(part)
    return read_sglang_array(np.concatenate(parts) if len(parts) > 1 else parts[0], hints)


def rank_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """TensorRT-LLM's statistics of all ranks in a folder."""
    found = sorted(folder.glob("rank*.safetensors"))
    return [path for path in found if not path.stem.endswith("_raw")]


def read_safetensors(path: str | os.PathLike, hints: Hints) -> Counts:
    """TensorRT-LLM's statistics: one rank's file, or a folder of them, which are added up."""
    path = pathlib.Path(path)
    vectors: dict[tuple[int, int], np.ndarray] = {}
    for one in rank_files(path) if path.is_dir() else [path]:
        for key, vector in _vectors(one).items():
            before = vectors.get(key, vector)
            if before.shape != vector.shape:
                name = f"{one.name} {key[0]}_{key[1]}"
                raise Refused(name, vector.shape, f"others {before.shape}", "Record again")
            vectors[key] = before + vector if key in vectors else vector
    if not vectors:
        raise Refused("in", str(path), "no tensor in it", "Give TensorRT-LLM's rank0.safetensors")
    return _of_vectors(vectors, hints)


def _vectors(path: pathlib.Path) -> dict[tuple[int, int], np.ndarray]:
    """Counts [E] by (iteration, layer)."""
    vectors: dict[tuple[int, int], np.ndarray] = {}
    for name, vector in safetensors.read(path).items():
        match = _KEY.fullmatch(name)
        if not match:
            raise Refused("tensor", name, "names are iteration_layer, such as 100_3", "Rename it")
        key = int(match[1]), int(match[2])
        if key in vectors:
            raise Refused("tensor", name, "this iteration and layer stand twice", "Delete one")
        vectors[key] = raw.int_array(vector, name, ("experts",))
    return vectors


def _of_vectors(vectors: dict[tuple[int, int], np.ndarray], hints: Hints) -> Counts:
    steps = sorted({step for step, _ in vectors})
    numbers = tuple(sorted({layer for _, layer in vectors}))
    first = next(iter(vectors.values()))
    if len(vectors) != len(steps) * len(numbers):  # before the table of pairs is walked
        raise Refused(
            "tensors",
            len(vectors),
            f"{len(steps)} iterations of {len(numbers)} layers need {len(steps) * len(numbers)}",
            "Record again: an iteration misses a layer",
        )
    for (step, layer), vector in vectors.items():
        if vector.shape != first.shape:
            raise Refused(f"{step}_{layer}", vector.shape, f"others {first.shape}", "Record again")
    rows, layer_ids = hints.select_layers(numbers)
    table = [[vectors[step, layer] for layer in numbers] for step in steps]
    return _valid(Counts(np.array(table)[:, rows], layer_ids), hints)


def sglang_text(counts: Counts, hints: Hints) -> str:
    """`logical_count` as JSON, with a row for every layer of the model up to the last counted."""
    rows = rows_up_to(counts.layer_ids)
    lines = []
    for count_LE in counts.count_SLE:  # one by one: the rows of all steps may not fit
        table = np.zeros((rows, counts.num_experts), np.int64)
        table[list(counts.layer_ids)] = count_LE
        lines.append(str(table.tolist()))
    if rows > len(counts.layer_ids):
        hints.note(f"{rows - len(counts.layer_ids)} rows of layers without counts are zero")
    return f'{{\n "{COUNT}": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def write_safetensors(path: str | os.PathLike, counts: Counts, hints: Hints) -> None:
    hints.note("TensorRT-LLM reads meta_info.json (num_experts, num_experts_per_token) beside it")
    safetensors.write(
        path,
        {
            f"{step}_{layer}": counts.count_SLE[step, row]
            for step in range(len(counts.count_SLE))
            for row, layer in enumerate(counts.layer_ids)
        },
    )


def _by_layer(table: np.ndarray, hints: Hints) -> Counts:
    count_SLE = table if table.ndim == 3 else table[None]
    used_L = (count_SLE != 0).any(axis=(0, 2))
    if not used_L.any():
        raise Refused(COUNT, "0 everywhere", "no token was counted", "Record at least one token")
    if not used_L.all():
        hints.note(f"{int((~used_L).sum())} layers without any count are left out")
    _, layer_ids = hints.select_layers(tuple(int(n) for n in np.flatnonzero(used_L)))
    return _valid(Counts(count_SLE[:, list(layer_ids)], layer_ids), hints)


def _valid(counts: Counts, hints: Hints) -> Counts:
    if counts.count_SLE.min() < 0:
        raise Refused(COUNT, int(counts.count_SLE.min()), "counts are not negative", "Record again")
    if hints.num_experts not in (None, counts.num_experts):
        raise Refused(
            "num_experts",
            hints.num_experts,
            f"the file says {counts.num_experts}",
            "Leave --num-experts out",
        )
    return counts
