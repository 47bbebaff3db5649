"""A 9.9 M-parameter MoE (8 layers, 32 experts, top 4) on the standard library's own text, for the
cluster in a box (benchmarks/cluster.py): small experts and many of them, so that rows on the wire
cost more than matmuls on two cores.

    python train.py --config=configs/cluster.py --workdir=runs/cluster

Cost and result: see benchmarks/README.md. `:smoke` is the same chain at toy size.
"""

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    smoke = arg == "smoke"
    if arg not in (None, "", "smoke"):
        raise ValueError(f"configs/cluster.py:{arg}: the only variant is ':smoke'")
    return ml_collections.ConfigDict(
        {
            "name": "cluster",
            "platform": "cpu",
            # Trained on whole copies of the experts, which is quickest on two cores; the benchmark
            # spreads them over its hosts.
            "virtual_devices": 2,
            "mesh": {"data": 2, "expert": 1},
            "model": {
                "vocab_size": 256,
                "num_layers": 2 if smoke else 8,
                "d_model": 32 if smoke else 128,
                "num_heads": 4,
                "num_kv_heads": 2,
                "d_head": 8 if smoke else 32,
                "d_ff": 32 if smoke else 96,
                "num_experts": 32,
                "top_k": 4,
                "max_seq_len": 256,
                "dispatch": "local",
                "dtype": "float32",
                "load_balance_coef": 0.003,
            },
            "data": {
                "seq_len": 64 if smoke else 128,
                "global_batch": 16,
                "max_bytes": 1_000_000 if smoke else 12_000_000,
            },
            "optimizer": {"learning_rate": 4e-3, "warmup_steps": 10 if smoke else 40},
            "train": {
                "num_steps": 20 if smoke else 600,
                "log_every": 5 if smoke else 25,
                "eval_every": 10 if smoke else 150,
                "checkpoint_every": 10 if smoke else 150,
                "checkpoints_kept": 2,
            },
        }
    )
