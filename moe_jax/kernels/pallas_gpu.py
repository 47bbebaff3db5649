"""Grouped operations on Hopper's tensor cores: Pallas kernels (Mosaic GPU) for every pass, fused.

bfloat16 and float16, with sums in float32. `hopper` takes these for what they take, and is the
default on such a GPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.errors import Refused
from moe_jax.kernels import fused
from moe_jax.kernels.gpu import OLDEST_JAX, tiles
from moe_jax.kernels.gpu.columns import grouped_columns
from moe_jax.kernels.gpu.rows import grouped_rows
from moe_jax.kernels.operands import Kernels
from moe_jax.kernels.scaled import Scaled

MULTIPROCESSORS = 132  # of an H100 or H200 (SXM); a GPU with fewer runs the blocks in turns


def kernels(blocks: int, interpret: Any) -> Kernels:
    """Hopper's, in so many blocks of threads; `interpret` as `plgpu.kernel` takes it."""

    def rows(*args: Any) -> list[Array]:
        return grouped_rows(*args, blocks=blocks, interpret=interpret)

    def columns(*args: Any) -> list[Array]:
        return grouped_columns(*args, blocks=blocks, interpret=interpret)

    return Kernels(rows, columns, tiles.padding)


COMPILED = kernels(MULTIPROCESSORS, None)


def check_types(x_ND: Array, *args: Any) -> None:
    """Raises `Refused` for what these kernels do not take."""
    if x_ND.dtype == jnp.float32:
        raise Refused(
            "x_ND.dtype",
            "float32",
            "the pallas_gpu implementation takes bfloat16 and float16: tensor cores would round "
            "float32 to 10 bits",
            "Cast to bfloat16, or pass implementation='cpu', which runs on every platform",
        )
    for w in args:
        if isinstance(w, Scaled):
            rule = f"the pallas_gpu implementation knows no weights in {w.values.dtype.name}"
            fix = "Widen them, or pass implementation='cpu', which runs on every platform"
            raise Refused("implementation", "pallas_gpu", rule, fix)


def _check(x_ND: Array, *args: Any) -> None:
    check_types(x_ND, *args)
    if jax.__version_info__ < OLDEST_JAX:
        rule = (
            f"needs JAX 0.11 or newer, which compiles all of its kernels; this is {jax.__version__}"
        )
        fix = "Use Python 3.12 or newer, or pass implementation='cpu'"
        raise Refused("implementation", "pallas_gpu", rule, fix)
    if isinstance(x_ND, jax.core.Tracer):
        return  # a program that is traced may be compiled for a GPU that is not there
    platforms = {device.platform for device in x_ND.devices()}
    if platforms != {"gpu"}:
        raise Refused(
            "implementation",
            "pallas_gpu",
            f"runs on GPUs, and x_ND lies on {', '.join(sorted(platforms))}",
            "Pass implementation='cpu', which runs on every platform",
        )


matmul, swiglu, ffn = fused.operations(COMPILED, _check)
