"""What the table of a family is made of: rows of parameters, keys of config.json.

A row says in which tensor a parameter is, and how its dimensions are stored. Letters are those of
the parameter; a group of letters is one dimension of the tensor:

    query_DHQ   "DHQ"   q_proj.weight   "HQ D"     a torch Linear: [out, in], heads first
    gate_PDF    "DF"    gate_up_proj    "E 2F D"   all experts in one tensor; the first half of 2F
    gate_PDF    "DF"    gate_up_proj    "E D F2"   the same, even columns: gate and up take turns

Import, export and the account of all tensors read the same rows (layout.py).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

REQUIRED = object()
# What is believed of config.json before the tensors bear it out: rows are counted out over layers
# and experts, so their number must be one that costs nothing. Well above published models (61
# layers of 384 experts, say).
MAX_LAYERS, MAX_EXPERTS = 4096, 2**16  # experts of all layers together
MAX_SIZE = 2**24  # positions, say; published models have up to 10,485,760


@dataclasses.dataclass(frozen=True)
class Row:
    """Where a parameter is stored.

    Attributes:
      parameter: its path in the model, "blocks.attention.query_DHQ".
      axes: letters of its dimensions, without layer and physical expert.
      tensor: name in the checkpoint; {layer} and {expert} are numbers.
      stored: the tensor's dimensions, each a group of letters. "E" in front is the expert, "1" a
        dimension of size 1, "2F" two parts of F one after the other, "F2" two that take turns.
      part: which of the two parts.
      code: "" = numbers; "mxfp4" or "fp8": the tensor is two, see mxfp4.py and fp8.py.
    """

    parameter: str
    axes: str
    tensor: str
    stored: str
    part: int = 0
    code: str = ""


@dataclasses.dataclass(frozen=True)
class Key:
    """A field of `ModelConfig` and the key of config.json that says it.

    Attributes:
      field: its name; "latent.kv_rank" is a field of a group.
      names: keys, newest first; the first that is there counts.
      default: where none is there; `REQUIRED` = refused.
      says: the field's value for each value of the key, or None = the value itself.
      null: what an explicit null says, or None: as if it were not there.
      times: a key whose value it is multiplied with.
      needs: a field without which (it is 0) the key says nothing, and the field is 0.
      most: the largest whole number that is believed.
    """

    field: str
    names: tuple[str, ...]
    default: Any = REQUIRED
    says: Mapping[Any, Any] | None = None
    null: Any = None
    times: str = ""
    needs: str = ""
    most: int = MAX_SIZE


@dataclasses.dataclass(frozen=True)
class WindowKeys:
    """Which layers have the window `sliding_window` (window_json.py).

    Attributes:
      switch: a key that must be true for any to have it; "" = there is none.
      layer_types: whether the key `layer_types` may say it.
      has_window: (layer, config.json) -> whether it has, where `layer_types` does not say.
    """

    switch: str = ""
    layer_types: bool = False
    has_window: Callable[[int, Mapping[str, Any]], bool] = lambda layer, plain: True


@dataclasses.dataclass(frozen=True)
class Family:
    """A published architecture.

    Attributes:
      model_type: as in config.json.
      keys: beside `COMMON`.
      fixed: fields of `ModelConfig` that all its models have.
      only: keys that must have one of these values if they are there, and what they would ask for.
      layouts: rows of each way in which its checkpoints are written, the published one first.
      beside: how names of tensors start that belong to a part which is not run; {layers} is the
        number of layers.
      windows: where its layers may have windows; None = they have none.
      codes: of quantised weights that are read: `quant_method` in config.json.
      made: parameters that no tensor holds: whoever loads them says what they are.
      num_kv_heads: where config.json leaves them out; 0 = as many as heads, as null says.
      d_head: width of a head where config.json leaves it out; 0 = an even share, as null says.
      rope_theta: base of rotary positions where config.json has none.
      rope: what `rope_parameters` says where neither it nor `rope_scaling` is there.
    """

    model_type: str
    keys: tuple[Key, ...]
    fixed: Mapping[str, Any]
    only: tuple[tuple[str, tuple[Any, ...], str], ...]
    layouts: Mapping[str, tuple[Row, ...]]
    beside: tuple[str, ...] = ()
    windows: WindowKeys | None = None
    codes: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    num_kv_heads: int = 0
    d_head: int = 0
    rope_theta: float = 10_000.0
    rope: Mapping[str, Any] = dataclasses.field(default_factory=dict)
