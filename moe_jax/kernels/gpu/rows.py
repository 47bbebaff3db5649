"""Hopper kernel: rows times the weights of their groups, any number of products, one epilogue.

Promise: what several products share is read once; what follows them (bias, activation, the rows'
weights) is computed while the sums are in registers. Rows of no group are exactly zero in every
result. The bits of a row depend on that row and its group's weights alone.

Axes: N rows, G groups, T rows of a tile, S those of a warpgroup, A the axis that is summed over, B
that of the result, C columns of a tile.

Algorithm: blocks of threads take turns at (item, columns), see work.py. One warpgroup copies tiles
of rows and weights into a ring in shared memory (ring.py); two multiply, S rows each, and write
their own rows out in pieces of 64, 32, .. 1, whatever a group's end leaves of a tile.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe_jax.kernels.gpu import out, ring, tiles
from moe_jax.kernels.gpu import work as items
from moe_jax.kernels.gpu.launch import launch
from moe_jax.kernels.gpu.out import Pieces
from moe_jax.kernels.gpu.tiles import PIECE, ROWS, SUMMED, WARPGROUPS
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
    used_rows, num_sum = operands.lhs[0].shape
    lhs = [items.padded(a) for a in operands.lhs]
    by_both = [items.padded(a.astype(lhs[0].dtype)) for a in operands.by_both]
    weights, num_rows = operands.weights, lhs[0].shape[0]
    num_groups = weights[0].array.shape[0]
    num_out = weights[0].array.shape[1 if weights[0].transposed else 2]
    width, stages = tiles.for_rows(operands, results, num_out)
    phases, slots = tiles.phases(operands)
    steps = pl.cdiv(num_sum, SUMMED)  # of a phase
    work, place_N = items.list_work(group_sizes_G, num_rows, TILE)
    num_items, num_tiles = work.group_W.shape[0], pl.cdiv(num_out, width)
    # read past the end of the rows by the last tile, without the copies that would fill it up
    rows_beyond = 0, num_rows + TILE - used_rows
    by_row = [jnp.pad(a.astype(jnp.float32), rows_beyond) for a in operands.by_row]
    columns_beyond = (0, 0), (0, -num_out % width)
    by_group = [jnp.pad(a.astype(jnp.float32), columns_beyond) for a in operands.by_group]
    counts = [len(work), len(lhs), len(weights), len(by_group), len(by_row), len(by_both)]

    def kernel(*refs):
        *inputs, out_refs = split(refs, counts)
        work = items.Work(*inputs[0])
        lhs_refs, weight_refs, group_refs, row_refs, both_refs = inputs[1:]

        # pieces [T, PIECE] that the epilogue needs follow the products, in the slot for rows
        each_last = [(start, ref) for start in range(0, width, PIECE) for ref in both_refs]

        def scoped(shared, written):
            def turns(one):
                """one(item, tile, group, first row of the tile, steps of a phase, steps before)"""

                def turn(loop, carry):
                    item, tile = work.turn(loop.index[0], num_tiles)
                    group = work.group_W[item]
                    first = pl.multiple_of(work.eighth_W[item] * items.ALIGNED, items.ALIGNED)
                    own_steps = jnp.where(group < num_groups, steps, 0)
                    one(item, tile, group, first, own_steps, carry)
                    all_steps = steps * len(phases) + len(each_last)
                    return carry + jnp.where(group < num_groups, all_steps, 0)

                grid = (work.turns(num_tiles),)
                plgpu.nd_loop(grid, collective_axes="sm", init_carry=jnp.int32(0))(turn)

            def copy_tile(item, tile, group, first, steps, done):
                columns = pl.ds(tile * width, width)
                for phase in phases:

                    def sources(step, phase=phase):
                        along = pl.ds(step * SUMMED, SUMMED)
                        found = [None] * len(slots)
                        for (weight, _), slot in zip(phase.terms, phase.slots, strict=True):
                            turned, ref = weights[weight].transposed, weight_refs[weight].at[group]
                            found[slot] = (
                                ref.at[columns, along] if turned else ref.at[along, columns]
                            )
                        return [lhs_refs[phase.lhs].at[pl.ds(first, TILE), along], *found]

                    done = ring.copy_steps(shared, done, steps, sources)
                for start, ref in each_last:
                    columns = pl.ds(tile * width + start, PIECE)
                    source = ref.at[pl.ds(first, TILE), columns], *[None] * len(slots)
                    once = jnp.minimum(steps, 1)
                    done = ring.copy_steps(shared, done, once, functools.partial(_same, source))

            def compute_tile(item, tile, group, first, steps, done):
                warpgroup = lax.axis_index("wg")
                own = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)
                low, high = work.low_W[item], work.high_W[item]
                rows = pl.ds(first + warpgroup * ROWS, ROWS)

                def of_phase(phase, sums):
                    def multiply(_, blocks):
                        for (weight, place), slot in zip(phase.terms, phase.slots, strict=True):
                            block = blocks[1 + slot]
                            block = block.transpose((1, 0)) if weights[weight].transposed else block
                            plgpu.wgmma(sums[place], blocks[0].at[own], block)

                    return steps, multiply

                def finish(sums, start):
                    shape = ROWS, PIECE
                    columns = pl.ds(tile * width + start, PIECE)

                    def spread(ref, axis):
                        # said, because the compiler's search for layouts may take minutes
                        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
                        vector = plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]
                        return lax.broadcast_in_dim(vector, shape, (axis,))

                    def of_both(slots):
                        return plgpu.load(slots[0].at[own], layout=plgpu.Layout.WGMMA)  # type: ignore[call-arg]

                    by_group = [spread(ref.at[group, columns], 1) for ref in group_refs]
                    by_row = [spread(ref.at[rows], 0) for ref in row_refs]
                    before = done + len(phases) * steps + start // PIECE * len(both_refs)
                    by_both = [
                        ring.use_step(shared, before + i, of_both).astype(jnp.float32)
                        for i in range(len(both_refs))
                    ]
                    pieces = [a[:, start : start + PIECE] for a in sums]
                    return epilogue(pieces, by_group, by_row, by_both)

                def write(values_of):
                    """values_of(first column of a piece) -> a value [S, PIECE] for each result"""
                    row_sums: list[Any] = [0.0] * len(results)
                    pieces = Pieces(warpgroup)
                    for start in range(0, width, PIECE):
                        target = pl.ds(tile * width + start, PIECE), first, low, high, warpgroup
                        for i, value in enumerate(values_of(start)):
                            if results[i].row_sum:  # beyond the last column products are with zeros
                                row_sums[i] += jnp.sum(value, axis=1)
                                continue
                            buffers = written[jnp.dtype(results[i].dtype)]
                            copy = functools.partial(_copy_rows, out_refs[i], *target)
                            pieces.write(value, buffers, copy)
                    for ref, value, result in zip(out_refs, row_sums, results, strict=True):
                        if result.row_sum:
                            ref[tile, item, own] = value

                def with_sums(use):
                    sums = [plgpu.ACC((ROWS, width), jnp.float32) for _ in operands.products]
                    pl.run_scoped(lambda *refs: use(refs), *sums)

                def multiplied(refs):
                    ring.use_steps(shared, done, [of_phase(phase, refs) for phase in phases])
                    sums = [ref[...] for ref in refs]
                    write(functools.partial(finish, sums))

                def nothing(refs):  # sums begin with zero
                    zero = refs[0][...]
                    write(lambda start: [zero[:, start : start + PIECE]] * len(results))

                start = warpgroup * ROWS
                idle = (high <= start) | (low >= start + ROWS)
                of_group = group < num_groups
                pl.when(of_group & ~idle)(lambda: with_sums(multiplied))
                pl.when(of_group & idle)(
                    lambda: ring.pass_steps(shared, done, steps * len(phases) + len(each_last))
                )
                pl.when(~of_group & ~idle)(lambda: with_sums(nothing))

            def compute():
                turns(compute_tile)
                plgpu.wait_smem_to_gmem(0)

            ring.run(lambda: turns(copy_tile), compute)

        blocks = [(width, SUMMED) if turned else (SUMMED, width) for turned in slots]
        dtypes = {jnp.dtype(r.dtype) for r in results if not r.row_sum}
        pl.run_scoped(
            scoped,
            ring.scratch([(TILE, SUMMED), *blocks], stages, lhs[0].dtype),
            {dtype: out.scratch(dtype) for dtype in dtypes},
            collective_axes="wg",
        )

    shapes = [(num_tiles, num_items, TILE) if r.row_sum else (num_rows, num_out) for r in results]
    shaped = [
        jax.ShapeDtypeStruct(shape, result.dtype)
        for shape, result in zip(shapes, results, strict=True)
    ]
    args = [*work, *lhs, *(w.array for w in weights), *by_group, *by_row, *by_both]
    found = launch(kernel, shaped, args, lhs[0], blocks=blocks, interpret=interpret)
    used_N = jnp.arange(used_rows, dtype=jnp.int32) < jnp.sum(group_sizes_G)

    def summed(parts: Array) -> Array:
        """[N]: of the sums [tiles of columns, items, T] those of rows of groups."""
        sums_N = jnp.sum(parts, axis=0).reshape(-1)[place_N[:used_rows]]
        return jnp.where(used_N, sums_N, 0.0)

    return [summed(a) if r.row_sum else a[:used_rows] for a, r in zip(found, results, strict=True)]


def _copy_rows(ref, columns, first, low, high, warpgroup, smem) -> None:
    """Rows low <= i < high of the tile, as far as this warpgroup has them, to row first + i."""
    start = warpgroup * ROWS
    low = jnp.clip(low - start, 0, ROWS)
    count = jnp.clip(high - start, 0, ROWS) - low
    for size in (64, 32, 16, 8, 4, 2, 1):  # sizes of copies are fixed: the binary digits of count

        @pl.when((count & size) != 0)
        def _(size=size):
            row = low + (count & ~(2 * size - 1))
            rows = pl.ds(first + start + row, size)
            source, target = smem.at[pl.ds(row, size)], ref.at[rows, columns]
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)

    plgpu.commit_smem_to_gmem_group()


def _same(sources: Sequence[Any], _: Any) -> Sequence[Any]:
    """In whatever step."""
    return sources
