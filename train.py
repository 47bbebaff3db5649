"""Trains an MoE language model: python train.py --config=configs/quickstart.py --workdir=DIR."""

import pathlib

from absl import flags

from moe_jax import config as config_lib
from moe_jax import entry
from moe_jax import processes as processes_lib

CONFIG = entry.define_config(
    "A file in configs/, with ':variant' if it has one. Override any field of moe_jax/config "
    "with --config.model.top_k=4 and the like."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives; a run that finds checkpoints there goes on from them."
)
DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    "off",
    "Join other processes: 'auto' (Cloud TPU pod, Slurm, MPI: the same command on every host), "
    "'HOST:PORT,NUM_PROCESSES,PROCESS_ID', or 'off'.",
)
REPLAY = flags.DEFINE_string(
    "replay", None, "Run one bad step of this run again: a file of WORKDIR/bad_steps."
)


def main() -> None:
    config = config_lib.from_config_dict(entry.required("--config", CONFIG.value))
    workdir = pathlib.Path(entry.required("--workdir", WORKDIR.value))
    entry.check_output("--workdir", WORKDIR.value)
    from moe_jax.train import inputs  # not for --help

    processes = processes_lib.parse(DISTRIBUTED.value)
    _, count, number = processes or ("", 1, 0)
    if config.virtual_devices and DISTRIBUTED.value != "auto":
        config_lib.check_devices(config, config.virtual_devices * count)
    config, chosen = inputs.choose_dispatch(config, workdir)
    ahead = None
    if REPLAY.value is None and DISTRIBUTED.value != "auto":  # "auto": numbers are not known yet
        ahead = inputs.digests_ahead(config, workdir, (number, count))
    corpus, plan = inputs.prepare(config, workdir)
    bad = None
    if REPLAY.value is not None:
        bad = inputs.bad_batch(config, pathlib.Path(entry.required("--replay", REPLAY.value)))

    from moe_jax import mesh, metrics  # and with them JAX, which takes seconds
    from moe_jax.train import loop, replay

    with entry.together():
        mesh.initialize(config.platform, config.virtual_devices, DISTRIBUTED.value)
        config_lib.check_devices(config, mesh.num_devices())
        if chosen:
            metrics.say(chosen)
        if bad:
            replay.replay(config, workdir, corpus, plan, bad)
        else:
            loop.train(config, workdir, corpus, plan, ahead)


if __name__ == "__main__":
    entry.run(main, __doc__)
