"""What must hold for rotary positions."""

import difflib
from typing import Any

from moe_jax.config.fields import ROPES, RopeConfig
from moe_jax.errors import Refused

_STRETCHED = ("factor", "original_seq_len")
# Fields that each kind reads: those that must be above 0, and the others.
_POSITIVE = {
    "plain": (),
    "linear": ("factor",),
    "yarn": (*_STRETCHED, "beta_fast", "beta_slow"),
    "llama3": (*_STRETCHED, "low_freq_factor", "high_freq_factor"),
    "longrope": _STRETCHED,
}
_OTHERS = {
    "yarn": ("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "short_factor", "long_factor"),
}


def reads(kind: str) -> tuple[str, ...]:
    """The fields of `RopeConfig` that mean something in one of `ROPES`."""
    return ("kind", "interleaved", *_POSITIVE[kind], *_OTHERS.get(kind, ()))


def validate(rope: RopeConfig, width: int) -> None:
    """Raises `Refused` at the first rule that does not hold.

    Args:
      width: values of a head that are turned.
    """
    if rope.kind not in ROPES:
        near = difflib.get_close_matches(rope.kind, ROPES, n=1)
        rule = f"must be one of {', '.join(map(repr, ROPES))}"
        fix = f"did you mean {near[0]!r}" if near else "choose one of them"
        raise Refused("model.rope.kind", rope.kind, rule, fix)
    positive, read = _POSITIVE[rope.kind], reads(rope.kind)
    for name in RopeConfig.__dataclass_fields__:
        value = getattr(rope, name)
        if name not in read and value != getattr(RopeConfig, name):
            _refuse(name, value, f"is nothing that kind {rope.kind!r} reads", "leave it out")
    for name in positive:
        if not getattr(rope, name) > 0:
            _refuse(name, getattr(rope, name), "must be above 0", "give a positive number")
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        if getattr(rope, name) < 0:
            _refuse(name, getattr(rope, name), "must be at least 0", "use 0")
    if rope.factor < 1:
        _refuse("factor", rope.factor, "must be at least 1", "use 1.0, which changes nothing")
    if rope.kind == "longrope" and rope.original_seq_len < 2:
        _refuse("original_seq_len", rope.original_seq_len, "must be at least 2", "correct it")
    if rope.beta_fast < rope.beta_slow:
        rule = f"must be at least model.rope.beta_slow = {rope.beta_slow}"
        _refuse("beta_fast", rope.beta_fast, rule, "exchange them")
    if rope.high_freq_factor <= rope.low_freq_factor:
        rule = f"must be above model.rope.low_freq_factor = {rope.low_freq_factor}"
        _refuse("high_freq_factor", rope.high_freq_factor, rule, "exchange them")
    for name in ("short_factor", "long_factor"):
        factors = getattr(rope, name)
        if rope.kind == "longrope" and len(factors) != width // 2:
            rule = f"must have a number for each of {width // 2} frequencies"
            _refuse(name, f"{len(factors)} numbers", rule, "take the published list")
        if not all(number > 0 for number in factors):
            _refuse(name, min(factors), "must be above 0", "take the published list")


def _refuse(name: str, value: Any, rule: str, fix: str) -> None:
    raise Refused(f"model.rope.{name}", value, rule, fix)
