"""Grouped operations in plain JAX loops over row tiles; made for CPUs, right on every backend.

Promise: work follows sum(group_sizes), not N (N costs one memset per output). The bits of a row and
of its dx, and of a group's dw, depend only on the rows of that group, in number and order: not on
where the group stands in the buffer, nor on the other groups, N or G.

Axes: N rows, D d_model, F d_ff, G groups, T rows of one tile.

Algorithm: an outer loop visits the non-empty groups and slices their weights once. A group's rows
are cut from its first row on into tiles of the sizes in `_LADDER`: as many of the largest as fit,
then at most one of each smaller size. What is left is less than the smallest tile: that one tile
alone reaches beyond its group, is read and written through a mask, and no buffer needs padding.
dw adds up over a group's tiles in that order.

Backward passes recompute the pre-activations in the tile: nothing but the inputs is kept.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

# Independent of the buffer's shape on purpose: that is what makes a row's bits independent of it.
_LADDER = (256, 128, 64, 32, 16)


# --- the tiles of the groups -----------------------------------------------------------------


class _Tile(NamedTuple):
    """`size` consecutive rows of one group from `start` on, `real` of them its own."""

    size: int
    start: Array
    real: Array | None  # None: all of them, and the tile lies inside the buffer

    def read(self, x_ND: Array) -> Array:
        """The tile's rows in float32; those past `real` are zero."""
        if self.real is None:
            return _f32(lax.dynamic_slice_in_dim(x_ND, self.start, self.size))
        start, shift = self._inside(x_ND.shape[0])
        x_TD = _rotate(lax.dynamic_slice_in_dim(x_ND, start, self.size), shift)
        row_T1 = np.arange(self.size, dtype=np.int32)[:, None]
        return jnp.where(row_T1 < self.real, _f32(x_TD), 0.0)

    def write(self, out_ND: Array, y_TD: Array) -> Array:
        y_TD = y_TD.astype(out_ND.dtype)
        if self.real is None:
            return lax.dynamic_update_slice_in_dim(out_ND, y_TD, self.start, 0)
        start, shift = self._inside(out_ND.shape[0])
        row_T1 = np.arange(self.size, dtype=np.int32)[:, None] - shift
        mine_T1 = (row_T1 >= 0) & (row_T1 < self.real)
        old_TD = lax.dynamic_slice_in_dim(out_ND, start, self.size)
        new_TD = jnp.where(mine_T1, _rotate(y_TD, -shift), old_TD)
        return lax.dynamic_update_slice_in_dim(out_ND, new_TD, start, 0)

    def _inside(self, num_rows: int) -> tuple[Array, Array]:
        """Where to slice so that the tile ends inside the buffer, and by how much that is early."""
        start = jnp.minimum(self.start, num_rows - self.size)
        return start, self.start - start


def _rotate(x_TD: Array, shift: Array) -> Array:
    """Row i of the result is row (i + shift) mod T of x_TD, for |shift| < T."""
    shift = jnp.where(shift < 0, shift + x_TD.shape[0], shift)
    return lax.dynamic_slice_in_dim(jnp.concatenate([x_TD, x_TD]), shift, x_TD.shape[0])


def _for_each_tile(
    group_sizes_G: Array,
    num_rows: int,
    buffers: Any,
    *,
    open_group: Callable[[Array], Any],
    visit: Callable[[Any, _Tile, Any, Any], tuple[Any, Any]],
    close_group: Callable[[Array, Any, Any], Any] = lambda group, sums, buffers: buffers,
    sums: Any = (),
) -> Any:
    """Runs `visit(weights, tile, buffers, sums) -> (buffers, sums)` over all tiles of all groups.

    `open_group(group)` gives the group's weights; `sums` start afresh with every group and end in
    `close_group(group, sums, buffers) -> buffers`.
    """
    ends_G = jnp.minimum(jnp.cumsum(group_sizes_G), num_rows)
    starts_G = jnp.concatenate([jnp.zeros_like(ends_G[:1]), ends_G[:-1]])
    occupied_G = ends_G > starts_G
    (groups_G,) = jnp.nonzero(occupied_G, size=occupied_G.shape[0], fill_value=0)

    def group_body(visited: Array, buffers: Any) -> Any:
        group = groups_G[visited]
        weights = open_group(group)
        start, end = starts_G[group], ends_G[group]
        carry = (buffers, sums)
        for size, first, times, real in _cut(start, end, num_rows):

            def tile_body(i, carry, size=size, first=first, real=real):
                return visit(weights, _Tile(size, first + i * size, real), *carry)

            carry = _repeat(times, tile_body, carry)
        buffers, group_sums = carry
        return close_group(group, group_sums, buffers)

    return _repeat(jnp.sum(occupied_G, dtype=jnp.int32), group_body, buffers)


def _cut(start: Array, end: Array, num_rows: int) -> list[tuple[int, Array, Array, Array | None]]:
    """(tile size, first row, number of tiles, real rows if not all) in row order."""
    cuts: list[tuple[int, Array, Array, Array | None]] = []
    for size in _LADDER:
        if size > num_rows:
            continue  # no group is that large, and no slice could be
        times = (end - start) // size
        cuts.append((size, start, times, None))
        start = start + times * size
    cuts.append((_LADDER[-1], start, (end > start).astype(jnp.int32), end - start))
    return cuts


def _repeat(times: Array, body: Callable[[Array, Any], Any], carry: Any) -> Any:
    def step(state):
        i, carry = state
        return i + 1, body(i, carry)

    return lax.while_loop(lambda state: state[0] < times, step, (jnp.int32(0), carry))[1]


# --- small helpers ---------------------------------------------------------------------------


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)


def _zeros(shape: tuple[int, ...], dtype: DTypeLike, like: Array) -> Array:
    """Zeros that vary over the same mesh axes as `like`: shard_map wants it of a loop's carry."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    zeros = jnp.zeros(shape, dtype)
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


def _weights(w_GDF: Array, group: Array) -> Array:
    return _f32(lax.dynamic_index_in_dim(w_GDF, group, keepdims=False))


def _put(w_GDF: Array, w_DF: Array, group: Array) -> Array:
    return lax.dynamic_update_index_in_dim(w_GDF, w_DF.astype(w_GDF.dtype), group, 0)


def _dot(x_TD: Array, w_DF: Array) -> Array:
    return lax.dot(x_TD, w_DF)


def _dot_wt(y_TF: Array, w_DF: Array) -> Array:
    """y @ w^T"""
    return lax.dot_general(y_TF, w_DF, (((1,), (1,)), ((), ())))


def _dot_xt(x_TD: Array, y_TF: Array) -> Array:
    """x^T @ y"""
    return lax.dot_general(x_TD, y_TF, (((0,), (0,)), ((), ())))


def _with_room(x_ND: Array) -> Array:
    """A buffer shorter than the smallest tile is filled up to it."""
    missing = max(0, _LADDER[-1] - x_ND.shape[0])
    return jnp.pad(x_ND, ((0, missing), (0, 0))) if missing else x_ND


def _swiglu_tile(gate_TF: Array, up_TF: Array) -> Array:
    return gate_TF * lax.logistic(gate_TF) * up_TF


def _swiglu_tile_bwd(gate_TF: Array, up_TF: Array, dh_TF: Array) -> tuple[Array, Array]:
    sigmoid_TF = lax.logistic(gate_TF)
    silu_TF = gate_TF * sigmoid_TF
    dgate_TF = dh_TF * up_TF * (sigmoid_TF + silu_TF * (1.0 - sigmoid_TF))
    return dgate_TF, dh_TF * silu_TF


# --- x @ w -----------------------------------------------------------------------------------


def matmul(x_ND: Array, w_GDF: Array, group_sizes_G: Array, out_dtype: DTypeLike) -> Array:
    y_NF = _matmul(jnp.dtype(out_dtype), _with_room(x_ND), w_GDF, group_sizes_G)
    return y_NF[: x_ND.shape[0]]


def _matmul_impl(out_dtype, x_ND, w_GDF, group_sizes_G):
    def visit(w_DF, tile, y_NF, sums):
        return tile.write(y_NF, _dot(tile.read(x_ND), w_DF)), sums

    return _for_each_tile(
        group_sizes_G,
        x_ND.shape[0],
        _zeros((x_ND.shape[0], w_GDF.shape[2]), out_dtype, x_ND),
        open_group=lambda group: _weights(w_GDF, group),
        visit=visit,
    )


def _matmul_fwd(out_dtype, x_ND, w_GDF, group_sizes_G):
    return _matmul_impl(out_dtype, x_ND, w_GDF, group_sizes_G), (x_ND, w_GDF, group_sizes_G)


def _matmul_bwd(out_dtype, saved, dy_NF):
    x_ND, w_GDF, group_sizes_G = saved

    def visit(w_DF, tile, buffers, dw_DF):
        dx_ND, dw_GDF = buffers
        dy_TF = tile.read(dy_NF)
        dx_ND = tile.write(dx_ND, _dot_wt(dy_TF, w_DF))
        return (dx_ND, dw_GDF), dw_DF + _dot_xt(tile.read(x_ND), dy_TF)

    def close_group(group, dw_DF, buffers):
        dx_ND, dw_GDF = buffers
        return dx_ND, _put(dw_GDF, dw_DF, group)

    dx_ND, dw_GDF = _for_each_tile(
        group_sizes_G,
        x_ND.shape[0],
        (_zeros(x_ND.shape, x_ND.dtype, x_ND), _zeros(w_GDF.shape, w_GDF.dtype, x_ND)),
        open_group=lambda group: _weights(w_GDF, group),
        visit=visit,
        close_group=close_group,
        sums=_zeros(w_GDF.shape[1:], jnp.float32, x_ND),
    )
    return dx_ND, dw_GDF, None


_matmul = jax.custom_vjp(_matmul_impl, nondiff_argnums=(0,))
_matmul.defvjp(_matmul_fwd, _matmul_bwd)


# --- silu(x @ w_gate) * (x @ w_up) -----------------------------------------------------------


def swiglu(x_ND: Array, w_gate_GDF: Array, w_up_GDF: Array, group_sizes_G: Array) -> Array:
    h_NF = _swiglu(_with_room(x_ND), w_gate_GDF, w_up_GDF, group_sizes_G)
    return h_NF[: x_ND.shape[0]]


def _swiglu_impl(x_ND, w_gate_GDF, w_up_GDF, group_sizes_G):
    def visit(weights, tile, h_NF, sums):
        w_gate_DF, w_up_DF = weights
        x_TD = tile.read(x_ND)
        h_TF = _swiglu_tile(_dot(x_TD, w_gate_DF), _dot(x_TD, w_up_DF))
        return tile.write(h_NF, h_TF), sums

    return _for_each_tile(
        group_sizes_G,
        x_ND.shape[0],
        _zeros((x_ND.shape[0], w_gate_GDF.shape[2]), x_ND.dtype, x_ND),
        open_group=lambda group: (_weights(w_gate_GDF, group), _weights(w_up_GDF, group)),
        visit=visit,
    )


def _swiglu_fwd(*args):
    return _swiglu_impl(*args), args


def _swiglu_bwd(saved, dh_NF):
    x_ND, w_gate_GDF, w_up_GDF, group_sizes_G = saved

    def visit(weights, tile, buffers, sums):
        w_gate_DF, w_up_DF = weights
        dx_ND, *dw = buffers
        dw_gate_DF, dw_up_DF = sums
        x_TD = tile.read(x_ND)
        dgate_TF, dup_TF = _swiglu_tile_bwd(
            _dot(x_TD, w_gate_DF), _dot(x_TD, w_up_DF), tile.read(dh_NF)
        )
        dx_ND = tile.write(dx_ND, _dot_wt(dgate_TF, w_gate_DF) + _dot_wt(dup_TF, w_up_DF))
        sums = (dw_gate_DF + _dot_xt(x_TD, dgate_TF), dw_up_DF + _dot_xt(x_TD, dup_TF))
        return (dx_ND, *dw), sums

    def close_group(group, sums, buffers):
        dx_ND, *dw = buffers
        return (dx_ND, *(_put(w, s, group) for w, s in zip(dw, sums, strict=True)))

    weights = (w_gate_GDF, w_up_GDF)
    grads = _for_each_tile(
        group_sizes_G,
        x_ND.shape[0],
        tuple(_zeros(a.shape, a.dtype, x_ND) for a in (x_ND, *weights)),
        open_group=lambda group: tuple(_weights(w, group) for w in weights),
        visit=visit,
        close_group=close_group,
        sums=tuple(_zeros(w.shape[1:], jnp.float32, x_ND) for w in weights),
    )
    return (*grads, None)


_swiglu = jax.custom_vjp(_swiglu_impl)
_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


# --- the whole expert: swiglu, then down -----------------------------------------------------


def ffn(
    x_ND: Array, w_gate_GDF: Array, w_up_GDF: Array, w_down_GFD: Array, group_sizes_G: Array
) -> Array:
    y_ND = _ffn(_with_room(x_ND), w_gate_GDF, w_up_GDF, w_down_GFD, group_sizes_G)
    return y_ND[: x_ND.shape[0]]


def _ffn_impl(x_ND, w_gate_GDF, w_up_GDF, w_down_GFD, group_sizes_G):
    def visit(weights, tile, y_ND, sums):
        w_gate_DF, w_up_DF, w_down_FD = weights
        x_TD = tile.read(x_ND)
        h_TF = _swiglu_tile(_dot(x_TD, w_gate_DF), _dot(x_TD, w_up_DF))
        return tile.write(y_ND, _dot(h_TF, w_down_FD)), sums

    weights = (w_gate_GDF, w_up_GDF, w_down_GFD)
    return _for_each_tile(
        group_sizes_G,
        x_ND.shape[0],
        _zeros(x_ND.shape, x_ND.dtype, x_ND),
        open_group=lambda group: tuple(_weights(w, group) for w in weights),
        visit=visit,
    )


def _ffn_fwd(*args):
    return _ffn_impl(*args), args


def _ffn_bwd(saved, dy_ND):
    x_ND, *weights, group_sizes_G = saved

    def visit(group_weights, tile, buffers, sums):
        w_gate_DF, w_up_DF, w_down_FD = group_weights
        dw_gate_DF, dw_up_DF, dw_down_FD = sums
        dx_ND, *dw = buffers
        x_TD, dy_TD = tile.read(x_ND), tile.read(dy_ND)
        gate_TF, up_TF = _dot(x_TD, w_gate_DF), _dot(x_TD, w_up_DF)
        dgate_TF, dup_TF = _swiglu_tile_bwd(gate_TF, up_TF, _dot_wt(dy_TD, w_down_FD))
        dx_ND = tile.write(dx_ND, _dot_wt(dgate_TF, w_gate_DF) + _dot_wt(dup_TF, w_up_DF))
        sums = (
            dw_gate_DF + _dot_xt(x_TD, dgate_TF),
            dw_up_DF + _dot_xt(x_TD, dup_TF),
            dw_down_FD + _dot_xt(_swiglu_tile(gate_TF, up_TF), dy_TD),
        )
        return (dx_ND, *dw), sums

    def close_group(group, sums, buffers):
        dx_ND, *dw = buffers
        return (dx_ND, *(_put(w, s, group) for w, s in zip(dw, sums, strict=True)))

    grads = _for_each_tile(
        group_sizes_G,
        x_ND.shape[0],
        tuple(_zeros(a.shape, a.dtype, x_ND) for a in (x_ND, *weights)),
        open_group=lambda group: tuple(_weights(w, group) for w in weights),
        visit=visit,
        close_group=close_group,
        sums=tuple(_zeros(w.shape[1:], jnp.float32, x_ND) for w in weights),
    )
    return (*grads, None)


_ffn = jax.custom_vjp(_ffn_impl)
_ffn.defvjp(_ffn_fwd, _ffn_bwd)
