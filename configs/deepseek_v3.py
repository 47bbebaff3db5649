"""DeepSeek-V3 (arXiv 2412.19437), 671 G parameters, 37.6 G active, for 512 chips.

    python -m moe_jax.hf counts configs/deepseek_v3.py
    python -m moe_jax.train.compile --config=configs/deepseek_v3.py --topology=v5p:8x8x8

As published: 61 layers, the first 3 dense (width 18,432), latent attention with 128 heads, 512 + 64
numbers a position and queries by way of 1,536, 256 experts of 2,048 and a shared one, sigmoid
scores with a correction of the choice, top 8 of the best 4 of 8 groups (by the sum of their best
two), weights normalised and times 2.5, YaRN from 4,096 positions by a factor of 40.
What differs in training:
  router     a load-balance loss over the batch; there: the correction is moved after each step
             (here it stays as it is), and a very small loss within sequences
  objective  the next token; there: one more token ahead (14 G parameters more, not run here)
  numbers    bfloat16 matmuls; there: fp8
  tokens     bytes, so a run from scratch uses 256 entries of the vocabulary
  sequences  4,096 positions at most, and 1,024 in training; there: up to 163,840
Compiled ahead of time (tests/train/test_pods.py), never run.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    if arg:
        raise ValueError(f"configs/deepseek_v3.py:{arg}: there are no variants")
    return ml_collections.ConfigDict(
        {
            "name": "deepseek_v3",
            "mesh": {"fsdp": 32, "expert": 16},
            "model": {
                "vocab_size": 129_280,
                "num_layers": 61,
                "num_dense_layers": 3,
                "d_model": 7168,
                "num_heads": 128,
                "num_kv_heads": 128,
                "d_head": 128,
                "latent": {"kv_rank": 512, "d_rope": 64, "d_value": 128, "query_rank": 1536},
                "d_ff": 2048,
                "d_ff_dense": 18_432,
                "d_ff_shared": 2048,
                "num_experts": 256,
                "top_k": 8,
                "router_scores": "sigmoid",
                "router_scale": 2.5,
                "router_group_scores": "top2",
                "router_groups": 8,
                "router_top_groups": 4,
                "router_correction": True,
                "max_seq_len": 4096,
                "norm_eps": 1e-6,
                "rope": {
                    "kind": "yarn",
                    "interleaved": True,
                    "factor": 40.0,
                    "original_seq_len": 4096,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                },
                "dispatch": "exchange",
                "dtype": "bfloat16",
                "load_balance_coef": 0.001,
            },
            "data": {"seq_len": 1024, "global_batch": 512, "max_bytes": 1_000_000_000},
            "optimizer": {"learning_rate": 2e-4, "warmup_steps": 2000},
            "train": {
                "num_steps": 10_000,
                "log_every": 10,
                "eval_every": 500,
                "eval_sequences": 512,
                "checkpoint_every": 500,
                "remat": "layer",
            },
        }
    )
