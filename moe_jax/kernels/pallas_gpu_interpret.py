"""The Hopper kernels, interpreted on any platform, races looked for: right, slow, for tests."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.errors import Refused
from moe_jax.kernels import fused, pallas_gpu

BLOCKS = 2  # of threads: enough for one to be left without work, and few to interpret

_params = getattr(plgpu, "InterpretGPUParams", None)
INTERPRETED = pallas_gpu.kernels(BLOCKS, _params and _params(detect_races=True))


def _check(*arrays: Any) -> None:
    pallas_gpu.check_types(*arrays)
    if _params is None:
        rule = f"needs a JAX that interprets GPU kernels, 0.12 or newer; this is {jax.__version__}"
        raise Refused("implementation", "pallas_gpu_interpret", rule, "Use Python 3.12 or newer")


matmul, swiglu, ffn = fused.operations(INTERPRETED, _check)
