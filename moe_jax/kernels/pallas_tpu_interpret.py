"""The TPU kernels, interpreted step by step on any platform: right, slow, for tests."""

import functools

from moe_jax.kernels import pallas_tpu

matmul = functools.partial(pallas_tpu.matmul, interpret=True)
swiglu = functools.partial(pallas_tpu.swiglu, interpret=True)
ffn = functools.partial(pallas_tpu.ffn, interpret=True)
