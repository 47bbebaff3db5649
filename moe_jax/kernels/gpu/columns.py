"""Hopper kernel for gradients of weights: dw[g] = x^T @ dy over the rows of g.

Promise: dw of an empty group is exactly zero; rows of other groups, and of none, may hold anything.

Axes: N rows, D width of x, F width of dy, G groups, S rows of a step.

Algorithm: blocks of threads take turns at (group, tile of dw). One warpgroup copies tiles of S rows
of x and dy into shared memory, from the multiple of 8 before the group's first row on; two
multiply, 64 rows of dw each. Where a step has rows of others, first or last, these are overwritten
with zeros in both tiles before they are multiplied: a NaN of another group goes nowhere.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from moe_jax.kernels.gpu import tiles
from moe_jax.kernels.gpu.launch import launch
from moe_jax.kernels.gpu.tiles import ROWS, SUMMED, WARPGROUPS
from moe_jax.kernels.gpu.work import ALIGNED

TILE_D = WARPGROUPS * ROWS


def grouped_columns(
    kind: str,
    x_ND: Array,
    dys: Sequence[Array],
    group_sizes_G: Array,
    dtype: DTypeLike,
    *,
    blocks: int,
    interpret: Any,
) -> list[Array]:
    """dw [G, D, F] for each dy [N, F], a kernel for each; arguments as of `grouped_rows`."""
    return [_one(x_ND, dy, group_sizes_G, dtype, blocks, interpret) for dy in dys]


def _one(
    x_ND: Array, dy_NF: Array, group_sizes_G: Array, dtype: DTypeLike, blocks: int, interpret: Any
) -> Array:
    d_model, d_ff = x_ND.shape[1], dy_NF.shape[1]
    x_ND, dy_NF = (jnp.pad(a, ((0, 0), (0, tiles.padding(a.shape[1])))) for a in (x_ND, dy_NF))
    (num_rows, padded_d), padded_f = x_ND.shape, dy_NF.shape[1]
    num_groups = group_sizes_G.shape[0]
    width, stages = tiles.for_columns(padded_f, x_ND.dtype.itemsize, jnp.dtype(dtype).itemsize)
    piece = tiles.piece(width)
    tiles_d, tiles_f = pl.cdiv(padded_d, TILE_D), pl.cdiv(padded_f, width)
    ends_G = jnp.minimum(jnp.cumsum(group_sizes_G.astype(jnp.int32)), num_rows)
    starts_G = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_G[:-1]])

    def kernel(starts, ends, x_ref, dy_ref, out_ref):
        def pipeline(steps, body, context):
            return plgpu.emit_pipeline_warp_specialized(
                body,
                grid=(steps,),
                memory_registers=40,
                in_specs=[
                    plgpu.BlockSpec((SUMMED, TILE_D), lambda k: (k, 0)),
                    plgpu.BlockSpec((SUMMED, width), lambda k: (k, 0)),
                ],
                wg_axis="wg",
                num_compute_wgs=WARPGROUPS,
                max_concurrent_steps=stages,
                compute_context=context,
            )

        def whole(tile_refs, written, both_masked):
            warpgroup = lax.axis_index("wg")
            own = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)

            def one(loop):
                (turn,) = loop.index
                group, tile = lax.div(turn, tiles_d * tiles_f), lax.rem(turn, tiles_d * tiles_f)
                tile_d, tile_f = lax.div(tile, tiles_f), lax.rem(tile, tiles_f)
                start, end = starts[group], ends[group]
                first = pl.multiple_of(lax.div(start, ALIGNED) * ALIGNED, ALIGNED)
                steps = lax.div(end - first + SUMMED - 1, SUMMED)
                in_d, in_f = pl.ds(tile_d * TILE_D, TILE_D), pl.ds(tile_f * width, width)

                def write(value):
                    rows = pl.ds(tile_d * TILE_D + warpgroup * ROWS, ROWS)
                    for column in range(0, width, piece):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        written[warpgroup] = value[:, column : column + piece].astype(dtype)
                        plgpu.commit_smem()
                        columns = pl.ds(tile_f * width + column, piece)
                        plgpu.copy_smem_to_gmem(
                            written.at[warpgroup], out_ref.at[group, rows, columns]
                        )

                def with_sum(use):
                    pl.run_scoped(use, plgpu.ACC((ROWS, width), jnp.float32))

                def context(run):
                    def multiply(sum_ref):
                        run(sum_ref)
                        write(sum_ref[...])

                    with_sum(multiply)

                def step(indices, x_block, dy_block, sum_ref):
                    row = first + indices[0] * SUMMED

                    @pl.when((row < start) | (row + SUMMED > end))
                    def _():
                        for index, block in enumerate((x_block, dy_block)):

                            @pl.when(warpgroup == index)
                            def _(block=block):
                                _mask(block, row, start, end)

                        plgpu.commit_smem()
                        plgpu.barrier_arrive(both_masked)
                        plgpu.barrier_wait(both_masked)

                    plgpu.wgmma(sum_ref, x_block.at[:, own].transpose((1, 0)), dy_block)
                    plgpu.wgmma_wait(0)
                    return sum_ref

                @pl.when(start < end)
                def _():
                    rows = pl.ds(first, num_rows)  # not read beyond the group's steps
                    pipeline(steps, step, context)(
                        x_ref.at[rows, in_d], dy_ref.at[rows, in_f], allocations=tile_refs
                    )

                @pl.when((start == end) & (warpgroup < WARPGROUPS))
                def _():
                    with_sum(lambda sum_ref: write(sum_ref[...]))  # sums begin with zero

            plgpu.nd_loop((num_groups * tiles_d * tiles_f,), collective_axes="sm")(one)
            plgpu.wait_smem_to_gmem(0)

        steps = lax.div(ends[0], SUMMED)  # of any number, known when the kernel runs
        nothing = pipeline(steps, lambda *_: None, lambda _: None)
        pl.run_scoped(
            whole,
            nothing.get_allocations(x_ref, dy_ref),
            plgpu.SMEM((WARPGROUPS, ROWS, piece), dtype),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            collective_axes="wg",
        )

    shaped = [jax.ShapeDtypeStruct((num_groups, padded_d, padded_f), dtype)]
    args = [starts_G, ends_G, x_ND, dy_NF]
    (dw_GDF,) = launch(kernel, shaped, args, x_ND, blocks=blocks, interpret=interpret)
    return dw_GDF[:, :d_model, :d_ff]


def _mask(block, row, start, end) -> None:
    """Zero in the rows of a tile, `row` the first of them, that are not start <= i < end."""
    value = block[...]
    rows = row + plgpu.broadcasted_iota(jnp.int32, value.shape, 0, layout=plgpu.Layout.WGMMA)
    block[...] = jnp.where((rows >= start) & (rows < end), value, jnp.zeros_like(value))
