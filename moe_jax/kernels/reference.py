"""Dense oracle for the grouped operations: every row meets every group, masks keep the right one.

Promise: obviously right, not fast. Costs G times the work and [G, N, F] of memory. Gradients are
JAX's own; everything is computed in float32 and cast once at the end.

Axes: N rows (sorted by group, rows past sum(group_sizes) unused), D d_model, F d_ff, G groups.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from moe_jax.kernels.activation import Activation
from moe_jax.kernels.scaled import Scaled, widened

_EXACT = jax.lax.Precision.HIGHEST


def matmul(x_ND: Array, w_GDF: Array | Scaled, group_sizes_G: Array, out_dtype: DTypeLike) -> Array:
    mask_GN = _membership(group_sizes_G, x_ND.shape[0])
    return _only_used(_matmul(x_ND, w_GDF, mask_GN), mask_GN).astype(out_dtype)


def swiglu(
    x_ND: Array,
    w_gate_GDF: Array | Scaled,
    w_up_GDF: Array | Scaled,
    group_sizes_G: Array,
    activation: Activation,
    bias_gate_GF: Array | None = None,
    bias_up_GF: Array | None = None,
) -> Array:
    mask_GN = _membership(group_sizes_G, x_ND.shape[0])
    gate_NF = _affine(x_ND, w_gate_GDF, bias_gate_GF, mask_GN)
    h_NF = activation.value(gate_NF, _affine(x_ND, w_up_GDF, bias_up_GF, mask_GN))
    return _only_used(h_NF, mask_GN).astype(x_ND.dtype)


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
) -> Array:
    mask_GN = _membership(group_sizes_G, x_ND.shape[0])
    gate_NF = _affine(x_ND, w_gate_GDF, bias_gate_GF, mask_GN)
    h_NF = activation.value(gate_NF, _affine(x_ND, w_up_GDF, bias_up_GF, mask_GN))
    y_ND = _only_used(_affine(h_NF, w_down_GFD, bias_down_GD, mask_GN), mask_GN)
    if row_weight_N is not None:
        y_ND *= _only_used(row_weight_N.astype(jnp.float32)[:, None], mask_GN)
    return y_ND.astype(x_ND.dtype)


def _membership(group_sizes_G: Array, num_rows: int) -> Array:
    """mask_GN[g, n]: row n belongs to group g."""
    ends_G1 = jnp.cumsum(group_sizes_G)[:, None]
    starts_G1 = ends_G1 - group_sizes_G[:, None]
    row_1N = jnp.arange(num_rows, dtype=ends_G1.dtype)[None, :]
    return (starts_G1 <= row_1N) & (row_1N < ends_G1)


def _only_used(y_NF: Array, mask_GN: Array) -> Array:
    """Changes no value, but keeps a NaN in an unused row of dy out of the gradients."""
    return jnp.where(mask_GN.any(axis=0)[:, None], y_NF, 0.0)


def _matmul(x_ND: Array, w_GDF: Array | Scaled, mask_GN: Array) -> Array:
    # `where` and not a product: unused rows and other groups' weights may hold anything.
    mask_GN1 = mask_GN[:, :, None]
    x_GND = jnp.where(mask_GN1, x_ND.astype(jnp.float32)[None], 0.0)
    y_GNF = jnp.einsum("gnd,gdf->gnf", x_GND, widened(w_GDF), precision=_EXACT)
    return jnp.where(mask_GN1, y_GNF, 0.0).sum(axis=0)


def _affine(x_ND: Array, w_GDF: Array | Scaled, bias_GF: Array | None, mask_GN: Array) -> Array:
    y_NF = _matmul(x_ND, w_GDF, mask_GN)
    if bias_GF is None:
        return y_NF
    bias_G1F = bias_GF.astype(jnp.float32)[:, None]
    return y_NF + jnp.where(mask_GN[:, :, None], bias_G1F, 0.0).sum(axis=0)
