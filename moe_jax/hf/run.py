"""A run's newest step, to be written as a published model's folder."""

import dataclasses
import os
import pathlib

import numpy as np

from moe_jax import checkpoint, metrics
from moe_jax import config as config_lib
from moe_jax.config import Config
from moe_jax.errors import Refused


def config(workdir: str | os.PathLike) -> Config:
    """What the run was trained with. Raises `Refused` where there is none."""
    kept = pathlib.Path(workdir) / "config.json"
    if not kept.is_file():
        rule = "must be the work directory of a run"
        raise Refused("WORKDIR", str(workdir), rule, "train first")
    return config_lib.read(kept)


def check_same(ours: Config, theirs: Config, field: str, like: str) -> None:
    """Raises `Refused`, naming fields, where the weights of two configs mean different things."""
    other = dataclasses.asdict(theirs.model)
    differ = [
        f"model.{name} = {value} in the run, {other[name]} in {like}"
        for name, value in dataclasses.asdict(ours.model).items()
        if name not in config_lib.BESIDE_WEIGHTS and value != other[name]
    ]
    if differ:
        rule = "must have the sizes and parts of the run"
        raise Refused(field, "; ".join(differ[:3]), rule, "give another folder")


def arrays(workdir: str | os.PathLike) -> tuple[checkpoint.Contents, dict[str, np.ndarray]]:
    """The newest good step, and its parameters by their path in the model.

    The whole step is read, optimizer state and all: three times the parameters on the host.

    Raises:
      Refused: there is no good step.
    """
    found = checkpoint.newest_good(pathlib.Path(workdir) / "checkpoints", metrics.fail)
    if found is None:
        rule = "has no checkpoint"
        raise Refused("WORKDIR", str(workdir), rule, "train at least one interval")
    step, contents = found
    stored = checkpoint.restore_numpy(step, contents)
    return contents, {
        name.removeprefix("model."): array
        for name, array in stored.items()
        if name.startswith("model.")
    }
