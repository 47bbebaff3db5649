"""Grouped operations on the TPU's matrix unit: Pallas kernels for every pass, fused.

Compiled for TPUs ahead of time and right in interpret mode; never timed on hardware.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.errors import Refused
from moe_jax.kernels import fused
from moe_jax.kernels.operands import Kernels
from moe_jax.kernels.tpu import tiles
from moe_jax.kernels.tpu.columns import grouped_columns
from moe_jax.kernels.tpu.rows import grouped_rows


def kernels(interpret: bool) -> Kernels:
    """The TPU's; `interpret`: step by step on any platform."""
    rows = functools.partial(grouped_rows, interpret=interpret)
    columns = functools.partial(grouped_columns, interpret=interpret)
    return Kernels(rows, columns, tiles.padding)


COMPILED = kernels(interpret=False)


def check_dtype(x_ND: Array, *_: Any) -> None:
    """Raises `Refused` for what these kernels do not take."""
    if x_ND.dtype == jnp.float16:
        raise Refused(
            "x_ND.dtype",
            "float16",
            "the pallas_tpu implementation takes float32 and bfloat16",
            "Cast to bfloat16, or pass implementation='cpu', which runs on every platform",
        )


def _check(x_ND: Array, *_: Any) -> None:
    check_dtype(x_ND)
    if isinstance(x_ND, jax.core.Tracer):
        return  # a program that is traced may be compiled for a TPU that is not there
    platforms = {device.platform for device in x_ND.devices()}
    if platforms != {"tpu"}:
        raise Refused(
            "implementation",
            "pallas_tpu",
            f"runs on TPUs, and x_ND lies on {', '.join(sorted(platforms))}",
            "Pass implementation='cpu', which runs on every platform, or 'pallas_tpu_interpret'",
        )


matmul, swiglu, ffn = fused.operations(COMPILED, _check)
