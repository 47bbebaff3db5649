"""Traces of SGLang's recorder and of ExFlow, read into our `Trace`. Megatron-LM: megatron.py.

Axes: T tokens, L layers, K experts per token, P slots.

What these files do not hold:
- Weights. Experts are taken to be in descending weight; where every token lists them in ascending
  id, that cannot be so, and a note says that best-expert figures mean nothing.
- Identities of tokens, unless a SGLang dump has them (`input_ids`).
- Borders of sequences. A SGLang array or an ExFlow trace is one sequence unless the file says
  more (`extend_seq_lens`); records of a SGLang dump are one sequence each. SGLang's decode passes
  say nothing: a token of each running request, which go on in the next pass. Nor does a chunk of
  a long prompt say of which request it is: chunks are sequences, and a note counts them.

SGLang records slots, not experts: where the dump has `last_physical_to_logical_map`, ids are taken
back to experts through it, and it says how many there are. Its rows are layers of the model; rows
without any expert are dense layers and left out, like tokens without any expert (padding). It
records eight experts per token whatever the model has; columns without any expert are left out too.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement.formats import ranks, raw
from moe_jax.placement.formats.hints import Hints
from moe_jax.routing.trace import Trace

IDS = "topk_ids_of_layer"
SEQ_LENS = "extend_seq_lens"
TOKENS = "input_ids"
SLOTS = "last_physical_to_logical_map"
_NO_TOKENS = f"{TOKENS} are left out: not one number from 0 for each token"
_AXES = ("layers", "tokens", "experts per token")
Table = Callable[[Any, str, Sequence[str]], np.ndarray]


def read_sglang_arrays(arrays: dict[str, np.ndarray], hints: Hints) -> Trace:
    """Arrays of a `.npz` (or the one of a `.npy`): ids, optional lengths and map."""
    ids_LTK = raw.int_array(arrays[IDS], IDS, _AXES)
    lens = None
    if SEQ_LENS in arrays:
        lens = raw.int_array(arrays[SEQ_LENS], SEQ_LENS, ("sequences",)).tolist()
    slots_LP = None
    if SLOTS in arrays:
        slots_LP = raw.int_array(arrays[SLOTS], SLOTS, ("layers", "slots"))
    tokens_T = None
    if TOKENS in arrays:
        tokens_T = raw.int_array(arrays[TOKENS], TOKENS, ("tokens",))
    lens = _lengths(lens, ids_LTK.shape[1], SEQ_LENS)
    return _sglang_trace(_experts(ids_LTK, slots_LP, IDS), lens, slots_LP, tokens_T, hints)


def read_sglang_dump(fields: dict[str, Any], hints: Hints, table: Table = raw.int_table) -> Trace:
    """One array, or the `records` of a per-token dump one after the other.

    Args:
      fields: the dump.
      hints: what it does not say.
      table: how its tables are checked: raw.int_table of JSON, raw.int_saved of `.pt` files.
    """
    return read_sglang_ranks([("dump", fields)], hints, table)


def read_sglang_ranks(
    dumps: Iterable[tuple[str, dict[str, Any]]], hints: Hints, table: Table = raw.int_table
) -> Trace:
    """The dumps (name, fields) of all ranks of one recording, put together as ranks.py says."""
    kept: list[ranks.Dump] = []
    seen: set[bytes] = set()
    names: list[str] = []
    for name, fields in dumps:
        names.append(name)
        one = _recorded(fields, name, hints, table)
        if not one.layers:
            continue
        digest = one.digest
        if digest in seen:
            hints.note("ranks that repeat another one (tensor-parallel) are left out")
            continue
        seen.add(digest)
        kept.append(one)
        _check_same_model(one, kept[0])
    if not kept:
        rule = "no token chose an expert"
        raise Refused("records", ", ".join(names), rule, "Record at least one token")
    whole = ranks.joined(kept, hints)
    ranks.check_own_rows(whole)
    passes = ranks.in_order(whole)
    lens = [length for one in passes for length in one.lens]
    if later := sum(one.later for one in passes):
        hints.note(
            f"{later} of {np.count_nonzero(lens)} sequences begin after position 0: they go on "
            "from an earlier pass (chunks of a long prompt) or from a cached prefix, so random "
            "halves may not be independent: record with --disable-radix-cache and a "
            "--chunked-prefill-size above all prompts that are sent at once, or take --split=time"
        )
    tokens = [one.tokens_T for one in passes if one.tokens_T is not None]
    return _sglang_trace(
        np.concatenate([one.ids_LTK for one in passes], axis=1),
        lens,
        kept[0].slots_LP,
        np.concatenate(tokens) if tokens else None,
        hints,
    )


def _check_same_model(one: ranks.Dump, first: ranks.Dump) -> None:
    found, wanted = (dump.passes[0].ids_LTK for dump in (one, first))
    if found[:, 0].shape != wanted[:, 0].shape:
        raise Refused(one.name, found.shape, f"as in {first.name}", "Give one recording's dumps")
    if not _same(one.slots_LP, first.slots_LP):
        rule = f"another map than in {first.name}"
        raise Refused(f"{one.name}.{SLOTS}", "a map", rule, "Record while no expert moves")


def _recorded(fields: dict[str, Any], dump: str, hints: Hints, table: Table) -> ranks.Dump:
    """Without passes where no token is recorded, as by idle ranks."""
    records = fields.get("records", [fields])
    if not isinstance(records, list) or not records:
        raise Refused(
            "records", raw.shown(records), "a list of forward passes", "Record at least one token"
        )
    slots_LP = fields.get(SLOTS)
    if slots_LP is not None:
        slots_LP = table(slots_LP, SLOTS, ("layers", "slots"))
    passes: list[ranks.Pass] = []
    rank = 0
    seen: set[int] = set()
    for at, record in enumerate(records):
        name = f"records[{at}]" if "records" in fields else dump
        if not isinstance(record, dict) or IDS not in record:
            raise Refused(
                name,
                "no " + IDS,
                "a trace needs the experts of every token",
                "Record with --expert-distribution-recorder-mode=per_token",
            )
        ids = record[IDS]
        if _without_tokens(ids):
            continue
        if id(ids) in seen:  # a pickle may name one tensor a thousand times
            raise Refused(f"{name}.{IDS}", "again", "stands in a record before", "Record again")
        seen.add(id(ids))
        if record.get(SEQ_LENS) is None and len(records) > 1:
            hints.note(
                f"passes without {SEQ_LENS} (decoding: a token of each running request) are one "
                "sequence each. Requests go on from pass to pass, so random halves are not "
                "independent: take --split=time, or record prefill alone"
            )
        one = _pass(record, name, slots_LP, hints, table)
        if passes and one.ids_LTK[:, 0].shape != passes[0].ids_LTK[:, 0].shape:
            shape = one.ids_LTK.shape
            raise Refused(f"{name}.{IDS}", shape, "as in the first record", "Record again")
        passes.append(one)
        rank = _number(record, "rank") or 0
    return ranks.Dump(dump, rank, passes, slots_LP)


def _pass(
    record: dict[str, Any], name: str, slots_LP: np.ndarray | None, hints: Hints, table: Table
) -> ranks.Pass:
    ids_LTK = _experts(table(record[IDS], f"{name}.{IDS}", _AXES), slots_LP, f"{name}.{IDS}")
    tokens = ids_LTK.shape[1]

    def vector(key: str, axis: str) -> np.ndarray | None:
        value = record.get(key)
        return None if value is None else table(value, f"{name}.{key}", (axis,))

    said = vector(SEQ_LENS, "sequences")
    lens = _lengths(None if said is None else said.tolist(), tokens, f"{name}.{SEQ_LENS}")
    tokens_T = vector(TOKENS, "tokens")
    if tokens_T is not None and len(tokens_T) != tokens:
        hints.note(_NO_TOKENS)
        tokens_T = None
    later = 0
    with contextlib.suppress(Refused):  # positions of another form tell nothing, and a note is all
        positions_T = vector("positions", "tokens")
        if said is not None and positions_T is not None and len(positions_T) == tokens:
            first_S = (np.cumsum(said) - said)[said > 0]
            later = int(np.count_nonzero(positions_T[first_S]))
    return ranks.Pass(ids_LTK, lens, tokens_T, _number(record, "forward_pass_id"), later)


def _number(record: dict[str, Any], key: str) -> int | None:
    number = record.get(key)
    return number if type(number) is int else None


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return b is None if a is None else b is not None and np.array_equal(a, b)


def _without_tokens(ids: Any) -> bool:
    """A forward pass without tokens, as servers in idle ranks record them."""
    if isinstance(ids, np.ndarray):
        return ids.ndim == 3 and ids.shape[1] == 0
    return isinstance(ids, list) and bool(ids) and all(row == [] for row in ids)


def read_exflow(array: np.ndarray, hints: Hints) -> Trace:
    """ExFlow's `.npy` [tokens, layers] of best experts."""
    ids_TL = raw.int_array(array, "trace", ("tokens", "layers"))
    rows, layer_ids = hints.name_layers(ids_TL.shape[1])
    return make_trace(ids_TL[:, rows, None], [len(ids_TL)], layer_ids, "ExFlow", hints)


def _sglang_trace(
    ids_LTK: np.ndarray,
    lens: list[int],
    slots_LP: np.ndarray | None,
    tokens_T: np.ndarray | None,
    hints: Hints,
) -> Trace:
    experts = None
    if slots_LP is None:
        hints.note(
            f"ids are taken as experts: the dump has no {SLOTS}, through which slots would be "
            "taken back to experts"
        )
    else:
        experts = int(slots_LP.max()) + 1  # every expert has a slot
    used_L = (ids_LTK >= 0).any(axis=(1, 2))
    if not used_L.any():
        raise Refused(IDS, "-1 everywhere", "no token chose an expert", "Record at least one token")
    numbers = tuple(int(number) for number in np.flatnonzero(used_L))
    if not used_L.all():
        hints.note(f"{int((~used_L).sum())} layers without any expert are left out")
    _, layer_ids = hints.select_layers(numbers)
    top_k = int(np.flatnonzero((ids_LTK >= 0).any(axis=(0, 1))).max()) + 1
    if top_k < ids_LTK.shape[2]:
        hints.note(f"top-{top_k}: the other {ids_LTK.shape[2] - top_k} columns hold no expert")
        ids_LTK = ids_LTK[:, :, :top_k]
    ids_TLK = ids_LTK[list(layer_ids)].transpose(1, 0, 2)
    if tokens_T is not None and (len(tokens_T) != len(ids_TLK) or tokens_T.min() < 0):
        hints.note(_NO_TOKENS)
        tokens_T = None
    elif tokens_T is not None:
        hints.note(f"{TOKENS} come along: the text can be read back from this trace")
    args = ids_TLK, lens, layer_ids, "SGLang", hints
    return make_trace(*args, token_ids_T=tokens_T, num_experts=experts)


def _experts(ids_LTK: np.ndarray, slots_LP: np.ndarray | None, field: str) -> np.ndarray:
    """Experts of slots; ids are experts where there is no map."""
    if slots_LP is None:
        return ids_LTK
    layers, slots = slots_LP.shape
    if layers != len(ids_LTK) or ids_LTK.max() >= slots or ids_LTK.min() < -1:
        raise Refused(
            field,
            f"{len(ids_LTK)} layers, ids {ids_LTK.min()} to {ids_LTK.max()}",
            f"{SLOTS} has {layers} layers of {slots} slots",
            "Give the map of this recording",
        )
    experts_LTK = slots_LP[np.arange(layers)[:, None, None], np.maximum(ids_LTK, 0)]
    return np.where(ids_LTK < 0, -1, experts_LTK)


def make_trace(
    ids_TLK: np.ndarray,
    lens: list[int],
    layer_ids: tuple[int, ...],
    name: str,
    hints: Hints,
    seq_name: tuple[str, ...] | None = None,
    token_ids_T: np.ndarray | None = None,
    num_experts: int | None = None,
) -> Trace:
    """A Trace of signed ids (-1 = no expert), without the tokens that chose none.

    `num_experts` where the file says it.
    """
    experts = hints.experts_of(ids_TLK, num_experts)
    if experts > 65535:
        raise Refused("num_experts", experts, "at most 65535", "Correct the file")
    chose_T = (ids_TLK >= 0).any(axis=(1, 2))
    sequence_T = np.repeat(np.arange(len(lens)), lens)
    seq_len = np.bincount(sequence_T[chose_T], minlength=len(lens))
    if not chose_T.all():
        hints.note(f"{int((~chose_T).sum())} tokens without any expert (padding) are left out")
    if seq_name is not None:
        seq_name = tuple(one for one, length in zip(seq_name, seq_len, strict=True) if length)
    none = 255 if experts <= 255 else 65535
    ids = np.where(ids_TLK < 0, none, ids_TLK)[chose_T].astype(
        np.uint8 if experts <= 255 else np.uint16
    )
    _note_order(ids, hints)
    if np.count_nonzero(seq_len) == 1:
        hints.note("one sequence: the source has no borders of sequences, so no half is held out")
    return Trace(
        *(ids, experts, seq_len[seq_len > 0]),
        seq_name=seq_name,
        token_ids_T=None if token_ids_T is None else token_ids_T[chose_T],
        layer_ids=layer_ids,
        model=name,
    )


def _note_order(ids_TLK: np.ndarray, hints: Hints) -> None:
    if ids_TLK.shape[2] == 1:
        return
    if (ids_TLK[:, :, 1:] >= ids_TLK[:, :, :-1]).all():
        hints.note(
            "no weights, and every token lists its experts in ascending id: what uses the best "
            "expert (top-1, transitions) means nothing here"
        )
    else:
        hints.note("no weights: experts are taken to be in descending weight")


def _lengths(lens: list[int] | None, tokens: int, field: str) -> list[int]:
    """Lengths of the sequences, which make up all tokens; one sequence where none are said."""
    if lens is None:
        return [tokens]
    if min(lens) < 0 or sum(lens) != tokens:
        raise Refused(field, lens, f"lengths of sequences, {tokens} in all", "Record it again")
    return lens
