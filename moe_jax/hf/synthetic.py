"""Small models of published shapes with random weights, for comparisons that need no download.

A shape is the config.json of a family with all sizes scaled down together: about 50 million
parameters, the same parts, as many layers as fit. The folder is one that every reader of the
family's published layout reads: config.json, model.safetensors, and a tokenizer whose tokens are
the bytes (the rest of the vocabulary stands for nothing).
"""

import json
import math
import os
from typing import Any

import numpy as np

from moe_jax import config as config_lib
from moe_jax import files
from moe_jax.errors import Refused
from moe_jax.hf import config_json, layout, safetensors
from moe_jax.hf import folder as folder_lib
from moe_jax.hf import tokens as tokens_lib

_BEGIN, _VOCABULARY = 256, 8192  # after the bytes: one token in front of a text
_COMMON = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": _BEGIN,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "dtype": "float32",
}
# Ratios of widths, groups and choices are those of Mixtral 8x7B (arXiv 2401.04088), OLMoE 1B-7B
# (arXiv 2409.02060) and DeepSeek-V3 (arXiv 2412.19437); the last has 64 experts of its 256.
SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 896,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        "num_hidden_layers": 7,
        "num_key_value_heads": 8,
        "intermediate_size": 128,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "clip_qkv": None,
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": 10,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 8,
        "intermediate_size": 640,
        "moe_intermediate_size": 96,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 64,
        "q_lora_rank": 96,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "num_nextn_predict_layers": 0,
    },
}


def make(shape: str, out: str | os.PathLike, seed: int = 0, **changed: Any) -> int:
    """Writes a folder with float32 weights.

    Args:
      shape: a name in `SHAPES`.
      out: a folder that is not there, or is empty; it appears whole, or not at all.
      seed: of the weights: the same seed, the same bytes.
      changed: keys of config.json that are to be different.

    Returns:
      The number of parameters.

    Raises:
      Refused: an unknown shape, a seed out of range, or `out` is there and not empty.
    """
    if shape not in SHAPES:
        rule = f"must be one of {', '.join(map(repr, SHAPES))}"
        raise Refused("SHAPE", shape, rule, "use one of them")
    config_lib.check_seed("--seed", seed)
    with folder_lib.new(out) as made:
        with files.atomic_write(made / config_json.NAME, "w") as file:
            json.dump({"model_type": shape, **_COMMON, **SHAPES[shape], **changed}, file, indent=1)
        with files.atomic_write(made / tokens_lib.NAME, "w") as file:
            json.dump(_bytes_as_tokens(), file)
        published = config_json.read(made)
        way = next(iter(published.family.layouts))
        shapes = layout.of_family(published.family, way, published.config.model).shapes
        rng = np.random.default_rng(seed)
        safetensors.write(
            made / folder_lib.SINGLE,
            {name: ("F32", shape) for name, shape in shapes.items()},
            lambda name: _values(name, shapes[name], rng),
        )
    return sum(map(math.prod, shapes.values()))


def _values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random, such that every part shows in the logits and their size does not grow with depth."""
    noise = rng.standard_normal(shape, np.float32)
    if name.endswith("norm.weight"):
        return 1 + np.float32(0.1) * noise
    if name.endswith("bias"):
        return np.float32(0.1) * noise
    if "embed" in name:
        return noise
    return noise / np.float32(math.sqrt(shape[-1]))


def _bytes_as_tokens() -> dict[str, Any]:
    """tokenizer.json: byte b is token b, a text begins with <s>."""
    # The format writes bytes as letters: those that can be seen as themselves, others from 256 on.
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    letters = [chr(byte if byte in seen else next(others)) for byte in range(256)]
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    begin = {"id": _BEGIN, "content": "<s>", "special": True, "normalized": False}
    begin |= {"single_word": False, "lstrip": False, "rstrip": False}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    front = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [begin],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [front, text],
            "pair": [front, text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [_BEGIN], "tokens": ["<s>"]}},
        },
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {letter: byte for byte, letter in enumerate(letters)} | {"<s>": _BEGIN},
            "merges": [],
        },
    }
