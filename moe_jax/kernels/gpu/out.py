"""Values of a warpgroup on their way from registers to memory, a piece of columns at a time."""

from collections.abc import Callable
from typing import Any

from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from moe_jax.kernels.gpu.tiles import PIECE, ROWS, WARPGROUPS, WRITTEN


def scratch(dtype: DTypeLike) -> Any:
    """Pieces of all warpgroups on chip, for `pl.run_scoped`."""
    return plgpu.SMEM((WARPGROUPS, WRITTEN, ROWS, PIECE), dtype)


class Pieces:
    """Those of one tile; waits until those of the last one have been read."""

    def __init__(self, warpgroup: Any):
        self._warpgroup, self._begun = warpgroup, 0
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def write(self, value: Array, written: Any, copy: Callable[[Any], None]) -> None:
        """copy(piece on chip) starts copies and commits them as one group.

        One, if there are no copies as well: who waits for all groups but the last knows that the
        piece before it is free.
        """
        buffer = written.at[self._warpgroup, self._begun % WRITTEN]
        if self._begun >= WRITTEN:
            plgpu.wait_smem_to_gmem(WRITTEN - 1, wait_read_only=True)
        self._begun += 1
        buffer[...] = value.astype(written.dtype)
        plgpu.commit_smem()
        copy(buffer)
