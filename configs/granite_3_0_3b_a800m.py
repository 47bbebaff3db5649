"""The sizes of Granite-3.0-3B-A800M, 3.3 G parameters, 0.8 G active, for 64 chips.

    python -m moe_jax.hf counts configs/granite_3_0_3b_a800m.py

As published (its model card): layers, widths, heads, experts, top_k (softmax over the chosen),
multipliers of embedding, attention, residual and logits, tied embeddings, vocabulary. What differs:
tokens are bytes here, so a run from scratch uses 256 entries of the vocabulary. The published
weights are read by `python infer.py --hf=DIR`, which needs no config.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    if arg:
        raise ValueError(f"configs/granite_3_0_3b_a800m.py:{arg}: there are no variants")
    return ml_collections.ConfigDict(
        {
            "name": "granite_3_0_3b_a800m",
            "mesh": {"fsdp": 8, "expert": 8},
            "model": {
                "vocab_size": 49_155,
                "num_layers": 32,
                "d_model": 1536,
                "num_heads": 24,
                "num_kv_heads": 8,
                "d_head": 64,
                "d_ff": 512,
                "num_experts": 40,
                "top_k": 8,
                "max_seq_len": 4096,
                "rope_theta": 10_000.0,
                "norm_eps": 1e-6,
                "router_weights": "normalised",
                "tied_output": True,
                "embedding_scale": 12.0,
                "residual_scale": 0.22,
                "attention_scale": 0.015625,
                "logits_divisor": 6.0,
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
