"""Keys that config.json leaves out: what the family's class in transformers makes of them.

Published files have nearly all keys, but a default of our own would make another model of one that
has not, and nothing would say so.
"""

import json

import pytest

from moe_jax.errors import Refused
from moe_jax.hf import config_json
from moe_jax.hf.families import COMMON as COMMON_KEYS
from moe_jax.hf.families import COMMON_ONLY, FAMILIES
from moe_jax.hf.tables import REQUIRED
from tests.hf.test_published_configs import COMMON, PUBLISHED

BASES = {
    "mixtral": "mixtral_8x7b",
    "olmoe": "olmoe_1b_7b",
    "qwen2_moe": "qwen1_5_moe_a2_7b",
    "qwen3_moe": "qwen3_30b_a3b",
    "gpt_oss": "gpt_oss_20b",
    "deepseek_v2": "deepseek_v2_lite",
    "deepseek_v3": "deepseek_v3",
    "granitemoe": "granite_3_0_3b_a800m",
    "phimoe": "phi_3_5_moe",
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
# Defaults of the classes of transformers 5.24, with what they make of None, copied by hand from
# `transformers.AutoConfig.for_model(FAMILY).to_dict()`; those of 4.57 are the same but for the loss
# of gpt-oss (0.9). A key that a class does not have is in NO_FIELD.
EVERY = {"hidden_act": "silu", "tie_word_embeddings": False}
DEFAULTS = {
    "mixtral": {
        **EVERY,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1e6,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
    },
    "olmoe": {
        **EVERY,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "rope_theta": 1e4,
        "router_aux_loss_coef": 0.01,
        "norm_topk_prob": False,
        "attention_bias": False,
        "clip_qkv": None,
    },
    "qwen2_moe": {
        **EVERY,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "rope_theta": 1e4,
        "router_aux_loss_coef": 0.001,
        "norm_topk_prob": False,
        "qkv_bias": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3_moe": {
        **EVERY,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "rope_theta": 1e4,
        "router_aux_loss_coef": 0.001,
        "norm_topk_prob": False,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
    "gpt_oss": {
        **EVERY,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_theta": 150_000.0,
        "router_aux_loss_coef": 0.001,
        "attention_bias": True,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    },
    "deepseek_v2": {
        **EVERY,
        "num_key_value_heads": 16,
        "rope_theta": 1e4,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "q_lora_rank": 1536,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "deepseek_v3": {
        **EVERY,
        "num_key_value_heads": 128,
        "rope_theta": 1e4,
        "n_group": 8,
        "topk_group": 4,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "rope_interleave": True,
        "attention_bias": False,
    },
    "llama": {
        **EVERY,
        "num_key_value_heads": 8,
        "head_dim": 8,
        "rope_theta": 1e4,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "granitemoe": {
        **EVERY,
        "num_key_value_heads": 24,
        "head_dim": 64,
        "rope_theta": 1e4,
        "router_aux_loss_coef": 0.001,
        "attention_bias": False,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    "phimoe": {
        **EVERY,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1e6,
        "router_aux_loss_coef": 0.001,
        "attention_bias": False,
        "lm_head_bias": False,
        "router_jitter_noise": 0.01,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
}
ASKED_FOR = {  # refused where it is left out
    ("gpt_oss", "router_aux_loss_coef"),  # classes disagree
    ("gpt_oss", "sliding_window"),
    ("qwen2_moe", "sliding_window"),
    ("qwen3_moe", "sliding_window"),
    ("phimoe", "num_experts_per_tok"),
    ("deepseek_v2", "topk_method"),
    ("deepseek_v3", "norm_topk_prob"),
    *(
        (family, key)
        for family in ("deepseek_v2", "deepseek_v3")
        for key in (
            "n_shared_experts",
            "routed_scaling_factor",
            "first_k_dense_replace",
            "q_lora_rank",
        )
    ),
}
REFUSED_ITSELF = {("deepseek_v3", "num_key_value_heads")}  # 128 of 64 heads
NO_FIELD = {
    "partial_rotary_factor": FAMILIES,
    "router_aux_loss_coef": ("deepseek_v2", "deepseek_v3", "llama"),
    "moe_layer_freq": ("deepseek_v2", "deepseek_v3"),
    "scoring_func": ("deepseek_v2", "deepseek_v3"),
    "topk_method": ("deepseek_v3",),
    "mlp_bias": ("deepseek_v3",),
}
# Changes of a published file where it would be the same with a default of another family.
BESIDE = {
    ("qwen2_moe", "num_key_value_heads"): {"num_attention_heads": 32},
    ("deepseek_v3", "num_key_value_heads"): {"num_attention_heads": 64},
    ("qwen2_moe", "sliding_window"): {"use_sliding_window": True},
    ("qwen3_moe", "sliding_window"): {"use_sliding_window": True, "sliding_window": 4096},
    ("qwen2_moe", "max_window_layers"): {"use_sliding_window": True, "num_hidden_layers": 32},
}


def made(folder, plain):
    """The model that is read, or the field that is refused."""
    (folder / "config.json").write_text(json.dumps(plain))
    try:
        return config_json.read(folder).config.model
    except Refused as refused:
        return refused.field


def heads(plain):
    return plain["num_attention_heads"]


def share(plain):
    return plain["hidden_size"] // plain["num_attention_heads"]


# What an explicit null says in the classes.
NULLS = [
    ("mixtral", "num_key_value_heads", heads),
    ("mixtral", "head_dim", share),
    ("gpt_oss", "num_key_value_heads", heads),
    ("deepseek_v2", "n_group", lambda plain: 1),
    ("deepseek_v2", "topk_group", lambda plain: 1),
    ("deepseek_v2", "n_shared_experts", lambda plain: 0),
    ("deepseek_v3", "n_shared_experts", lambda plain: 0),
]
CASES = [(family, key) for family, keys in DEFAULTS.items() for key in keys]


@pytest.mark.parametrize(("family", "key"), CASES)
def test_what_is_left_out_is_as_in_transformers_or_refused(family, key, tmp_path):
    plain = LLAMA if family == "llama" else PUBLISHED[BASES[family]][1]
    plain = {**COMMON, **plain, **BESIDE.get((family, key), {})}
    told = made(tmp_path, {**plain, key: DEFAULTS[family][key]})
    plain.pop(key, None)
    found = made(tmp_path, plain)
    if (family, key) in ASKED_FOR:
        assert isinstance(found, str)
        assert found.endswith(f": {key}")
    else:
        assert found == told
    assert isinstance(told, str) == ((family, key) in REFUSED_ITSELF)


@pytest.mark.parametrize(("family", "key", "meant"), NULLS)
def test_what_null_says(family, key, meant, tmp_path):
    plain = {**COMMON, **PUBLISHED[BASES[family]][1]}
    told, found = (made(tmp_path, {**plain, key: value}) for value in (meant(plain), None))
    assert not isinstance(told, str)
    assert found == told


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_may_be_left_out_is_looked_at(family):
    table = FAMILIES[family]
    keys = (*COMMON_KEYS, *table.keys)
    free = {key.names for key in keys if key.default is not REQUIRED}
    free |= {(name,) for name, *_ in (*COMMON_ONLY, *table.only)}
    held = set(DEFAULTS[family]) | {key for key, where in NO_FIELD.items() if family in where}
    assert [names for names in free if not held & set(names)] == []
