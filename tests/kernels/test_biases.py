"""Biases and activations of experts against NumPy in float64, and the bits of biased rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import activation
from moe_jax.kernels import grouped_matmul as gm
from tests.kernels.oracle import BOUNDS, IMPLEMENTATIONS, OPS, SLOW, VARIANTS, assert_close, make


def numpy_clamped(gate, up):
    """h, and its derivatives by gate and up."""
    free_gate, free_up = gate <= 7.0, np.abs(up) <= 7.0
    gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
    sigmoid = 1 / (1 + np.exp(-1.702 * gate))
    by_gate = (up + 1) * (sigmoid + 1.702 * gate * sigmoid * (1 - sigmoid))
    return (up + 1) * gate * sigmoid, by_gate * free_gate, gate * sigmoid * free_up


def numpy_silu(gate, up):
    sigmoid = 1 / (1 + np.exp(-gate))
    return gate * sigmoid * up, up * sigmoid * (1 + gate * (1 - sigmoid)), gate * sigmoid


def numpy_biased(activation, x_ND, weights, biases, sizes_G, dy, row_weight_N):
    """y, dx, dw, dbias, and the gradient of the rows' weights; no down projection: `swiglu`."""
    x_ND, dy, w_N, *arrays = (
        np.asarray(a, np.float64) for a in (x_ND, dy, row_weight_N, *weights, *biases)
    )
    weights, biases = arrays[: len(weights)], arrays[len(weights) :]
    y, dx, dweight_N = np.zeros(dy.shape), np.zeros(x_ND.shape), np.zeros(w_N.shape)
    dw, dbias = ([np.zeros(a.shape) for a in group] for group in (weights, biases))
    start = 0
    for g, size in enumerate(np.asarray(sizes_G)):
        rows = slice(start, start + size)
        start += size
        x, d = x_ND[rows], dy[rows] * w_N[rows, None]
        gate, up = (x @ weights[i][g] + biases[i][g] for i in (0, 1))
        h, by_gate, by_up = activation(gate, up)
        plain, dh = h, d
        if len(weights) == 3:
            plain = h @ weights[2][g] + biases[2][g]
            dh, dw[2][g], dbias[2][g] = d @ weights[2][g].T, h.T @ d, d.sum(0)
        y[rows], dweight_N[rows] = plain * w_N[rows, None], (plain * dy[rows]).sum(1)
        for i, dpart in enumerate((dh * by_gate, dh * by_up)):
            dw[i][g], dbias[i][g] = x.T @ dpart, dpart.sum(0)
            dx[rows] += dpart @ weights[i][g].T
    return [y, dx, *dw, *dbias, dweight_N]


BIASES = {"swiglu": ("bias_gate_GF", "bias_up_GF"),
          "ffn": ("bias_gate_GF", "bias_up_GF", "bias_down_GD")}  # fmt: skip
ACTIVATIONS = {"swiglu": numpy_silu, "clamped_swiglu": numpy_clamped}


@functools.cache
def biased_program(op, implementation, activation):
    @jax.jit
    def run(x_ND, weights, biases, sizes_G, row_weight_N, dy):
        def f(x_ND, weights, biases, row_weight_N):
            named = dict(zip(BIASES[op], biases, strict=True))
            if op == "ffn":
                named["row_weight_N"] = row_weight_N
            return OPS[op](
                *(x_ND, *weights, sizes_G),
                **named,
                activation=activation,
                implementation=implementation,
            )

        y, vjp = jax.vjp(f, x_ND, weights, biases, row_weight_N)
        return y, *vjp(dy.astype(y.dtype))

    return run


def make_biased(op, sizes, num_rows, dtype, **widths):
    """Gates and ups of which many are cut off, biases that unused rows would show."""
    x_ND, weights, sizes_G, dy = make(op, num_rows, sizes, dtype, **widths)
    rng = np.random.default_rng(3)
    x_ND = 4 * x_ND
    width = {"GF": weights[0].shape[2], "GD": x_ND.shape[1]}
    biases = [
        jnp.asarray(2 * rng.normal(size=(len(sizes), width[name[-2:]])), jnp.float32)
        for name in BIASES[op]
    ]
    return x_ND, weights, biases, sizes_G, dy


BIASED = [
    pytest.param(*variant, activation, dtype, marks=() if usual else SLOW)
    for activation in ACTIVATIONS
    for dtype in ("float32", "bfloat16")
    for variant in VARIANTS
    for usual in [
        activation == "clamped_swiglu"
        and (dtype == "float32" or variant == ("cpu", "ffn"))
        and variant != ("reference", "swiglu")
    ]
    if variant[1] != "matmul"
]


@pytest.mark.parametrize(("implementation", "op", "activation", "dtype"), BIASED)
def test_biases_and_activations(implementation, op, activation, dtype):
    """y and all gradients; empty groups; a bias does not leak into unused rows, which hold NaN."""
    sizes, used = [0, 129, 0, 64, 20, 1], 214
    x_ND, weights, biases, sizes_G, dy = make_biased(op, sizes, 300, dtype)
    weighed = op == "ffn"
    row_weight_N = jnp.asarray(np.random.default_rng(1).normal(size=300), jnp.float32)
    if not weighed:
        row_weight_N = jnp.ones(300)
    case = (x_ND, weights, biases, sizes_G, dy, row_weight_N)
    want = numpy_biased(ACTIVATIONS[activation], *case)
    if activation == "clamped_swiglu":
        gate, up = (np.asarray(x_ND[:129] @ w[1], np.float32) for w in weights[:2])
        assert min((gate > 7).mean(), (up < -7).mean(), (up > 7).mean()) > 0.02

    x_ND, dy = x_ND.at[used:].set(jnp.nan), dy.at[used:].set(jnp.nan)
    row_weight_N = row_weight_N.at[used:].set(jnp.nan)
    program = biased_program(op, implementation, activation)
    got = program(x_ND, weights, biases, sizes_G, row_weight_N, dy)
    *got, dweight_N = (np.asarray(a) for a in jax.tree.leaves(got))
    assert [a.dtype.name for a in got[-len(biases) :]] == ["float32"] * len(biases)
    assert_close(got, want[:-1], BOUNDS[dtype])
    for rows in (got[0], got[1]):
        assert (rows[used:] == 0).all()
    assert all((a[[0, 2]] == 0).all() for a in got[2:])
    if weighed:
        assert_close([dweight_N], want[-1:], BOUNDS[dtype])
        assert (dweight_N[used:] == 0).all()


@pytest.mark.parametrize("implementation", ["cpu", *(pytest.param(i, marks=SLOW)
                         for i in IMPLEMENTATIONS if i != "cpu")])  # fmt: skip
@pytest.mark.parametrize("present", [pytest.param("bias_up_GF", marks=SLOW), "bias_down_GD"])
def test_a_bias_that_is_none_is_zero(implementation, present):
    x_ND, weights, biases, sizes_G, dy = make_biased("ffn", [40, 0, 20], 64, "float32")
    zeroed = [
        b if name == present else 0 * b for name, b in zip(BIASES["ffn"], biases, strict=True)
    ]
    ones_N = jnp.ones(64)
    want = biased_program("ffn", implementation, "clamped_swiglu")(
        x_ND, weights, zeroed, sizes_G, ones_N, dy
    )

    def f(x_ND, bias):
        return gm.grouped_ffn(
            *(x_ND, *weights, sizes_G),
            **{present: bias},
            activation="clamped_swiglu",
            implementation=implementation,
        )

    index = BIASES["ffn"].index(present)
    y, vjp = jax.vjp(jax.jit(f), x_ND, biases[index])
    got = [np.asarray(a) for a in (y, *vjp(dy))]
    assert_close(got, [np.asarray(a) for a in (want[0], want[1], want[3][index])], 2e-6)


@pytest.mark.parametrize(
    ("d_model", "d_ff", "count"),
    [(128, 256, 140), *(pytest.param(*s, marks=SLOW) for s in ((192, 96, 300), (512, 1024, 70)))],
)
def test_bits_of_biased_rows_depend_on_no_other_row(d_model, d_ff, count):
    """y, dx, dw and dbias of one group alone, in another buffer and beside other groups."""
    widths = {"d_model": d_model, "d_ff": d_ff}
    x_ND, weights, biases, _, dy = make_biased("ffn", [0, count, 0], 640, "float32", **widths)
    program = biased_program("ffn", "cpu", "clamped_swiglu")

    def run(before, after, num_rows):
        chosen = np.arange(before, before + count)
        x_moved, dy_moved = (
            jnp.ones((num_rows, d_model)).at[chosen].set(a[:count]) for a in (x_ND, dy)
        )
        sizes_G = jnp.asarray([before, count, after], jnp.int32)
        case = (x_moved, weights, biases, sizes_G, jnp.ones(num_rows), dy_moved)
        y, dx, dw, dbias, _ = program(*case)
        return [y[chosen], dx[chosen], *(a[1] for a in (*dw, *dbias))]

    alone = run(0, 0, 640)
    for before, after, num_rows in ((17, 0, 640), (130, 200, 640), (5, 3, count + 8)):
        for a, b in zip(run(before, after, num_rows), alone, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", activation.ACTIVATIONS)
def test_a_gradient_at_nan_is_nan(name):
    """It is not taken for a value that is cut off."""
    act, nan, one = activation.ACTIVATIONS[name], jnp.float32(jnp.nan), jnp.float32(1)
    for gate, up in ((nan, one), (one, nan)):
        by_jax = jax.grad(act.value, (0, 1))(gate, up)
        assert np.array_equal(np.isnan(act.gradient(gate, up, one)), np.isnan(by_jax))
