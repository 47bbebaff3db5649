"""What must hold for latent attention, dense layers, norms and multipliers."""

from moe_jax.config.fields import LatentConfig, ModelConfig
from moe_jax.errors import Refused


def validate(model: ModelConfig) -> None:
    """Raises `Refused` at the first rule that does not hold."""
    if model.latent.kv_rank:
        _validate_latent(model)
    else:
        for name in LatentConfig.__dataclass_fields__:
            if value := getattr(model.latent, name):
                rule = "is of latent attention, and model.latent.kv_rank = 0: there is none"
                raise Refused(f"model.latent.{name}", value, rule, "set kv_rank, or use 0")
    if not 0 <= model.num_dense_layers <= model.num_layers:
        rule = f"must be at most model.num_layers = {model.num_layers}"
        fix = f"choose 0 to {model.num_layers}"
        raise Refused("model.num_dense_layers", model.num_dense_layers, rule, fix)
    if not model.num_moe_layers:
        _validate_dense(model)
    if (model.d_ff_dense > 0) != (model.num_dense_layers > 0) or model.d_ff_dense < 0:
        rule = f"is the width of model.num_dense_layers = {model.num_dense_layers} dense layers"
        raise Refused("model.d_ff_dense", model.d_ff_dense, rule, "set both, or none")
    if not model.num_moe_layers and model.dispatch in ("shuffled", "coherent"):
        rule = "puts tokens where their experts are, and no layer has any (model.num_dense_layers)"
        raise Refused("model.dispatch", model.dispatch, rule, "use 'local' or 'gathered'")
    for name in ("embedding_scale", "residual_scale", "logits_divisor"):
        if not (value := getattr(model, name)) > 0:
            raise Refused(f"model.{name}", value, "must be above 0", "use 1 where there is none")
    if model.attention_scale < 0:
        rule = "must be at least 0"
        raise Refused("model.attention_scale", model.attention_scale, rule, "use 0 for 1/sqrt(Q)")
    if model.norm != "rms" and model.num_dense_layers:
        rule = "is not there in dense layers (model.num_dense_layers)"
        raise Refused("model.norm", model.norm, rule, "use 'rms'")


def _validate_dense(model: ModelConfig) -> None:
    """Of a model without MoE layers; what is of experts says nothing, and may say nothing else."""
    for name in ("num_experts", "top_k"):
        if (value := getattr(model, name)) != 1:
            rule = "must be 1 where all layers are dense (model.num_dense_layers): none has experts"
            raise Refused(f"model.{name}", value, rule, "use 1, or fewer dense layers")
    if model.d_ff != model.d_ff_dense:
        rule = f"must be model.d_ff_dense = {model.d_ff_dense} where all layers are dense"
        raise Refused("model.d_ff", model.d_ff, rule, f"use {model.d_ff_dense}")


def _validate_latent(model: ModelConfig) -> None:
    latent = model.latent
    for name in ("kv_rank", "d_rope", "d_value"):
        if getattr(latent, name) <= 0:
            rule = "must be above 0 in latent attention"
            raise Refused(f"model.latent.{name}", getattr(latent, name), rule, "correct it")
    if latent.query_rank < 0:
        rule = "must be at least 0"
        raise Refused("model.latent.query_rank", latent.query_rank, rule, "use 0 for none")
    if model.num_kv_heads != model.num_heads:
        rule = "has a key and a value for each head: must be model.num_heads"
        fix = f"set it to {model.num_heads}"
        raise Refused("model.num_kv_heads", model.num_kv_heads, f"latent attention {rule}", fix)
    for name in ("qk_norm", "attention_bias", "attention_sinks", "attention_scale"):
        if value := getattr(model, name):
            rule = "is not there in latent attention (model.latent.kv_rank > 0)"
            raise Refused(f"model.{name}", value, rule, "leave it out")
