"""A routing trace: which experts every token chose in every MoE layer.

Axes: T tokens (all sequences, one after the other), L MoE layers, K experts per token in
descending weight, S sequences. A trace that exists is valid: the constructor checks it, and `load`
checks sizes before it makes arrays, never unpickles, and answers bad files with `Refused`.

File (`.npz`): `expert_ids` uint8 or uint16 [T, L, K] (255 / 65535 = no expert), `seq_len` int32
[S], optional `expert_weights` float16 [T, L, K], `seq_name` [S], `seq_home` int32 [S], `token_ids`
int32 [T], and `meta`, one JSON string. Files without `meta` are read too: the number of experts is
then given by the caller or inferred as the largest id + 1.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax import files
from moe_jax.errors import Refused
from moe_jax.routing import checks, npz

FORMAT = "moe_jax.trace"
VERSION = 1
_ARRAYS = ("expert_ids", "seq_len", "expert_weights", "seq_name", "seq_home", "token_ids", "meta")


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """The experts of every token.

    Attributes:
      expert_ids_TLK: uint8 or uint16, in descending weight; `no_expert` where there is none.
      num_experts: experts per layer.
      seq_len: int32 [S], tokens per sequence; sequences are contiguous and in order.
      expert_weights_TLK: float16 combine weights, or None.
      seq_name: names of the sequences, or None.
      seq_home: int32 [S], expert-axis coordinate of the device that held the sequence, or None.
      token_ids_T: int32, which token of the vocabulary each is, or None. The text can be read back
        from them, so they are recorded only where that was asked for.
      layer_ids: the model's own numbers of these layers; 0..L-1 by default.
      model: the model that was recorded, for people.
      corpus: the text that was recorded, for people.
    """

    expert_ids_TLK: np.ndarray
    num_experts: int
    seq_len: np.ndarray
    expert_weights_TLK: np.ndarray | None = None
    seq_name: tuple[str, ...] | None = None
    seq_home: np.ndarray | None = None
    token_ids_T: np.ndarray | None = None
    layer_ids: Sequence[int] = ()
    model: str = ""
    corpus: str = ""

    def __post_init__(self):
        ids = np.asarray(self.expert_ids_TLK)
        checks.check_shape(ids)
        set_field = functools.partial(object.__setattr__, self)
        set_field("num_experts", checks.valid_num_experts(self.num_experts, ids))
        set_field("seq_len", _frozen(checks.valid_numbers("seq_len", self.seq_len, None)))
        checks.check_seq_len(self.seq_len, ids.shape[0])
        checks.check_ids(ids, self.num_experts)
        set_field("expert_ids_TLK", _frozen(np.ascontiguousarray(ids)))
        if self.expert_weights_TLK is not None:
            set_field(
                "expert_weights_TLK", _frozen(checks.valid_weights(self.expert_weights_TLK, ids))
            )
        if self.seq_name is not None:
            set_field("seq_name", checks.valid_names(self.seq_name, len(self.seq_len)))
        if self.seq_home is not None:
            homes = checks.valid_numbers("seq_home", self.seq_home, len(self.seq_len))
            set_field("seq_home", _frozen(homes))
        if self.token_ids_T is not None:
            tokens = checks.valid_numbers("token_ids", self.token_ids_T, ids.shape[0], "token")
            set_field("token_ids_T", _frozen(tokens))
        set_field("layer_ids", checks.valid_layer_ids(self.layer_ids, ids.shape[1]))

    @property
    def num_tokens(self) -> int:
        return self.expert_ids_TLK.shape[0]

    @property
    def num_layers(self) -> int:
        return self.expert_ids_TLK.shape[1]

    @property
    def top_k(self) -> int:
        return self.expert_ids_TLK.shape[2]

    @property
    def num_sequences(self) -> int:
        return len(self.seq_len)

    @property
    def no_expert(self) -> int:
        """The id that means "no expert": the largest value of the id type."""
        return int(np.iinfo(self.expert_ids_TLK.dtype).max)

    @property
    def home_T(self) -> np.ndarray | None:
        """int32 [T]: `seq_home` per token, or None."""
        return None if self.seq_home is None else np.repeat(self.seq_home, self.seq_len)

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the contents (arrays and meta), whatever the file's compression."""
        total = hashlib.sha256(_meta(self).encode())
        for name, array in _arrays(self).items():
            total.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()

    def select(self, sequences: np.ndarray) -> "Trace":
        """The trace of these sequences only, in the order given."""
        sequences = np.asarray(sequences, np.int64)
        if sequences.size == 0:
            raise Refused("sequences", [], "at least one is needed", "Select one or more sequences")
        start = np.concatenate([[0], np.cumsum(self.seq_len, dtype=np.int64)])
        token = np.concatenate([np.arange(start[s], start[s + 1]) for s in sequences])
        weights, names, homes = self.expert_weights_TLK, self.seq_name, self.seq_home
        tokens = self.token_ids_T
        return dataclasses.replace(
            self,
            expert_ids_TLK=self.expert_ids_TLK[token],
            seq_len=self.seq_len[sequences],
            expert_weights_TLK=None if weights is None else weights[token],
            seq_name=None if names is None else tuple(names[s] for s in sequences),
            seq_home=None if homes is None else homes[sequences],
            token_ids_T=None if tokens is None else tokens[token],
        )


class Halves(NamedTuple):
    """A trace cut in two by sequences: one half to plan on, the other to judge on."""

    plan_half: Trace
    judge_half: Trace


def split(trace: Trace, seed: int) -> Halves:
    """Random halves of the sequences (the planning half gets the odd one)."""
    if trace.num_sequences < 2:
        raise Refused(
            "seq_len",
            trace.seq_len.tolist(),
            "one sequence has no held-out half",
            "Record two or more sequences",
        )
    order = np.random.default_rng(seed).permutation(trace.num_sequences)
    cut = (trace.num_sequences + 1) // 2
    halves = Halves(trace.select(np.sort(order[:cut])), trace.select(np.sort(order[cut:])))
    check_routed(halves.plan_half, "the half that is planned on")
    check_routed(halves.judge_half, "the half that is judged on")
    return halves


def check_routed(trace: Trace, part: str) -> None:
    """Refuses to plan or judge on a trace where no token has an expert.

    Not a rule of every trace: layers or tokens that are cut out of one may have none.
    """
    if (trace.expert_ids_TLK == trace.no_expert).all():
        raise Refused(
            "expert_ids",
            trace.no_expert,
            f"no token of {part} has an expert: there is nothing to count",
            "Record more sequences, with the experts of their tokens",
        )


def save(trace: Trace, path: str | os.PathLike) -> None:
    """Writes the trace whole or not at all."""
    with files.atomic_write(path) as file:
        arrays: dict[str, Any] = _arrays(trace)
        np.savez_compressed(file, meta=np.array(_meta(trace)), **arrays)


def load(path: str | os.PathLike, num_experts: int | None = None) -> Trace:
    """Reads and checks a trace; `num_experts` is needed only where the file does not say it."""
    arrays = npz.read_npz(path, _ARRAYS)
    for name in ("expert_ids", "seq_len"):
        if name not in arrays:
            raise Refused(name, None, f"{path} has no such array", "Give a trace .npz")
    ids = arrays["expert_ids"]
    checks.check_shape(ids)
    meta = _read_meta(arrays.get("meta"))
    if num_experts is not None and meta.get("num_experts", num_experts) != num_experts:
        raise Refused(
            "num_experts",
            num_experts,
            f"the trace says {meta['num_experts']}",
            "Leave num_experts out, or give the model's own trace",
        )
    experts = meta.get("num_experts", num_experts)
    if experts is None:
        chosen = ids[ids != np.iinfo(ids.dtype).max]
        experts = (
            int(chosen.max()) + 1 if chosen.size else ids.shape[2]
        )  # as many as a token may have
    experts = checks.valid_num_experts(experts, ids)
    return Trace(
        expert_ids_TLK=ids,
        num_experts=experts,
        seq_len=arrays["seq_len"],
        expert_weights_TLK=arrays.get("expert_weights"),
        seq_name=None if "seq_name" not in arrays else _strings(arrays["seq_name"]),
        seq_home=arrays.get("seq_home"),
        token_ids_T=arrays.get("token_ids"),
        layer_ids=checks.valid_layer_ids(meta.get("layer_ids", ()), ids.shape[1]),
        model=str(meta.get("model", "")),
        corpus=str(meta.get("corpus", "")),
    )


def _strings(array: np.ndarray) -> tuple[str, ...]:
    if array.ndim != 1 or array.dtype.kind != "U":
        raise Refused(
            "seq_name",
            f"{array.dtype} {array.shape}",
            "a vector of strings",
            "Correct it or leave it out",
        )
    try:
        return tuple(array.tolist())
    except ValueError as error:  # code points beyond Unicode
        raise Refused(
            "seq_name", "unreadable", "names are Unicode", "Correct it or leave it out"
        ) from error


def _read_meta(array: np.ndarray | None) -> dict[str, Any]:
    if array is None:
        return {}
    try:
        if array.ndim != 0 or array.dtype.kind != "U":
            raise ValueError(f"{array.dtype} {array.shape} is not one string")
        meta = json.loads(str(array))
        if not isinstance(meta, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise Refused(
            "meta", str(error)[:80], "meta is one JSON object as a string", "Record the trace again"
        ) from error
    if meta.get("format") != FORMAT or meta.get("version") != VERSION:
        raise Refused(
            "meta version",
            (meta.get("format"), meta.get("version")),
            f"this program reads {FORMAT} version {VERSION}",
            "Record the trace again",
        )
    return meta


def _meta(trace: Trace) -> str:
    return json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "num_experts": trace.num_experts,
            "layer_ids": trace.layer_ids,
            "model": trace.model,
            "corpus": trace.corpus,
        }
    )


def _arrays(trace: Trace) -> dict[str, np.ndarray]:
    """What goes into the file and the digest besides `meta`; optional arrays only when present."""
    arrays = {"expert_ids": trace.expert_ids_TLK, "seq_len": trace.seq_len}
    if trace.expert_weights_TLK is not None:
        arrays["expert_weights"] = trace.expert_weights_TLK
    if trace.seq_name is not None:
        arrays["seq_name"] = np.array(trace.seq_name, dtype=np.str_)
    if trace.seq_home is not None:
        arrays["seq_home"] = trace.seq_home
    if trace.token_ids_T is not None:
        arrays["token_ids"] = trace.token_ids_T
    return arrays


def _frozen(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view
