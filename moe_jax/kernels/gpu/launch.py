"""How the Hopper kernels are started: persistent blocks of three warpgroups."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.gpu.tiles import WARPGROUPS


def launch(
    kernel: Callable[..., None],
    results: Sequence[jax.ShapeDtypeStruct],
    args: Sequence[Array],
    like: Array,
    *,
    blocks: int,
    interpret: Any,
) -> list[Array]:
    """The results of a kernel that takes references to `args` and to `results`.

    Args:
      like: the results vary over the mesh axes that this array varies over.
      blocks: of threads, axis "sm"; in each the axis "wg" of warpgroups, the last of which copies.
      interpret: as `plgpu.kernel` takes it; None = compiled.
    """
    found = plgpu.kernel(
        kernel,
        out_type=list(results),
        grid=(blocks,),
        grid_names=("sm",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=interpret,
    )(*args)
    return [_varying_like(array, like) for array in found]


def _varying_like(array: Array, like: Array) -> Array:
    """Kernels' results do not say what they vary over."""
    of = lambda a: jax.typeof(a).manual_axis_type.varying  # noqa: E731
    missing = tuple(of(like) - of(array))
    return lax.pcast(array, missing, to="varying") if missing else array
