"""Compiles the whole training step of configs/moe_100m.py for a TPU topology that is not there.

    python tests/train/compile_for_tpu.py v5e:2x4

prints one JSON object: seconds, bytes per chip, and how many ragged exchanges and kernels stand in
the program. Runs in a process of its own: libtpu reads its environment once.
"""

import collections
import json
import os
import pathlib
import re
import runpy
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
from moe_jax.model.dispatch.table import Table
from moe_jax.train import step as step_lib

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs" / "moe_100m.py"


def main(topology: str, dispatch: str) -> None:
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    data, expert = len(devices) // 8, 8
    plain = runpy.run_path(str(CONFIG))["get_config"]()
    plain.update_from_flattened_dict(
        {
            "mesh.data": data,
            "mesh.expert": expert,
            "model.dispatch": dispatch,
            "data.global_batch": 2 * len(devices),
        }
    )
    plain.train.eval_sequences = len(devices)
    config = config_lib.from_config_dict(plain)
    mesh = mesh_lib.of_config(config.mesh, devices)
    state = step_lib.abstract_state(config, mesh)
    replicated = mesh_lib.sharding(mesh)
    shape_LE = (config.model.num_layers, config.model.num_experts)
    table = Table(
        jax.ShapeDtypeStruct((*shape_LE, 1), jnp.int32, sharding=replicated),
        jax.ShapeDtypeStruct(shape_LE, jnp.int32, sharding=replicated),
    )
    window = jax.ShapeDtypeStruct(
        (config.data.global_batch, config.data.seq_len + 1),
        jnp.int32,
        sharding=mesh_lib.sharding(mesh, "batch", None),
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
