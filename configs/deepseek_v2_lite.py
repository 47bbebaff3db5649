"""The sizes of DeepSeek-V2-Lite (arXiv 2405.04434, appendix B): 15.7 G parameters, 2.7 G active.

    python -m moe_jax.hf counts configs/deepseek_v2_lite.py

As published: 27 layers, the first dense (width 10,944), latent attention with 512 + 64 numbers a
position, 64 experts of 1,408, top 6 with the weights of the softmax, 2 shared ones, YaRN from
4,096 positions by a factor of 40. 2.4 G active are published: without the embedding of tokens, that
is looked up and not multiplied, we count 2.45 G, and 2.24 G without that of outputs too.
What differs: tokens are bytes here, so a run from scratch uses 256 entries of the vocabulary, and
sequences have 4,096 positions and not 163,840. The published weights are read by
`python infer.py --hf=DIR`, which needs no config.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    if arg:
        raise ValueError(f"configs/deepseek_v2_lite.py:{arg}: there are no variants")
    return ml_collections.ConfigDict(
        {
            "name": "deepseek_v2_lite",
            "mesh": {"fsdp": 8, "expert": 8},
            "model": {
                "vocab_size": 102_400,
                "num_layers": 27,
                "num_dense_layers": 1,
                "d_model": 2048,
                "num_heads": 16,
                "num_kv_heads": 16,
                "d_head": 128,
                "latent": {"kv_rank": 512, "d_rope": 64, "d_value": 128},
                "d_ff": 1408,
                "d_ff_dense": 10_944,
                "d_ff_shared": 2 * 1408,
                "num_experts": 64,
                "top_k": 6,
                "router_weights": "softmax",
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
            "data": {"seq_len": 4096, "global_batch": 64, "max_bytes": 1_000_000_000},
            "optimizer": {"learning_rate": 2e-4, "warmup_steps": 2000},
            "train": {
                "num_steps": 10_000,
                "log_every": 10,
                "eval_every": 500,
                "eval_sequences": 64,
                "checkpoint_every": 500,
                "remat": "layer",
            },
        }
    )
