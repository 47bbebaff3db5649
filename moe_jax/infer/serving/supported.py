"""Models and meshes that the serving engine takes; all others are refused by name."""

import dataclasses

from jax.sharding import Mesh

from moe_jax import mesh as mesh_lib
from moe_jax.config import Config, ModelConfig
from moe_jax.errors import Refused
from moe_jax.infer.serving import paged, sizes
from moe_jax.infer.serving.scheduler import Limits

DISPATCHES = ("local", "gathered", "exchange", "hierarchical")
# What program.py and paged.py compute with, or need not know of. A field that is not here may be
# only what it is by default: a part of a model that nobody thought of is not left out silently.
KNOWN = {
    *("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "d_head", "d_ff"),
    *("num_experts", "top_k", "max_seq_len", "rope_theta", "norm_eps", "dtype", "dispatch"),
    *("combine", "wire_dtype", "overlap_degree", "load_balance_coef", "z_loss_coef"),
    *("router_weights", "qk_norm", "attention_bias", "tied_output", "d_ff_shared", "shared_gate"),
    *("rope", "router_scores", "router_scale", "router_groups", "router_top_groups"),
    *("router_group_scores", "router_correction", "router_bias", "expert_bias", "activation"),
    *("windows", "attention_sinks", "latent", "num_dense_layers", "d_ff_dense"),
    *("embedding_scale", "residual_scale", "attention_scale", "logits_divisor", "norm"),
    "output_bias",
}


def check_dispatch(config: Config) -> None:
    """Refuses a dispatch that the engine cannot serve."""
    if config.model.dispatch not in DISPATCHES:
        raise Refused(
            "model.dispatch",
            config.model.dispatch,
            "is not served with requests that come and go: "
            "its tokens, or the heads of its attention, do not stay with their request",
            f"use --dispatch={DISPATCHES[2]} (one of {', '.join(DISPATCHES)})",
        )


def check_model(config: Config) -> None:
    """Refuses models that the engine cannot serve, before any device work."""
    check_dispatch(config)
    model = config.model
    if model.capacity_factor:
        raise Refused(
            "model.capacity_factor",
            model.capacity_factor,
            "must be 0: what is dropped would depend on who else is in the batch",
            "serve a run with capacity_factor = 0",
        )
    for field in dataclasses.fields(ModelConfig):
        value = getattr(model, field.name)
        if field.name not in KNOWN and field.name != "capacity_factor" and value != field.default:
            raise Refused(
                f"model.{field.name}",
                value,
                "is not served yet: the cache in blocks does not know it",
                "answer with infer.py --prompt instead",
            )


def check_context(model: ModelConfig, context: int) -> None:
    """Refuses texts that are longer than the model's."""
    if context > model.max_seq_len:
        rule = f"must be at most model.max_seq_len = {model.max_seq_len}, the rotary range"
        raise Refused("--context", context, rule, f"use {model.max_seq_len}")


def check(config: Config, mesh: Mesh, limits: Limits) -> None:
    """Refuses what the engine cannot serve, before anything is compiled."""
    check_model(config)
    model = config.model
    check_context(model, limits.max_len)
    if limits.long_from != (known := sizes.long_from(model)):
        rule = f"must be {known}, where the model's long factors begin"
        raise Refused("long_from", limits.long_from, rule, "see sizes.py")
    if limits.shards != mesh_lib.size(mesh, mesh_lib.BATCH):
        raise Refused("shards", limits.shards, "must be the devices of tokens", "see sizes.py")
    if limits.block_size < paged.LEAST_BLOCK or paged.TILE % limits.block_size:
        rule = f"must be at least {paged.LEAST_BLOCK} and divide {paged.TILE}"
        raise Refused("block_size", limits.block_size, rule, "use 16")
