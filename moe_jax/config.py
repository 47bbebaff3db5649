"""Configuration: one frozen, validated dataclass made once from a `ConfigDict`.

`from_config_dict` turns what a file in configs/ returns into a `Config`; it refuses unknown fields
(with the nearest known name), wrong types, and every combination that could not run, each as
`Refused(field, value, rule, fix)`, before any device work. Nothing else in the package reads a
`ConfigDict`; math never reads a config at all.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from moe_jax.errors import Refused

DISPATCHES = ("local", "gathered", "exchange", "hierarchical", "shuffled", "coherent")
INFERENCE_ONLY = ("coherent",)  # of them: not for training
COMBINES = ("exact", "partial", "reproducible")
WIRE_DTYPES = ("", "float8_e4m3fn")
OVERLAP_DEGREES = (1, 2, 4, 8)
DTYPES = ("float32", "bfloat16")
MESH_AXES = ("data", "fsdp", "node", "expert", "tensor")
ATTENTIONS = ("split", "replicated")
REMATS = ("none", "layer")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only MoE transformer (sizes in elements; letters as in the glossary)."""

    vocab_size: int  # V
    num_layers: int  # L
    d_model: int  # D
    num_heads: int  # H, query heads
    num_kv_heads: int  # key/value heads; divides num_heads (grouped-query attention)
    d_head: int
    d_ff: int  # F, width of one expert
    num_experts: int  # E
    top_k: int  # K
    max_seq_len: int  # the rotary range, in tokens
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    dtype: str = "float32"  # of activations; parameters and router are float32
    dispatch: str = "exchange"
    # Sums at home, bits free of the placement; "partial": fewest rows; "reproducible": both.
    combine: str = "exact"
    capacity_factor: float = 0.0  # of the mean load of an expert; 0 = nothing is dropped
    wire_dtype: str = ""  # of rows to the experts: "" = dtype, or "float8_e4m3fn"; gradients: dtype
    overlap_degree: int = 1  # chunks of tokens whose exchange and experts may overlap
    load_balance_coef: float = 0.01
    z_loss_coef: float = 0.001


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis.

    Tokens are split over data x fsdp x node x expert; experts over node x expert; parameters and
    optimizer state over fsdp; heads, the columns of an expert and the vocabulary over tensor.
    With `node` above 1, `expert` counts the devices of one node; a plan is for node x expert
    devices, node by node.
    """

    data: int = 1
    fsdp: int = 1
    node: int = 1
    expert: int = 1
    tensor: int = 1
    # Over node x expert, attention splits the batch ("split") or does the same work ("replicated").
    attention: str = "split"

    @property
    def expert_devices(self) -> int:
        """Devices that hold one copy of all experts together: those that a plan is for."""
        return self.node * self.expert

    @property
    def num_devices(self) -> int:
        return self.token_devices * self.tensor

    @property
    def token_devices(self) -> int:
        """Devices over which the tokens of a batch are split."""
        return self.data * self.fsdp * self.expert_devices

    def __str__(self) -> str:
        """As "data 2 x expert 4"; axes of size 1 are left out."""
        sizes = {name: getattr(self, name) for name in MESH_AXES}
        named = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        return " x ".join(named) or "data 1"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text as bytes, cut into windows; files are split into train and held-out by their name."""

    seq_len: int  # tokens a sequence, without the target of the last one
    global_batch: int  # sequences a step
    path: str = ""  # folder of text files; "" = the running Python's standard library
    max_bytes: int = 12_000_000  # stop reading after this many bytes of text
    held_out_fraction: float = 0.1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to a tenth of the peak."""

    learning_rate: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.98


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    num_steps: int
    log_every: int = 10
    eval_every: int = 50
    eval_sequences: int = 64
    checkpoint_every: int = 100
    checkpoints_kept: int = 3
    max_bad_steps: int = 5  # non-finite steps in a row before the run stops
    # "layer": the backward pass computes each layer again from its input, and gathers its weights
    # again; "none": everything is kept, the weights that `fsdp` gathered included.
    remat: str = "none"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
    name: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    platform: str = ""  # "cpu", "gpu", "tpu"; "" = what JAX finds
    virtual_devices: int = 0  # > 0: that many virtual CPU devices a process (platform "cpu" only)
    placement: str = ""  # plan file to train under; "" = contiguous


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
    except json.JSONDecodeError as error:
        raise Refused("config.json", text[:40], f"must be JSON ({error})", "restore it") from None
    return from_config_dict(plain)


def digest(config: Config) -> str:
    """SHA-256 of what makes two runs the same run: all but where and for how long it runs."""
    plain = dataclasses.asdict(config)
    for field in ("mesh", "platform", "virtual_devices", "placement"):
        del plain[field]
    for field in ("num_steps", "log_every", "checkpoint_every", "checkpoints_kept", "remat"):
        del plain["train"][field]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


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
            with group.ignore_type():
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
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise Refused(
            field,
            value,
            f"must be of type {hint.__name__}, not {type(value).__name__}",
            f"write it as {hint.__name__}",
        )
    if hint is float and not math.isfinite(value):
        raise Refused(field, value, "must be finite", "give a number")
    return value


def validate(config: Config) -> None:
    """Checks every rule that needs no devices and no files. Raises `Refused` at the first."""
    _validate_model(config.model)
    _validate_mesh(config)
    _validate_data(config)
    _validate_training(config)


def _positive(group: Any, prefix: str, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(group, name)
        if not value > 0:
            raise Refused(f"{prefix}.{name}", value, "must be above 0", "give a positive number")


def _one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        hint = f"did you mean {near[0]!r}" if near else "choose one of them"
        raise Refused(field, value, f"must be one of {', '.join(map(repr, known))}", hint)


def _validate_model(model: ModelConfig) -> None:
    _positive(
        model,
        "model",
        (
            *("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "d_head"),
            *("d_ff", "num_experts", "top_k", "max_seq_len", "rope_theta", "norm_eps"),
        ),
    )
    for name in ("load_balance_coef", "z_loss_coef"):
        if getattr(model, name) < 0:
            raise Refused(f"model.{name}", getattr(model, name), "must be at least 0", "use 0")
    if model.top_k > model.num_experts:
        raise Refused(
            "model.top_k",
            model.top_k,
            f"must be at most model.num_experts = {model.num_experts}",
            f"choose 1 to {model.num_experts}",
        )
    if model.num_heads % model.num_kv_heads:
        raise Refused(
            "model.num_kv_heads",
            model.num_kv_heads,
            f"must divide model.num_heads = {model.num_heads}",
            f"nearest: {_nearest_divisors(model.num_kv_heads, model.num_heads)}",
        )
    if model.d_head % 2:
        raise Refused(
            "model.d_head",
            model.d_head,
            "must be even: rotary embeddings turn pairs of values",
            f"use {model.d_head + 1}",
        )
    _one_of("model.dispatch", model.dispatch, DISPATCHES)
    _one_of("model.combine", model.combine, COMBINES)
    _one_of("model.dtype", model.dtype, DTYPES)
    _one_of("model.wire_dtype", model.wire_dtype, WIRE_DTYPES)
    for name in ("capacity_factor", "overlap_degree", "wire_dtype"):
        default = getattr(ModelConfig, name)
        if model.dispatch == "coherent" and getattr(model, name) != default:
            raise Refused(
                f"model.{name}",
                getattr(model, name),
                "is not made for coherent dispatch, where tokens do not come home",
                f"use {default!r}, or another dispatch",
            )
    if model.overlap_degree not in OVERLAP_DEGREES:
        nearest = min(OVERLAP_DEGREES, key=lambda degree: abs(degree - model.overlap_degree))
        raise Refused(
            "model.overlap_degree",
            model.overlap_degree,
            f"must be one of {', '.join(map(str, OVERLAP_DEGREES))}",
            f"nearest: {nearest}",
        )


# (mesh axis, what it splits besides tokens and experts)
_SPLIT_BY = (
    ("fsdp", "d_model"),
    *(("tensor", split) for split in ("num_heads", "num_kv_heads", "d_ff", "vocab_size")),
)


def _validate_mesh(config: Config) -> None:
    mesh, model = config.mesh, config.model
    _positive(mesh, "mesh", MESH_AXES)
    _one_of("mesh.attention", mesh.attention, ATTENTIONS)
    for axis, split in _SPLIT_BY:
        devices, value = getattr(mesh, axis), getattr(model, split)
        if value % devices:
            raise Refused(
                f"mesh.{axis}",
                devices,
                f"must divide model.{split} = {value}, which it splits",
                f"nearest: {_nearest_divisors(devices, value)}",
            )
    devices = mesh.expert_devices
    if model.num_experts % devices:
        what = "mesh.expert" if mesh.node == 1 else "mesh.node x mesh.expert"
        raise Refused(
            "model.num_experts",
            model.num_experts,
            f"must be divisible by {what} = {devices}",
            f"nearest: {what} {_nearest_divisors(devices, model.num_experts)}, or "
            f"num_experts {_nearest_multiples(model.num_experts, devices)}",
        )
    if model.dispatch == "local" and devices > 1:
        raise Refused(
            "model.dispatch",
            "local",
            f"keeps every expert on one device, but they are split over {devices} ({mesh})",
            "use 'exchange' or 'gathered', or mesh.expert = 1",
        )
    if model.dispatch == "shuffled":
        _validate_heads(model, devices)
    if model.dispatch in ("shuffled", "coherent"):
        for field, value, plain in (
            ("mesh.fsdp", mesh.fsdp, 1),
            ("mesh.tensor", mesh.tensor, 1),
            ("mesh.attention", mesh.attention, "split"),
            ("train.remat", config.train.remat, "none"),
        ):
            if value != plain and (field, model.dispatch) != ("train.remat", "coherent"):
                rule = f"is not there for model.dispatch = {model.dispatch!r}: its layers differ"
                raise Refused(field, value, rule, f"set {field} = {plain!r}")
    _one_of("platform", config.platform, ("", "cpu", "gpu", "tpu"))
    if config.virtual_devices < 0:
        raise Refused("virtual_devices", config.virtual_devices, "must be at least 0", "use 0")
    if config.virtual_devices and config.platform != "cpu":
        raise Refused(
            "virtual_devices",
            config.virtual_devices,
            "virtual devices exist on the CPU only",
            "set platform = 'cpu', or virtual_devices = 0",
        )


def _validate_heads(model: ModelConfig, devices: int) -> None:
    """`shuffled` splits attention by heads over the devices that share the experts."""
    rule = f"must be divisible by the {devices} devices that attention is split over (shuffled)"
    if model.num_heads % devices:
        nearest = _nearest_multiples(model.num_heads, devices)
        raise Refused("model.num_heads", model.num_heads, rule, f"nearest: {nearest}")
    if model.num_kv_heads % devices and devices % model.num_kv_heads:
        fix = f"nearest: {_nearest_multiples(model.num_kv_heads, devices)}, or a divisor"
        raise Refused("model.num_kv_heads", model.num_kv_heads, f"{rule}, or divide them", fix)


def with_dispatch(config: Config, dispatch: str) -> Config:
    """The config of a model that is served with another dispatch than it was trained with."""
    _one_of("--dispatch", dispatch, DISPATCHES)
    model = dataclasses.replace(config.model, dispatch=dispatch)
    config = dataclasses.replace(config, model=model)
    validate(config)
    return config


def check_trainable(config: Config) -> None:
    """Refuses a dispatch that has no backward pass."""
    if config.model.dispatch in INFERENCE_ONLY:
        raise Refused(
            "model.dispatch",
            config.model.dispatch,
            "serves only: its tokens attend wherever their experts left them, for which keys and "
            "values of all sequences are kept on every device, and nothing is differentiated",
            "train with 'exchange' and serve with infer.py "
            f"--dispatch={config.model.dispatch}: the parameters are the same",
        )


def check_devices(config: Config, num_devices: int) -> None:
    """Refuses a mesh that needs more devices than all processes have together."""
    needed = config.mesh.num_devices
    if needed > num_devices:
        raise Refused(
            "mesh",
            str(config.mesh),
            f"needs {needed} devices, but there are {num_devices}",
            f"choose axes whose product is at most {num_devices}, or more virtual_devices",
        )


def _validate_data(config: Config) -> None:
    data, model, mesh = config.data, config.model, config.mesh
    _positive(data, "data", ("seq_len", "global_batch", "max_bytes"))
    if data.seq_len > model.max_seq_len:
        raise Refused(
            "data.seq_len",
            data.seq_len,
            f"must be at most model.max_seq_len = {model.max_seq_len}, the rotary range",
            f"shorten it, or set model.max_seq_len = {data.seq_len}",
        )
    devices = mesh.token_devices
    for field, value in (
        ("data.global_batch", data.global_batch),
        ("train.eval_sequences", config.train.eval_sequences),
    ):
        if value % devices or value <= 0:
            raise Refused(
                field,
                value,
                f"must be a multiple of the {devices} devices that tokens are split over",
                f"nearest: {_nearest_multiples(value, devices)}",
            )
    if not 0 < data.held_out_fraction < 1:
        raise Refused(
            "data.held_out_fraction", data.held_out_fraction, "must lie in (0, 1)", "use 0.1"
        )
    if model.vocab_size < 256:
        raise Refused(
            "model.vocab_size",
            model.vocab_size,
            "must be at least 256: tokens are bytes",
            "use 256",
        )


def _validate_training(config: Config) -> None:
    train, optimizer = config.train, config.optimizer
    _positive(
        train,
        "train",
        (
            *("num_steps", "log_every", "eval_every", "eval_sequences"),
            *("checkpoint_every", "checkpoints_kept", "max_bad_steps"),
        ),
    )
    _one_of("train.remat", train.remat, REMATS)
    for field, seed in (("data.seed", config.data.seed), ("train.seed", train.seed)):
        if not 0 <= seed < 2**31:
            raise Refused(field, seed, "must lie in [0, 2^31)", "use 0")
    _positive(optimizer, "optimizer", ("learning_rate", "clip_norm"))
    for name in ("b1", "b2"):
        if not 0 <= getattr(optimizer, name) < 1:
            raise Refused(
                f"optimizer.{name}", getattr(optimizer, name), "must lie in [0, 1)", "use 0.9"
            )
    for name in ("warmup_steps", "weight_decay"):
        if getattr(optimizer, name) < 0:
            raise Refused(
                f"optimizer.{name}", getattr(optimizer, name), "must be at least 0", "use 0"
            )


def _nearest_divisors(value: int, of: int) -> str:
    divisors = [n for n in range(1, of + 1) if of % n == 0]
    below = [n for n in divisors if n <= value][-1:]
    above = [n for n in divisors if n > value][:1]
    return " or ".join(map(str, below + above))


def _nearest_multiples(value: int, of: int) -> str:
    below = value // of * of
    return " or ".join(str(n) for n in (below, below + of) if n > 0)
