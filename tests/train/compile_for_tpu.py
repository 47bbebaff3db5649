"""Compiles the whole training step for a TPU topology that need not be there.

    python tests/train/compile_for_tpu.py v5e:2x4

prints one JSON object: seconds, bytes per chip, and how many ragged exchanges and kernels stand in
the program. Runs in a process of its own: libtpu reads its environment once.
"""

import collections
import json
import os
import re
import sys
import time

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5p-8",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # nothing is run: no other process is in the way
)

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax.model.dispatch.schemes import Table
from moe_jax.train import step as step_lib

MODEL = {
    "vocab_size": 1024,
    "num_layers": 4,
    "d_model": 512,
    "num_heads": 8,
    "num_kv_heads": 4,
    "d_head": 64,
    "d_ff": 512,
    "num_experts": 16,
    "top_k": 2,
    "max_seq_len": 2048,
    "dtype": "bfloat16",
}


def main(topology: str, dispatch: str) -> None:
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    data, expert = len(devices) // 4, 4
    config = config_lib.from_config_dict(
        {
            "name": "compiled",
            "model": MODEL | {"dispatch": dispatch},
            "mesh": {"data": data, "expert": expert},
            "data": {"seq_len": 512, "global_batch": len(devices)},
            "train": {"num_steps": 100, "eval_sequences": len(devices)},
        }
    )
    mesh = mesh_lib.make(data, expert, devices)
    state = step_lib.abstract_state(config, mesh)
    replicated = mesh_lib.sharding(mesh)
    shape_LE = (MODEL["num_layers"], MODEL["num_experts"])
    table = Table(
        jax.ShapeDtypeStruct((*shape_LE, 1), jnp.int32, sharding=replicated),
        jax.ShapeDtypeStruct(shape_LE, jnp.int32, sharding=replicated),
    )
    window = jax.ShapeDtypeStruct(
        (len(devices), 513), jnp.int32, sharding=mesh_lib.sharding(mesh, "batch", None)
    )
    start = time.perf_counter()
    lowered = step_lib.build_step(config, mesh).lower(state, window, table)
    memory = lowered.compile().memory_analysis()
    # Of the lowered program: some versions of XLA cannot print a compiled one for v5p.
    calls = collections.Counter(re.findall(r"custom_call @(\w+)", lowered.as_text()))
    print(
        json.dumps(
            {
                "topology": topology,
                "dispatch": dispatch,
                "chips": len(devices),
                "seconds": round(time.perf_counter() - start, 1),
                "argument_bytes": memory.argument_size_in_bytes,
                "temporary_bytes": memory.temp_size_in_bytes,
                "ragged_exchanges": calls["ragged_all_to_all"],
                "kernels": calls["tpu_custom_call"],
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "exchange")
