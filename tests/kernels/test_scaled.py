"""Weights in 8 bits with scales: every implementation against the oracle on the widened weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.kernels import grouped_matmul as gm
from moe_jax.kernels import scaled
from tests.kernels.oracle import BOUNDS, IMPLEMENTATIONS, OPS, assert_close, make

SIZES, NUM_ROWS = [129, 0, 64, 20, 1], 300
SCALES = {
    "matmul": ("w_scale_GF",),
    "swiglu": ("w_gate_scale_GF", "w_up_scale_GF"),
    "ffn": ("w_gate_scale_GF", "w_up_scale_GF", "w_down_scale_GD"),
}


@functools.cache
def case(op, narrow, dtype, d_model=48, d_ff=80):
    x_ND, weights, _, _ = make(op, NUM_ROWS, SIZES, d_model=d_model, d_ff=d_ff)
    rng, groups = np.random.default_rng(1), len(SIZES)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    weights = [scaled.quantised(w, narrow) for w in weights]
    # columns of very different sizes: a scale that is forgotten or mixed up shows
    weights = [
        w._replace(scale=w.scale * 2.0 ** rng.integers(-3, 3, w.scale.shape)) for w in weights
    ]
    x_ND = x_ND.at[sum(SIZES) :].set(jnp.nan).astype(dtype)
    named = {}
    if op != "matmul":
        named = {"bias_gate_GF": normal(groups, d_ff), "activation": "clamped_swiglu"}
    if op == "ffn":
        named |= {"bias_down_GD": normal(groups, d_model), "row_weight_N": normal(NUM_ROWS)}
    return x_ND, weights, named


CASES = [
    ("reference", "matmul", "int8", "float32"),
    ("cpu", "matmul", "float8_e4m3fn", "float32"),
    ("cpu", "ffn", "int8", "bfloat16"),
    ("pallas_tpu_interpret", "matmul", "float8_e4m3fn", "bfloat16"),
    ("pallas_tpu_interpret", "swiglu", "int8", "float32"),
    ("pallas_tpu_interpret", "ffn", "int8", "bfloat16"),
    ("pallas_tpu_interpret", "ffn", "float8_e5m2", "float32"),
]
CASES += [
    pytest.param(i, op, narrow, dtype, marks=pytest.mark.slow)
    for i in IMPLEMENTATIONS
    for op in OPS
    for narrow in scaled.DTYPES
    for dtype in ("float32", "bfloat16")
    if (i, op, narrow, dtype) not in CASES
]


@pytest.mark.parametrize(("implementation", "op", "narrow", "dtype"), CASES)
def test_narrow_weights_equal_the_oracle_on_widened_ones(implementation, op, narrow, dtype):
    x_ND, weights, named = case(op, narrow, dtype)
    sizes_G = jnp.asarray(SIZES, jnp.int32)
    scales = {name: w.scale for name, w in zip(SCALES[op], weights, strict=True)}
    run = jax.jit(lambda x, w: OPS[op](x, *w, sizes_G, **named, **scales,
                                       implementation=implementation))  # fmt: skip
    got = run(x_ND, [w.values for w in weights])
    assert got.dtype == x_ND.dtype
    wide = [scaled.widened(w) for w in weights]
    want = OPS[op](x_ND.astype(jnp.float32), *wide, sizes_G, **named, implementation="reference")
    used = sum(SIZES)
    assert_close([np.asarray(got)[:used]], [np.asarray(want)[:used]], BOUNDS[dtype])
    assert (np.asarray(got)[used:] == 0).all()


@pytest.mark.parametrize("implementation", ["cpu", "pallas_tpu_interpret"])
def test_narrow_weights_of_one_layer_stored_transposed(implementation):
    x_ND, (w,), _ = case("matmul", "int8", "float32")
    sizes_G = jnp.asarray(SIZES[1:3], jnp.int32)
    named = {"transpose_w": True, "first_group": 2, "implementation": implementation}
    got = gm.grouped_matmul(x_ND, w.values.swapaxes(1, 2), sizes_G, w_scale_GF=w.scale, **named)
    part = scaled.Scaled(w.values[2:4], w.scale[2:4])
    want = gm.grouped_matmul(x_ND, scaled.widened(part), sizes_G, implementation="reference")
    assert_close([np.asarray(got)], [np.asarray(want)], BOUNDS["float32"])


@pytest.mark.parametrize(
    ("narrow", "error"), [("int8", 0.004), ("float8_e4m3fn", 0.04), ("float8_e5m2", 0.08)]
)
def test_quantised_weights_are_near(narrow, error):
    """Within half a step of the type: of the column's largest (int8), of each value (fp8)."""
    w_GDF = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64, 10)), jnp.float32)
    w_GDF = w_GDF.at[1].set(0.0)
    back = scaled.widened(scaled.quantised(w_GDF, narrow))
    largest = jnp.max(jnp.abs(w_GDF), axis=1, keepdims=True)
    assert float(jnp.max(jnp.abs(back - w_GDF) / jnp.where(largest > 0, largest, 1))) < error
    assert (np.asarray(back[1]) == 0).all()


@pytest.mark.parametrize("narrow", scaled.DTYPES)
@pytest.mark.parametrize("largest", [1e-36, 1e-38, 1e-42, 0.0])
def test_columns_of_hardly_anything_are_no_nan(narrow, largest):
    """Their scale would be no normal number, which a division reads as 0."""
    w_GDF = jnp.full((1, 4, 2), largest, jnp.float32).at[0, :, 1].set(1.0)
    found = np.asarray(scaled.widened(scaled.quantised(w_GDF, narrow)))
    np.testing.assert_allclose(found[0, :, 0], largest, rtol=0.1, atol=1.1e-36)
    np.testing.assert_allclose(found[0, :, 1], 1.0, rtol=0.1)


def test_wrong_scales_are_refused():
    x_ND, (w,), _ = case("matmul", "int8", "float32")
    sizes_G = jnp.asarray(SIZES, jnp.int32)
    run = lambda w_GDF, **named: gm.grouped_matmul(x_ND, w_GDF, sizes_G, **named)  # noqa: E731
    with pytest.raises(Refused, match=r"w_scale_GF = None: weights in int8 need w_scale_GF"):
        run(w.values)
    with pytest.raises(Refused, match=r"w_GDF.dtype = 'float32': must be one of int8, .* w_scale"):
        run(scaled.widened(w), w_scale_GF=w.scale)
    with pytest.raises(Refused, match=r"w_scale_GF.shape = \(5, 79\): must be \(5, 80\), one"):
        run(w.values, w_scale_GF=w.scale[:, 1:])
    with pytest.raises(Refused, match=r"w_scale_GF.dtype = 'int32': must be one of float32"):
        run(w.values, w_scale_GF=w.scale.astype(jnp.int32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_through_narrow_weights_are_refused(implementation):
    x_ND, (w,), _ = case("matmul", "int8", "float32")
    sizes_G, named = jnp.asarray(SIZES, jnp.int32), {"implementation": implementation}
    loss = lambda x: gm.grouped_matmul(x, w.values, sizes_G, w_scale_GF=w.scale, **named).sum()  # noqa: E731
    with pytest.raises(Refused, match=r"w_GDF = 'differentiated': weights in 8 bits are for forw"):
        jax.grad(loss)(x_ND)
