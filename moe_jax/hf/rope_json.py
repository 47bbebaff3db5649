"""Rotary positions of config.json, in both ways of writing them.

Until version 4 of transformers `rope_theta` and, where positions are stretched, an object
`rope_scaling`; since version 5 one object `rope_parameters`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from moe_jax.config import RopeConfig, rope_rules
from moe_jax.errors import Refused
from moe_jax.hf.tables import MAX_SIZE

_OBJECTS = ("rope_scaling", "rope_parameters")
_KINDS = {"default": "plain"} | {kind: kind for kind in ("linear", "yarn", "llama3", "longrope")}
_ORIGINAL = "original_max_position_embeddings"
# Key and field of `RopeConfig`.
_FIELDS = {
    "factor": "factor",
    _ORIGINAL: "original_seq_len",
    "attention_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "short_factor": "short_factor",
    "long_factor": "long_factor",
}
_LOGITS = "mscale_all_dim"  # latent attention goes by it in every kind but "default"
_SAID_ELSEWHERE = ("rope_type", "rope_theta", "partial_rotary_factor")
_TYPES = ("rope_type", "type")  # one key, its older name behind
_MSCALES = ("short_mscale", "long_mscale")  # LongRoPE, as Phi-3.5-MoE writes its scale


@dataclasses.dataclass(frozen=True)
class Read:
    """Attributes:
    theta: base of the frequencies.
    fields: of `RopeConfig`, as they stand there: its rules check them.
    """

    theta: Any
    fields: dict[str, Any]


def read(
    path: pathlib.Path, plain: Mapping[str, Any], theta: float, unsaid: Mapping[str, Any]
) -> Read:
    """Rotary positions of a model.

    Args:
      theta: where config.json has none (`Family.rope_theta`).
      unsaid: the object where config.json has none, or null (`Family.rope`).

    Raises:
      Refused: a kind, or a key of it, that is not supported, by name.
    """
    there = any(plain.get(name) is not None for name in _OBJECTS)
    group = _group(path, plain) if there else dict(unsaid)
    kind = group.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        rule = f"is a scaling of rotary positions that is not supported: must be one of {known}"
        raise Refused(f"{path}: {_name(plain)}.rope_type", kind, rule, "use a model without it")
    if (part := group.get("partial_rotary_factor")) not in (None, 1.0):
        rule = "asks for rotary positions on a part of each head, which is not supported: must be 1"
        field = f"{path}: {_name(plain)}.partial_rotary_factor"
        raise Refused(field, part, rule, "use another")
    for key, value in group.items():
        if key not in (*_FIELDS, *_SAID_ELSEWHERE, *_MSCALES) and value is not None:
            rule = "is not known, so what it asks for would be ignored"
            raise Refused(f"{path}: {_name(plain)}.{key}", value, rule, "use another model")
    said = (group.get("rope_theta"), plain.get("rope_theta"), theta)
    theta = next(one for one in said if one is not None)
    if kind == "default":
        return Read(theta, {})
    fields = {_FIELDS[key]: value for key, value in group.items() if key in _FIELDS}
    fields = {name: value for name, value in fields.items() if value is not None}
    meant = rope_rules.reads(_KINDS[kind])
    if fields.get(_LOGITS) and _LOGITS not in meant:
        rule = f"is not supported where positions are stretched as {kind!r} says"
        field = f"{path}: {_name(plain)}.{_LOGITS}"
        raise Refused(field, fields[_LOGITS], rule, "use another model")
    # Of numbers that belong to other kinds the reference makes nothing either.
    fields = {name: value for name, value in fields.items() if name in meant}
    if kind != "linear":
        _complete(path, fields, plain)
    if kind == "longrope":
        _scale(path, plain, group, fields)
    return Read(theta, fields | {"kind": kind})


def written(rope: RopeConfig, theta: float) -> dict[str, Any]:
    """Keys of config.json that `read` makes the same of, in both ways of writing them."""
    kind_of = {ours: theirs for theirs, ours in _KINDS.items()}
    told: dict[str, Any] = {"rope_type": kind_of[rope.kind]}
    for key, name in _FIELDS.items():
        value = getattr(rope, name)
        follows = value == 0 and value is not False  # from the others
        if name in rope_rules.reads(rope.kind) and not follows:
            told[key] = list(value) if isinstance(value, tuple) else value
    older = None if rope.kind == "plain" else told
    both = {"rope_scaling": older, "rope_parameters": {**told, "rope_theta": theta}}
    return {"rope_theta": theta, **both}


def _name(plain: Mapping[str, Any]) -> str:
    return next((name for name in reversed(_OBJECTS) if plain.get(name)), _OBJECTS[-1])


def _group(path: pathlib.Path, plain: Mapping[str, Any]) -> dict[str, Any]:
    """What both objects say together."""
    merged: dict[str, Any] = {}
    for name in _OBJECTS:
        found = plain.get(name)
        if found is None:
            continue
        if not isinstance(found, dict):
            rule = 'must be an object, {"rope_type": ...}'
            raise Refused(f"{path}: {name}", found, rule, "download config.json again")
        for key, value in found.items():
            known = "rope_type" if key in _TYPES else key
            if merged.setdefault(known, value) != value:
                rule = f"is {merged[known]!r} elsewhere in rope_scaling or rope_parameters"
                raise Refused(f"{path}: {name}.{key}", value, rule, "leave one of them out")
    older, newer = (plain.get(name) or {} for name in _OBJECTS)
    for key, value in newer.items() if older else ():
        names = _TYPES if key in _TYPES else (key,)
        said = any(name in older for name in names) or value == plain.get(key)
        if not said and value is not None:
            rule = (
                "is not in rope_scaling, and transformers reads that one alone where both are there"
            )
            fix = f"say {key} there, too, or leave rope_scaling out"
            raise Refused(f"{path}: {_OBJECTS[1]}.{key}", value, rule, fix)
    return merged


def _complete(path: pathlib.Path, fields: dict[str, Any], plain: Mapping[str, Any]) -> None:
    """What follows from the number of positions where it is not given."""
    longest = plain.get("max_position_embeddings")
    said = (plain.get(_ORIGINAL), fields.get("original_seq_len"))
    original: Any = next((one for one in said if one is not None), longest)
    if isinstance(original, int) and original > MAX_SIZE:
        rule = f"must be at most {MAX_SIZE:,}"
        raise Refused(f"{path}: {_ORIGINAL}", original, rule, "download config.json again")
    fields["original_seq_len"] = original
    if "factor" not in fields and all(isinstance(n, int) and n > 0 for n in (longest, original)):
        fields["factor"] = longest / original


def _scale(
    path: pathlib.Path, plain: Mapping[str, Any], group: dict[str, Any], fields: dict[str, Any]
) -> None:
    """One scale of cosine and sine for short and long sequences."""
    scales = [group[name] for name in _MSCALES if group.get(name) is not None]
    if not scales:
        return
    if scales[0] != scales[-1] or "attention_factor" in fields:
        rule = "must be the same number as the other scales of cosine and sine"
        value = [group.get(name) for name in (*_MSCALES, "attention_factor")]
        raise Refused(f"{path}: {_name(plain)}.short_mscale", value, rule, "use another model")
    fields["attention_factor"] = scales[0]
