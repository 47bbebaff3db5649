"""A `Config` from a `ConfigDict`, to JSON and back, and the digest that names a run."""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import pathlib
import stat
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from moe_jax.config.fields import PARTS, Config, ModelConfig
from moe_jax.config.rules import validate
from moe_jax.errors import Refused

_MAX_BYTES = 2**24  # of a config.json, before it is read into memory


def from_config_dict(config_dict: Any) -> Config:
    """Builds and validates a `Config`.

    Args:
      config_dict: a `ConfigDict` or a plain nested mapping.

    Raises:
      Refused: naming the first field that is unknown, missing, of a wrong type, or out of rule.
    """
    if not isinstance(config_dict, Mapping) and not hasattr(config_dict, "to_dict"):
        raise Refused(
            "config",
            type(config_dict).__name__,
            "get_config(arg) must return a ConfigDict",
            "return ml_collections.ConfigDict(...) from the config file",
        )
    plain = config_dict.to_dict() if hasattr(config_dict, "to_dict") else config_dict
    config = _build(Config, plain, prefix="")
    validate(config)
    return config


def to_json(config: Config) -> str:
    """The form kept in a run's work directory as config.json."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> Config:
    """Inverse of `to_json`."""
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused("config.json", text[:40], f"must be JSON ({error})", "restore it") from None
    return from_config_dict(plain)


def read(path: pathlib.Path) -> Config:
    """The config in a run's config.json. Raises `Refused`."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_BYTES:
            rule = f"must be a file of at most {_MAX_BYTES} bytes"
            raise Refused("config.json", str(path), rule, "restore it")
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        rule = f"cannot be read ({error.strerror})"
        raise Refused("config.json", str(path), rule, "restore it") from None
    return from_json(text)


def digest(config: Config) -> str:
    """SHA-256 of `identity`."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()


def identity(config: Config) -> dict[str, Any]:
    """What makes two runs the same run: all but where and for how long it runs."""
    plain = dataclasses.asdict(config)
    for field in (
        *("mesh", "platform", "virtual_devices", "placement", "topology", "trace", "replan"),
    ):
        del plain[field]
    for field in (
        *("num_steps", "log_every", "checkpoint_every", "checkpoints_kept", "remat"),
        "pre_activations",
        *("checkpoints_kept_every", "checkpoints_kept_best", "failed_save"),
        *("checkpoints_verified", "hang_seconds", "hang_exit", "probe_every"),
    ):
        del plain["train"][field]
    for field in PARTS:
        if getattr(config.model, field) == getattr(ModelConfig, field):
            del plain["model"][field]
    del plain["data"]["read_threads"], plain["model"]["kernels"]
    if not config.data.tokenizer:
        del plain["data"]["tokenizer"]
    if not config.train.spike_sigma:
        del plain["train"]["spike_sigma"], plain["train"]["spike_window"]
    return plain


def complete(config_dict: Any) -> None:
    """Sets every field with a default that a `ConfigDict` leaves out, so that it can be overridden.

    Whole numbers given for real ones become real. What is wrong stays, for `from_config_dict`.
    """
    _complete(Config, config_dict)


def _complete(cls: type, group: Any) -> None:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            if field.name not in group and field.default is not dataclasses.MISSING:
                group[field.name] = type(group)()
            if isinstance(group.get(field.name), type(group)):
                _complete(typing.cast(type, hint), group[field.name])
        elif field.name not in group:
            if field.default is not dataclasses.MISSING:
                group[field.name] = field.default
        elif hint is float and type(group[field.name]) is int:
            with group.ignore_type(), contextlib.suppress(OverflowError):
                group[field.name] = float(group[field.name])


def unknown_field(
    lead: str, prefix: str, name: str, value: object, known: Iterable[str]
) -> Refused:
    """The refusal of a field there is not, with the nearest one of its group, or of another group.

    Args:
      lead: "--config." on the command line, "" in a file.
      prefix: the group, with its dot, or "".
      name: of the field.
      value: what it was to be.
      known: the names in that group.
    """
    elsewhere = {
        leaf.name: f"{group.name}.{leaf.name}"
        for group in dataclasses.fields(Config)
        if dataclasses.is_dataclass(group.type)
        for leaf in dataclasses.fields(group.type)
    }
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    far = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8)
    if far and (far[0] == name or not near):
        fix = f"did you mean {lead}{elsewhere[far[0]]}"
    elif near:
        fix = f"did you mean {lead}{prefix}{near[0]}"
    else:
        fix = f"known: {', '.join(known) or 'nothing below it'}"
    return Refused(f"{lead}{prefix}{name}", value, "is not a config field", fix)


def _build(cls: type, values: Any, prefix: str) -> Any:
    """One dataclass from one mapping, recursively; the checks that need no other field."""
    if not isinstance(values, Mapping):
        raise Refused(prefix or "config", values, "must be a group of fields", "see configs/")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise unknown_field("", prefix, str(name), values[name], fields)
    made = {}
    for name, field in fields.items():
        hint = hints[name]
        if name not in values:
            missing = dataclasses.MISSING
            if field.default is missing and field.default_factory is missing:
                raise Refused(f"{prefix}{name}", None, "is required", "set it in the config file")
            continue
        value = values[name]
        if dataclasses.is_dataclass(hint):
            made[name] = _build(typing.cast(type, hint), value, f"{prefix}{name}.")
        else:
            made[name] = _typed(hint, value, f"{prefix}{name}")
    return cls(**made)


def _typed(hint: Any, value: Any, field: str) -> Any:
    assert not isinstance(hint, types.UnionType), "config fields have one plain type"
    if typing.get_origin(hint) is tuple:
        of, _ = typing.get_args(hint)
        if not isinstance(value, list | tuple):
            raise Refused(
                field, value, "must be a list of numbers", f"write it as {[of(1), of(2)]}"
            )
        return tuple(_typed(of, number, f"{field}[{i}]") for i, number in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise Refused(field, value, "must be finite", "give a number") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise Refused(
            field,
            value,
            f"must be of type {hint.__name__}, not {type(value).__name__}",
            f"write it as {hint.__name__}",
        )
    if hint is float and not math.isfinite(value):
        raise Refused(field, value, "must be finite", "give a number")
    return value + 0.0 if hint is float else value  # -0.0 is 0.0, in the digest as well
