"""The sizes of Mixtral 8x7B (arXiv 2401.04088), 46.7 G parameters, 12.9 G active, for 64 chips.

    python -m moe_jax.train.compile --config=configs/mixtral_8x7b.py --topology=v5p:4x4x4

As published: layers, widths, heads, experts, top_k (softmax over all experts, the chosen weights
scaled to sum 1, which equals its softmax over the chosen), vocabulary, rope_theta. What differs:
tokens are bytes here, so a run from scratch uses 256 entries of the vocabulary, and sequences
have 4,096 positions and not 32,768. Compiled ahead of time (tests/train/test_pods.py), never run.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    if arg:
        raise ValueError(f"configs/mixtral_8x7b.py:{arg}: there are no variants")
    return ml_collections.ConfigDict(
        {
            "name": "mixtral_8x7b",
            "mesh": {"fsdp": 8, "expert": 8},
            "model": {
                "vocab_size": 32_000,
                "num_layers": 32,
                "d_model": 4096,
                "num_heads": 32,
                "num_kv_heads": 8,
                "d_head": 128,
                "d_ff": 14_336,
                "num_experts": 8,
                "top_k": 2,
                "max_seq_len": 4096,
                "rope_theta": 1e6,
                "norm_eps": 1e-5,
                "dispatch": "exchange",
                "dtype": "bfloat16",
                "load_balance_coef": 0.02,
            },
            "data": {"seq_len": 4096, "global_batch": 64, "max_bytes": 1_000_000_000},
            "optimizer": {"learning_rate": 1e-4, "warmup_steps": 500},
            "train": {
                "num_steps": 10_000,
                "log_every": 10,
                "eval_every": 500,
                "checkpoint_every": 500,
                "remat": "layer",
            },
        }
    )
