"""Weights that are stored transposed, or among those of other layers: values, gradients, bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.kernels import grouped_matmul as gm
from tests.kernels.oracle import (
    BOUNDS,
    OPS,
    SLOW,
    VARIANTS,
    among_others,
    assert_close,
    assert_rows_keep_their_bits,
    make,
    numpy_answer,
)

STORED = [
    pytest.param(True, False, marks=SLOW),
    pytest.param(False, True, marks=SLOW),
    (True, True),
]
SIZES = [0, 33, 0, 1, 100, 4, 17, 0]


@functools.cache
def program(op, implementation, transpose_w, stacked):
    @jax.jit
    def run(x_ND, weights, sizes_G, first, dy):
        how = {"implementation": implementation, "transpose_w": transpose_w}
        if stacked:
            how["first_group"] = first
        y, vjp = jax.vjp(lambda x, w: OPS[op](x, *w, sizes_G, **how), x_ND, weights)
        return y, *vjp(dy.astype(y.dtype))

    return run


def stored(weights, transpose_w, stacked):
    """The arrays as they lie in memory; other layers hold NaN."""
    if stacked:
        other = [jnp.full(w.shape, jnp.nan, w.dtype) for w in weights]
        weights = [jnp.concatenate([o, w, o]) for w, o in zip(weights, other, strict=True)]
    return [w.swapaxes(1, 2) if transpose_w else w for w in weights]


@pytest.mark.parametrize(("transpose_w", "stacked"), STORED)
@pytest.mark.parametrize(("implementation", "op"), VARIANTS)
def test_matches_float64(implementation, op, transpose_w, stacked):
    x_ND, weights, sizes_G, dy = make(op, 160, SIZES)
    run = program(op, implementation, transpose_w, stacked)
    first = jnp.int32(len(SIZES))
    y, dx, dw = run(x_ND, stored(weights, transpose_w, stacked), sizes_G, first, dy)
    if transpose_w:
        dw = [w.swapaxes(1, 2) for w in dw]
    if stacked:
        before, dw, after = zip(*(np.split(np.asarray(w), 3) for w in dw), strict=True)
        assert not any(w.any() for w in (*before, *after))  # a NaN would be one
    got = [np.asarray(a) for a in (y, dx, *dw)]
    assert_close(got, numpy_answer(op, x_ND, weights, sizes_G, dy), BOUNDS["float32"])


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_biases_lie_among_those_of_other_layers(implementation):
    x_ND, weights, sizes_G, _ = make("ffn", 160, SIZES)
    rng = np.random.default_rng(1)
    widths = (80, 80, 48)
    biases = [jnp.asarray(rng.normal(size=(len(SIZES), f)), jnp.float32) for f in widths]
    names = ("bias_gate_GF", "bias_up_GF", "bias_down_GD")
    how = {"activation": "clamped_swiglu", "row_weight_N": jnp.asarray(rng.normal(size=160))}
    how["row_weight_N"] = how["row_weight_N"].astype(jnp.float32)
    plain = gm.grouped_ffn(
        *(x_ND, *weights, sizes_G),
        **dict(zip(names, biases, strict=True)),
        **how,
        implementation="reference",
    )
    how |= {"implementation": implementation, "transpose_w": True}
    found = jax.jit(functools.partial(gm.grouped_ffn, **how))(
        *(x_ND, *stored(weights, True, True), sizes_G),
        first_group=jnp.int32(len(SIZES)),
        **dict(zip(names, stored(biases, False, True), strict=True)),
    )
    assert_close([np.asarray(found)], [np.asarray(plain)], BOUNDS["float32"])


@pytest.mark.parametrize(
    ("d_model", "d_ff", "dtype"),
    [
        (192, 96, "float32"),
        (192, 96, "bfloat16"),
        (24, 40, "float32"),
        *(
            pytest.param(*shape, dtype, marks=SLOW)
            for shape in ((64, 128), (128, 256), (384, 768), (256, 896), (512, 1024), (16, 16))
            for dtype in ("float32", "bfloat16")
        ),
    ],
)
def test_bits_of_a_row_depend_on_no_other_row(d_model, d_ff, dtype):
    """Any rows in any company: y and dx as among all 300, in tiles from 4 to 256 rows."""
    x_ND, weights, _, dy = make("ffn", 330, [0] * 3, dtype, d_model=d_model, d_ff=d_ff)
    weights = stored(weights, True, False)
    rng = np.random.default_rng(0)
    x_XD, dy_XD = (np.asarray(a)[:300] for a in (x_ND, dy))

    def run(num_rows, before, chosen, after):
        sizes_G = jnp.asarray([before, len(chosen), after], jnp.int32)
        buffers = [among_others(a, num_rows, before, chosen, rng) for a in (x_XD, dy_XD)]
        args = (buffers[0], weights, sizes_G, jnp.int32(0), buffers[1])
        y, dx, _ = program("ffn", "cpu", True, False)(*args)
        return [np.asarray(a)[before : before + len(chosen)] for a in (y, dx)]

    counts = [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 255, *rng.integers(0, 301, 4)]
    assert_rows_keep_their_bits(run, counts, rng)


@pytest.mark.parametrize(
    ("shapes", "how", "message"),
    [
        ([(2, 6, 8)], {"transpose_w": True}, r"w_GDF.shape = \(2, 6, 8\): axis 2 must be 6, as x_"),
        ([(1, 6, 8)], {"first_group": 0}, r"group_sizes_G.shape = \(2,\): must be at most 1, the"),
        ([(6, 6, 8)], {"first_group": 5}, r"first_group = 5: must lie in 0 .. 4: 2 of 6 groups"),
        ([(6, 6, 8)], {}, r"axis 0 must be 2, as group_sizes_G.shape\[0\] is"),
        ([(6, 8, 6), (6, 6, 8)], {"transpose_w": True, "first_group": 0}, r"w_up_GDF.shape = .*ax"),
        ([(6, 6, 8), (4, 6, 8)], {"first_group": 0}, r"axis 0 must be 6, as w_gate_GDF.shape\[0\]"),
    ],
)
def test_wrong_arrays_are_refused(shapes, how, message):
    op = gm.grouped_matmul if len(shapes) == 1 else gm.grouped_swiglu
    x_ND, weights = jnp.ones((4, 6)), [jnp.ones(shape) for shape in shapes]
    with pytest.raises(Refused, match=message):
        op(x_ND, *weights, jnp.asarray([1, 3]), **how)
