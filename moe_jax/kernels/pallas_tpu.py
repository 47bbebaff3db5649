"""Grouped matmul on the TPU's matrix unit: one Pallas kernel for y and dx, one for dw.

Promise: as `grouped_matmul`; dx and dw are kernels as well, the weights are read transposed through
their block indices, and nothing of the size of x or w is transposed or copied in HBM. Compiled for
TPUs ahead of time and right in interpret mode; not yet tuned, and never timed on hardware.

Axes: N rows, D d_model, F d_ff, G groups, T rows of one tile, W work items, A the axis that is
summed over, B the axis of the result (D and F for y, F and D for dx).

Algorithm: rows are cut into tiles of T, aligned with the buffer. A work item is a pair (group,
tile) that overlap, listed in row order by a few integer operations before the kernel and read by it
from scalar memory. y, dx: the unused rows count as one more group, without weights, so that every
tile is visited; a tile stays on chip while its groups, which follow one another, each write their
own rows. dw: every group has at least one item, so that empty groups are written too; a sum stays
on chip while the items of its group pass, and only tiles at a group's edge are masked.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from moe_jax.errors import Refused
from moe_jax.kernels.activation import Activation

_TILE_ROWS = 128
_LANES = 128
_LARGEST_TILE = 512
_LARGEST_UNEVEN = 1024  # an axis that is no multiple of 128 is one block, which must fit on chip


# --- public: the three operations ------------------------------------------------------------


def matmul(
    x_ND: Array,
    w_GDF: Array,
    group_sizes_G: Array,
    out_dtype: DTypeLike,
    *,
    interpret: bool = False,
) -> Array:
    _check(x_ND)
    pad_d, pad_f = (_padding(length) for length in w_GDF.shape[1:])
    if pad_d or pad_f:
        x_ND = jnp.pad(x_ND, ((0, 0), (0, pad_d)))
        w_GDF = jnp.pad(w_GDF, ((0, 0), (0, pad_d), (0, pad_f)))
    y_NF = _matmul(jnp.dtype(out_dtype), interpret, x_ND, w_GDF, group_sizes_G)
    return y_NF[:, : y_NF.shape[1] - pad_f] if pad_f else y_NF


def swiglu(
    x_ND: Array,
    w_gate_GDF: Array,
    w_up_GDF: Array,
    group_sizes_G: Array,
    activation: Activation,
    bias_gate_GF: Array | None = None,
    bias_up_GF: Array | None = None,
    *,
    interpret: bool = False,
) -> Array:
    """Two grouped matmuls and XLA's own fusion of the activation: x is read twice."""
    affine = functools.partial(_affine, out_dtype=x_ND.dtype, interpret=interpret)
    gate_NF = affine(x_ND, w_gate_GDF, bias_gate_GF, group_sizes_G)
    h_NF = activation.value(gate_NF, affine(x_ND, w_up_GDF, bias_up_GF, group_sizes_G))
    return h_NF.astype(x_ND.dtype)


def ffn(
    x_ND: Array,
    w_gate_GDF: Array,
    w_up_GDF: Array,
    w_down_GFD: Array,
    group_sizes_G: Array,
    activation: Activation,
    bias_gate_GF: Array | None = None,
    bias_up_GF: Array | None = None,
    bias_down_GD: Array | None = None,
    row_weight_N: Array | None = None,
    *,
    interpret: bool = False,
) -> Array:
    gate_up = w_gate_GDF, w_up_GDF, group_sizes_G, activation, bias_gate_GF, bias_up_GF
    h_NF = swiglu(x_ND, *gate_up, interpret=interpret)
    affine = functools.partial(_affine, h_NF, w_down_GFD, bias_down_GD, group_sizes_G)
    if row_weight_N is None:
        return affine(out_dtype=x_ND.dtype, interpret=interpret).astype(x_ND.dtype)
    y_ND = affine(out_dtype=jnp.float32, interpret=interpret)
    # Unused rows may hold anything, and 0 x NaN is NaN.
    used_N = _used(group_sizes_G, x_ND.shape[0])
    weight_N = jnp.where(used_N, row_weight_N.astype(jnp.float32), 0.0)
    return (y_ND * weight_N[:, None]).astype(x_ND.dtype)


def _affine(
    x_ND: Array,
    w_GDF: Array,
    bias_GF: Array | None,
    group_sizes_G: Array,
    *,
    out_dtype: DTypeLike,
    interpret: bool,
) -> Array:
    """x @ w, or x @ w + bias in float32 on the rows of groups alone; outside the kernel."""
    if bias_GF is None:
        return matmul(x_ND, w_GDF, group_sizes_G, out_dtype, interpret=interpret)
    num_rows, num_groups = x_ND.shape[0], group_sizes_G.shape[0]
    y_NF = matmul(x_ND, w_GDF, group_sizes_G, jnp.float32, interpret=interpret)
    row_N1 = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    ended_NG = jnp.cumsum(group_sizes_G)[None] <= row_N1
    group_N = jnp.minimum(ended_NG.sum(axis=1, dtype=jnp.int32), num_groups - 1)
    bias_NF = bias_GF.astype(jnp.float32)[group_N]
    return jnp.where(_used(group_sizes_G, num_rows)[:, None], y_NF + bias_NF, 0.0)


def _used(group_sizes_G: Array, num_rows: int) -> Array:
    """bool [N]: rows of some group."""
    return jnp.arange(num_rows, dtype=jnp.int32) < jnp.sum(group_sizes_G)


def _matmul_impl(out_dtype, interpret, x_ND, w_GDF, group_sizes_G):
    return _rows_times_weights(x_ND, w_GDF, group_sizes_G, 1, out_dtype, interpret)


def _matmul_fwd(out_dtype, interpret, *args):
    return _matmul_impl(out_dtype, interpret, *args), args


def _matmul_bwd(out_dtype, interpret, saved, dy_NF):
    x_ND, w_GDF, group_sizes_G = saved
    dy_NF = dy_NF.astype(x_ND.dtype)
    dx_ND = _rows_times_weights(dy_NF, w_GDF, group_sizes_G, 2, x_ND.dtype, interpret)
    return dx_ND, _rows_times_rows(x_ND, dy_NF, group_sizes_G, w_GDF.dtype, interpret), None


_matmul = jax.custom_vjp(_matmul_impl, nondiff_argnums=(0, 1))
_matmul.defvjp(_matmul_fwd, _matmul_bwd)


# --- work items ------------------------------------------------------------------------------


class _Work(NamedTuple):
    """What the kernels read from scalar memory, all int32."""

    group_W: Array
    tile_W: Array
    active_W: Array  # 1 where the item has rows to multiply
    start_G: Array  # first row of each group
    end_G: Array


def _list_work(sizes_G: Array, num_rows: int, tile_rows: int, least: int) -> _Work:
    """Pairs of group and overlapping tile in row order, at least `least` per group.

    The number of items depends on the sizes, the length of the list does not: it is filled up with
    inactive items of the last group.
    """
    num_groups, num_tiles = sizes_G.shape[0], pl.cdiv(num_rows, tile_rows)
    end_G = jnp.cumsum(sizes_G).astype(jnp.int32)
    start_G = end_G - sizes_G.astype(jnp.int32)
    first_tile_G = start_G // tile_rows
    overlaps_G = jnp.where(end_G > start_G, (end_G - 1) // tile_rows - first_tile_G + 1, 0)
    items_G = jnp.maximum(overlaps_G, least)
    item_end_G = jnp.cumsum(items_G)

    item_W = jnp.arange(num_tiles + num_groups, dtype=jnp.int32)
    before_WG = item_end_G[None, :] <= item_W[:, None]
    group_W = jnp.minimum(jnp.sum(before_WG, axis=1, dtype=jnp.int32), num_groups - 1)
    nth_W = item_W - (item_end_G - items_G)[group_W]
    tile_W = jnp.minimum(first_tile_G[group_W] + nth_W, num_tiles - 1)
    active_W = nth_W < overlaps_G[group_W]
    return _Work(group_W, tile_W, active_W.astype(jnp.int32), start_G, end_G)


def _cut_off(group_sizes_G: Array, num_rows: int) -> Array:
    """Sizes without the rows that the buffer does not have."""
    end_G = jnp.minimum(jnp.cumsum(group_sizes_G), num_rows)
    return jnp.diff(end_G, prepend=jnp.zeros_like(end_G[:1]))


def _own_rows(work: _Work, item: Array, tile_rows: int) -> Array:
    """mask_T1: which rows of the item's tile belong to its group."""
    row_T1 = lax.broadcasted_iota(jnp.int32, (tile_rows, 1), 0) + work.tile_W[item] * tile_rows
    group = work.group_W[item]
    return (work.start_G[group] <= row_T1) & (row_T1 < work.end_G[group])


# --- y = x @ w and dx = dy @ w^T -------------------------------------------------------------


def _rows_times_weights(
    x_NA: Array,
    w_GDF: Array,
    group_sizes_G: Array,
    sum_axis: int,
    out_dtype: DTypeLike,
    interpret: bool,
) -> Array:
    """x[n] times the weights of n's group, summed over axis 1 or 2 of the weights."""
    num_rows, num_sum = x_NA.shape
    num_groups, num_out = w_GDF.shape[0], w_GDF.shape[3 - sum_axis]
    tile_rows, tile_sum, tile_out = _row_tile(num_rows), _tile(num_sum), _tile(num_out)
    steps = num_sum // tile_sum

    sizes_G = _cut_off(group_sizes_G, num_rows)
    unused = (num_rows - jnp.sum(sizes_G, dtype=sizes_G.dtype))[None]
    work = _list_work(jnp.concatenate([sizes_G, unused]), num_rows, tile_rows, least=0)
    has_weights_W = (work.group_W < num_groups).astype(jnp.int32)
    work = work._replace(active_W=work.active_W * has_weights_W)

    def kernel(*refs):
        work, (x_ref, w_ref, y_ref, sum_ref) = _Work(*refs[:5]), refs[5:]
        item, step = pl.program_id(1), pl.program_id(2)

        @pl.when(step == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(work.active_W[item] == 1)
        def _():
            sum_ref[...] += _dot(x_ref[...], w_ref[...], (1, sum_axis - 1))

        @pl.when(step == steps - 1)
        def _():
            # rows of other groups keep what is there: a result, or what their turn will replace
            others_TB = y_ref[...].astype(jnp.float32)
            own_T1 = _own_rows(work, item, tile_rows)
            y_ref[...] = jnp.where(own_T1, sum_ref[...], others_TB).astype(y_ref.dtype)

    def x_block(out, item, step, *refs):
        work = _Work(*refs)
        # an inactive item stays at block 0 of the summed axis: one fetch, not one per step
        return work.tile_W[item], step * work.active_W[item]

    def w_block(out, item, step, *refs):
        work = _Work(*refs)
        group = jnp.minimum(work.group_W[item], num_groups - 1)
        step = step * work.active_W[item]
        return (group, step, out) if sum_axis == 1 else (group, out, step)

    w_tile = (tile_sum, tile_out) if sum_axis == 1 else (tile_out, tile_sum)
    return _call(
        kernel,
        work,
        (x_NA, w_GDF),
        (num_rows, num_out),
        out_dtype,
        grid=(num_out // tile_out, work.group_W.shape[0], steps),
        in_specs=[
            pl.BlockSpec((tile_rows, tile_sum), x_block),
            pl.BlockSpec((None, *w_tile), w_block),
        ],
        out_spec=pl.BlockSpec(
            (tile_rows, tile_out), lambda out, item, step, *work: (_Work(*work).tile_W[item], out)
        ),
        sum_shape=(tile_rows, tile_out),
        semantics=("parallel", "arbitrary", "arbitrary"),
        flops=2 * num_rows * num_sum * num_out,
        interpret=interpret,
    )


# --- dw = x^T @ dy ---------------------------------------------------------------------------


def _rows_times_rows(
    x_ND: Array, dy_NF: Array, group_sizes_G: Array, out_dtype: DTypeLike, interpret: bool
) -> Array:
    (num_rows, d_model), d_ff = x_ND.shape, dy_NF.shape[1]
    num_groups = group_sizes_G.shape[0]
    tile_rows, tile_d, tile_f = _row_tile(num_rows), _tile(d_model), _tile(d_ff)
    work = _list_work(_cut_off(group_sizes_G, num_rows), num_rows, tile_rows, least=1)
    num_items = work.group_W.shape[0]

    def kernel(*refs):
        work, (x_ref, dy_ref, dw_ref, sum_ref) = _Work(*refs[:5]), refs[5:]
        item = pl.program_id(2)
        group = work.group_W[item]

        @pl.when((item == 0) | (work.group_W[jnp.maximum(item - 1, 0)] != group))
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        active = work.active_W[item] == 1
        first_row = work.tile_W[item] * tile_rows
        inside = work.start_G[group] <= first_row
        inside &= first_row + tile_rows <= work.end_G[group]

        @pl.when(active & inside)
        def _():
            sum_ref[...] += _dot(x_ref[...], dy_ref[...], (0, 0))

        @pl.when(active & ~inside)
        def _():
            own_T1 = _own_rows(work, item, tile_rows)
            # both: 0 * NaN is NaN, and rows of neither group may hold anything
            x_TD = jnp.where(own_T1, x_ref[...], jnp.zeros_like(x_ref[...]))
            dy_TF = jnp.where(own_T1, dy_ref[...], jnp.zeros_like(dy_ref[...]))
            sum_ref[...] += _dot(x_TD, dy_TF, (0, 0))

        following = jnp.minimum(item + 1, num_items - 1)

        @pl.when((item == num_items - 1) | (work.group_W[following] != group))
        def _():
            dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)

    return _call(
        kernel,
        work,
        (x_ND, dy_NF),
        (num_groups, d_model, d_ff),
        out_dtype,
        grid=(d_model // tile_d, d_ff // tile_f, num_items),
        in_specs=[
            pl.BlockSpec(
                (tile_rows, tile_d), lambda d, f, item, *work: (_Work(*work).tile_W[item], d)
            ),
            pl.BlockSpec(
                (tile_rows, tile_f), lambda d, f, item, *work: (_Work(*work).tile_W[item], f)
            ),
        ],
        out_spec=pl.BlockSpec(
            (None, tile_d, tile_f), lambda d, f, item, *work: (_Work(*work).group_W[item], d, f)
        ),
        sum_shape=(tile_d, tile_f),
        semantics=("parallel", "parallel", "arbitrary"),
        flops=2 * num_rows * d_model * d_ff,
        interpret=interpret,
    )


# --- small helpers ---------------------------------------------------------------------------


def _call(
    kernel: Callable[..., None],
    work: _Work,
    arrays: tuple[Array, Array],
    out_shape: tuple[int, ...],
    out_dtype: DTypeLike,
    *,
    grid: tuple[int, ...],
    in_specs: list[pl.BlockSpec],
    out_spec: pl.BlockSpec,
    sum_shape: tuple[int, int],
    semantics: tuple[Literal["parallel", "arbitrary"], ...],
    flops: int,
    interpret: bool,
) -> Array:
    out = jax.ShapeDtypeStruct(
        out_shape, out_dtype, manual_axis_type=jax.typeof(arrays[0]).manual_axis_type
    )
    bytes_accessed = sum(a.size * a.dtype.itemsize for a in (*arrays, out))
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(work),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM(sum_shape, jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=0, bytes_accessed=bytes_accessed
        ),
        interpret=interpret,
    )(*work, *arrays)


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Sums over the given axis of each; float32 operands keep all their bits."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _row_tile(num_rows: int) -> int:
    return min(num_rows, _TILE_ROWS)


def _tile(length: int) -> int:
    """The largest tile that divides the axis; one block where no multiple of 128 does."""
    fitting = (t for t in range(_LARGEST_TILE, 0, -_LANES) if length % t == 0)
    return next(fitting, length)


def _padding(length: int) -> int:
    """Zeros behind an axis that is too long for one block and that 128 does not divide, up to
    whole tiles: of 2,880 (gpt-oss) 192, where 64 would leave tiles of 128."""
    uneven = length % _LANES and length > _LARGEST_UNEVEN
    return -length % _LARGEST_TILE if uneven else 0


def _check(x_ND: Array) -> None:
    if x_ND.dtype == jnp.float16:
        raise Refused(
            "x_ND.dtype",
            "float16",
            "the pallas_tpu implementation takes float32 and bfloat16",
            "Cast to bfloat16, or pass implementation='cpu', which runs on every platform",
        )
