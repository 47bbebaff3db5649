"""The published families: for each, where every parameter lies in a checkpoint, and config keys.

A family is a table (tables.py) and never a branch: what it needs of the model are fields of
`ModelConfig`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.hf.tables import MAX_LAYERS, Family, Key, Row, WindowKeys

COMMON = (
    Key("vocab_size", ("vocab_size",)),
    Key("num_layers", ("num_hidden_layers",), most=MAX_LAYERS),
    Key("d_model", ("hidden_size",)),
    Key("num_heads", ("num_attention_heads",)),
    Key("max_seq_len", ("max_position_embeddings",)),
    Key("norm_eps", ("rms_norm_eps",)),
    Key("top_k", ("num_experts_per_tok",)),
    Key("tied_output", ("tie_word_embeddings",), False),
    Key("load_balance_coef", ("router_aux_loss_coef",), 0.001),
)
COMMON_ONLY = (
    ("hidden_act", ("silu",), "another activation of experts"),
    ("partial_rotary_factor", (None, 1.0), "rotary positions on a part of each head"),
)

_BLOCK = "model.layers.{layer}."
_ATTENTION = _BLOCK + "self_attn."


def _linear(parameter: str, axes: str, name: str, stored: str) -> tuple[Row, Row]:
    """A projection of attention and its bias; a model without biases has no such parameter."""
    bias = axes[1:] if axes[0] == "D" else axes[-1]
    return (
        Row(f"blocks.attention.{parameter}_{axes}", axes, f"{_ATTENTION}{name}.weight", stored),
        Row(f"blocks.attention.{parameter}_bias_{bias}", bias, f"{_ATTENTION}{name}.bias", bias),
    )


_ENDS = (
    Row("embedding_VD", "VD", "model.embed_tokens.weight", "V D"),
    Row("output_DV", "DV", "lm_head.weight", "V D"),
    Row("final_norm_D", "D", "model.norm.weight", "D"),
)
_NORMS = (
    Row("blocks.attention_norm_D", "D", _BLOCK + "input_layernorm.weight", "D"),
    Row("blocks.moe_norm_D", "D", _BLOCK + "post_attention_layernorm.weight", "D"),
)
_PLAIN_ATTENTION = (
    *_linear("query", "DHQ", "q_proj", "HQ D"),
    *_linear("key", "DGQ", "k_proj", "GQ D"),
    *_linear("value", "DGQ", "v_proj", "GQ D"),
    *_linear("output", "HQD", "o_proj", "D HQ"),
)
_TRUNK = (*_ENDS, *_NORMS, *_PLAIN_ATTENTION)
_NORM_HEADS = (
    Row("blocks.attention.query_norm_Z", "Q", _ATTENTION + "q_norm.weight", "Q"),
    Row("blocks.attention.key_norm_Z", "Q", _ATTENTION + "k_norm.weight", "Q"),
)
_NORM_ALL = (
    Row("blocks.attention.query_norm_Z", "HQ", _ATTENTION + "q_norm.weight", "HQ"),
    Row("blocks.attention.key_norm_Z", "GQ", _ATTENTION + "k_norm.weight", "GQ"),
)
_SHARED = (
    Row("blocks.moe.shared.gate_DF", "DF", _BLOCK + "mlp.shared_expert.gate_proj.weight", "F D"),
    Row("blocks.moe.shared.up_DF", "DF", _BLOCK + "mlp.shared_expert.up_proj.weight", "F D"),
    Row("blocks.moe.shared.down_FD", "FD", _BLOCK + "mlp.shared_expert.down_proj.weight", "D F"),
    Row("blocks.moe.shared.share_D", "D", _BLOCK + "mlp.shared_expert_gate.weight", "1 D"),
)


def _experts(mlp: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Router and experts, a tensor for each matrix of each expert."""
    block, one = _BLOCK + mlp, _BLOCK + mlp + "experts.{expert}."
    return (
        Row("blocks.moe.router_DE", "DE", block + "gate.weight", "E D"),
        Row("blocks.moe.gate_PDF", "DF", f"{one}{gate}.weight", "F D"),
        Row("blocks.moe.up_PDF", "DF", f"{one}{up}.weight", "F D"),
        Row("blocks.moe.down_PFD", "FD", f"{one}{down}.weight", "D F"),
    )


# As transformers holds them since its version 5, and may write them.
_FUSED = (
    Row("blocks.moe.router_DE", "DE", _BLOCK + "mlp.gate.weight", "E D"),
    Row("blocks.moe.gate_PDF", "DF", _BLOCK + "mlp.experts.gate_up_proj", "E 2F D", part=0),
    Row("blocks.moe.up_PDF", "DF", _BLOCK + "mlp.experts.gate_up_proj", "E 2F D", part=1),
    Row("blocks.moe.down_PFD", "FD", _BLOCK + "mlp.experts.down_proj", "E D F"),
)
_MLP = _experts("mlp.", "gate_proj", "up_proj", "down_proj")


def _layouts(*parts: Row, experts: tuple[Row, ...] = _MLP) -> dict[str, tuple[Row, ...]]:
    return {"per expert": (*_TRUNK, *parts, *experts), "fused": (*_TRUNK, *parts, *_FUSED)}


_ROUTER = _BLOCK + "mlp.router.weight"
_GPT_OSS = _BLOCK + "mlp.experts."


def _in_turns(gate_up: str, down: str, code: str = "") -> tuple[Row, ...]:
    """Experts and their biases, gate and up in turns, as the matrices are stored."""
    return (
        Row("blocks.moe.gate_PDF", "DF", _GPT_OSS + "gate_up_proj", gate_up, 0, code),
        Row("blocks.moe.up_PDF", "DF", _GPT_OSS + "gate_up_proj", gate_up, 1, code),
        Row("blocks.moe.down_PFD", "FD", _GPT_OSS + "down_proj", down, 0, code),
        Row("blocks.moe.gate_bias_PF", "F", _GPT_OSS + "gate_up_proj_bias", "E F2", part=0),
        Row("blocks.moe.up_bias_PF", "F", _GPT_OSS + "gate_up_proj_bias", "E F2", part=1),
        Row("blocks.moe.down_bias_PD", "D", _GPT_OSS + "down_proj_bias", "E D"),
    )


_NORMALISED = {True: "normalised", False: "softmax"}
_QWEN2_WINDOW_LAYERS = 28  # where config.json leaves it out


def _every_other_of_the_first(layer: int, plain: Mapping[str, Any]) -> bool:
    """Of the first `max_window_layers`."""
    first = plain.get("max_window_layers")
    return layer % 2 == 0 and layer < (_QWEN2_WINDOW_LAYERS if first is None else first)


_ALL_MOE: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("decoder_sparse_step", (1,), "dense layers among the MoE layers"),
    ("mlp_only_layers", ([], None), "dense layers among the MoE layers"),
)

MIXTRAL = Family(
    "mixtral",
    keys=(
        Key("d_ff", ("intermediate_size",)),
        Key("num_experts", ("num_local_experts", "num_experts")),
    ),
    fixed={"router_weights": "normalised"},
    only=(),
    layouts=_layouts(experts=_experts("block_sparse_moe.", "w1", "w3", "w2")),
    windows=WindowKeys(),
    num_kv_heads=8,
    rope_theta=1_000_000.0,
)
OLMOE = Family(
    "olmoe",
    keys=(
        Key("d_ff", ("intermediate_size",)),
        Key("num_experts", ("num_experts", "num_local_experts")),
        Key("router_weights", ("norm_topk_prob",), "softmax", _NORMALISED),
        Key("attention_bias", ("attention_bias",), "", {False: "", True: "qkvo"}),
        Key("load_balance_coef", ("router_aux_loss_coef",), 0.01),
    ),
    fixed={"qk_norm": "all"},
    only=(("clip_qkv", (None,), "clipped queries, keys and values"),),
    layouts=_layouts(*_NORM_ALL),
)
QWEN3_MOE = Family(
    "qwen3_moe",
    keys=(
        Key("d_ff", ("moe_intermediate_size",)),
        Key("num_experts", ("num_experts", "num_local_experts")),
        Key("router_weights", ("norm_topk_prob",), "softmax", _NORMALISED),
        Key("attention_bias", ("attention_bias",), "", {False: "", True: "qkvo"}),
    ),
    fixed={"qk_norm": "head"},
    only=_ALL_MOE,
    layouts=_layouts(*_NORM_HEADS),
    windows=WindowKeys("use_sliding_window"),
    num_kv_heads=4,
)
QWEN2_MOE = Family(
    "qwen2_moe",
    keys=(
        Key("d_ff", ("moe_intermediate_size",)),
        Key("num_experts", ("num_experts", "num_local_experts")),
        Key("router_weights", ("norm_topk_prob",), "softmax", _NORMALISED),
        Key("attention_bias", ("qkv_bias",), "qkv", {False: "", True: "qkv"}),
        Key("d_ff_shared", ("shared_expert_intermediate_size",)),
    ),
    fixed={"shared_gate": True},
    only=_ALL_MOE,
    layouts=_layouts(*_SHARED),
    windows=WindowKeys(
        "use_sliding_window",
        layer_types=True,
        has_window=_every_other_of_the_first,
    ),
    num_kv_heads=16,
)
GPT_OSS = Family(
    "gpt_oss",
    keys=(
        Key("d_ff", ("intermediate_size",)),
        Key("num_experts", ("num_local_experts", "num_experts")),
        Key("attention_bias", ("attention_bias",), "qkvo", {False: "", True: "qkvo"}),
        Key("load_balance_coef", ("router_aux_loss_coef",)),  # the class: 0.9, since 5 0.001
    ),
    fixed={
        "router_weights": "normalised",
        "router_bias": True,
        "expert_bias": True,
        "activation": "clamped_swiglu",
        "attention_sinks": True,
    },
    only=(
        ("swiglu_limit", (7.0, None), "another limit of the clamped SwiGLU"),
        ("swiglu_alpha", (1.702, None), "another slope of the clamped SwiGLU"),
    ),
    layouts={
        name: (
            *_TRUNK,
            Row("blocks.attention.sink_H", "H", _ATTENTION + "sinks", "H"),
            Row("blocks.moe.router_DE", "DE", _ROUTER, "E D"),
            Row("blocks.moe.router_bias_E", "E", _BLOCK + "mlp.router.bias", "E"),
            *experts,
        )
        for name, experts in (
            ("mxfp4", _in_turns("E F2 D", "E D F", code="mxfp4")),
            ("fused", _in_turns("E D F2", "E F D")),
        )
    },
    windows=WindowKeys(layer_types=True, has_window=lambda layer, plain: layer % 2 == 0),
    codes=("mxfp4",),
    num_kv_heads=8,
    d_head=64,
    rope_theta=150_000.0,
    rope={
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
)

_LATENT = (
    Row("blocks.attention.query_DHX", "DHX", _ATTENTION + "q_proj.weight", "HX D"),
    Row("blocks.attention.query_down_DU", "DU", _ATTENTION + "q_a_proj.weight", "U D"),
    Row("blocks.attention.query_norm_U", "U", _ATTENTION + "q_a_layernorm.weight", "U"),
    Row("blocks.attention.query_up_UHX", "UHX", _ATTENTION + "q_b_proj.weight", "HX U"),
    Row("blocks.attention.latent_down_DZ", "DZ", _ATTENTION + "kv_a_proj_with_mqa.weight", "Z D"),
    Row("blocks.attention.latent_norm_R", "R", _ATTENTION + "kv_a_layernorm.weight", "R"),
    Row("blocks.attention.expand_RHY", "RHY", _ATTENTION + "kv_b_proj.weight", "HY R"),
    Row("blocks.attention.output_HWD", "HWD", _ATTENTION + "o_proj.weight", "D HW"),
)


def _swiglu(parameter: str, mlp: str) -> tuple[Row, ...]:
    return (
        Row(f"{parameter}.gate_DF", "DF", f"{_BLOCK}{mlp}gate_proj.weight", "F D"),
        Row(f"{parameter}.up_DF", "DF", f"{_BLOCK}{mlp}up_proj.weight", "F D"),
        Row(f"{parameter}.down_FD", "FD", f"{_BLOCK}{mlp}down_proj.weight", "D F"),
    )


def _dense(*rows: Row) -> tuple[Row, ...]:
    """Rows of norms and attention, in the stack of dense layers."""
    return tuple(
        dataclasses.replace(
            row,
            parameter=row.parameter.replace("blocks", "dense_blocks").replace(
                "moe_norm", "mlp_norm"
            ),
        )
        for row in rows
    )


_DENSE_MLP = _swiglu("dense_blocks.mlp", "mlp.")
_DENSE = (*_dense(*_NORMS, *_LATENT), *_DENSE_MLP)
_DEEPSEEK = (
    *(*_ENDS, *_NORMS, *_LATENT, *_DENSE),
    *_swiglu("blocks.moe.shared", "mlp.shared_experts."),
    Row("blocks.moe.correction_E", "E", _BLOCK + "mlp.gate.e_score_correction_bias", "E"),
)
_DEEPSEEK_LAYOUTS = {"per expert": (*_DEEPSEEK, *_MLP), "fused": (*_DEEPSEEK, *_FUSED)}
_PROJECTIONS = ("_proj.weight", "_with_mqa.weight")  # all but ends, norms and the router
_FP8 = tuple(
    dataclasses.replace(row, code="fp8") if row.tensor.endswith(_PROJECTIONS) else row
    for row in (*_DEEPSEEK, *_MLP)
)
_DEEPSEEK_KEYS = (
    Key("d_ff", ("moe_intermediate_size",)),
    Key("num_experts", ("n_routed_experts", "num_experts", "num_local_experts")),
    Key("d_ff_shared", ("n_shared_experts",), null=0, times="moe_intermediate_size"),
    Key("num_dense_layers", ("first_k_dense_replace",)),
    Key("d_ff_dense", ("intermediate_size",), needs="num_dense_layers"),
    Key("d_head", ("qk_nope_head_dim",)),
    Key("latent.kv_rank", ("kv_lora_rank",)),
    Key("latent.d_rope", ("qk_rope_head_dim",)),
    Key("latent.d_value", ("v_head_dim",)),
    Key("latent.query_rank", ("q_lora_rank",), null=0),
    Key("router_scale", ("routed_scaling_factor",)),
    Key("load_balance_coef", ("aux_loss_alpha", "router_aux_loss_coef"), 0.001),
)
_DEEPSEEK_ONLY: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("attention_bias", (False, None), "biases in latent attention"),
    ("mlp_bias", (False, None), "biases of dense layers"),
    ("moe_layer_freq", (1, None), "dense layers among the MoE layers"),
)
DEEPSEEK_V2 = Family(
    "deepseek_v2",
    keys=(
        *_DEEPSEEK_KEYS,
        Key("router_groups", ("n_group",), 1),
        Key("router_top_groups", ("topk_group",), 1),
        Key(
            "router_group_scores",
            ("topk_method",),
            says={"greedy": "", "group_limited_greedy": "max"},
        ),
    ),
    fixed={"router_weights": "softmax", "rope": {"interleaved": True}},
    only=(
        *_DEEPSEEK_ONLY,
        ("scoring_func", ("softmax", None), "other scores of experts"),
        # Of it the published code and transformers make different things: scaled, and not at all.
        ("norm_topk_prob", (False, None), "normalised weights, which no published model of it has"),
    ),
    layouts=_DEEPSEEK_LAYOUTS,
)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    keys=(
        *_DEEPSEEK_KEYS,
        Key("router_groups", ("n_group",), 8, null=1),
        Key("router_top_groups", ("topk_group",), 4, null=1),
        Key("router_weights", ("norm_topk_prob",), says=_NORMALISED),
        Key("rope.interleaved", ("rope_interleave",), True, {True: True, False: False}, null=False),
    ),
    fixed={"router_scores": "sigmoid", "router_group_scores": "top2", "router_correction": True},
    only=(
        *_DEEPSEEK_ONLY,
        ("scoring_func", ("sigmoid", None), "other scores of experts"),
        ("topk_method", ("noaux_tc", None), "another choice of experts"),
    ),
    layouts={**_DEEPSEEK_LAYOUTS, "fp8": _FP8},
    codes=("fp8",),
    beside=("model.layers.{layers}.",),  # predicts one more token ahead
    num_kv_heads=128,
)

LLAMA = Family(
    "llama",
    keys=(
        Key("num_dense_layers", ("num_hidden_layers",)),
        Key("d_ff_dense", ("intermediate_size",)),
        Key("d_ff", ("intermediate_size",)),  # there are no experts to have another
        Key("attention_bias", ("attention_bias",), "", {False: "", True: "qkvo"}),
    ),
    fixed={"num_experts": 1, "top_k": 1},
    only=(("mlp_bias", (False, None), "biases of dense layers"),),
    layouts={"per matrix": (*_ENDS, *_dense(*_NORMS, *_PLAIN_ATTENTION), *_DENSE_MLP)},
)

# Of a Llama whose later layers have become MoE layers (../upcycle): every expert of a layer is
# read from the layer's one MLP, and the router from nowhere.
UPCYCLED = Family(
    "llama",
    keys=(),
    fixed={},
    only=(),
    layouts={
        "per matrix": (
            *LLAMA.layouts["per matrix"],
            *_NORMS,
            *_PLAIN_ATTENTION,
            Row("blocks.moe.gate_PDF", "DF", _BLOCK + "mlp.gate_proj.weight", "F D"),
            Row("blocks.moe.up_PDF", "DF", _BLOCK + "mlp.up_proj.weight", "F D"),
            Row("blocks.moe.down_PFD", "FD", _BLOCK + "mlp.down_proj.weight", "D F"),
        )
    },
    made=("blocks.moe.router_DE",),
)

_MULTIPLIERS = (
    Key("embedding_scale", ("embedding_multiplier",), 1.0),
    Key("residual_scale", ("residual_multiplier",), 1.0),
    Key("attention_scale", ("attention_multiplier",), 1.0),
    Key("logits_divisor", ("logits_scaling",), 1.0),
)
GRANITE_MOE = Family(
    "granitemoe",
    keys=(
        Key("d_ff", ("intermediate_size",)),
        Key("num_experts", ("num_local_experts",)),
        Key("attention_bias", ("attention_bias",), "", {False: "", True: "qkvo"}),
        *_MULTIPLIERS,
    ),
    fixed={"router_weights": "normalised"},
    only=(),
    layouts={
        name: (
            *_TRUNK,
            Row("blocks.moe.router_DE", "DE", f"{_BLOCK}block_sparse_moe.{router}.weight", "E D"),
            Row("blocks.moe.gate_PDF", "DF", _BLOCK + "block_sparse_moe." + up, "E 2F D", part=0),
            Row("blocks.moe.up_PDF", "DF", _BLOCK + "block_sparse_moe." + up, "E 2F D", part=1),
            Row("blocks.moe.down_PFD", "FD", _BLOCK + "block_sparse_moe." + down, "E D F"),
        )
        for name, router, up, down in (
            ("per matrix", "router.layer", "input_linear.weight", "output_linear.weight"),
            ("fused", "router", "experts.gate_up_proj", "experts.down_proj"),
        )
    },
)
PHIMOE = Family(
    "phimoe",
    keys=(
        Key("d_ff", ("intermediate_size",)),
        Key("num_experts", ("num_local_experts",)),
        Key("attention_bias", ("attention_bias",), "", {False: "", True: "qkvo"}),
        Key("output_bias", ("lm_head_bias",), False),
    ),
    fixed={"router_weights": "sparse_mixer", "norm": "layer"},
    only=(
        ("router_jitter_noise", (0.01, None), "another width of its routing"),
        ("num_experts_per_tok", (2, None), "another number of experts a token than its routing"),
    ),
    layouts={
        name: (
            *_TRUNK,
            Row("blocks.attention_norm_bias_D", "D", _BLOCK + "input_layernorm.bias", "D"),
            Row("blocks.moe_norm_bias_D", "D", _BLOCK + "post_attention_layernorm.bias", "D"),
            Row("final_norm_bias_D", "D", "model.norm.bias", "D"),
            Row("output_bias_V", "V", "lm_head.bias", "V"),
            *experts,
        )
        for name, experts in (
            ("per expert", _experts("block_sparse_moe.", "w1", "w3", "w2")),
            ("fused", (dataclasses.replace(_FUSED[0], tensor=_ROUTER), *_FUSED[1:])),
        )
    },
    windows=WindowKeys(),
    num_kv_heads=8,
    rope_theta=1_000_000.0,
)
FAMILIES = {
    family.model_type: family
    for family in (
        *(MIXTRAL, OLMOE, QWEN3_MOE, QWEN2_MOE, GPT_OSS),
        *(DEEPSEEK_V2, DEEPSEEK_V3, LLAMA, GRANITE_MOE, PHIMOE),
    )
}
