"""TPU kernel: rows times the weights of their groups, any number of products, one epilogue.

Promise: what several products share is read once; what follows them (bias, activation, the rows'
weights, scales of narrow weights) is computed while the tile is on chip. Rows of no group are
exactly zero in every result.

Axes: N rows, G groups, T rows of a tile, S rows of a part of it, A the axis that is summed over,
B the axis of the result.

Algorithm: a work item is (group, tile of rows), see work.py. Where the summed axis is whole,
weights stay on chip while the tiles of their group pass, and no sum is kept. A tile inside its
group is one product; at a group's edge only the parts of S rows that the group touches are
computed, and its own rows written over what the neighbours left.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moe_jax.kernels.operands import Epilogue, Operands, Result, split
from moe_jax.kernels.tpu import cost, tiles
from moe_jax.kernels.tpu import work as items
from moe_jax.kernels.tpu.cost import PART_ROWS


def grouped_rows(
    kind: str,
    operands: Operands,
    group_sizes_G: Array,
    epilogue: Epilogue,
    results: Sequence[Result],
    interpret: bool,
) -> list[Array]:
    """Results [N, B], or [N] for sums of rows; `kind` names the operation in the table of tiles."""
    # float16, which the chips do not know, stays outside of the kernel
    asked, results = results, [_on_chip(result) for result in results]
    operands = operands._replace(
        by_group=[a.astype(jnp.float32) for a in operands.by_group],
        by_row=[a.astype(jnp.float32) for a in operands.by_row],
    )
    lhs, weights, products, by_group, by_row, by_both = operands
    num_rows, num_sum = lhs[0].shape
    num_groups, num_out = weights[0].array.shape[0], cost.width(operands)
    tile = tiles.for_rows(kind, operands, results)
    tile_rows, tile_sum, tile_out, tile_chunk = tile
    steps, num_tiles = num_sum // tile_sum, pl.cdiv(num_out, tile_out)
    work = items.with_unused(group_sizes_G, num_rows, tile_rows)
    counts = [len(work), len(lhs), len(weights), len(by_group), len(by_row), len(by_both)]

    def kernel(*refs):
        *inputs, out_refs, sum_refs = split(refs, [*counts, len(results)])
        work = items.Work(*inputs[0])
        out, item, step = (pl.program_id(i) for i in range(3))
        start, end = work.rows(item, tile_rows)
        whole = (start == 0) & (end == tile_rows)

        def write(rows, size, columns, values, masked):
            for ref, value, result in zip(out_refs, values, results, strict=True):
                place = (slice(None), rows) if result.row_sum else (rows, columns)
                if result.row_sum:
                    first = columns.start
                    value = _row_sums(value, num_out - out * tile_out - first)
                    value += jnp.where(first == 0, 0.0, ref[place])
                if masked:
                    # rows of other groups keep what is there: a result, or what their turn replaces
                    axis = 1 if result.row_sum else 0
                    own = items.inside(rows.start, size, start, end, axis)
                    value = jnp.where(own, value, ref[place].astype(jnp.float32))
                ref[place] = value.astype(ref.dtype)

        def compute(first, size, first_column, width, masked):
            rows, columns = pl.ds(first, size), pl.ds(first_column, width)

            def product(i, j):
                place = (columns, slice(None)) if weights[j].transposed else (slice(None), columns)
                return _dot(inputs[1][i][rows, :], inputs[2][j][place], weights[j].transposed)

            def finish(sums):
                shared = [ref[:, columns].astype(jnp.float32) for ref in inputs[3]]
                own = [ref[:, rows].astype(jnp.float32).T for ref in inputs[4]]
                both = [ref[rows, columns].astype(jnp.float32) for ref in inputs[5]]
                write(rows, size, columns, epilogue(sums, shared, own, both), masked)

            sums = [sum(product(i, j) for i, j in terms) for terms in products]
            if steps == 1:
                finish(sums)
                return
            for ref, value in zip(sum_refs, sums, strict=True):
                ref[rows, columns] = value + jnp.where(step == 0, 0.0, ref[rows, columns])
            pl.when(step == steps - 1)(lambda: finish([ref[rows, columns] for ref in sum_refs]))

        def for_columns(first, size, masked):
            whole_tile = size == tile_rows
            width = tile_chunk if whole_tile else tiles.chunk(tile_out, size * tile_sum)
            count = tile_out // width
            if count == 1:
                compute(first, size, 0, width, masked)
                return
            _repeat(0, count, lambda j: compute(first, size, j, width, masked), width)

        active = work.active_W[item] == 1
        pl.when(active & whole)(lambda: for_columns(0, tile_rows, masked=False))

        @pl.when(active & ~whole)
        def _():
            if tile_rows % PART_ROWS:
                for_columns(0, tile_rows, masked=True)
                return
            parts = lax.div(start, PART_ROWS), lax.div(end + PART_ROWS - 1, PART_ROWS)
            _repeat(*parts, lambda first: for_columns(first, PART_ROWS, masked=True), PART_ROWS)

        @pl.when(~active & (step == steps - 1) & (start < end))
        def _():
            zeros = [jnp.zeros((tile_rows, tile_out), jnp.float32) for _ in results]
            write(pl.ds(0, tile_rows), tile_rows, pl.ds(0, tile_out), zeros, masked=True)

    def row_block(out, item, step, *refs):
        work = items.Work(*refs)
        # an inactive item stays at block 0 of the summed axis: one fetch, not one per step
        return work.tile_W[item], step * work.active_W[item]

    def group_of(item, refs):
        return jnp.minimum(items.Work(*refs).group_W[item], num_groups - 1)

    def weight_spec(weight):
        def block(out, item, step, *refs):
            step = step * items.Work(*refs).active_W[item]
            index = (out, step) if weight.transposed else (step, out)
            return group_of(item, refs), *index

        sides = (tile_out, tile_sum) if weight.transposed else (tile_sum, tile_out)
        return pl.BlockSpec((None, *sides), block)

    def tile_of(item, refs):
        return items.Work(*refs).tile_W[item]

    both = pl.BlockSpec(
        (tile_rows, tile_out), lambda out, item, step, *refs: (tile_of(item, refs), out)
    )
    in_specs = [
        *(pl.BlockSpec((tile_rows, tile_sum), row_block) for _ in lhs),
        *(weight_spec(weight) for weight in weights),
        *(
            pl.BlockSpec(
                (None, 1, tile_out), lambda out, item, step, *refs: (group_of(item, refs), 0, out)
            )
            for _ in by_group
        ),
        *(
            pl.BlockSpec((1, tile_rows), lambda out, item, step, *refs: (0, tile_of(item, refs)))
            for _ in by_row
        ),
        *(both for _ in by_both),
    ]
    # one value for each row lies along the lanes: a column would be padded to 128 of them in HBM
    row_sums = pl.BlockSpec(
        (None, 1, tile_rows), lambda out, item, step, *refs: (out, 0, tile_of(item, refs))
    )
    arrays = [
        *lhs,
        *(weight.array for weight in weights),
        *(a[:, None] for a in by_group),
        *(a[None] for a in by_row),
        *by_both,
    ]
    vma = jax.typeof(lhs[0]).manual_axis_type
    shapes = [(num_tiles, 1, num_rows) if r.row_sum else (num_rows, num_out) for r in results]
    outs = [
        jax.ShapeDtypeStruct(shape, result.dtype, manual_axis_type=vma)
        for shape, result in zip(shapes, results, strict=True)
    ]
    num_items = work.group_W.shape[0]
    num_products = sum(len(terms) for terms in products)
    moved, most_moved = (
        cost.bytes_of_rows(operands, results, tile, count(num_rows, num_groups, tile_rows))
        for count in (cost.equal_items, cost.uneven_items)
    )
    sizes = num_rows, num_groups, num_sum, num_out, num_products, moved, most_moved
    tiles.note(tiles.Plan(kind, tile, *sizes))
    found = pl.pallas_call(
        kernel,
        out_shape=outs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(work),
            grid=(num_tiles, num_items, steps),
            in_specs=in_specs,
            out_specs=[row_sums if result.row_sum else both for result in results],
            scratch_shapes=[pltpu.VMEM((tile_rows, tile_out), jnp.float32) for _ in products]
            if steps > 1
            else [],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_limit(),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * num_sum * num_out * num_products,
            transcendentals=0,
            bytes_accessed=moved,
        ),
        interpret=interpret,
        name=f"grouped_{kind}",
    )(*work, *arrays)
    return [
        jnp.sum(a, axis=(0, 1)) if result.row_sum else a.astype(result.dtype)
        for a, result in zip(found, asked, strict=True)
    ]


def _on_chip(result: Result) -> Result:
    half = jnp.dtype(result.dtype) == jnp.float16
    return result._replace(dtype=jnp.float32) if half else result


def _repeat(
    first: Array | int, end: Array | int, body: Callable[[Array], None], stride: int
) -> None:
    """body(i * stride) for i from `first` to `end`; a loop in the program, not copies of it."""

    def one(i, carry):
        body(pl.multiple_of(i * stride, stride))
        return carry

    lax.fori_loop(first, end, one, 0)


def _dot(x_TA: Array, w_AB: Array, transposed: bool) -> Array:
    """Weights narrower than x are widened on chip; float32 operands keep all their bits."""
    if w_AB.dtype != x_TA.dtype:
        w_AB = w_AB.astype(jnp.float32).astype(x_TA.dtype)
    precision = lax.Precision.HIGHEST if x_TA.dtype == jnp.float32 else None
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(
        x_TA, w_AB, dims, precision=precision, preferred_element_type=jnp.float32
    )


def _row_sums(value_TB: Array, num_columns: Array | int) -> Array:
    """[1, T]: each row's sum over the first `num_columns`."""
    column_TB = lax.broadcasted_iota(jnp.int32, value_TB.shape, 1)
    # a block may reach beyond the array, where anything may lie
    return jnp.sum(jnp.where(column_TB < num_columns, value_TB, 0.0), axis=1, keepdims=True).T
