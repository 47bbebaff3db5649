"""The sizes of gpt-oss-20b (arXiv 2508.10925), 20.9 G parameters, 3.6 G active, for 64 chips.

    python -m moe_jax.hf counts configs/gpt_oss_20b.py
    python -m moe_jax.train.compile --config=configs/gpt_oss_20b.py --topology=v5p:4x4x4

As published: layers, widths, heads (of 64, wider together than the model), experts and their
biases, top_k (softmax over the chosen), the clamped SwiGLU, sinks, a window of 128 positions on
every other layer, YaRN, vocabulary. What differs: tokens are bytes here, so a run from scratch uses
256 entries of the vocabulary, sequences have 4,096 positions and not 131,072, and weights have 16
bits, those of experts too. The published weights, MXFP4, are read by `python infer.py --hf=DIR`,
which needs no config.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    if arg:
        raise ValueError(f"configs/gpt_oss_20b.py:{arg}: there are no variants")
    return ml_collections.ConfigDict(
        {
            "name": "gpt_oss_20b",
            "mesh": {"fsdp": 8, "expert": 8},
            "model": {
                "vocab_size": 201_088,
                "num_layers": 24,
                "d_model": 2880,
                "num_heads": 64,
                "num_kv_heads": 8,
                "d_head": 64,
                "d_ff": 2880,
                "num_experts": 32,
                "top_k": 4,
                "max_seq_len": 4096,
                "rope_theta": 150_000.0,
                "rope": {
                    "kind": "yarn",
                    "factor": 32.0,
                    "original_seq_len": 4096,
                    "truncate": False,
                },
                "norm_eps": 1e-5,
                "router_weights": "normalised",
                "router_bias": True,
                "attention_bias": "qkvo",
                "attention_sinks": True,
                "windows": (128, 0),
                "expert_bias": True,
                "activation": "clamped_swiglu",
                "dispatch": "exchange",
                "dtype": "bfloat16",
                "load_balance_coef": 0.9,
            },
            "data": {"seq_len": 4096, "global_batch": 64, "max_bytes": 1_000_000_000},
            "optimizer": {"learning_rate": 2e-4, "warmup_steps": 2000},
            "train": {
                "num_steps": 10_000,
                "log_every": 10,
                "eval_every": 500,
                "checkpoint_every": 500,
                "remat": "layer",
            },
        }
    )
