"""What must hold between the fields of a config, each rule with the nearest values that keep it."""

import difflib
import math
import operator
from typing import Any

from moe_jax.config import layer_rules, rope_rules
from moe_jax.config.fields import (
    ACTIVATIONS,
    ATTENTION_BIASES,
    ATTENTIONS,
    AUTO,
    COMBINES,
    DISPATCHES,
    DTYPES,
    FAILED_SAVES,
    GROUP_SCORES,
    INFERENCE_ONLY,
    KERNELS,
    MESH_AXES,
    NORMS,
    OVERLAP_DEGREES,
    PRE_ACTIVATIONS,
    QK_NORMS,
    REMATS,
    ROUTER_SCORES,
    ROUTER_WEIGHTS,
    WIRE_DTYPES,
    Config,
    ModelConfig,
)
from moe_jax.errors import Refused


def validate(config: Config) -> None:
    """Checks every rule that needs no devices and no files. Raises `Refused` at the first."""
    _validate_model(config.model)
    layer_rules.validate(config.model)
    rope_rules.validate(config.model.rope, config.model.d_rotated)
    _validate_mesh(config)
    _validate_data(config)
    _validate_training(config)
    _validate_replanning(config)


def _positive(group: Any, prefix: str, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(group, name)
        if not value > 0:
            raise Refused(f"{prefix}.{name}", value, "must be above 0", "give a positive number")


def _at_most(group: Any, prefix: str, limits: dict[str, float]) -> None:
    for name, limit in limits.items():
        value = getattr(group, name)
        if value > limit:
            rule = f"must be at most {limit:,}"
            raise Refused(f"{prefix}.{name}", value, rule, "give a smaller number")


def one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    """Refuses what is not known, with what is nearest to it."""
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
    for name in ("load_balance_coef", "z_loss_coef", "d_ff_shared"):
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
    if model.d_rotated % 2:
        raise Refused(
            "model.latent.d_rope" if model.latent.kv_rank else "model.d_head",
            model.d_rotated,
            "must be even: rotary embeddings turn pairs of values",
            f"use {model.d_rotated + 1}",
        )
    one_of("model.dispatch", model.dispatch, (*DISPATCHES, AUTO))
    one_of("model.combine", model.combine, COMBINES)
    one_of("model.dtype", model.dtype, DTYPES)
    one_of("model.wire_dtype", model.wire_dtype, WIRE_DTYPES)
    one_of("model.kernels", model.kernels, KERNELS)
    if model.kernels == "pallas_gpu" and model.dtype == "float32":
        rule = "computes in 16 bits, and model.dtype = 'float32'"
        raise Refused("model.kernels", model.kernels, rule, "set model.dtype = 'bfloat16'")
    one_of("model.router_weights", model.router_weights, ROUTER_WEIGHTS)
    one_of("model.router_scores", model.router_scores, ROUTER_SCORES)
    one_of("model.router_group_scores", model.router_group_scores, GROUP_SCORES)
    _validate_groups(model)
    if model.router_weights == "sparse_mixer":
        for name in ("router_scores", "router_group_scores", "router_correction"):
            if (value := getattr(model, name)) != getattr(ModelConfig, name):
                rule = "does not go with model.router_weights = 'sparse_mixer'"
                raise Refused(f"model.{name}", value, rule, "leave it out")
    one_of("model.norm", model.norm, NORMS)
    one_of("model.qk_norm", model.qk_norm, QK_NORMS)
    one_of("model.attention_bias", model.attention_bias, ATTENTION_BIASES)
    if model.shared_gate and not model.d_ff_shared:
        raise Refused(
            "model.shared_gate",
            True,
            "weighs the output of a shared expert, and model.d_ff_shared = 0: there is none",
            "set model.d_ff_shared to its width, or model.shared_gate = False",
        )
    one_of("model.activation", model.activation, ACTIVATIONS)
    if model.activation != "swiglu" and model.d_ff_shared:
        rule = (
            "is that of routed experts, and model.d_ff_shared is a shared one, which has 'swiglu'"
        )
        raise Refused("model.activation", model.activation, rule, "use 'swiglu'")
    _validate_windows(model)
    for name in ("capacity_factor", "overlap_degree", "wire_dtype"):
        default = getattr(ModelConfig, name)
        if model.dispatch == "coherent" and getattr(model, name) != default:
            raise Refused(
                f"model.{name}",
                getattr(model, name),
                "is not made for coherent dispatch, where tokens do not come home",
                f"use {default!r}, or another dispatch",
            )
    if model.dispatch == "shuffled" and model.capacity_factor:
        raise Refused(
            "model.capacity_factor",
            model.capacity_factor,
            "is not made for shuffled dispatch: who comes too late would depend on where experts "
            "live",
            "use 0.0, or another dispatch",
        )
    if model.overlap_degree not in OVERLAP_DEGREES:
        nearest = min(OVERLAP_DEGREES, key=lambda degree: abs(degree - model.overlap_degree))
        raise Refused(
            "model.overlap_degree",
            model.overlap_degree,
            f"must be one of {', '.join(map(str, OVERLAP_DEGREES))}",
            f"nearest: {nearest}",
        )


def _validate_groups(model: ModelConfig) -> None:
    """Of experts, that routing chooses among."""
    names = ("router_scale", "router_groups", "router_top_groups")
    _positive(model, "model", names)
    groups, best = model.router_groups, model.router_top_groups
    if not model.router_group_scores:
        for name in names[1:]:
            if (value := getattr(model, name)) != 1:
                rule = "needs model.router_group_scores: without it tokens choose among all experts"
                raise Refused(f"model.{name}", value, rule, "set it to 'max' or 'top2', or use 1")
        return
    if model.num_experts % groups:
        rule = f"must divide model.num_experts = {model.num_experts}"
        nearest = _nearest_divisors(groups, model.num_experts)
        raise Refused("model.router_groups", groups, rule, f"nearest: {nearest}")
    each = model.num_experts // groups
    if best > groups:
        rule = f"must be at most model.router_groups = {groups}"
        raise Refused("model.router_top_groups", best, rule, f"choose 1 to {groups}")
    if model.top_k > best * each:
        rule = f"must be at most the {best} x {each} experts of a token's groups"
        raise Refused("model.top_k", model.top_k, rule, "raise model.router_top_groups")
    if model.router_group_scores == "top2" and each < 2:
        rule = "must leave 2 experts or more in a group: its score is the sum of the best two"
        raise Refused("model.router_groups", groups, rule, f"use {model.num_experts // 2} at most")


def _validate_windows(model: ModelConfig) -> None:
    for layer, window in enumerate(model.windows):
        if window < 0:
            rule = "must be at least 0"
            raise Refused(f"model.windows[{layer}]", window, rule, "use 0 where there is none")
    if model.windows and model.num_layers % len(model.windows):
        raise Refused(
            "model.windows",
            list(model.windows),
            f"must have a number of entries that divides model.num_layers = {model.num_layers}",
            "write one for each layer",
        )


# (mesh axis, what it splits besides tokens and experts)
_SPLIT_BY = (
    *(("fsdp", split) for split in ("d_model", "latent.kv_rank", "latent.query_rank")),
    *(
        ("tensor", split)
        for split in (
            *("num_heads", "num_kv_heads", "d_ff", "vocab_size", "d_ff_shared", "d_ff_dense"),
        )
    ),
)


def _validate_mesh(config: Config) -> None:
    mesh, model = config.mesh, config.model
    _positive(mesh, "mesh", MESH_AXES)
    one_of("mesh.attention", mesh.attention, ATTENTIONS)
    for axis, split in _SPLIT_BY:
        devices, value = getattr(mesh, axis), operator.attrgetter(split)(model)
        if value % devices:
            raise Refused(
                f"mesh.{axis}",
                devices,
                f"must divide model.{split} = {value}, which it splits",
                f"nearest: {_nearest_divisors(devices, value)}",
            )
    devices = mesh.expert_devices
    if devices > 1 and not model.num_moe_layers:
        rule = f"splits experts ({mesh}), and all layers are dense: there are none"
        raise Refused("mesh.expert", devices, rule, "use mesh.data or mesh.fsdp")
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
        _validate_heads(model, devices * mesh.tensor)
    if model.dispatch == "coherent" and mesh.tensor > 1 and model.qk_norm == "all":
        raise Refused(
            "mesh.tensor",
            mesh.tensor,
            "splits heads, and the norm of model.qk_norm = 'all' is over all of them, which is not "
            "there for model.dispatch = 'coherent'",
            "set mesh.tensor = 1, or use another dispatch",
        )
    if model.dispatch in ("shuffled", "coherent") and mesh.attention != "split":
        rule = f"is not there for model.dispatch = {model.dispatch!r}: its layers differ"
        raise Refused("mesh.attention", mesh.attention, rule, "set mesh.attention = 'split'")
    one_of("platform", config.platform, ("", "cpu", "gpu", "tpu"))
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


def check_trainable(config: Config) -> None:
    """Refuses what has no backward pass."""
    if config.model.router_weights == "sparse_mixer":
        raise Refused(
            "model.router_weights",
            "sparse_mixer",
            "serves only: its training samples experts and estimates their gradients another way "
            "(arXiv 2409.12136), which is not here",
            "train with 'normalised' or 'softmax'",
        )
    if config.model.dispatch in INFERENCE_ONLY:
        raise Refused(
            "model.dispatch",
            config.model.dispatch,
            "serves only: its tokens attend wherever their experts left them, for which keys and "
            "values of all sequences are kept on every device, and nothing is differentiated",
            "train with 'exchange' and serve with infer.py "
            f"--dispatch={config.model.dispatch}: the parameters are the same",
        )


def check_seed(field: str, seed: int) -> None:
    """Refuses what not every generator takes; `field` names it in the message."""
    if not 0 <= seed < 2**31:
        raise Refused(field, seed, "must lie in [0, 2^31)", "use 0")


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
    _positive(data, "data", ("seq_len", "global_batch", "max_bytes", "read_threads"))
    _at_most(data, "data", {"read_threads": 256})
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
    if model.vocab_size < 256 and not data.tokenizer:
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
            *("checkpoint_every", "checkpoints_kept", "max_bad_steps", "spike_window"),
        ),
    )
    _at_most(train, "train", {"num_steps": 2**31 - 1, "spike_window": 1_000_000})
    for name in (
        *("checkpoints_kept_every", "checkpoints_kept_best", "spike_sigma", "hang_seconds"),
        "probe_every",
    ):
        if getattr(train, name) < 0:
            raise Refused(f"train.{name}", getattr(train, name), "must be at least 0", "use 0")
    one_of("train.remat", train.remat, REMATS)
    one_of("train.pre_activations", train.pre_activations, PRE_ACTIVATIONS)
    if (train.pre_activations, train.remat) == ("store", "layer"):
        rule = "is computed again with its layer: train.remat = 'layer'"
        fix = "set train.remat = 'none', or train.pre_activations = 'recompute'"
        raise Refused("train.pre_activations", "store", rule, fix)
    one_of("train.failed_save", train.failed_save, FAILED_SAVES)
    for field, seed in (("data.seed", config.data.seed), ("train.seed", train.seed)):
        check_seed(field, seed)
    _positive(optimizer, "optimizer", ("learning_rate", "clip_norm"))
    # Beyond, parameters may stop to be finite in a step whose loss and gradients are.
    _at_most(optimizer, "optimizer", {"learning_rate": 1_000, "weight_decay": 1_000})
    for name in ("b1", "b2"):
        value = getattr(optimizer, name)
        # From there on it is 1 in 32 bits, and the optimizer divides by what is left of 1.
        if not 0 <= value < 1 - 2**-25:
            rule = "must lie in [0, 1), in 32 bits, too"
            raise Refused(f"optimizer.{name}", value, rule, "use 0.9")
    for name in ("warmup_steps", "weight_decay"):
        if getattr(optimizer, name) < 0:
            raise Refused(
                f"optimizer.{name}", getattr(optimizer, name), "must be at least 0", "use 0"
            )


def _validate_replanning(config: Config) -> None:
    replan = config.replan
    for name in ("every", "seconds", "min_gain"):
        if getattr(replan, name) < 0:
            raise Refused(f"replan.{name}", getattr(replan, name), "must be at least 0", "use 0")
    if replan.min_gain >= 1:
        rule = "is a share of a layer's time, below 1"
        raise Refused("replan.min_gain", replan.min_gain, rule, "use 0.02 for 2 %")
    if replan.record_steps < 4:
        rule = "must be at least 4: two steps plan and two judge"
        raise Refused("replan.record_steps", replan.record_steps, rule, "use 8")
    if not replan.every:
        if replan.pins:
            rule = "pins bind plans that are made while the model trains, and none is made"
            raise Refused("replan.pins", replan.pins, rule, "set replan.every, or leave it out")
        return
    if not config.model.num_moe_layers:
        rule = "moves experts, and all layers are dense: there are none"
        raise Refused("replan.every", replan.every, rule, "use 0")
    if replan.every < replan.record_steps:
        raise Refused(
            "replan.every",
            replan.every,
            f"must be at least replan.record_steps = {replan.record_steps}",
            f"use {replan.record_steps} or more; 0 = never",
        )
    if config.model.dispatch == "shuffled" or config.mesh.expert_devices == 1:
        one = config.mesh.expert_devices == 1
        why = "experts are on one device"
        if not one:
            why = "gradients follow the rows in shuffled dispatch, so a new plan changes the curve"
        raise Refused("replan.every", replan.every, f"must be 0 here: {why}", "use 0")


def _nearest_divisors(value: int, of: int) -> str:
    # Exact below 10^12; of a larger number, the divisors with a factor that is soon found.
    small = [n for n in range(1, min(math.isqrt(of), 10**6) + 1) if of % n == 0]
    divisors = sorted({*small, *(of // n for n in small)})
    below = [n for n in divisors if n <= value][-1:]
    above = [n for n in divisors if n > value][:1]
    return " or ".join(map(str, below + above))


def _nearest_multiples(value: int, of: int) -> str:
    below = value // of * of
    return " or ".join(str(n) for n in (below, below + of) if n > 0)
