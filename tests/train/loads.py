"""One process of several that reads a checkpoint; prints what its devices hold, as digests.

python -m tests.train.loads CONFIG.json WORKDIR HOST:PORT,PROCESSES,NUMBER|off
"""

import hashlib
import json
import pathlib
import sys

import jax
import numpy as np

from moe_jax import checkpoint
from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax.train import inputs, resume


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def main() -> None:
    config = config_lib.from_json(pathlib.Path(sys.argv[1]).read_text("utf-8"))
    workdir, distributed = pathlib.Path(sys.argv[2]), sys.argv[3]
    corpus, plan = inputs.prepare(config, workdir)
    mesh_lib.initialize(config.platform, config.virtual_devices, distributed)
    mesh = mesh_lib.of_config(config.mesh)
    run, _ = resume.start_or_resume(config, mesh, workdir, corpus, plan)
    shards = [
        (name, [[part.start, part.stop] for part in shard.index], digest(np.asarray(shard.data)))
        for name, array in checkpoint.flatten(run.state).items()
        for shard in array.addressable_shards
    ]
    position, batch = run.batches.get_state(), digest(next(run.batches))
    held = {"step": run.step, "position": position, "batch": batch, "shards": shards}
    print(json.dumps(held | {"devices": jax.device_count(), "here": jax.local_device_count()}))


if __name__ == "__main__":
    main()
