"""One start of a run in a process of its own, as train.py makes it; prints its seconds as JSON.

    python -m moe_jax.train.one_start CONFIG.json WORKDIR verified|not

What `checkpoint_bench` measures: a run restores once in its process, with everything that Python,
JAX and Orbax do for the first time, and hashes while they are imported.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import sys
import time

from moe_jax import config as config_lib
from moe_jax.train import inputs


def main() -> None:
    """Prints {"before": from the checks to the mesh, "restore": from there to the state}."""
    file, workdir, verified = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
    config = config_lib.from_json(file.read_text("utf-8"))
    train = dataclasses.replace(config.train, checkpoints_verified=verified == "verified")
    config = dataclasses.replace(config, train=train)
    began = time.perf_counter()
    ahead = inputs.digests_ahead(config, workdir, (0, 1))
    corpus, plan = inputs.prepare(config, workdir)

    import jax

    from moe_jax import mesh as mesh_lib
    from moe_jax.train import loop, resume  # noqa: F401 all that train.py imports
    from moe_jax.train import step as step_lib

    mesh_lib.initialize(config.platform, config.virtual_devices, "off")
    mesh = mesh_lib.of_config(config.mesh)
    step_lib.build_step(config, mesh)
    ready = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        run, _ = resume.start_or_resume(config, mesh, workdir, corpus, plan, ahead=ahead)
    jax.block_until_ready(run.state)
    print(json.dumps({"before": ready - began, "restore": time.perf_counter() - ready}))


if __name__ == "__main__":
    main()
