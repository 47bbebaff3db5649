"""A 118 M-parameter MoE (19 M active) for one node of 8 accelerators, or a pod of more.

    python train.py --config=configs/moe_100m.py --workdir=runs/moe_100m \
        --config.data.path=DIR_OF_TEXT

On more devices raise `mesh.data`: 32 chips are --config.mesh.data=4, on every host with
--distributed=auto. Cost and loss: compiled ahead of time for TPU v5e, v5p and v6e
(tests/train/test_pods.py); two layers of it have run on one H200. `:smoke` runs on a laptop.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    smoke = arg == "smoke"
    if arg not in (None, "", "smoke"):
        raise ValueError(f"configs/moe_100m.py:{arg}: the only variant is ':smoke'")
    return ml_collections.ConfigDict(
        {
            "name": "moe_100m",
            "platform": "cpu" if smoke else "",
            "virtual_devices": 8 if smoke else 0,
            "mesh": {"data": 1, "expert": 8},
            "model": {
                "vocab_size": 256,
                "num_layers": 2 if smoke else 6,
                "d_model": 64 if smoke else 512,
                "num_heads": 8,
                "num_kv_heads": 4,
                "d_head": 16 if smoke else 64,
                "d_ff": 64 if smoke else 768,
                "num_experts": 16,
                "top_k": 2,
                "max_seq_len": 2048,
                "dispatch": "exchange",
                "dtype": "float32" if smoke else "bfloat16",
            },
            "data": {
                "seq_len": 64 if smoke else 1024,
                "global_batch": 16 if smoke else 64,
                "max_bytes": 1_000_000 if smoke else 200_000_000,
            },
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 10 if smoke else 200},
            "train": {
                "num_steps": 20 if smoke else 5_000,
                "log_every": 5 if smoke else 50,
                "eval_every": 10 if smoke else 500,
                "checkpoint_every": 10 if smoke else 500,
            },
        }
    )
