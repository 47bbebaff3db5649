"""Grouped operations on a Hopper GPU, by what they are given; the default there.

bfloat16 and float16 run in the kernels for its tensor cores (`pallas_gpu`); float32, which those
would round, and weights in 8 bits in plain JAX (`cpu`), which is right there and not fast. Which of
the two it is depends on dtypes alone.
"""

from types import ModuleType
from typing import Any

import jax.numpy as jnp
from jax import Array

from moe_jax.errors import Refused
from moe_jax.kernels import cpu, pallas_gpu
from moe_jax.kernels.scaled import Scaled


def chosen(x_ND: Array, *args: Any) -> ModuleType:
    """For rows, and weights among the other arguments."""
    narrow = any(isinstance(w, Scaled) for w in args)
    return cpu if x_ND.dtype == jnp.float32 or narrow else pallas_gpu


def matmul(*args: Any, **how: Any) -> Array:
    return chosen(*args).matmul(*args, **how)


def swiglu(*args: Any, **how: Any) -> Array:
    module = chosen(*args)
    return module.swiglu(*args, **_able(module, how))


def ffn(*args: Any, **how: Any) -> Array:
    module = chosen(*args)
    return module.ffn(*args, **_able(module, how))


def _able(module: ModuleType, how: dict[str, Any]) -> dict[str, Any]:
    if module is cpu and how.get("store"):
        rule = "is for bfloat16 and float16 without scales on this GPU"
        raise Refused("pre_activations", "store", rule, "Pass 'recompute'")
    return how
