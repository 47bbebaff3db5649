"""Configuration: one frozen, validated dataclass made once from a `ConfigDict`.

`from_config_dict` turns what a file in configs/ returns into a `Config`; it refuses unknown fields
(with the nearest known name), wrong types, and every combination that could not run, each as
`Refused(field, value, rule, fix)`, before any device work. Nothing else in the package reads a
`ConfigDict`; math never reads a config at all.

    fields.py     the dataclasses
    building.py   from a ConfigDict or JSON, to JSON, the digest of a run
    rules.py      what must hold between fields
    served.py     another dispatch, other devices
    layer_rules.py  of latent attention and dense layers
    rope_rules.py   of rotary positions
"""

from moe_jax.config.building import (
    complete,
    digest,
    from_config_dict,
    from_json,
    identity,
    read,
    to_json,
    unknown_field,
)
from moe_jax.config.fields import (
    AUTO,
    BESIDE_WEIGHTS,
    COMBINES,
    DISPATCHES,
    MEASURED_COMBINES,
    MEASURED_DISPATCHES,
    MESH_AXES,
    Config,
    DataConfig,
    LatentConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ReplanConfig,
    RopeConfig,
    TrainConfig,
)
from moe_jax.config.rules import (
    check_devices,
    check_seed,
    check_trainable,
    validate,
)
from moe_jax.config.served import served, with_dispatch

__all__ = [
    "AUTO",
    "BESIDE_WEIGHTS",
    "COMBINES",
    "DISPATCHES",
    "MEASURED_COMBINES",
    "MEASURED_DISPATCHES",
    "MESH_AXES",
    "Config",
    "DataConfig",
    "LatentConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ReplanConfig",
    "RopeConfig",
    "TrainConfig",
    "check_devices",
    "check_seed",
    "check_trainable",
    "complete",
    "digest",
    "from_config_dict",
    "from_json",
    "identity",
    "read",
    "served",
    "to_json",
    "unknown_field",
    "validate",
    "with_dispatch",
]
