"""The TPU kernels, interpreted step by step on any platform: right, slow, for tests."""

from typing import Any

from jax import Array

from moe_jax.kernels import fused, pallas_tpu

INTERPRETED = pallas_tpu.kernels(interpret=True)


def matmul(x_ND: Array, *args: Any, **how: Any) -> Array:
    pallas_tpu.check_dtype(x_ND)
    return fused.matmul(x_ND, *args, **how, kernels=INTERPRETED)


def swiglu(x_ND: Array, *args: Any, **how: Any) -> Array:
    pallas_tpu.check_dtype(x_ND)
    return fused.swiglu(x_ND, *args, **how, kernels=INTERPRETED)


def ffn(x_ND: Array, *args: Any, **how: Any) -> Array:
    pallas_tpu.check_dtype(x_ND)
    return fused.ffn(x_ND, *args, **how, kernels=INTERPRETED)
