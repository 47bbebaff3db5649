"""A 3.4 M-parameter MoE on the standard library's own text, on 8 virtual CPU devices.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Cost and result: see the table in README.md. `:smoke` is the same chain at toy size.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    smoke = arg == "smoke"
    if arg not in (None, "", "smoke"):
        raise ValueError(f"configs/quickstart.py:{arg}: the only variant is ':smoke'")
    return ml_collections.ConfigDict(
        {
            "name": "quickstart",
            "platform": "cpu",
            "virtual_devices": 8,
            "placement": "",
            "mesh": {"data": 2, "expert": 4},
            "model": {
                "vocab_size": 256,
                "num_layers": 2 if smoke else 4,
                "d_model": 32 if smoke else 128,
                "num_heads": 4,
                "num_kv_heads": 2,
                "d_head": 8 if smoke else 32,
                "d_ff": 32 if smoke else 128,
                "num_experts": 16,
                "top_k": 2,
                "max_seq_len": 256,
                "rope_theta": 10_000.0,
                "dispatch": "exchange",
                "dtype": "float32",
                "load_balance_coef": 0.01,
                "z_loss_coef": 0.001,
            },
            "data": {
                "path": "",
                "seq_len": 64 if smoke else 128,
                "global_batch": 16,
                "max_bytes": 1_000_000 if smoke else 12_000_000,
                "held_out_fraction": 0.1,
                "seed": 0,
            },
            "optimizer": {
                "learning_rate": 4e-3,
                "warmup_steps": 30,
                "weight_decay": 0.05,
                "clip_norm": 1.0,
                "b1": 0.9,
                "b2": 0.98,
            },
            "train": {
                "num_steps": 30 if smoke else 300,
                "log_every": 10 if smoke else 25,
                "eval_every": 10 if smoke else 100,
                "eval_sequences": 64,
                "checkpoint_every": 15 if smoke else 150,
                "checkpoints_kept": 2,
                "max_bad_steps": 5,
                "seed": 0,
            },
        }
    )
