"""config.json of a published model -> `Config`; what is not supported is named, never ignored."""

import dataclasses
import difflib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from moe_jax import config as config_lib
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.hf import folder as folder_lib
from moe_jax.hf import fp8, rope_json, window_json
from moe_jax.hf.families import COMMON, COMMON_ONLY, FAMILIES
from moe_jax.hf.tables import MAX_EXPERTS, REQUIRED, Family, Key

NAME, GENERATION = "config.json", "generation_config.json"
# Weights of 16 bits other than bfloat16 are computed with in float32, which holds them exactly.
_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32", None: "float32"}
# What else must be said of quantised weights, by `quant_method`.
_CODED: dict[str, dict[str, tuple[Any, ...]]] = {
    "fp8": {"weight_block_size": ([fp8.BLOCK, fp8.BLOCK],), "fmt": ("e4m3", None)}
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
      config: as we compute with it.
      family: the table of its family.
      ends: the tokens that end a text.
    """

    config: Config
    family: Family
    ends: tuple[int, ...] = ()


def read(folder: str | os.PathLike) -> Published:
    """Reads FOLDER/config.json; the mesh is one device.

    Raises:
      Refused: naming the key, its value, and what is supported.
    """
    path = pathlib.Path(folder) / NAME
    plain = folder_lib.json_object(path, "give the folder of a published model")
    model_type = plain.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
        fix = (
            f"did you mean {near[0]!r}" if near else "a family is a table in moe_jax/hf/families.py"
        )
        rule = f"must be one of {', '.join(map(repr, FAMILIES))}"
        raise Refused(f"{path}: model_type", model_type, rule, fix)
    family = FAMILIES[model_type]
    model = _model(path, plain, family)
    return Published(
        config_lib.from_config_dict(
            {
                "name": model_type,
                "model": model,
                # of held-out text, with room for what follows; this config is not trained with
                "data": {"seq_len": _sequence(model["max_seq_len"]), "global_batch": 1},
                "train": {"num_steps": 1, "eval_sequences": 1},
            }
        ),
        family,
        tuple(
            dict.fromkeys(
                (*_ends(path, plain, model["vocab_size"]), *ends(folder, model["vocab_size"]))
            )
        ),
    )


def _sequence(max_seq_len: Any) -> Any:
    """Tokens of a held-out sequence; nonsense is left to the rules of the config."""
    return min(1024, max(1, max_seq_len // 2)) if isinstance(max_seq_len, int) else max_seq_len


def ends(folder: str | os.PathLike, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a text by FOLDER/generation_config.json, in its order; () without it.

    Chat models often name there the end of a turn beside the end of a text, which config.json has.

    Raises:
      Refused: a file that is no JSON object, or tokens that are none of the vocabulary.
    """
    path = pathlib.Path(folder) / GENERATION
    if not path.is_file():
        return ()
    return _ends(path, folder_lib.json_object(path, "download it again"), vocab_size)


def _ends(path: pathlib.Path, plain: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    found = plain.get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and 0 <= token < vocab_size for token in ends):
        rule = f"must be tokens of the vocabulary, 0 to {vocab_size - 1}"
        raise Refused(f"{path}: eos_token_id", found, rule, "correct it, or leave it out")
    return tuple(ends)


def _model(path: pathlib.Path, plain: dict[str, Any], family: Family) -> dict[str, Any]:
    """The fields of `ModelConfig`."""
    for key, values, what in (*COMMON_ONLY, *family.only):
        if key in plain and plain[key] not in values:
            supported = " or ".join(map(repr, values))
            rule = f"asks for {what}, which is not supported here: must be {supported}"
            raise Refused(f"{path}: {key}", plain[key], rule, "use another model of this family")
    model: dict[str, Any] = {}
    for asked in (*COMMON, *family.keys):
        if asked.field in family.fixed:
            continue
        group, _, field = asked.field.rpartition(".")
        fields = model.setdefault(group, {}) if group else model
        fields[field] = 0 if asked.needs and not model[asked.needs] else _value(path, plain, asked)
    model |= family.fixed
    _check_experts(path, model["num_layers"], model["num_experts"])
    all_heads, share = model["num_heads"], _share(model["d_model"], model["num_heads"])
    fewer = family.num_kv_heads or all_heads
    heads = Key("num_kv_heads", ("num_key_value_heads",), fewer, null=all_heads)
    model["num_kv_heads"] = _value(path, plain, heads)
    width = Key("d_head", ("head_dim",), family.d_head or share, null=share)
    model.setdefault("d_head", _value(path, plain, width))
    turned = rope_json.read(path, plain, family.rope_theta, family.rope)
    model["rope_theta"] = turned.theta
    model["rope"] = turned.fields | model.get("rope", {})
    if family.windows is not None:
        model["windows"] = window_json.read(path, plain, family.windows, model["num_layers"])
    dtype = plain.get("torch_dtype") if plain.get("dtype") is None else plain["dtype"]
    if _code(path, plain, family) and dtype is None:
        dtype = "bfloat16"  # which holds what 4 bits and a scale say
    if not isinstance(dtype, str | None) or dtype not in _DTYPES:
        known = ", ".join(repr(name) for name in _DTYPES if name)
        raise Refused(f"{path}: dtype", dtype, f"must be one of {known}", "convert the checkpoint")
    return model | {"dtype": _DTYPES[dtype]}


def _check_experts(path: pathlib.Path, layers: Any, experts: Any) -> None:
    """Of all layers together; nonsense is left to the rules of the config."""
    numbers = all(isinstance(number, int) and number > 0 for number in (layers, experts))
    if numbers and layers * experts > MAX_EXPERTS:
        rule = f"must be at most {MAX_EXPERTS:,} experts in all layers"
        fix = "download config.json again"
        raise Refused(f"{path}: layers x experts", f"{layers:,} x {experts:,}", rule, fix)


def _said(field: str, value: Any, says: Mapping[Any, Any]) -> Any:
    for known, said in says.items():
        if type(value) is type(known) and value == known:
            return said
    if True in says:
        raise Refused(field, value, "must be true or false", "correct it")
    known = ", ".join(map(repr, says))
    raise Refused(field, value, f"is not supported here: must be one of {known}", "use another")


def _code(path: pathlib.Path, plain: dict[str, Any], family: Family) -> str:
    """How weights are quantised; "" = they are not."""
    said = plain.get("quantization_config")
    if said is None:
        return ""
    method = said.get("quant_method") if isinstance(said, dict) else said
    if method not in family.codes:
        known = ", ".join(map(repr, family.codes)) or "none is read in this family"
        rule = f"asks for quantised weights that are not supported here: {known}"
        fix = "convert the checkpoint, or use another model of this family"
        raise Refused(f"{path}: quantization_config.quant_method", method, rule, fix)
    for key, values in _CODED.get(method, {}).items():
        if (value := said.get(key)) not in values:
            rule = f"is not how {method} weights are read: must be {values[0]!r}"
            fix = "convert the checkpoint, or use another model of this family"
            raise Refused(f"{path}: quantization_config.{key}", value, rule, fix)
    return method


def _share(whole: Any, parts: Any) -> int:
    """Width of a head; nonsense is left to the rules of the config."""
    numbers = isinstance(whole, int) and isinstance(parts, int) and parts > 0
    return whole // parts if numbers else 0


def _value(path: pathlib.Path, plain: dict[str, Any], key: Key) -> Any:
    for name in key.names:
        value = plain.get(name)
        if value is None:
            if name in plain and key.null is not None:
                return key.null
            continue
        if key.says is not None:
            return _said(f"{path}: {name}", value, key.says)
        _check_size(f"{path}: {name}", value, key.most)
        if not key.times:
            return value
        factor = plain.get(key.times)
        _check_size(f"{path}: {key.times}", factor, key.most)
        if not all(type(number) is int and number >= 0 for number in (value, factor)):
            rule = f"must be a number of parts, {key.times} = {factor!r} wide each"
            raise Refused(f"{path}: {name}", value, rule, "correct them")
        _check_size(f"{path}: {name} x {key.times}", value * factor, key.most)
        return value * factor
    if key.default is REQUIRED:
        rule = f"is required (it is model.{key.field})"
        raise Refused(f"{path}: {key.names[0]}", None, rule, "download config.json again")
    return key.default


def _check_size(field: str, value: Any, most: int) -> None:
    """A whole number that work may follow; any other value is left to the rules of the config."""
    if isinstance(value, int) and value > most:
        raise Refused(field, value, f"must be at most {most:,}", "download config.json again")
