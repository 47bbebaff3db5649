"""config.json as published -> the configs of this repository, every parameter in its tensor."""

import dataclasses
import json
import math
import pathlib
import runpy

import pytest

from moe_jax import config as config_lib
from moe_jax.hf import config_json, layout
from moe_jax.model import transformer

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
COMMON = {"hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
YARN = {
    "type": "yarn",
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
}
DEEPSEEK_V2 = {  # the Lite one
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "attention_bias": False,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": YARN,
}
# Number of tensors, and the keys of config.json that say what the model is: written from memory of
# the published files.
PUBLISHED = {
    "mixtral_8x7b": (
        995,
        {
            "model_type": "mixtral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
        },
    ),
    "olmoe_1b_7b": (
        3219,
        {
            "model_type": "olmoe",
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "attention_bias": False,
            "clip_qkv": None,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "router_aux_loss_coef": 0.01,
        },
    ),
    "qwen3_30b_a3b": (
        18867,
        {
            "model_type": "qwen3_moe",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "head_dim": 128,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "use_sliding_window": False,
        },
    ),
    "qwen1_5_moe_a2_7b": (
        4659,
        {
            "model_type": "qwen2_moe",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "max_position_embeddings": 8192,
            "max_window_layers": 21,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": 32768,
            "use_sliding_window": False,
        },
    ),
    "deepseek_v2_lite": (5291, {**DEEPSEEK_V2, "topk_method": "greedy"}),
    "deepseek_v2": (
        29102,
        {
            **DEEPSEEK_V2,
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_routed_experts": 160,
            "n_group": 8,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
            "q_lora_rank": 1536,
            "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek_v3": (
        45395,
        {
            **DEEPSEEK_V2,
            "model_type": "deepseek_v3",
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_nextn_predict_layers": 1,
            "first_k_dense_replace": 3,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "q_lora_rank": 1536,
            "routed_scaling_factor": 2.5,
            "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
}
PUBLISHED["granite_3_0_3b_a800m"] = (
    32 * 9 + 2,
    {
        "model_type": "granitemoe",
        "attention_bias": False,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "hidden_size": 1536,
        "intermediate_size": 512,
        "logits_scaling": 6.0,
        "max_position_embeddings": 4096,
        "num_attention_heads": 24,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 40,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": True,
        "vocab_size": 49155,
    },
)
PUBLISHED["phi_3_5_moe"] = (  # without its factors of LongRoPE
    32 * (8 + 4 + 1 + 48) + 5,
    {
        "model_type": "phimoe",
        "attention_bias": True,
        "hidden_size": 4096,
        "input_jitter_noise": 0.01,
        "intermediate_size": 6400,
        "lm_head_bias": True,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.01,
        "sliding_window": 131072,
        "vocab_size": 32064,
    },
)
_LAYERS_OF_GPT_OSS = ("sliding_attention", "full_attention")
GPT_OSS = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "torch_dtype": None,
    "vocab_size": 201088,
}
for name, num_layers, num_experts in (("gpt_oss_20b", 24, 32), ("gpt_oss_120b", 36, 128)):
    PUBLISHED[name] = (
        19 * num_layers + 3,
        {
            **GPT_OSS,
            "num_hidden_layers": num_layers,
            "num_local_experts": num_experts,
            "layer_types": num_layers // 2 * list(_LAYERS_OF_GPT_OSS),
        },
    )
FREE = {"max_seq_len": 0, "z_loss_coef": 0.0}  # of training here


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_json_is_the_config_and_tensors_hold_every_parameter(name, tmp_path):
    num_tensors, published = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, **published}))
    read = config_json.read(tmp_path)
    ours = config_lib.from_config_dict(runpy.run_path(CONFIGS / f"{name}.py")["get_config"]())
    assert dataclasses.replace(read.config.model, **FREE) == dataclasses.replace(ours.model, **FREE)
    assert read.config.model.max_seq_len == published["max_position_embeddings"]
    for way in read.family.layouts:
        found = layout.of_family(read.family, way, read.config.model)
        assert sum(_values(found).values()) == transformer.num_parameters(ours.model)
        if way == next(iter(read.family.layouts)):  # as published
            assert len(found.shapes) == num_tensors


def _values(found: layout.Layout) -> dict[str, int]:
    """Numbers that every tensor says: two a byte of codes, none by scales."""
    sizes = {name: math.prod(shape) for name, shape in found.shapes.items()}
    times = {"_blocks": 2, "_scales": 0, "_scale_inv": 0}
    ends = {name: next((end for end in times if name.endswith(end)), "") for name in found.codes}
    return sizes | {name: times.get(end, 1) * sizes[name] for name, end in ends.items()}
