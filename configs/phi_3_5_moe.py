"""The sizes of Phi-3.5-MoE (arXiv 2404.14219), 41.9 G parameters, 6.6 G active: to count them.

    python -m moe_jax.hf counts configs/phi_3_5_moe.py

As published: layers, widths, heads, experts, top_k (sparse mixer), norms with biases, biases of
attention and logits, vocabulary. What differs: sequences have 4,096 positions, for which its
factors of LongRoPE are not needed (they stand in its config.json). It cannot be trained here: the
sparse mixer's training is another one (arXiv 2409.12136). The published weights are read by
`python infer.py --hf=DIR`, which needs no config.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    if arg:
        raise ValueError(f"configs/phi_3_5_moe.py:{arg}: there are no variants")
    return ml_collections.ConfigDict(
        {
            "name": "phi_3_5_moe",
            "mesh": {"fsdp": 4, "expert": 16},
            "model": {
                "vocab_size": 32_064,
                "num_layers": 32,
                "d_model": 4096,
                "num_heads": 32,
                "num_kv_heads": 8,
                "d_head": 128,
                "d_ff": 6400,
                "num_experts": 16,
                "top_k": 2,
                "max_seq_len": 4096,
                "rope_theta": 10_000.0,
                "norm_eps": 1e-5,
                "router_weights": "sparse_mixer",
                "norm": "layer",
                "attention_bias": "qkvo",
                "output_bias": True,
                "windows": (131_072,),  # all of its positions
                "dispatch": "exchange",
                "dtype": "bfloat16",
                "load_balance_coef": 0.0,
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
