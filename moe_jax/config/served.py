"""The config of a model that is served otherwise than it was trained: dispatch, devices."""

import dataclasses
from typing import Any

from moe_jax.config import rules
from moe_jax.config.fields import AUTO, DISPATCHES, MESH_AXES, Config, MeshConfig, ReplanConfig
from moe_jax.errors import Refused


def served(config: Config, dispatch: str | None = None, devices: str | None = None) -> Config:
    """The config to serve with; plans that training would make are not part of it.

    Args:
      config: of a run, or of a published model.
      dispatch: None = the config's.
      devices: "8": experts are split over so many (tokens, where all layers are dense). Or sizes of
        mesh axes, those that are left out being 1: "node=2,expert=4,tensor=2". None = the config's
        mesh. What training asks of batches is made to fit, on a CPU the virtual devices, too.

    Raises:
      Refused: a name or number that is none, or parts that do not go together.
    """
    config = dataclasses.replace(config, replan=ReplanConfig())
    if devices is not None:
        config = _on_mesh(config, _mesh(config, devices))
    if dispatch is not None:
        return with_dispatch(config, dispatch)
    rules.validate(config)
    return config


def with_dispatch(config: Config, dispatch: str) -> Config:
    """The config with another dispatch.

    Raises:
      Refused: there is none of this name, or it does not go with the rest.
    """
    rules.one_of("--dispatch", dispatch, (*DISPATCHES, AUTO))
    model = dataclasses.replace(config.model, dispatch=dispatch)
    config = dataclasses.replace(config, model=model)
    rules.validate(config)
    return config


def _on_mesh(config: Config, mesh: MeshConfig) -> Config:
    def fitting(sequences: int) -> int:
        return -(-sequences // mesh.token_devices) * mesh.token_devices

    data, train = config.data, config.train
    return dataclasses.replace(
        config,
        mesh=mesh,
        virtual_devices=mesh.num_devices if config.platform == "cpu" else 0,
        data=dataclasses.replace(data, global_batch=fitting(data.global_batch)),
        train=dataclasses.replace(train, eval_sequences=fitting(train.eval_sequences)),
    )


def _mesh(config: Config, devices: str) -> MeshConfig:
    plain = "expert" if config.model.num_moe_layers else "data"
    sizes: dict[str, Any] = {}
    for part in (devices if "=" in devices else f"{plain}={devices}").split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in MESH_AXES or axis in sizes or not _is_number(size):
            rule = f"must be a number, or AXIS=NUMBER,... of the axes {', '.join(MESH_AXES)}"
            raise Refused("--devices", devices, rule, "use 8, or node=2,expert=4,tensor=2")
        sizes[axis] = int(size)
    return MeshConfig(**sizes, attention=config.mesh.attention)


def _is_number(size: str) -> bool:
    return size.isascii() and size.isdigit() and len(size) < 10 and int(size) > 0
