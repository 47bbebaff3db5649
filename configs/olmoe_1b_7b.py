"""The sizes of OLMoE-1B-7B (arXiv 2409.02060), 6.9 G parameters, 1.3 G active, for 8 chips.

    python -m moe_jax.hf counts configs/olmoe_1b_7b.py

As published: layers, widths, heads, experts, top_k (softmax over all experts, weights as they are),
norms of queries and keys over all heads, vocabulary, rope_theta, both losses' coefficients. Tokens
are bytes here, so a run from scratch uses 256 entries of the vocabulary. The published weights are
read by `python infer.py --hf=DIR`, which needs no config.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    if arg:
        raise ValueError(f"configs/olmoe_1b_7b.py:{arg}: there are no variants")
    return ml_collections.ConfigDict(
        {
            "name": "olmoe_1b_7b",
            "mesh": {"expert": 8},
            "model": {
                "vocab_size": 50_304,
                "num_layers": 16,
                "d_model": 2048,
                "num_heads": 16,
                "num_kv_heads": 16,
                "d_head": 128,
                "d_ff": 1024,
                "num_experts": 64,
                "top_k": 8,
                "max_seq_len": 4096,
                "rope_theta": 1e4,
                "norm_eps": 1e-5,
                "router_weights": "softmax",
                "qk_norm": "all",
                "dispatch": "exchange",
                "dtype": "bfloat16",
                "load_balance_coef": 0.01,
                "z_loss_coef": 0.001,
            },
            "data": {"seq_len": 4096, "global_batch": 64, "max_bytes": 1_000_000_000},
            "optimizer": {"learning_rate": 4e-4, "warmup_steps": 2500},
            "train": {
                "num_steps": 10_000,
                "log_every": 10,
                "eval_every": 500,
                "checkpoint_every": 500,
                "remat": "layer",
            },
        }
    )
