"""Ways: a dispatch, or a dispatch and a combine mode, as one word: `exchange`, `exchange:partial`.

What there is, is read from the config module: a dispatch or a combine mode that is added there is
measured here as well.
"""

import dataclasses

from moe_jax import config as config_lib
from moe_jax.config import Config, ModelConfig
from moe_jax.errors import Refused

NOT_SPREAD = ("local",)  # keeps all experts on one device: nothing travels


def known() -> list[str]:
    """Every dispatch with every combine mode, whether or not they fit together."""
    dispatches = [name for name in config_lib.DISPATCHES if name not in NOT_SPREAD]
    return [f"{way}:{combine}" for way in dispatches for combine in config_lib.COMBINES]


def applied(model: ModelConfig, way: str) -> ModelConfig:
    """The model's config with this way's dispatch and combine mode."""
    dispatch, _, combine = way.partition(":")
    changed = {"dispatch": dispatch, **({"combine": combine} if combine else {})}
    unknown = set(changed) - {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown:
        raise Refused("--dispatch", way, f"there is no model.{unknown.pop()}", "leave it out")
    return dataclasses.replace(model, **changed)


def chosen(words: list[str], config: Config) -> list[str]:
    """The ways to measure; all that this model can do when none are named.

    Args:
      words: of --dispatch.
      config: on the mesh of the box.

    Raises:
      Refused: one that is named cannot be measured, or none can.
    """
    if words:
        for way in words:
            config_lib.validate(dataclasses.replace(config, model=applied(config.model, way)))
            if way.partition(":")[0] in NOT_SPREAD:
                raise Refused("--dispatch", way, "keeps all experts on one device", "leave it out")
        return words
    possible, why = [], None
    for way in known():
        try:
            config_lib.validate(dataclasses.replace(config, model=applied(config.model, way)))
        except Refused as error:
            why = error
            continue
        possible.append(way)
    if why and not possible:
        raise why
    return possible
