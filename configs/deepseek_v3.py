"""The MoE sizes of DeepSeek-V3 (arXiv 2412.19437) in this repository's transformer, for 512 chips.

    python -m moe_jax.train.compile --config=configs/deepseek_v3.py --topology=v5p:8x8x8

This is NOT DeepSeek-V3: it is a model whose MoE layers have its shapes, to see what such layers
ask of a pod. As published: d_model, 61 layers, 256 experts of width 2,048, top_k 8, vocabulary.
What differs:
  attention    grouped-query, 128 heads of 128 over 8 key/value heads; there: multi-head latent
               attention with compressed queries, keys and values
  first layers all 61 layers are MoE; there: the first 3 are dense (width 18,432)
  experts      none is shared; there: 1 shared expert in every MoE layer
  router       softmax and a load-balance loss; there: sigmoid scores, groups of experts limited to
               4 nodes a token, a bias in place of the loss, weights scaled by 2.5
  objective    the next token; there: one more token ahead (MTP)
  numbers      bfloat16 matmuls; there: fp8
  tokens       bytes, so a run from scratch uses 256 entries of the vocabulary
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
                "d_model": 7168,
                "num_heads": 128,
                "num_kv_heads": 8,
                "d_head": 128,
                "d_ff": 2048,
                "num_experts": 256,
                "top_k": 8,
                "max_seq_len": 4096,
                "norm_eps": 1e-6,
                "dispatch": "exchange",
                "dtype": "bfloat16",
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
