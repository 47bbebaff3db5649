"""A 1.25 G-parameter MoE (0.19 G active) for 16 accelerators of 16 GB.

    python train.py --config=configs/moe_1b.py --workdir=runs/moe_1b --config.data.path=DIR_OF_TEXT
    python -m moe_jax.train.compile --config=configs/moe_1b.py --topology=v5e:4x4

Cost and loss: compiled ahead of time for TPU v5e 4x4 (tests/train/test_pods.py), not yet run.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    if arg:
        raise ValueError(f"configs/moe_1b.py:{arg}: there are no variants")
    return ml_collections.ConfigDict(
        {
            "name": "moe_1b",
            "mesh": {"fsdp": 2, "expert": 8},
            "model": {
                "vocab_size": 256,
                "num_layers": 16,
                "d_model": 1024,
                "num_heads": 16,
                "num_kv_heads": 4,
                "d_head": 64,
                "d_ff": 768,
                "num_experts": 32,
                "top_k": 4,
                "max_seq_len": 2048,
                "dispatch": "exchange",
                "dtype": "bfloat16",
            },
            "data": {"seq_len": 1024, "global_batch": 16, "max_bytes": 1_000_000_000},
            "optimizer": {"learning_rate": 6e-4, "warmup_steps": 500},
            "train": {
                "num_steps": 20_000,
                "log_every": 50,
                "eval_every": 500,
                "checkpoint_every": 500,
                "remat": "layer",
            },
        }
    )
