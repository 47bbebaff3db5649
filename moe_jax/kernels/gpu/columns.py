"""Hopper kernel for gradients of weights: dw[g] = x^T @ dy over the rows of g.

Promise: dw of an empty group is exactly zero; rows of other groups, and of none, may hold anything.

Axes: N rows, D width of x, F width of dy, G groups, S rows of a step.

Algorithm: blocks of threads take turns at (group, tile of dw). One warpgroup copies tiles of S rows
of x and dy into shared memory, from the multiple of 8 before the group's first row on; two
multiply, 64 rows of dw each. Where a step has rows of others, first or last, these are overwritten
with zeros in both tiles before they are multiplied: a NaN of another group goes nowhere.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from moe_jax.kernels.gpu import out, ring, tiles
from moe_jax.kernels.gpu.launch import launch
from moe_jax.kernels.gpu.out import Pieces
from moe_jax.kernels.gpu.tiles import PIECE, ROWS, SUMMED, WARPGROUPS
from moe_jax.kernels.gpu.work import ALIGNED, padded

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
    x_ND, dy_NF = (padded(_with_columns(a)) for a in (x_ND, dy_NF))
    (num_rows, padded_d), padded_f = x_ND.shape, dy_NF.shape[1]
    num_groups = group_sizes_G.shape[0]
    width, stages = tiles.for_columns(padded_f, x_ND.dtype.itemsize, jnp.dtype(dtype).itemsize)
    tiles_d, tiles_f = pl.cdiv(padded_d, TILE_D), pl.cdiv(padded_f, width)
    ends_G = jnp.minimum(jnp.cumsum(group_sizes_G.astype(jnp.int32)), num_rows)
    starts_G = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_G[:-1]])

    def kernel(starts, ends, x_ref, dy_ref, out_ref):
        def scoped(shared, written, both_masked):
            def turns(one):
                """one(group, tile of D, tile of F, first row, steps, steps before)"""

                def turn(loop, carry):
                    (index,) = loop.index
                    group, tile = (
                        lax.div(index, tiles_d * tiles_f),
                        lax.rem(index, tiles_d * tiles_f),
                    )
                    start, end = starts[group], ends[group]
                    first = pl.multiple_of(lax.div(start, ALIGNED) * ALIGNED, ALIGNED)
                    steps = lax.div(end - first + SUMMED - 1, SUMMED)
                    steps = jnp.where(start < end, steps, 0)
                    tile_d, tile_f = lax.div(tile, tiles_f), lax.rem(tile, tiles_f)
                    one(group, tile_d, tile_f, first, steps, carry)
                    return carry + steps

                grid = (num_groups * tiles_d * tiles_f,)
                plgpu.nd_loop(grid, collective_axes="sm", init_carry=jnp.int32(0))(turn)

            def copy_tile(group, tile_d, tile_f, first, steps, done):
                in_d, in_f = pl.ds(tile_d * TILE_D, TILE_D), pl.ds(tile_f * width, width)

                def sources(step):
                    rows = pl.ds(first + step * SUMMED, SUMMED)
                    return x_ref.at[rows, in_d], dy_ref.at[rows, in_f]

                ring.copy_steps(shared, done, steps, sources)

            def compute_tile(group, tile_d, tile_f, first, steps, done):
                warpgroup = lax.axis_index("wg")
                own = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)
                start, end = starts[group], ends[group]

                def multiply(sum_ref, step, blocks):
                    row = first + step * SUMMED

                    @pl.when((row < start) | (row + SUMMED > end))
                    def _():
                        for index, block in enumerate(blocks):
                            pl.when(warpgroup == index)(
                                functools.partial(_mask, block, row, start, end)
                            )
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(both_masked)
                        plgpu.barrier_wait(both_masked)

                    x_block, dy_block = blocks
                    plgpu.wgmma(sum_ref, x_block.at[:, own].transpose((1, 0)), dy_block)

                def write(sums):
                    rows = pl.ds(tile_d * TILE_D + warpgroup * ROWS, ROWS)
                    pieces = Pieces(warpgroup)
                    for start in range(0, width, PIECE):
                        target = out_ref.at[group, rows, pl.ds(tile_f * width + start, PIECE)]
                        value = sums[:, start : start + PIECE]
                        pieces.write(value, written, functools.partial(_copy, target))

                def whole(sum_ref):  # sums begin with zero
                    phase = steps, functools.partial(multiply, sum_ref)
                    ring.use_steps(shared, done, [phase])
                    write(sum_ref[...])

                pl.run_scoped(whole, plgpu.ACC((ROWS, width), jnp.float32))

            def compute():
                turns(compute_tile)
                plgpu.wait_smem_to_gmem(0)

            ring.run(lambda: turns(copy_tile), compute)

        pl.run_scoped(
            scoped,
            ring.scratch([(SUMMED, TILE_D), (SUMMED, width)], stages, x_ND.dtype),
            out.scratch(dtype),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            collective_axes="wg",
        )

    shaped = [jax.ShapeDtypeStruct((num_groups, padded_d, padded_f), dtype)]
    args = [starts_G, ends_G, x_ND, dy_NF]
    (dw_GDF,) = launch(kernel, shaped, args, x_ND, blocks=blocks, interpret=interpret)
    return dw_GDF[:, :d_model, :d_ff]


def _with_columns(x_ND: Array) -> Array:
    return jnp.pad(x_ND, ((0, 0), (0, tiles.padding(x_ND.shape[1]))))


def _mask(block, row, start, end) -> None:
    """Zero in the rows of a tile, `row` the first of them, that are not start <= i < end."""
    value = block[...]
    rows = row + plgpu.broadcasted_iota(jnp.int32, value.shape, 0, layout=plgpu.Layout.WGMMA)
    block[...] = jnp.where((rows >= start) & (rows < end), value, jnp.zeros_like(value))


def _copy(target, piece) -> None:
    plgpu.copy_smem_to_gmem(piece, target)
