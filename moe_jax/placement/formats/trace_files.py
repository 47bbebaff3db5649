"""Our traces in the forms that `traces.py` and `megatron.py` read.

Axes: T tokens, L layers of the trace, N layers of the model, K experts per token.

What a form cannot hold is said in a note. SGLang's alone holds the number of experts, in its map:
where the last ones are never chosen, reading another back takes `--num-experts`.
"""

import json
from collections.abc import Iterator

import numpy as np

from moe_jax.placement.formats import traces
from moe_jax.placement.formats.hints import Hints
from moe_jax.placement.formats.plans import rows_up_to
from moe_jax.routing.trace import Trace

NONE = -1  # no expert


def sglang_arrays(trace: Trace, hints: Hints) -> dict[str, np.ndarray]:
    """Arrays of a `.npz`: ids [N, T, K] with a row for every layer of the model up to our last
    one, lengths of sequences, the map (expert e in slot e), and identities where there are some.
    """
    _lost(trace, hints, ("weights", trace.expert_weights_TLK))
    ids_LTK = _signed(trace).transpose(1, 0, 2)
    layers, tokens, top_k = rows_up_to(trace.layer_ids), trace.num_tokens, trace.top_k
    ids_NTK = np.full((layers, tokens, top_k), NONE, np.int32)
    ids_NTK[list(trace.layer_ids)] = ids_LTK
    slots_NE = np.tile(np.arange(trace.num_experts, dtype=np.int32), (layers, 1))
    arrays = {traces.IDS: ids_NTK, traces.SEQ_LENS: trace.seq_len, traces.SLOTS: slots_NE}
    if trace.token_ids_T is not None:
        arrays[traces.TOKENS] = trace.token_ids_T
    if tuple(trace.layer_ids) != tuple(sorted(trace.layer_ids)):
        hints.note("layers are written in rising order")
    return arrays


def sglang_pieces(trace: Trace, hints: Hints) -> Iterator[str]:
    """Text of a `.json`: the same as the recorder dumps it, all sequences in one forward pass."""
    arrays = sglang_arrays(trace, hints)
    yield '{"records": [{"forward_pass_id": 0, "rank": 0'
    for key in (traces.SEQ_LENS, traces.TOKENS):
        if key in arrays:
            yield f', "{key}": {json.dumps(arrays[key].tolist())}'
    yield f', "{traces.IDS}": ['
    for at, ids_TK in enumerate(arrays[traces.IDS]):  # one by one: the lists of all may not fit
        yield ("," if at else "") + "\n" + json.dumps(ids_TK.tolist())
    yield f']}}],\n"{traces.SLOTS}": {json.dumps(arrays[traces.SLOTS].tolist())}}}\n'


def megatron_lines(trace: Trace, hints: Hints) -> Iterator[str]:
    """Lines of a `.jsonl`: every sequence a step of rank 0."""
    _lost(trace, hints, ("weights", trace.expert_weights_TLK), ("identities", trace.token_ids_T))
    _note_experts(trace, hints)
    ids_TLK = _signed(trace)
    ends = np.cumsum(trace.seq_len)
    for step, (end, length) in enumerate(zip(ends.tolist(), trace.seq_len.tolist(), strict=True)):
        for layer, ids_TK in zip(
            trace.layer_ids, ids_TLK[end - length : end].transpose(1, 0, 2), strict=True
        ):
            record = {
                "step": step,
                "layer": int(layer),
                "rank": 0,
                "block": "decoder",
                "num_tokens": length,
                "topk": trace.top_k,
                "top_indices": ids_TK.tolist(),
            }
            yield json.dumps(record) + "\n"


def exflow_array(trace: Trace, hints: Hints) -> np.ndarray:
    """int32 [T, L]: best experts, layers in rising order."""
    _lost(trace, hints, ("weights", trace.expert_weights_TLK), ("identities", trace.token_ids_T))
    _note_experts(trace, hints)
    if trace.top_k > 1:
        hints.note(f"only the best of {trace.top_k} experts of every token is written")
    if len(trace.seq_len) > 1:
        hints.note("borders of sequences are lost")
    if tuple(trace.layer_ids) != tuple(range(trace.num_layers)):
        hints.note("numbers of layers are lost")
    return _signed(trace)[:, np.argsort(trace.layer_ids), 0]


def _signed(trace: Trace) -> np.ndarray:
    """int32 [T, L, K], -1 where there is no expert."""
    ids_TLK = trace.expert_ids_TLK
    return np.where(ids_TLK == trace.no_expert, NONE, ids_TLK.astype(np.int32))


def _lost(trace: Trace, hints: Hints, *more: tuple[str, object]) -> None:
    held = (*more, ("names of sequences", trace.seq_name), ("homes of sequences", trace.seq_home))
    for name, value in held:
        if value is not None:
            hints.note(f"{name} are lost")


def _note_experts(trace: Trace, hints: Hints) -> None:
    """For the forms that do not say how many there are."""
    chosen = trace.expert_ids_TLK[trace.expert_ids_TLK != trace.no_expert]
    if chosen.size and int(chosen.max()) + 1 < trace.num_experts:
        hints.note(f"to read it back, give --num-experts={trace.num_experts}")
