"""The rules as a file that a server can use: small JSON, whole or absent, checked on reading.

Axes: L MoE layers, E experts, M devices, F features.

`HomeRules` belongs to one plan (its digest). A server assigns a batch at once by `cost_SM`
(assign.in_batches), or single sequences by cost and price of the devices (assign.online). The cost:
- by name: mean + sum of the effects of the name's fields (`0:mmlu`, `1:physics`; split at / : |);
- by the identities of the first n tokens, a prompt: the mean over them of `costs` (token -> cost at
  each home; nothing for a token that is not in it), with the largest n it has;
- after a prefill of n tokens: mean + sum over layers and experts of (how often a token chose the
  expert) x weight, with the largest n it has.

Everything read is untrusted: sizes are measured, numbers finite, shapes those of the head, and the
digest is that of the contents.
"""

import dataclasses
import hashlib
import json
import math
import os
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.errors import Refused
from moe_jax.placement.formats import raw
from moe_jax.placement.homes.ridge import Linear
from moe_jax.placement.homes.rules import MOST_FIELDS, NameRule, PrefillRule, TokenRule
from moe_jax.placement.homes.tally import DISPATCHES

FORMAT = "moe_jax.homes"
VERSION = 2
MOST_RULES = 16
_KEYS = (
    "format",
    "version",
    "plan_digest",
    "num_devices",
    "num_layers",
    "num_experts",
    "dispatch",
    "provenance",
    "name",
    "tokens",
    "prefill",
    "digest",
)


@dataclasses.dataclass(frozen=True, eq=False)
class HomeRules:
    """Rules for the homes of one plan.

    Attributes:
      plan_digest: of the placement they hold for.
      num_devices, num_layers, num_experts: its sizes.
      dispatch: what the costs are rows of.
      name: by name, or None.
      tokens: by the identities of the first tokens, fewest first; all of one table.
      prefill: by the first tokens, fewest first.
      provenance: trace digest, seed and so on: plain JSON data.
    """

    plan_digest: str
    num_devices: int
    num_layers: int
    num_experts: int
    dispatch: str
    name: NameRule | None = None
    tokens: tuple[TokenRule, ...] = ()
    prefill: tuple[PrefillRule, ...] = ()
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of everything else in the file."""
        text = json.dumps(self._fields(), sort_keys=True, allow_nan=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, path: str | os.PathLike) -> None:
        """Writes JSON whole or not at all."""
        fields = {**self._fields(), "digest": self.digest}
        lines = [f' "{key}": {json.dumps(fields[key], allow_nan=False)}' for key in _KEYS]
        with files.atomic_write(path, "w") as file:
            file.write("{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def read(cls, path: str | os.PathLike) -> "HomeRules":
        """Reads and checks; anything wrong is `Refused`."""
        fields = raw.json_object(raw.parse_json(raw.read_text(path), str(path)), str(path))
        if (fields.get("format"), fields.get("version")) != (FORMAT, VERSION):
            raise _refused("format", fields.get("format"), f"{FORMAT} version {VERSION} is read")
        _only(fields, _KEYS, "homes")
        rules = _rules(fields)
        if fields["digest"] != rules.digest:
            raise _refused("digest", fields["digest"], f"the contents have {rules.digest}")
        return rules

    def _fields(self) -> dict[str, Any]:
        name = None
        if self.name is not None:
            effects = dict(zip(self.name.words, self.name.linear.weight_FM.tolist(), strict=True))
            name = {"fields": self.name.fields, **_head(self.name), "effects": effects}
        tokens = None
        if self.tokens:  # of one table
            table = self.tokens[0]
            costs = zip(table.token_F.tolist(), table.cost_FM.tolist(), strict=True)
            tokens = {
                "prices": {str(rule.known): rule.price_M.tolist() for rule in self.tokens},
                "costs": {str(token): cost_M for token, cost_M in costs},
            }
        shape = (self.num_layers, self.num_experts, self.num_devices)
        prefill = [
            {
                "tokens": rule.first,
                **_head(rule),
                "weights": rule.linear.weight_FM.reshape(shape).tolist(),
            }
            for rule in self.prefill
        ]
        return {
            "format": FORMAT,
            "version": VERSION,
            "plan_digest": self.plan_digest,
            "num_devices": self.num_devices,
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "dispatch": self.dispatch,
            "provenance": self.provenance,
            "name": name,
            "tokens": tokens,
            "prefill": prefill,
        }


def _head(rule: NameRule | PrefillRule) -> dict[str, list[float]]:
    return {"mean": rule.linear.mean_M.tolist(), "price": rule.price_M.tolist()}


def _rules(fields: dict[str, Any]) -> HomeRules:
    sizes = [raw.whole_number(fields[k], k, 1) for k in ("num_devices", "num_layers")]
    devices, layers = sizes
    experts = raw.whole_number(fields["num_experts"], "num_experts", 1)
    if fields["dispatch"] not in DISPATCHES:
        raise _refused("dispatch", fields["dispatch"], f"one of {', '.join(DISPATCHES)}")
    plan_digest = fields["plan_digest"]
    if not isinstance(plan_digest, str) or len(plan_digest) != 64:
        raise _refused("plan_digest", plan_digest, "64 hexadecimal digits")
    name, prefill = fields["name"], fields["prefill"]
    if not isinstance(prefill, list) or len(prefill) > MOST_RULES:
        raise _refused("prefill", prefill, f"a list of at most {MOST_RULES} rules")
    read = tuple(
        _prefill_rule(rule, f"prefill[{at}]", layers, experts, devices)
        for at, rule in enumerate(prefill)
    )
    firsts = [rule.first for rule in read]
    if firsts != sorted(set(firsts)):
        raise _refused("prefill", firsts, "fewest tokens first, none twice")
    return HomeRules(
        plan_digest,
        devices,
        layers,
        experts,
        fields["dispatch"],
        None if name is None else _name_rule(name, devices),
        () if fields["tokens"] is None else _token_rules(fields["tokens"], devices),
        read,
        raw.json_object(fields["provenance"], "provenance"),
    )


def _name_rule(value: Any, devices: int) -> NameRule:
    fields = raw.json_object(value, "name")
    _only(fields, ("fields", "mean", "price", "effects"), "name")
    count = raw.whole_number(fields["fields"], "name fields", 1)
    if count > MOST_FIELDS:
        raise _refused("name fields", count, f"at most {MOST_FIELDS}")
    effects = raw.json_object(fields["effects"], "name effects")
    rows = [_numbers(row, f"effects {word[:40]!r}", (devices,)) for word, row in effects.items()]
    weight_FM = np.stack(rows) if rows else np.zeros((0, devices))
    mean_M, price_M = (_numbers(fields[k], f"name {k}", (devices,)) for k in ("mean", "price"))
    return NameRule(count, tuple(effects), Linear(mean_M, weight_FM), price_M)


def _token_rules(value: Any, devices: int) -> tuple[TokenRule, ...]:
    fields = raw.json_object(value, "tokens")
    _only(fields, ("prices", "costs"), "tokens")
    prices = _by_number(fields["prices"], "tokens prices", 1, devices)
    if not 1 <= len(prices) <= MOST_RULES:
        raise _refused("tokens prices", len(prices), f"from 1 to {MOST_RULES} rules")
    costs = _by_number(fields["costs"], "tokens costs", 0, devices)
    token_F = np.array(list(costs), np.int64)
    cost_FM = np.stack(list(costs.values())) if costs else np.zeros((0, devices))
    return tuple(TokenRule(known, token_F, cost_FM, price_M) for known, price_M in prices.items())


def _by_number(value: Any, where: str, least: int, devices: int) -> dict[int, np.ndarray]:
    """Numbers for every device by a whole number below 2**31, ascending."""
    found, before = {}, least - 1
    for key, numbers in raw.json_object(value, where).items():
        number = int(key) if key.isascii() and key.isdigit() and len(key) <= 10 else -1
        if str(number) != key or not before < number < 2**31:
            raise _refused(where, key[:40], f"whole numbers from {least}, ascending, none twice")
        found[number] = _numbers(numbers, f"{where} {key}", (devices,))
        before = number
    return found


def _prefill_rule(value: Any, where: str, layers: int, experts: int, devices: int) -> PrefillRule:
    fields = raw.json_object(value, where)
    _only(fields, ("tokens", "mean", "price", "weights"), where)
    first = raw.whole_number(fields["tokens"], f"{where} tokens", 1)
    weights = _numbers(fields["weights"], f"{where} weights", (layers, experts, devices))
    mean_M, price_M = (_numbers(fields[k], f"{where} {k}", (devices,)) for k in ("mean", "price"))
    linear = Linear(mean_M, weights.reshape(-1, devices))
    return PrefillRule(first, layers, experts, linear, price_M)


def _numbers(value: Any, field: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 of nested lists of exactly this shape; nothing is made before all lengths fit."""
    entries = [value]
    for size in shape:
        for entry in entries:
            if not isinstance(entry, list) or len(entry) != size:
                raise _refused(field, raw.shown(entry), f"numbers of shape {list(shape)}")
        entries = [inner for entry in entries for inner in entry]
    for entry in entries:
        if type(entry) not in (int, float) or abs(entry) > 1e15 or not math.isfinite(entry):
            raise _refused(field, raw.shown(entry), "finite numbers, below 1e15")
    return np.array(entries, np.float64).reshape(shape)


def _only(fields: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in fields:
        if key not in keys:
            raise _refused(f"{where} {key[:40]}", raw.shown(fields[key]), "no such field")
    for key in keys:
        if key not in fields:
            raise _refused(f"{where} {key}", None, "this field is needed")


def _refused(field: str, value: Any, rule: str) -> Refused:
    return Refused(field, raw.shown(value), rule, "Write the file again with `homes --out`")
