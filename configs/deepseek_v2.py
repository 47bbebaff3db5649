"""The sizes of DeepSeek-V2 (arXiv 2405.04434): 236 G parameters, 21 G active, for 160 chips.

    python -m moe_jax.hf counts configs/deepseek_v2.py

As published: 60 layers, the first dense (width 12,288), latent attention with 128 heads, 512 + 64
numbers a position and queries by way of 1,536, 160 experts of 1,536, top 6 of the best 3 of 8
groups (by their best expert), weights of the softmax times 16, 2 shared ones, YaRN from 4,096
positions by a factor of 40. What differs: tokens are bytes here, so a run from scratch uses 256
entries of the vocabulary, and sequences have 4,096 positions and not 163,840; there, training
balances devices as well as experts. The published weights are read by `python infer.py --hf=DIR`,
which needs no config.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    if arg:
        raise ValueError(f"configs/deepseek_v2.py:{arg}: there are no variants")
    return ml_collections.ConfigDict(
        {
            "name": "deepseek_v2",
            "mesh": {"fsdp": 8, "expert": 20},
            "model": {
                "vocab_size": 102_400,
                "num_layers": 60,
                "num_dense_layers": 1,
                "d_model": 5120,
                "num_heads": 128,
                "num_kv_heads": 128,
                "d_head": 128,
                "latent": {"kv_rank": 512, "d_rope": 64, "d_value": 128, "query_rank": 1536},
                "d_ff": 1536,
                "d_ff_dense": 12_288,
                "d_ff_shared": 2 * 1536,
                "num_experts": 160,
                "top_k": 6,
                "router_weights": "softmax",
                "router_scale": 16.0,
                "router_group_scores": "max",
                "router_groups": 8,
                "router_top_groups": 3,
                "max_seq_len": 4096,
                "norm_eps": 1e-6,
                "rope": {
                    "kind": "yarn",
                    "interleaved": True,
                    "factor": 40.0,
                    "original_seq_len": 4096,
                    "mscale": 0.707,
                    "mscale_all_dim": 0.707,
                },
                "dispatch": "exchange",
                "dtype": "bfloat16",
                "load_balance_coef": 0.001,
            },
            "data": {"seq_len": 4096, "global_batch": 160, "max_bytes": 1_000_000_000},
            "optimizer": {"learning_rate": 2e-4, "warmup_steps": 2000},
            "train": {
                "num_steps": 10_000,
                "log_every": 10,
                "eval_every": 500,
                "eval_sequences": 160,
                "checkpoint_every": 500,
                "remat": "layer",
            },
        }
    )
