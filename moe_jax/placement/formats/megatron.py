"""Megatron-LM's `router_trace_rank*.jsonl`, read into our `Trace`.

Axes: T tokens, L layers, K experts per token. One line holds the experts of one layer, step and
rank. What makes a sequence of ours is one forward pass of one rank, the layers of its pipeline
stages put together:

- A step of training has a pass for every microbatch: the n-th record of a layer belongs to the n-th
  pass of the step. A pass that repeats another one of its step entirely (activations that are
  recomputed) is left out.

- Ranks that hold different layers are pipeline stages. Stages have disjoint layers and equally many
  ranks; the n-th rank of every stage saw the same tokens, in all of Megatron-LM's rank orders.
- Its tracer may number the layers of every stage from 0. Then nothing in the file tells stages from
  data-parallel ranks, and `pipeline_stages` has to say it: stages are taken as the outermost part
  of a rank's number (the default order), and layers are numbered on from stage to stage.
- Its replay of routing numbers layers from 1, its hooks from 0; nothing in the file says which, so
  `layer_base` has to.
- Tensor-parallel ranks record the same tokens again. A rank that repeats another one entirely is
  left out: the same token must not stand in both halves of a trace.
"""

import collections
import hashlib
import os
import pathlib

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement.formats import raw
from moe_jax.placement.formats.hints import Hints
from moe_jax.placement.formats.traces import make_trace
from moe_jax.routing.trace import Trace

IDS = "top_indices"
Key = tuple[int, int, int]  # step, rank, number of the pass in the step
Passes = dict[Key, dict[int, np.ndarray]]  # layer -> int64 [T, K]


def read_megatron(path: str | os.PathLike, hints: Hints) -> Trace:
    """`router_trace_rank*.jsonl`: one file, or all of a folder."""
    path = pathlib.Path(path)
    paths = sorted(path.glob("router_trace_rank*.jsonl")) if path.is_dir() else [path]
    if not paths:
        rule = "no router_trace_rank*.jsonl, expert_distribution_recorder_*.pt or rank*.safetensors"
        raise Refused("in", str(path), f"{rule} in it", "Give another folder, or a file")
    passes: Passes = {}
    recorded: collections.Counter[tuple[int, int, int]] = collections.Counter()
    for one in paths:
        with raw.existing_file(one).open("rb") as file:
            for at, line in enumerate(file, start=1):
                if line.strip():
                    _add_record(passes, recorded, line, f"{one.name}:{at}", hints)
    if not passes:
        raise Refused("in", str(path), "no token is recorded", "Record at least one token")
    passes = _without_repeats(_merged(_computed_once(passes, hints), hints), hints)
    numbers = tuple(sorted(set().union(*passes.values())))
    order = sorted(passes)
    parts = [_stack(passes[key], numbers, key) for key in order]
    top_ks = {part_TLK.shape[2] for part_TLK in parts}
    if len(top_ks) > 1:
        raise Refused("topk", sorted(top_ks), "the same in all records", "Give one model's trace")
    if numbers[0] == 1 and hints.layer_base is None:
        hints.note(
            "layers are numbered from 1: if that is the model's first layer, as in traces of "
            "Megatron-LM's routing replay, give --layer-base=1"
        )
    rows, layer_ids = hints.select_layers(numbers)
    several = max(number for _, _, number in order) > 0
    return make_trace(
        np.concatenate(parts)[:, rows],
        [len(part_TLK) for part_TLK in parts],
        layer_ids,
        "Megatron-LM",
        hints,
        tuple(_name(key, several) for key in order),
    )


def _name(key: Key, several: bool) -> str:
    step, rank, number = key
    return f"step {step} rank {rank}" + (f" pass {number}" if several else "")


def _computed_once(passes: Passes, hints: Hints) -> Passes:
    """Passes without those that repeat another one of their step and rank."""
    seen: set[tuple[int, int, bytes]] = set()
    kept: Passes = {}
    for (step, rank, number), layers in sorted(passes.items()):
        one = step, rank, _digest(layers)
        if one in seen:
            hints.note("passes that repeat another one of their step (recomputed) are left out")
            continue
        seen.add(one)
        kept[step, rank, number] = layers
    return kept


def _digest(layers: dict[int, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for layer, ids_TK in sorted(layers.items()):
        digest.update(f"{layer} {ids_TK.shape} ".encode() + ids_TK.tobytes())
    return digest.digest()


def _merged(passes: Passes, hints: Hints) -> Passes:
    """Every step of the first stage's ranks, with the layers of all stages."""
    layers_of: dict[int, set[int]] = {}
    for (_, rank, _), layers in passes.items():
        layers_of.setdefault(rank, set()).update(layers)
    stages = _stages(layers_of, hints)
    if len(stages) == 1:
        return passes
    first_of = {rank: stages[0][at] for stage in stages for at, rank in enumerate(stage)}
    first_layer = _first_layers(stages, layers_of, hints)
    merged: Passes = {}
    for (step, rank, number), layers in sorted(passes.items()):
        whole = merged.setdefault((step, first_of[rank], number), {})
        whole |= {first_layer[rank] + layer: ids_TK for layer, ids_TK in layers.items()}
    hints.note(f"layers of {len(stages)} pipeline stages are put together")
    return merged


def _stages(layers_of: dict[int, set[int]], hints: Hints) -> list[list[int]]:
    """Ranks of every pipeline stage, both in order; one stage where all hold the same layers."""
    ranks, count = sorted(layers_of), hints.pipeline_stages
    if count is not None:
        if count < 1 or len(ranks) % count:
            raise Refused("pipeline_stages", count, f"divides the {len(ranks)} ranks", "Correct it")
        each = len(ranks) // count
        return [ranks[at : at + each] for at in range(0, len(ranks), each)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in ranks:
        groups.setdefault(tuple(sorted(layers_of[rank])), []).append(rank)
    if len(groups) == 1 and len(ranks) > 1:
        hints.note(
            "ranks with the same layers are taken as data-parallel: if they are pipeline stages "
            "that number their layers from 0, give --pipeline-stages"
        )
    stages = [groups[layers] for layers in sorted(groups)]
    disjoint = sum(map(len, groups)) == len(set().union(*groups))
    if not disjoint or len({len(stage) for stage in stages}) > 1:
        every = sorted(set().union(*groups))
        layer = next(number for number in every if any(number not in group for group in groups))
        raise Refused(
            f"layer {layer}",
            f"ranks {ranks}",
            "is missing on some; pipeline stages have disjoint layers and equally many ranks",
            "Record every rank, or give one stage",
        )
    return stages


def _first_layers(stages, layers_of: dict[int, set[int]], hints: Hints) -> dict[int, int]:
    """What is added to the layer numbers of a rank."""
    first_layer: dict[int, int] = {}
    first = 0
    for stage in stages:
        first_layer |= dict.fromkeys(stage, first)
        if hints.pipeline_stages is not None:
            first += max(max(layers_of[rank]) for rank in stage) + 1
    if hints.pipeline_stages is not None:
        hints.note("layers are numbered on from stage to stage: dense layers at an end are unseen")
    return first_layer


def _without_repeats(passes: Passes, hints: Hints) -> Passes:
    """Ranks that recorded other tokens than those before them."""
    seen: dict[bytes, int] = {}
    kept: Passes = {}
    for rank in sorted({rank for _, rank, _ in passes}):
        digest = hashlib.sha256()
        mine = {key: layers for key, layers in sorted(passes.items()) if key[1] == rank}
        for (step, _, number), layers in mine.items():
            digest.update(f"{step} {number} ".encode() + _digest(layers))
        if digest.digest() in seen:
            hints.note("ranks that repeat another one (tensor-parallel) are left out")
            continue
        seen[digest.digest()] = rank
        kept |= mine
    return kept


def _add_record(
    passes: Passes,
    recorded: collections.Counter[tuple[int, int, int]],
    line: bytes,
    where: str,
    hints: Hints,
) -> None:
    """Files one line under its pass and layer.

    Args:
      passes: what is filed.
      recorded: lines so far of a (step, rank, layer).
      line: JSON.
      where: its file and number, for errors.
      hints: numbers of layers; what is left out.
    """
    record = raw.json_object(raw.parse_json(raw.decode(line, where), where), where)
    if record.get("block", "decoder") != "decoder":
        hints.note("records of other blocks than the decoder (multi-token prediction) are left out")
        return
    step, layer, rank, tokens = (
        raw.whole_number(record.get(key), f"{where} {key}")
        for key in ("step", "layer", "rank", "num_tokens")
    )
    if tokens == 0 and record.get(IDS) == []:
        return
    name = f"{where} {IDS}"
    ids_TK = raw.int_table(record.get(IDS), name, ("tokens", "experts per token"))
    top_k = ids_TK.shape[1] if record.get("topk") is None else record["topk"]
    if ids_TK.shape != (tokens, raw.whole_number(top_k, f"{where} topk", 1)):
        raise Refused(
            name, ids_TK.shape, f"num_tokens and topk are {tokens}, {top_k}", "Record it again"
        )
    layer -= hints.layer_base or 0
    if layer < 0:
        rule = f"at least --layer-base={hints.layer_base}"
        raise Refused(f"{where} layer", layer + (hints.layer_base or 0), rule, "Correct the base")
    number = recorded[step, rank, layer]
    recorded[step, rank, layer] += 1
    passes.setdefault((step, rank, number), {})[layer] = ids_TK


def _stack(layers: dict[int, np.ndarray], numbers: tuple[int, ...], key: Key) -> np.ndarray:
    """int64 [T, L, K] of one pass, which has to have every layer, all of one shape."""
    name = _name(key, key[2] > 0)
    for number in numbers:
        if number not in layers:
            raise Refused(f"{name} layer", number, "is missing", "Record every layer in every step")
    shapes = {layers[number].shape for number in numbers}
    if len(shapes) > 1:
        raise Refused(name, sorted(shapes), "all layers see the same tokens", "Record it again")
    return np.stack([layers[number] for number in numbers], axis=1)
