"""TPU kernel for gradients of weights: dw[g] = x^T @ dy over the rows of g, several dy at once.

Promise: x is read once for all of them; dw of an empty group is exactly zero; rows of no group may
hold anything.

Axes: N rows, D width of x, F width of every dy, G groups, T rows of a tile, S rows of a part of it.

Algorithm: every group has at least one work item, so that empty groups are written too. Sums stay
on chip while the items of their group pass. At a group's edge only the parts of S rows that the
group touches are multiplied, with the rows of others masked.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from moe_jax.kernels.tpu import cost, tiles
from moe_jax.kernels.tpu import work as items
from moe_jax.kernels.tpu.cost import PART_ROWS


def grouped_columns(
    kind: str,
    x_ND: Array,
    dys: Sequence[Array],
    group_sizes_G: Array,
    out_dtype: DTypeLike,
    interpret: bool,
) -> list[Array]:
    """dw [G, D, F] for each dy [N, F]; `kind` names the operation in the table of tiles."""
    (num_rows, d_model), d_ff = x_ND.shape, dys[0].shape[1]
    num_groups = group_sizes_G.shape[0]
    tile = tiles.for_columns(kind, x_ND, dys, num_groups, out_dtype)
    tile_rows, tile_d, tile_f, tile_chunk = tile
    sizes_G = items.cut_off(group_sizes_G, num_rows)
    work = items.list_work(sizes_G, num_rows, tile_rows, least=1)
    count = work.group_W.shape[0]

    def kernel(*refs):
        work, refs = items.Work(*refs[:5]), refs[5:]
        x_ref, dy_refs = refs[0], refs[1 : 1 + len(dys)]
        dw_refs, sum_refs = refs[1 + len(dys) : 1 + 2 * len(dys)], refs[1 + 2 * len(dys) :]
        item = pl.program_id(2)
        group = work.group_W[item]
        start, end = work.rows(item, tile_rows)
        whole = (start <= 0) & (end == tile_rows)
        active = work.active_W[item] == 1

        @pl.when((item == 0) | (work.group_W[jnp.maximum(item - 1, 0)] != group))
        def _():
            for ref in sum_refs:
                ref[...] = jnp.zeros_like(ref)

        def add(x_SD_of, dys_SF, size):
            """A chunk of D after the other, which keeps the program short."""
            whole_tile = size == tile_rows
            width = tile_chunk if whole_tile else tiles.chunk(tile_d, size * tile_f)

            def one(i, carry):
                columns = pl.ds(pl.multiple_of(i * width, width), width)
                x_SD = x_SD_of(columns)
                for dy_SF, ref in zip(dys_SF, sum_refs, strict=True):
                    ref[columns, :] += _dot(x_SD, dy_SF())
                return carry

            if width == tile_d:
                x_SD = x_SD_of(slice(None))
                for dy_SF, ref in zip(dys_SF, sum_refs, strict=True):
                    ref[...] += _dot(x_SD, dy_SF())
            else:
                lax.fori_loop(0, tile_d // width, one, 0)

        def add_masked(first, size):
            rows, own_S1 = pl.ds(first, size), items.inside(first, size, start, end)

            # both: 0 * NaN is NaN, and rows of neither group may hold anything
            def own(ref, columns):
                value = ref[rows, columns]
                return jnp.where(own_S1, value, jnp.zeros_like(value))

            dys = [functools.partial(own, ref, slice(None)) for ref in dy_refs]
            add(functools.partial(own, x_ref), dys, size)

        @pl.when(active & whole)
        def _():
            dys = [lambda ref=ref: ref[...] for ref in dy_refs]
            add(lambda columns: x_ref[:, columns], dys, tile_rows)

        @pl.when(active & ~whole)
        def _():
            if tile_rows % PART_ROWS:
                add_masked(0, tile_rows)
                return

            def one(i, carry):
                add_masked(pl.multiple_of(i * PART_ROWS, PART_ROWS), PART_ROWS)
                return carry

            parts = lax.div(start, PART_ROWS), lax.div(end + PART_ROWS - 1, PART_ROWS)
            lax.fori_loop(*parts, one, 0)

        @pl.when((item == count - 1) | (work.group_W[jnp.minimum(item + 1, count - 1)] != group))
        def _():
            for dw_ref, ref in zip(dw_refs, sum_refs, strict=True):
                dw_ref[...] = ref[...].astype(dw_ref.dtype)

    vma = jax.typeof(x_ND).manual_axis_type
    out = jax.ShapeDtypeStruct((num_groups, d_model, d_ff), out_dtype, manual_axis_type=vma)
    dy_spec = pl.BlockSpec(
        (tile_rows, tile_f), lambda d, f, item, *refs: (items.Work(*refs).tile_W[item], f)
    )
    dw_spec = pl.BlockSpec(
        (None, tile_d, tile_f), lambda d, f, item, *refs: (items.Work(*refs).group_W[item], d, f)
    )
    x_spec = pl.BlockSpec(
        (tile_rows, tile_d), lambda d, f, item, *refs: (items.Work(*refs).tile_W[item], d)
    )
    moved = cost.bytes_of_columns(x_ND, dys, num_groups, out_dtype, tile)
    sizes = num_rows, num_groups, d_model, d_ff, len(dys), moved, moved
    tiles.note(tiles.Plan(kind, tile, *sizes))
    found = pl.pallas_call(
        kernel,
        out_shape=[out for _ in dys],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(work),
            grid=(pl.cdiv(d_model, tile_d), pl.cdiv(d_ff, tile_f), count),
            in_specs=[x_spec, *(dy_spec for _ in dys)],
            out_specs=[dw_spec for _ in dys],
            scratch_shapes=[pltpu.VMEM((tile_d, tile_f), jnp.float32) for _ in dys],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_limit(),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * len(dys) * num_rows * d_model * d_ff,
            transcendentals=0,
            bytes_accessed=moved,
        ),
        interpret=interpret,
        name=f"grouped_{kind}",
    )(*work, x_ND, *dys)
    return list(found)


def _dot(x_TD: Array, dy_TF: Array) -> Array:
    """x^T @ dy; float32 operands keep all their bits."""
    precision = lax.Precision.HIGHEST if x_TD.dtype == jnp.float32 else None
    return lax.dot_general(
        x_TD,
        dy_TF,
        (((0,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
