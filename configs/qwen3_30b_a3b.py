"""The sizes of Qwen3-30B-A3B (arXiv 2505.09388), 30.5 G parameters, 3.3 G active, for 64 chips.

    python -m moe_jax.hf counts configs/qwen3_30b_a3b.py

As published: layers, widths, heads (of 128, wider together than the model), experts, top_k (weights
scaled to sum 1), norms of queries and keys of each head, vocabulary, rope_theta. What differs:
tokens are bytes here, so a run from scratch uses 256 entries of the vocabulary, and sequences have
4,096 positions and not 40,960. The published weights are read by `python infer.py --hf=DIR`, which
needs no config.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    if arg:
        raise ValueError(f"configs/qwen3_30b_a3b.py:{arg}: there are no variants")
    return ml_collections.ConfigDict(
        {
            "name": "qwen3_30b_a3b",
            "mesh": {"fsdp": 8, "expert": 8},
            "model": {
                "vocab_size": 151_936,
                "num_layers": 48,
                "d_model": 2048,
                "num_heads": 32,
                "num_kv_heads": 4,
                "d_head": 128,
                "d_ff": 768,
                "num_experts": 128,
                "top_k": 8,
                "max_seq_len": 4096,
                "rope_theta": 1e6,
                "norm_eps": 1e-6,
                "router_weights": "normalised",
                "qk_norm": "head",
                "dispatch": "exchange",
                "dtype": "bfloat16",
                "load_balance_coef": 0.001,
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
