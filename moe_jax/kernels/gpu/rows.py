"""Hopper kernel: rows times the weights of their groups, any number of products, one epilogue.

Promise: what several products share is read once; what follows them (bias, activation, the rows'
weights) is computed while the sums are in registers. Rows of no group are exactly zero in every
result. The bits of a row depend on that row and its group's weights alone.

Axes: N rows, G groups, T rows of a tile, S those of a warpgroup, A the axis that is summed over, B
that of the result, C columns of a tile.

Algorithm: blocks of threads take turns at (item, columns), see work.py. One warpgroup copies tiles
of rows and weights into shared memory, some steps ahead; two multiply, S rows each, and write their
own rows out in pieces of 64, 32, .. 1, whatever a group's end leaves of a tile.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.gpu import tiles
from moe_jax.kernels.gpu import work as items
from moe_jax.kernels.gpu.launch import launch
from moe_jax.kernels.gpu.tiles import ROWS, SUMMED, WARPGROUPS
from moe_jax.kernels.operands import Epilogue, Operands, Result, split

TILE = WARPGROUPS * ROWS


def grouped_rows(
    kind: str,
    operands: Operands,
    group_sizes_G: Array,
    epilogue: Epilogue,
    results: Sequence[Result],
    *,
    blocks: int,
    interpret: Any,
) -> list[Array]:
    """Results [N, B], or [N] for sums of rows.

    Args:
      kind: names the operation, as on TPUs; tiles do not depend on it here.
      blocks: of threads, one for each multiprocessor.
      interpret: what `plgpu.kernel` takes.
    """
    if operands.by_both:
        return _epilogue_outside(
            kind, operands, group_sizes_G, epilogue, results, blocks=blocks, interpret=interpret
        )
    lhs, weights, products, by_group, by_row, _ = operands
    num_rows, num_sum = lhs[0].shape
    num_groups = weights[0].array.shape[0]
    num_out = weights[0].array.shape[1 if weights[0].transposed else 2]
    width, stages = tiles.for_rows(operands, results, num_out)
    piece = tiles.piece(width)
    work, place_N = items.list_work(group_sizes_G, num_rows, TILE)
    num_items, num_tiles = work.group_W.shape[0], pl.cdiv(num_out, width)
    # read past the end of the rows by the last tile, without the copies that would fill it up
    by_row = [jnp.pad(a.astype(jnp.float32), (0, TILE)) for a in by_row]
    by_group = [jnp.pad(a.astype(jnp.float32), ((0, 0), (0, -num_out % width))) for a in by_group]
    counts = [len(work), len(lhs), len(weights), len(by_group), len(by_row)]

    def pipeline(body, context):
        def spec(shape, along):
            place = (lambda k: (0, k)) if along else (lambda k: (k, 0))
            return plgpu.BlockSpec(shape, place)

        rows = [spec((TILE, SUMMED), 1) for _ in lhs]
        columns = [
            spec((width, SUMMED), 1) if w.transposed else spec((SUMMED, width), 0) for w in weights
        ]
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(pl.cdiv(num_sum, SUMMED),),
            memory_registers=40,
            in_specs=[*rows, *columns],
            wg_axis="wg",
            num_compute_wgs=WARPGROUPS,
            max_concurrent_steps=stages,
            compute_context=context,
        )

    def kernel(*refs):
        *inputs, out_refs = split(refs, counts)
        work = items.Work(*inputs[0])
        lhs_refs, weight_refs, group_refs, row_refs = inputs[1:]
        nothing = pipeline(lambda *_: None, lambda _: None)

        def whole(tile_refs, written):
            warpgroup = lax.axis_index("wg")
            own = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)

            def one(loop):
                (turn,) = loop.index
                item, tile = lax.div(turn, num_tiles), lax.rem(turn, num_tiles)
                group, low, high = work.group_W[item], work.low_W[item], work.high_W[item]
                first = pl.multiple_of(work.eighth_W[item] * items.ALIGNED, items.ALIGNED)
                columns = pl.ds(tile * width, width)

                def write(values):
                    for ref, value, result in zip(out_refs, values, results, strict=True):
                        if result.row_sum:  # beyond the last column products are with zeros
                            ref[tile, item, own] = jnp.sum(value, axis=1)
                            continue
                        smem = written[jnp.dtype(result.dtype)].at[warpgroup]
                        for start in range(0, width, piece):
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            smem[...] = value[:, start : start + piece].astype(result.dtype)
                            plgpu.commit_smem()
                            columns = pl.ds(tile * width + start, piece)
                            _copy_rows(smem, ref, columns, first, low, high, warpgroup)

                def finish(sum_refs):
                    shape = (ROWS, width)

                    def spread(vector, axis):
                        # said, because the compiler's search for layouts may take minutes
                        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
                        vector = plgpu.layout_cast(vector, layout)
                        return lax.broadcast_in_dim(vector, shape, (axis,))

                    shared = [spread(ref[group, columns], 1) for ref in group_refs]
                    rows = pl.ds(first + warpgroup * ROWS, ROWS)
                    each = [spread(ref[rows], 0) for ref in row_refs]
                    sums = [ref[...] for ref in sum_refs]
                    return epilogue(sums, shared, each, [])

                def with_sums(use):
                    sums = [plgpu.ACC((ROWS, width), jnp.float32) for _ in products]
                    pl.run_scoped(lambda *refs: use(refs), *sums)

                def context(run):
                    def multiply(refs):
                        run(refs)
                        write(finish(refs))

                    with_sums(multiply)

                def step(_, *arrays):
                    *blocks, sums = arrays
                    for ref, terms in zip(sums, products, strict=True):
                        for i, j in terms:
                            block = blocks[len(lhs) + j]
                            if weights[j].transposed:
                                block = block.transpose((1, 0))
                            plgpu.wgmma(ref, blocks[i].at[own], block)
                    plgpu.wgmma_wait(0)
                    return sums

                def of_columns(ref, weight):
                    ref = ref.at[group]
                    return ref.at[columns] if weight.transposed else ref.at[:, columns]

                @pl.when((group < num_groups) & (low < high))
                def _():
                    pipeline(step, context)(
                        *(ref.at[pl.ds(first, TILE)] for ref in lhs_refs),
                        *(of_columns(*pair) for pair in zip(weight_refs, weights, strict=True)),
                        allocations=tile_refs,
                    )

                @pl.when((group == num_groups) & (low < high) & (warpgroup < WARPGROUPS))
                def _():
                    # sums begin with zero
                    with_sums(lambda refs: write([refs[0][...] for _ in results]))

            plgpu.nd_loop((num_items * num_tiles,), collective_axes="sm")(one)
            plgpu.wait_smem_to_gmem(0)

        dtypes = {jnp.dtype(r.dtype) for r in results if not r.row_sum}
        pl.run_scoped(
            whole,
            nothing.get_allocations(*lhs_refs, *(ref.at[0] for ref in weight_refs)),
            {dtype: plgpu.SMEM((WARPGROUPS, ROWS, piece), dtype) for dtype in dtypes},
            collective_axes="wg",
        )

    shapes = [(num_tiles, num_items, TILE) if r.row_sum else (num_rows, num_out) for r in results]
    shaped = [
        jax.ShapeDtypeStruct(shape, result.dtype)
        for shape, result in zip(shapes, results, strict=True)
    ]
    args = [*work, *lhs, *(w.array for w in weights), *by_group, *by_row]
    found = launch(kernel, shaped, args, lhs[0], blocks=blocks, interpret=interpret)
    used_N = jnp.arange(num_rows, dtype=jnp.int32) < jnp.sum(group_sizes_G)

    def summed(parts: Array) -> Array:
        """[N]: of the sums [tiles of columns, items, T] those of rows of groups."""
        sums_N = jnp.sum(parts, axis=0).reshape(-1)[place_N]
        return jnp.where(used_N, sums_N, 0.0)

    return [summed(a) if r.row_sum else a for a, r in zip(found, results, strict=True)]


def _copy_rows(smem, ref, columns, first, low, high, warpgroup) -> None:
    """Rows low <= i < high of the tile, as far as this warpgroup has them, to row first + i."""
    start = warpgroup * ROWS
    low = jnp.clip(low - start, 0, ROWS)
    count = jnp.clip(high - start, 0, ROWS) - low
    for size in (64, 32, 16, 8, 4, 2, 1):  # sizes of copies are fixed: the binary digits of count

        @pl.when((count & size) != 0)
        def _(size=size):
            row = low + (count & ~(2 * size - 1))
            rows = pl.ds(first + start + row, size)
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(row, size)], ref.at[rows, columns])


def _epilogue_outside(
    kind: str,
    operands: Operands,
    group_sizes_G: Array,
    epilogue: Epilogue,
    results: Sequence[Result],
    **how: Any,
) -> list[Array]:
    """The same with sums written out in float32: nothing of size [N, B] is read by the kernel."""
    num_rows = operands.lhs[0].shape[0]
    sums = grouped_rows(
        f"{kind}_sums",
        operands._replace(by_group=[], by_row=[], by_both=[]),
        group_sizes_G,
        lambda sums, *_: sums,
        [Result(jnp.float32) for _ in operands.products],
        **how,
    )
    ends_G = jnp.cumsum(group_sizes_G)
    row_N = jnp.arange(num_rows, dtype=jnp.int32)
    group_N = jnp.minimum(jnp.searchsorted(ends_G, row_N, side="right"), ends_G.shape[0] - 1)
    shared = [a.astype(jnp.float32)[group_N] for a in operands.by_group]
    each = [a.astype(jnp.float32)[:, None] for a in operands.by_row]
    both = [a.astype(jnp.float32) for a in operands.by_both]
    used_N1 = (row_N < ends_G[-1])[:, None]
    values = [jnp.where(used_N1, v, 0.0) for v in epilogue(sums, shared, each, both)]
    return [
        jnp.sum(v, axis=1) if r.row_sum else v.astype(r.dtype)
        for v, r in zip(values, results, strict=True)
    ]
