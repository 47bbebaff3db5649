"""Sliding windows of layers in config.json: `sliding_window`, and which layers have it.

`layer_types` says it layer by layer; where a family has no such key, or a file leaves it out, the
family's rule does, as in the reference implementation.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import Refused
from moe_jax.hf.tables import WindowKeys

_KINDS = {"sliding_attention": True, "full_attention": False}


def read(
    path: pathlib.Path, plain: Mapping[str, Any], keys: WindowKeys, num_layers: Any
) -> tuple[int, ...]:
    """`ModelConfig.windows`: as few entries as say it.

    Args:
      num_layers: as it stands there, at most `MAX_LAYERS`; nonsense is left to the rules of the
        config.

    Raises:
      Refused: naming the key, its value, and what must hold.
    """
    window, first = plain.get("sliding_window"), plain.get("max_window_layers")
    if not isinstance(first, int | None):
        rule = "must be a number of layers"
        raise Refused(f"{path}: max_window_layers", first, rule, "download config.json again")
    if not isinstance(num_layers, int) or not _asked(path, plain, keys, window):
        return ()
    has_window = [keys.has_window(layer, plain) for layer in range(num_layers)]
    if keys.layer_types and (kinds := plain.get("layer_types")) is not None:
        has_window = _kinds(path, kinds, num_layers)
    if not any(has_window):
        return ()
    if type(window) is not int or not 1 <= window < 2**31:
        rule = "must be the number of positions that layers with a window attend to"
        raise Refused(f"{path}: sliding_window", window, rule, "download config.json again")
    return _period([window if has else 0 for has in has_window])


def _asked(path: pathlib.Path, plain: Mapping[str, Any], keys: WindowKeys, window: Any) -> bool:
    if not keys.switch:
        return window is not None or keys.layer_types
    switch = plain.get(keys.switch)
    if not isinstance(switch, bool | None):
        raise Refused(f"{path}: {keys.switch}", switch, "must be true or false", "correct it")
    return bool(switch)


def _kinds(path: pathlib.Path, kinds: Any, num_layers: int) -> list[bool]:
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        rule = f"must be a list of num_hidden_layers = {num_layers} kinds of attention"
        raise Refused(f"{path}: layer_types", kinds, rule, "download config.json again")
    for layer, kind in enumerate(kinds):
        if not isinstance(kind, str) or kind not in _KINDS:
            rule = f"must be one of {', '.join(map(repr, _KINDS))}: others are not supported"
            raise Refused(f"{path}: layer_types[{layer}]", kind, rule, "use another model")
    return [_KINDS[kind] for kind in kinds]


def _period(windows: list[int]) -> tuple[int, ...]:
    """The shortest beginning that, repeated, is the whole."""
    size = len(windows)
    lengths = (n for n in range(1, size + 1) if size % n == 0)
    return next(tuple(windows[:n]) for n in lengths if windows[:n] * (size // n) == windows)
