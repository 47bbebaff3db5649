"""The Hopper kernels, interpreted on any platform, races looked for: right, slow, for tests."""

from typing import Any

import jax
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.errors import Refused
from moe_jax.kernels import fused, pallas_gpu
from moe_jax.kernels.operands import Kernels

BLOCKS = 2  # of threads: enough for one to be left without work, and few to interpret


def _kernels() -> Kernels:
    if not hasattr(plgpu, "InterpretGPUParams"):
        rule = f"needs a JAX that interprets GPU kernels, 0.12 or newer; this is {jax.__version__}"
        raise Refused("implementation", "pallas_gpu_interpret", rule, "Use Python 3.12 or newer")
    return pallas_gpu.kernels(BLOCKS, plgpu.InterpretGPUParams(detect_races=True))


def matmul(x_ND: Array, *args: Any, **how: Any) -> Array:
    pallas_gpu.check_types(x_ND, *args)
    return fused.matmul(x_ND, *args, **how, kernels=_kernels())


def swiglu(x_ND: Array, *args: Any, **how: Any) -> Array:
    pallas_gpu.check_types(x_ND, *args)
    return fused.swiglu(x_ND, *args, **how, kernels=_kernels())


def ffn(x_ND: Array, *args: Any, **how: Any) -> Array:
    pallas_gpu.check_types(x_ND, *args)
    return fused.ffn(x_ND, *args, **how, kernels=_kernels())
