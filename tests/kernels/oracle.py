"""Arguments of the grouped operations, their results in NumPy's float64, and bounds of errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import grouped_matmul as gm

OPS = {
    "matmul": gm.grouped_matmul,
    "swiglu": gm.grouped_swiglu,
    "ffn": gm.grouped_ffn,
}
IMPLEMENTATIONS = ["reference", "cpu", "pallas_tpu_interpret"]
# the TPU kernels are slow to interpret, and ffn calls them for all three matmuls
VARIANTS = [(i, op) for i in IMPLEMENTATIONS for op in OPS if op == "ffn" or "pallas" not in i]
SLOW = pytest.mark.slow
BOUNDS = {"float32": 2e-6, "bfloat16": 1.2e-2}


def make(op, num_rows, sizes, dtype="float32", seed=0, d_model=48, d_ff=80):
    """x [N, D], weights, sizes, and a dy of the result's shape."""
    rng = np.random.default_rng(seed)
    num_groups = len(sizes)
    shapes = {"matmul": ["DF"], "swiglu": ["DF", "DF"], "ffn": ["DF", "DF", "FD"]}[op]
    length = {"D": d_model, "F": d_ff}
    x_ND = rng.normal(size=(num_rows, d_model))
    weights = [
        rng.normal(size=(num_groups, length[a], length[b])) / length[a] ** 0.5 for a, b in shapes
    ]
    dy = rng.normal(size=(num_rows, length[shapes[-1][1]]))
    x_ND, dy, *weights = (jnp.asarray(a, dtype) for a in (x_ND, dy, *weights))
    return x_ND, weights, jnp.asarray(sizes, jnp.int32), dy


def value_and_grads(op, x_ND, weights, sizes_G, dy, **kwargs):
    """[y, dx, dw of each weight]"""
    y, dx, dw = program(op, **kwargs)(x_ND, weights, sizes_G, dy)
    return [np.asarray(a) for a in (y, dx, *dw)]


@functools.cache
def program(op, **kwargs):
    @jax.jit
    def run(x_ND, weights, sizes_G, dy):
        y, vjp = jax.vjp(lambda x, w: OPS[op](x, *w, sizes_G, **kwargs), x_ND, weights)
        return y, *vjp(dy.astype(y.dtype))

    return run


def numpy_answer(op, x_ND, weights, sizes_G, dy):
    """[y, dx, dw of each weight] in float64, group by group"""
    x_ND, dy, *weights = (np.asarray(a, np.float64) for a in (x_ND, dy, *weights))
    y, dx, dw = np.zeros(dy.shape), np.zeros(x_ND.shape), [np.zeros(w.shape) for w in weights]
    start = 0
    for g, size in enumerate(np.asarray(sizes_G)):
        rows = slice(start, start + size)
        x, d, ws = x_ND[rows], dy[rows], [w[g] for w in weights]
        if op == "matmul":
            y[rows], dx[rows], dw[0][g] = x @ ws[0], d @ ws[0].T, x.T @ d
        else:
            gate, up = x @ ws[0], x @ ws[1]
            sigmoid = 1 / (1 + np.exp(-gate))
            h, dh = gate * sigmoid * up, d
            if op == "ffn":
                y[rows], dh, dw[2][g] = h @ ws[2], d @ ws[2].T, h.T @ d
            else:
                y[rows] = h
            dgate = dh * up * sigmoid * (1 + gate * (1 - sigmoid))
            dup = dh * gate * sigmoid
            dx[rows] = dgate @ ws[0].T + dup @ ws[1].T
            dw[0][g], dw[1][g] = x.T @ dgate, x.T @ dup
        start += size
    return [y, dx, *dw]


def assert_close(got, want, bound):
    """Errors relative to the largest entry of each result."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        error = np.abs(a.astype(np.float64) - b).max() / max(np.abs(b).max(), 1e-30)
        assert error <= bound, f"result {i}: relative error {error:.2e} > {bound:.2e}"


def among_others(rows_XD, num_rows, before, chosen, rng):
    """[N, D]: the chosen rows from row `before` on, random ones around them."""
    others_ND = rng.normal(size=(num_rows, rows_XD.shape[1])).astype(rows_XD.dtype)
    others_ND[before : before + len(chosen)] = rows_XD[chosen]
    return jnp.asarray(others_ND)


def assert_rows_keep_their_bits(run, counts, rng):
    """Rows that are chosen out of 300 have the bits that they have among all.

    Args:
      run: (rows of the buffer, rows before, chosen, rows after) -> arrays of the chosen rows.
      counts: how many are chosen.
    """
    whole = run(700, 0, np.arange(300), 0)
    for count in counts:
        chosen = rng.choice(300, int(count), replace=bool(rng.integers(2)))
        for num_rows in (700, 41) if count <= 41 else (700,):
            before = int(rng.integers(num_rows - count + 1))
            after = int(rng.integers(num_rows - count - before + 1))
            for found, expected in zip(run(num_rows, before, chosen, after), whole, strict=True):
                np.testing.assert_array_equal(found, expected[chosen])
