"""The sizes of Qwen1.5-MoE-A2.7B, 14.3 G parameters, 2.7 G active, for 60 chips.

    python -m moe_jax.hf counts configs/qwen1_5_moe_a2_7b.py

As published (its model card): layers, widths, heads, biases of queries, keys and values, 60 experts
of top 4 (weights as the softmax gives them), a shared expert of 5,632 with a sigmoid gate, which
is computed where the token is. What differs: tokens are bytes here, so a run from scratch uses 256
entries of the vocabulary, and sequences have 4,096 positions and not 8,192. The published weights
are read by `python infer.py --hf=DIR`, which needs no config.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    if arg:
        raise ValueError(f"configs/qwen1_5_moe_a2_7b.py:{arg}: there are no variants")
    return ml_collections.ConfigDict(
        {
            "name": "qwen1_5_moe_a2_7b",
            "mesh": {"fsdp": 4, "expert": 15},
            "model": {
                "vocab_size": 151_936,
                "num_layers": 24,
                "d_model": 2048,
                "num_heads": 16,
                "num_kv_heads": 16,
                "d_head": 128,
                "d_ff": 1408,
                "num_experts": 60,
                "top_k": 4,
                "max_seq_len": 4096,
                "rope_theta": 1e6,
                "norm_eps": 1e-6,
                "router_weights": "softmax",
                "attention_bias": "qkv",
                "d_ff_shared": 5632,
                "shared_gate": True,
                "dispatch": "exchange",
                "dtype": "bfloat16",
                "load_balance_coef": 0.001,
            },
            "data": {"seq_len": 4096, "global_batch": 60, "max_bytes": 1_000_000_000},
            "optimizer": {"learning_rate": 2e-4, "warmup_steps": 2000},
            "train": {
                "num_steps": 10_000,
                "log_every": 10,
                "eval_every": 500,
                "eval_sequences": 60,
                "checkpoint_every": 500,
                "remat": "layer",
            },
        }
    )
