"""Grouped matmuls of others, for the bench: where they run, and what is said where they do not.

Each is a function (x_ND, w_GDF, sizes_G) -> y_NF that JAX can differentiate.

- `ragged_dot`: `jax.lax.ragged_dot`, on every platform.
- `batched`: one dot of XLA, [G, N / G, D] times [G, D, F], that knows equal groups only: what a
  machine reaches that has to read the weights of G groups, where `dense` reads those of one.
- `megablox`: the Pallas kernel for TPUs that comes with JAX; rows must be multiples of its tile.
- `tokamax`: `tokamax.ragged_dot`, if it is installed; on CPU it only calls `jax.lax.ragged_dot`.
"""

import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.errors import Refused

NAMES = ("ragged_dot", "batched", "megablox", "tokamax")
_MEGABLOX_ROWS = 128
Dot = Callable[[Array, Array, Array], Array]


def opponent(name: str, platform: str, num_rows: int, equal_groups: bool = False) -> Dot:
    """Refused, with the name, where it does not run.

    Args:
      platform: as in `jax.Device.platform`.
      num_rows: of the buffer.
      equal_groups: all groups have as many rows, and fill the buffer, in whatever is asked of it.
    """
    if name not in NAMES:
        rule = f"must be among {', '.join(NAMES)}"
        raise Refused("--opponents", name, rule, "Name some of these")
    if name == "ragged_dot":
        return jax.lax.ragged_dot
    if name == "batched":
        if not equal_groups:
            rule = "knows nothing of groups that differ or leave rows unused"
            raise Refused("--opponents", name, rule, "Take it with g16, g64 and --patterns=uniform")
        return _batched
    if name == "megablox":
        if platform != "tpu":
            rule = f"runs on TPUs, and this is a {platform}"
            raise Refused("--opponents", name, rule, "Leave it out")
        if num_rows % _MEGABLOX_ROWS:
            rule = f"takes multiples of {_MEGABLOX_ROWS} rows, and the buffer has {num_rows}"
            raise Refused("--opponents", name, rule, "Leave it out for this shape")
        from jax.experimental.pallas.ops.tpu.megablox import gmm

        return functools.partial(_megablox, gmm)
    if importlib.util.find_spec("tokamax") is None:
        fix = "pip install tokamax, or leave it out"
        raise Refused("--opponents", name, "is not installed", fix)
    if platform == "cpu":
        rule = "has no kernel for CPUs: it calls jax.lax.ragged_dot there"
        raise Refused("--opponents", name, rule, "Take ragged_dot")
    import tokamax

    return lambda x_ND, w_GDF, sizes_G: tokamax.ragged_dot(x_ND, w_GDF, group_sizes=sizes_G)


def _batched(x_ND: Array, w_GDF: Array, sizes_G: Array) -> Array:
    """The sizes are known."""
    x_GTD = x_ND.reshape(len(sizes_G), -1, x_ND.shape[1])
    return jnp.einsum("gtd,gdf->gtf", x_GTD, w_GDF).reshape(len(x_ND), -1)


def _megablox(gmm: Callable[..., Array], x_ND: Array, w_GDF: Array, sizes_G: Array) -> Array:
    """It leaves rows of no group as they are in memory; ours are zero, and so is this."""
    tiling = (_MEGABLOX_ROWS, min(512, w_GDF.shape[1]), min(512, w_GDF.shape[2]))
    y_NF = gmm(x_ND, w_GDF, sizes_G, x_ND.dtype, tiling)
    used_N = jnp.arange(x_ND.shape[0]) < jnp.sum(sizes_G)
    return jnp.where(used_N[:, None], y_NF, 0)
