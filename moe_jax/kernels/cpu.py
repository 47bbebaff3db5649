"""Grouped operations in plain JAX loops over row tiles; made for CPUs, right on every backend.

Promise: work follows sum(group_sizes), not N (N costs one memset per output). The bits of a row of
the output and of dx depend on nothing but that row (of x, of dy) and its group's weights. The bits
of a group's dw depend on the rows of that group alone, in number and order; neither depends on
where the group stands in the buffer, nor on the other groups, N or G.

Axes: N rows, D d_model, F d_ff, G groups, T rows of one tile.

Algorithm: every pass is one walk over tiles of each group's rows (cpu_tiles.py). A row gets the
same bits in a tile of any size used here. Matmul libraries compute few rows another way than many
(XLA's does not pack the weights for fewer than about 50, and rounds otherwise), so no tile has
fewer than 64. Transposed weights are always packed: there forward tiles start at 4 rows.

Backward passes recompute the pre-activations in the tile: nothing but the inputs is kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from moe_jax.kernels.activation import Activation
from moe_jax.kernels.cpu_tiles import Groups, Sizes, Tile, for_each_tile
from moe_jax.kernels.scaled import Scaled


class _Linear(NamedTuple):
    """x @ w for weights stored [D, F] or, transposed, [F, D]; hashable, fixed while tracing."""

    transposed: bool
    precision: lax.Precision | None

    def width(self, w_GDF: Array | Scaled) -> int:
        """F"""
        return w_GDF.shape[1 if self.transposed else 2]

    def y(self, x_TD: Array, w_DF: Array | Scaled, bias_F: Array | None = None) -> Array:
        values_DF, scale_F = w_DF if isinstance(w_DF, Scaled) else (w_DF, None)
        y_TF = self._dot(x_TD, values_DF, 1, 1 if self.transposed else 0)
        y_TF = y_TF if scale_F is None else y_TF * scale_F[None]
        return y_TF if bias_F is None else y_TF + bias_F[None]

    def dx(self, dy_TF: Array, w_DF: Array) -> Array:
        return self._dot(dy_TF, w_DF, 1, 0 if self.transposed else 1)

    def dw(self, x_TD: Array, dy_TF: Array) -> Array:
        return self._dot(*((dy_TF, x_TD) if self.transposed else (x_TD, dy_TF)), 0, 0)

    def _dot(self, a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
        """Summed over these axes."""
        return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), precision=self.precision)


def _linear(x_ND: Array, transposed: bool) -> _Linear:
    # GPUs round float32 to 10 bits by default, TPUs to 7: more than x in bfloat16 has
    exact = x_ND.dtype != jnp.bfloat16
    return _Linear(transposed, lax.Precision.HIGHEST if exact else None)


_SMALL, _LARGE = Sizes(128, (64, 128)), Sizes(256, (64, 96, 128, 192, 256, 320))
_FEW = (4, 8, 16, 32, 48)  # where transposed weights allow them
_NARROW = 16  # below, transposed weights are not always packed either


def _sizes_of(w_GDF: Array | Scaled, linear: _Linear) -> Sizes:
    """Of tiles whose only matmuls are `linear.y`."""
    sizes = _sizes_of_any(w_GDF)
    if linear.transposed and min(w_GDF.shape[1:]) >= _NARROW:
        return sizes._replace(first=_FEW + sizes.first)
    return sizes


def _sizes_of_any(w_GDF: Array | Scaled) -> Sizes:
    return _LARGE if w_GDF.shape[1] * w_GDF.shape[2] >= 2**18 else _SMALL


# --- small helpers ---------------------------------------------------------------------------


def _zeros(shape: tuple[int, ...], dtype: DTypeLike, like: Array) -> Array:
    """Zeros that vary over the same mesh axes as `like`: shard_map wants it of a loop's carry."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    zeros = jnp.zeros(shape, dtype)
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


def _zero_grads(x_ND: Array, weights: Sequence[Array | None]) -> tuple[Any, ...]:
    """Buffers for dx and every dw; a dw adds up in float32."""
    dw = jax.tree.map(lambda w: _zeros(w.shape, jnp.float32, x_ND), tuple(weights))
    return _zeros(x_ND.shape, x_ND.dtype, x_ND), *dw


def _as_cotangents(grads: tuple[Any, ...], weights: Sequence[Array | None]) -> tuple[Any, ...]:
    """(dx, dw ...) in the dtypes of their arguments; group sizes have no gradient."""
    dx_ND, *dw = grads
    return dx_ND, *jax.tree.map(lambda w, g: g.astype(w.dtype), list(weights), dw), None


def _with_room(x_ND: Array, w_GDF: Array | Scaled) -> Array:
    """A buffer shorter than the largest tile it may be cut into is filled up to it."""
    num_rows, choices = x_ND.shape[0], _sizes_of_any(w_GDF).first
    missing = min((size for size in choices if size >= num_rows), default=num_rows) - num_rows
    return jnp.pad(x_ND, ((0, missing), (0, 0))) if missing else x_ND


def _groups(group_sizes_G: Array, first_group: Array | None) -> Groups:
    return Groups(group_sizes_G, jnp.int32(0) if first_group is None else first_group)


def _add_rows(tile: Tile, dbias_GF: Array | None, dy_TF: Array) -> Array | None:
    """The gradient of a bias, where there is one: the sum over the rows that it was added to."""
    return None if dbias_GF is None else tile.add(dbias_GF, jnp.sum(dy_TF, axis=0))


# --- x @ w -----------------------------------------------------------------------------------


def matmul(
    x_ND: Array,
    w_GDF: Array | Scaled,
    group_sizes_G: Array,
    out_dtype: DTypeLike,
    *,
    transposed: bool = False,
    first_group: Array | None = None,
) -> Array:
    how = _linear(x_ND, transposed), jnp.dtype(out_dtype)
    groups = _groups(group_sizes_G, first_group)
    return _matmul(*how, _with_room(x_ND, w_GDF), w_GDF, groups)[: x_ND.shape[0]]


def _matmul_impl(linear, out_dtype, x_ND, w_GDF, groups):
    def visit(y_NF, weights, tile):
        (w_DF,) = weights
        return tile.write(y_NF, linear.y(tile.read(x_ND), w_DF))

    num_rows = x_ND.shape[0]
    y_NF = _zeros((num_rows, linear.width(w_GDF)), out_dtype, x_ND)
    sizes = _sizes_of(w_GDF, linear)
    return for_each_tile(groups, (w_GDF,), y_NF, visit, num_rows, sizes)


def _matmul_fwd(linear, out_dtype, *args):
    return _matmul_impl(linear, out_dtype, *args), args


def _matmul_bwd(linear, out_dtype, saved, dy_NF):
    x_ND, *weights, groups = saved

    def visit(grads, weights, tile):
        (w_DF,) = weights
        dx_ND, dw_GDF = grads
        x_TD, dy_TF = tile.read(x_ND), tile.read(dy_NF)
        return tile.write(dx_ND, linear.dx(dy_TF, w_DF)), tile.add(dw_GDF, linear.dw(x_TD, dy_TF))

    grads = _zero_grads(x_ND, weights)
    grads = for_each_tile(groups, weights, grads, visit, x_ND.shape[0], _sizes_of_any(weights[0]))
    return _as_cotangents(grads, weights)


_matmul = jax.custom_vjp(_matmul_impl, nondiff_argnums=(0, 1))
_matmul.defvjp(_matmul_fwd, _matmul_bwd)


# --- activation(x @ w_gate + bias, x @ w_up + bias) -------------------------------------------


def swiglu(
    x_ND: Array,
    w_gate_GDF: Array | Scaled,
    w_up_GDF: Array | Scaled,
    group_sizes_G: Array,
    activation: Activation,
    bias_gate_GF: Array | None = None,
    bias_up_GF: Array | None = None,
    *,
    transposed: bool = False,
    first_group: Array | None = None,
) -> Array:
    how = _linear(x_ND, transposed), activation
    weights = w_gate_GDF, w_up_GDF, bias_gate_GF, bias_up_GF
    groups = _groups(group_sizes_G, first_group)
    return _swiglu(*how, _with_room(x_ND, w_gate_GDF), *weights, groups)[: x_ND.shape[0]]


def _swiglu_impl(linear, activation, x_ND, *rest):
    *weights, groups = rest

    def visit(h_NF, weights, tile):
        w_gate_DF, w_up_DF, bias_gate_F, bias_up_F = weights
        x_TD = tile.read(x_ND)
        gate_TF, up_TF = linear.y(x_TD, w_gate_DF, bias_gate_F), linear.y(x_TD, w_up_DF, bias_up_F)
        return tile.write(h_NF, activation.value(gate_TF, up_TF))

    num_rows, w_gate_GDF = x_ND.shape[0], weights[0]
    h_NF = _zeros((num_rows, linear.width(w_gate_GDF)), x_ND.dtype, x_ND)
    sizes = _sizes_of(w_gate_GDF, linear)
    return for_each_tile(groups, weights, h_NF, visit, num_rows, sizes)


def _swiglu_fwd(linear, activation, *args):
    return _swiglu_impl(linear, activation, *args), args


def _swiglu_bwd(linear, activation, saved, dh_NF):
    x_ND, *weights, groups = saved

    def visit(grads, weights, tile):
        w_gate_DF, w_up_DF, bias_gate_F, bias_up_F = weights
        dx_ND, dw_gate_GDF, dw_up_GDF, dbias_gate_GF, dbias_up_GF = grads
        x_TD, dh_TF = tile.read(x_ND), tile.read(dh_NF)
        gate_TF, up_TF = linear.y(x_TD, w_gate_DF, bias_gate_F), linear.y(x_TD, w_up_DF, bias_up_F)
        dgate_TF, dup_TF = activation.gradient(gate_TF, up_TF, dh_TF)
        return (
            tile.write(dx_ND, linear.dx(dgate_TF, w_gate_DF) + linear.dx(dup_TF, w_up_DF)),
            tile.add(dw_gate_GDF, linear.dw(x_TD, dgate_TF)),
            tile.add(dw_up_GDF, linear.dw(x_TD, dup_TF)),
            _add_rows(tile, dbias_gate_GF, dgate_TF),
            _add_rows(tile, dbias_up_GF, dup_TF),
        )

    grads = _zero_grads(x_ND, weights)
    grads = for_each_tile(groups, weights, grads, visit, x_ND.shape[0], _sizes_of_any(weights[0]))
    return _as_cotangents(grads, weights)


_swiglu = jax.custom_vjp(_swiglu_impl, nondiff_argnums=(0, 1))
_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


# --- the whole expert: swiglu, then down -----------------------------------------------------


def ffn(
    x_ND: Array,
    w_gate_GDF: Array | Scaled,
    w_up_GDF: Array | Scaled,
    w_down_GFD: Array | Scaled,
    group_sizes_G: Array,
    activation: Activation,
    bias_gate_GF: Array | None = None,
    bias_up_GF: Array | None = None,
    bias_down_GD: Array | None = None,
    row_weight_N: Array | None = None,
    *,
    transposed: bool = False,
    first_group: Array | None = None,
) -> Array:
    how = _linear(x_ND, transposed), activation
    groups = _groups(group_sizes_G, first_group)
    weight_N1 = None if row_weight_N is None else _with_room(row_weight_N[:, None], w_gate_GDF)
    weights = w_gate_GDF, w_up_GDF, w_down_GFD, bias_gate_GF, bias_up_GF, bias_down_GD
    x_ND, num_rows = _with_room(x_ND, w_gate_GDF), x_ND.shape[0]
    return _ffn(*how, x_ND, *weights, groups, weight_N1)[:num_rows]


def _ffn_impl(linear, activation, x_ND, *rest):
    *weights, groups, weight_N1 = rest

    def visit(y_ND, weights, tile):
        w_gate_DF, w_up_DF, w_down_FD, bias_gate_F, bias_up_F, bias_down_D = weights
        x_TD = tile.read(x_ND)
        gate_TF, up_TF = linear.y(x_TD, w_gate_DF, bias_gate_F), linear.y(x_TD, w_up_DF, bias_up_F)
        y_TD = linear.y(activation.value(gate_TF, up_TF), w_down_FD, bias_down_D)
        return tile.write(y_ND, y_TD if weight_N1 is None else y_TD * tile.read(weight_N1))

    y_ND = _zeros(x_ND.shape, x_ND.dtype, x_ND)
    sizes = _sizes_of(weights[0], linear)
    return for_each_tile(groups, weights, y_ND, visit, x_ND.shape[0], sizes)


def _ffn_fwd(linear, activation, *args):
    return _ffn_impl(linear, activation, *args), args


def _ffn_bwd(linear, activation, saved, dy_ND):
    x_ND, *weights, groups, weight_N1 = saved

    def visit(buffers, weights, tile):
        w_gate_DF, w_up_DF, w_down_FD, bias_gate_F, bias_up_F, bias_down_D = weights
        (dx_ND, *dw, dbias_gate_GF, dbias_up_GF, dbias_down_GD), dweight_N1 = buffers
        dw_gate_GDF, dw_up_GDF, dw_down_GFD = dw
        x_TD, dy_TD = tile.read(x_ND), tile.read(dy_ND)
        gate_TF, up_TF = linear.y(x_TD, w_gate_DF, bias_gate_F), linear.y(x_TD, w_up_DF, bias_up_F)
        h_TF, dh_TF = activation.value(gate_TF, up_TF), linear.dx(dy_TD, w_down_FD)
        if weight_N1 is not None:
            # dy . (h @ w_down) = (dy @ w_down^T) . h: y need not be computed again
            dweight_T1 = jnp.sum(dh_TF * h_TF, axis=1, keepdims=True)
            if bias_down_D is not None:
                dweight_T1 += jnp.sum(dy_TD * bias_down_D[None], axis=1, keepdims=True)
            dweight_N1 = tile.write(dweight_N1, dweight_T1)
            weight_T1 = tile.read(weight_N1)
            dh_TF, dy_TD = dh_TF * weight_T1, dy_TD * weight_T1
        dgate_TF, dup_TF = activation.gradient(gate_TF, up_TF, dh_TF)
        grads = (
            tile.write(dx_ND, linear.dx(dgate_TF, w_gate_DF) + linear.dx(dup_TF, w_up_DF)),
            tile.add(dw_gate_GDF, linear.dw(x_TD, dgate_TF)),
            tile.add(dw_up_GDF, linear.dw(x_TD, dup_TF)),
            tile.add(dw_down_GFD, linear.dw(h_TF, dy_TD)),
            _add_rows(tile, dbias_gate_GF, dgate_TF),
            _add_rows(tile, dbias_up_GF, dup_TF),
            _add_rows(tile, dbias_down_GD, dy_TD),
        )
        return grads, dweight_N1

    dweight_N1 = None if weight_N1 is None else _zeros(weight_N1.shape, weight_N1.dtype, x_ND)
    buffers = _zero_grads(x_ND, weights), dweight_N1
    sizes = _sizes_of_any(weights[0])
    grads, dweight_N1 = for_each_tile(groups, weights, buffers, visit, x_ND.shape[0], sizes)
    return *_as_cotangents(grads, weights), dweight_N1


_ffn = jax.custom_vjp(_ffn_impl, nondiff_argnums=(0, 1))
_ffn.defvjp(_ffn_fwd, _ffn_bwd)
