"""The TPU kernels, interpreted step by step on any platform: right, slow, for tests."""

from moe_jax.kernels import fused, pallas_tpu

INTERPRETED = pallas_tpu.kernels(interpret=True)

matmul, swiglu, ffn = fused.operations(INTERPRETED, pallas_tpu.check_dtype)
