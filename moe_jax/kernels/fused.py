"""Differentiable grouped operations made of two kernels, whatever platform these are for.

Promise: as `grouped_matmul`. gate and up are one kernel that reads x once and computes the
activation while both are on chip; the rows' weights and the bias of the down projection are
multiplied and added in its epilogue; dx of gate and up is one kernel, and so are their dw.
Nothing of the size of x or w is transposed or copied in memory, weights that are stored transposed
included.

Axes: N rows, D d_model, F d_ff, G groups.

Backward: the pre-activations are computed again (nothing but the inputs is kept) in one kernel
with dh = dy @ w_down^T, or kept by the forward pass (`store`): 2 N F values more, one kernel
with three matmuls less a third. `Kernels` holds the two kernels: tpu/ and gpu/ have them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from moe_jax.kernels.activation import Activation
from moe_jax.kernels.operands import Kernels, Operands, Result, Weight
from moe_jax.kernels.scaled import Scaled

_PRODUCT = (((0, 0),),)  # the first lhs times the first weight


class _How(NamedTuple):
    """What is fixed when a program is built."""

    kernels: Kernels
    out_dtype: DTypeLike
    transposed: bool
    activation: Activation | None = None
    store: bool = False

    def forward(self, w_GDF: Array) -> Weight:
        """Of x @ w."""
        return Weight(w_GDF, self.transposed)

    def backward(self, w_GDF: Array) -> Weight:
        """Of dy @ w^T."""
        return Weight(w_GDF, not self.transposed)

    def width(self, w_GDF: Array | Scaled) -> int:
        """F of [G, D, F] or, transposed, [G, F, D]."""
        return w_GDF.shape[1 if self.transposed else 2]


# --- x @ w -----------------------------------------------------------------------------------


def matmul(
    x_ND: Array,
    w_GDF: Array | Scaled,
    group_sizes_G: Array,
    out_dtype: DTypeLike,
    *,
    transposed: bool = False,
    kernels: Kernels,
) -> Array:
    how = _How(kernels, jnp.dtype(out_dtype), transposed)
    weights, scales = _opened(kernels, w_GDF)
    y_NF = _matmul(how, _padded(kernels, x_ND, 1), weights, scales, group_sizes_G)
    return _cut(y_NF, how.width(w_GDF))


def _matmul_impl(how, x_ND, weights, scales, group_sizes_G):
    def epilogue(sums, by_group, by_row, by_both):
        return _affine(sums, scales, [None], by_group)

    operands = Operands([x_ND], [how.forward(weights[0])], _PRODUCT, by_group=_present(scales))
    results = [Result(how.out_dtype)]
    return how.kernels.rows("y", operands, group_sizes_G, epilogue, results)[0]


def _matmul_fwd(how, *args):
    return _matmul_impl(how, *args), args


def _matmul_bwd(how, saved, dy_NF):
    x_ND, (w_GDF,), _, group_sizes_G = saved
    dy_NF = dy_NF.astype(x_ND.dtype)
    dx_ND = _dx("dx", [dy_NF], [w_GDF], group_sizes_G, how)
    dw = _dw("dw", x_ND, [dy_NF], w_GDF.dtype, group_sizes_G, how)
    return dx_ND, dw, [None], None


_matmul = jax.custom_vjp(_matmul_impl, nondiff_argnums=(0,))
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
    store: bool = False,
    kernels: Kernels,
) -> Array:
    """`store`: keep gate and up for the backward pass instead of computing them again."""
    how = _How(kernels, x_ND.dtype, transposed, activation, store)
    weights, scales = _opened(kernels, w_gate_GDF, w_up_GDF)
    biases = [_padded(kernels, b, 1) for b in (bias_gate_GF, bias_up_GF)]
    h_NF = _swiglu(how, _padded(kernels, x_ND, 1), weights, scales, biases, group_sizes_G)
    return _cut(h_NF, how.width(w_gate_GDF))


def _swiglu_impl(how, *args):
    return _gate_up(how, args, False)[0]


def _swiglu_fwd(how, *args):
    h_NF, *stored = _gate_up(how, args, how.store)
    return h_NF, (args, stored)


def _swiglu_bwd(how, saved, dh_NF):
    (x_ND, weights, scales, biases, group_sizes_G), stored = saved
    gradient = how.activation.gradient
    if stored:
        gate_NF, up_NF, dh_NF = (a.astype(jnp.float32) for a in (*stored, dh_NF))
        used_N1 = _used(group_sizes_G, x_ND.shape[0])[:, None]
        grads = [jnp.where(used_N1, g, 0.0) for g in gradient(gate_NF, up_NF, dh_NF)]
        dgate_NF, dup_NF = (g.astype(x_ND.dtype) for g in grads)
    else:

        def epilogue(sums, by_group, by_row, by_both):
            return gradient(*_affine(sums, scales, biases, by_group), *by_both)

        operands = Operands(
            [x_ND],
            [how.forward(w) for w in weights],
            (((0, 0),), ((0, 1),)),
            by_group=_present(biases),
            by_both=[dh_NF],
        )
        results = [Result(x_ND.dtype), Result(x_ND.dtype)]
        args = operands, group_sizes_G, epilogue, results
        dgate_NF, dup_NF = how.kernels.rows("dgate_dup", *args)
    grads = _of_gate_up(how, x_ND, weights, dgate_NF, dup_NF, group_sizes_G)
    dbiases = _dbiases(how, [dgate_NF, dup_NF], biases, group_sizes_G)
    return grads[0], list(grads[1:]), [None, None], dbiases, None


def _gate_up(how, args, store):
    """[h], or [h, gate, up] to be stored."""
    x_ND, weights, scales, biases, group_sizes_G = args

    def epilogue(sums, by_group, by_row, by_both):
        gate_TF, up_TF = _affine(sums, scales, biases, by_group)
        h_TF = how.activation.value(gate_TF, up_TF)
        return [h_TF, gate_TF, up_TF] if store else [h_TF]

    products = (((0, 0),), ((0, 1),))
    by_group = _present([*scales, *biases])
    operands = Operands([x_ND], [how.forward(w) for w in weights], products, by_group=by_group)
    results = [Result(x_ND.dtype)] * (3 if store else 1)
    kind = "gate_up_stored" if store else "gate_up"
    return how.kernels.rows(kind, operands, group_sizes_G, epilogue, results)


def _of_gate_up(how, x_ND, weights, dgate_NF, dup_NF, group_sizes_G):
    """dx, dw of gate, dw of up."""
    dx_ND = _dx("dx2", [dgate_NF, dup_NF], weights, group_sizes_G, how)
    return dx_ND, *_dw("dw2", x_ND, [dgate_NF, dup_NF], weights[0].dtype, group_sizes_G, how)


_swiglu = jax.custom_vjp(_swiglu_impl, nondiff_argnums=(0,))
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
    store: bool = False,
    kernels: Kernels,
) -> Array:
    how = _How(kernels, x_ND.dtype, transposed, activation, store)
    weights, scales = _opened(kernels, w_gate_GDF, w_up_GDF, w_down_GFD)
    biases = [_padded(kernels, b, 1) for b in (bias_gate_GF, bias_up_GF, bias_down_GD)]
    y_ND = _ffn(
        how, _padded(kernels, x_ND, 1), weights, scales, biases, row_weight_N, group_sizes_G
    )
    return _cut(y_ND, x_ND.shape[1])


def _ffn_impl(how, *args):
    return _ffn_fwd(how._replace(store=False), *args)[0]


def _ffn_fwd(how, *args):
    x_ND, weights, scales, biases, row_weight_N, group_sizes_G = args
    inputs = x_ND, weights[:2], scales[:2], biases[:2], group_sizes_G
    h_NF, *stored = _gate_up(how, inputs, how.store)

    def epilogue(sums, by_group, by_row, by_both):
        (y_TD,) = _affine(sums, scales[2:], biases[2:], by_group)
        return [y_TD * by_row[0] if by_row else y_TD]

    operands = Operands(
        [h_NF],
        [how.forward(weights[2])],
        _PRODUCT,
        by_group=_present([*scales[2:], *biases[2:]]),
        by_row=_present([row_weight_N]),
    )
    results = [Result(x_ND.dtype)]
    (y_ND,) = how.kernels.rows("down", operands, group_sizes_G, epilogue, results)
    return y_ND, (args, stored)


def _ffn_bwd(how, saved, dy_ND):
    args, stored = saved
    x_ND, (w_gate, w_up, w_down_GFD), scales, biases, row_weight_N, group_sizes_G = args
    dtype, weighed = x_ND.dtype, row_weight_N is not None
    gradient, value = how.activation.gradient, how.activation.value

    def epilogue(sums, by_group, by_row, by_both):
        *pre, dh_TF = sums
        gate_TF, up_TF = by_both if stored else _affine(pre, scales[:2], biases[:2], by_group)
        h_TF = value(gate_TF, up_TF)
        # dy . (h @ w_down) = (dy @ w_down^T) . h: y need not be computed again
        row_sum = [dh_TF * h_TF] if weighed else []
        dh_TF = dh_TF * by_row[0] if weighed else dh_TF
        return [*gradient(gate_TF, up_TF, dh_TF), h_TF, *row_sum]

    down = how.backward(w_down_GFD)
    if stored:
        operands = Operands([dy_ND], [down], _PRODUCT, by_both=stored)
    else:
        products = (((0, 0),), ((0, 1),), ((1, 2),))
        weights = [how.forward(w_gate), how.forward(w_up), down]
        operands = Operands([x_ND, dy_ND], weights, products, by_group=_present(biases[:2]))
    operands = operands._replace(by_row=_present([row_weight_N]))
    results = [Result(dtype)] * 3 + [Result(jnp.float32, row_sum=True)] * weighed
    kind = "dh" if stored else "dh_gate_up"
    found = how.kernels.rows(kind, operands, group_sizes_G, epilogue, results)
    dgate_NF, dup_NF, h_NF, *row_sums = found
    dweight_N = None
    if weighed:
        used_N = _used(group_sizes_G, x_ND.shape[0])
        dweight_N = row_sums[0]
        if biases[2] is not None:
            dweight_N += _bias_dots(biases[2], dy_ND, group_sizes_G)
        # unused rows may hold anything, and 0 x NaN is NaN
        weighted_ND = dy_ND.astype(jnp.float32) * row_weight_N.astype(jnp.float32)[:, None]
        dy_ND = jnp.where(used_N[:, None], weighted_ND, 0.0).astype(dtype)
        dweight_N = jnp.where(used_N, dweight_N, 0.0).astype(row_weight_N.dtype)
    dx_ND, *dw = _of_gate_up(how, x_ND, [w_gate, w_up], dgate_NF, dup_NF, group_sizes_G)
    dw += _dw("dw", h_NF, [dy_ND], w_down_GFD.dtype, group_sizes_G, how)
    dbiases = _dbiases(how, [dgate_NF, dup_NF, dy_ND], biases, group_sizes_G)
    return dx_ND, dw, [None] * 3, dbiases, dweight_N, None


_ffn = jax.custom_vjp(_ffn_impl, nondiff_argnums=(0,))
_ffn.defvjp(_ffn_fwd, _ffn_bwd)


# --- as a module has them ---------------------------------------------------------------------


def operations(
    kernels: Kernels, check: Callable[..., None]
) -> tuple[Callable[..., Array], Callable[..., Array], Callable[..., Array]]:
    """matmul, swiglu, ffn with these kernels.

    Args:
      check: takes the arrays and raises `Refused` for what the kernels do not take.
    """

    def checked(operation: Callable[..., Array]) -> Callable[..., Array]:
        def run(x_ND: Array, *args: Any, **how: Any) -> Array:
            check(x_ND, *args)
            return operation(x_ND, *args, **how, kernels=kernels)

        return run

    return checked(matmul), checked(swiglu), checked(ffn)


# --- parts -----------------------------------------------------------------------------------


def _present(arrays: Sequence[Array | None]) -> list[Array]:
    return [a for a in arrays if a is not None]


def _affine(
    sums: Sequence[Array],
    scales: Sequence[Array | None],
    biases: Sequence[Array | None],
    given: Sequence[Array],
) -> list[Array]:
    """sum * scale + bias for each; `given` are the blocks of those that are there, scales first."""
    left = iter(given)
    sums = [s if c is None else s * next(left) for s, c in zip(sums, scales, strict=True)]
    return [s if b is None else s + next(left) for s, b in zip(sums, biases, strict=True)]


def _opened(kernels: Kernels, *weights: Array | Scaled) -> tuple[list[Array], list[Array | None]]:
    """Values, filled up where they must be, and scales; None for weights without."""
    pairs = [w if isinstance(w, Scaled) else (w, None) for w in weights]
    values = _present([_padded(kernels, _padded(kernels, w, 1), 2) for w, _ in pairs])
    return values, [_padded(kernels, scale, 1) for _, scale in pairs]


def _dx(kind, dys, weights, group_sizes_G, how):
    """The sum over pairs of dy @ w^T."""
    products = (tuple((i, i) for i in range(len(dys))),)
    operands = Operands(dys, [how.backward(w) for w in weights], products)
    results = [Result(dys[0].dtype)]
    args = operands, group_sizes_G, lambda sums, *_: sums, results
    return how.kernels.rows(kind, *args)[0]


def _dw(kind, x_ND, dys, dtype, group_sizes_G, how) -> list[Array]:
    """x^T @ dy for each dy, x being read once; transposed dy^T @ x, for each on its own."""
    if not how.transposed:
        return how.kernels.columns(kind, x_ND, dys, group_sizes_G, dtype)
    args = group_sizes_G, dtype
    return [dw for dy in dys for dw in how.kernels.columns("dw", dy, [x_ND], *args)]


def _dbiases(how, dys, biases, group_sizes_G) -> list[Array | None]:
    """Sums of each dy over the rows of a group: its product with rows of ones."""

    def one(dy_NF: Array, bias_GF: Array) -> Array:
        ones_N8 = jnp.ones_like(dy_NF, shape=(dy_NF.shape[0], 8))
        (sums_G8F,) = how.kernels.columns("dbias", ones_N8, [dy_NF], group_sizes_G, jnp.float32)
        return sums_G8F[:, 0].astype(bias_GF.dtype)

    return [None if b is None else one(dy, b) for dy, b in zip(dys, biases, strict=True)]


def _bias_dots(bias_GD: Array, dy_ND: Array, group_sizes_G: Array) -> Array:
    """[N]: dy[n] . bias of n's group, in float32; anything in unused rows."""
    row_N1 = jnp.arange(dy_ND.shape[0], dtype=jnp.int32)[:, None]
    ended_NG = jnp.cumsum(group_sizes_G)[None] <= row_N1
    group_N = jnp.minimum(ended_NG.sum(axis=1, dtype=jnp.int32), bias_GD.shape[0] - 1)
    return jnp.sum(dy_ND.astype(jnp.float32) * bias_GD.astype(jnp.float32)[group_N], axis=1)


def _used(group_sizes_G: Array, num_rows: int) -> Array:
    """bool [N]: rows of some group."""
    return jnp.arange(num_rows, dtype=jnp.int32) < jnp.sum(group_sizes_G)


def _padded(kernels: Kernels, array: Array | None, axis: int) -> Array | None:
    """With zeros behind an axis that must be cut when it is summed over, and cannot be."""
    missing = 0 if array is None else kernels.padding(array.shape[axis])
    if array is None or not missing:
        return array
    return jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])


def _cut(y_NF: Array, width: int) -> Array:
    return y_NF if y_NF.shape[1] == width else y_NF[:, :width]
