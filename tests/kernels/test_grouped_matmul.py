"""Every implementation against NumPy in float64: values, dx and dw, for awkward groups.

Errors are judged relative to the largest entry; the bounds are a few roundings of the dtype.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.errors import Refused
from moe_jax.kernels import grouped_matmul as gm
from tests.kernels.oracle import (
    BOUNDS,
    IMPLEMENTATIONS,
    OPS,
    VARIANTS,
    assert_close,
    make,
    numpy_answer,
    program,
    value_and_grads,
)

# (rows in the buffer, rows of each group); equal shapes share one compiled program
GROUPS = {
    "one group": (130, [130]),
    "one row": (1, [1]),
    "decode": (64, [0, 1, 0, 1]),
    "no row used": (997, [0] * 16),
    "sizes around those of tiles": (
        997,
        [129, 128, 127, 1, 65, 64, 63, 0, 17, 16, 257, 5] + [0] * 4,
    ),
    "ends with the buffer": (997, [1, 0, 300, 17, 1, 350, 15, 0, 16, 31, 0, 0, 260, 0, 0, 6]),
    "empty groups, unused rows": (997, [0, 33, 0, 0, 100, 0, 16, 0, 0, 7, 0, 0, 64, 0, 1, 0]),
    "one of 16 takes all": (997, [0] * 5 + [997] + [0] * 10),
}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("implementation", "op"), VARIANTS)
def test_matches_float64(implementation, op, groups):
    case = make(op, *GROUPS[groups])
    got = value_and_grads(op, *case, implementation=implementation)
    assert_close(got, numpy_answer(op, *case), BOUNDS["float32"])


@functools.cache
def weighted_program(implementation):
    @jax.jit
    def run(x_ND, weights, sizes_G, row_weight_N, dy):
        def f(x_ND, weights, row_weight_N):
            return gm.grouped_ffn(
                x_ND, *weights, sizes_G, row_weight_N=row_weight_N, implementation=implementation
            )

        y, vjp = jax.vjp(f, x_ND, weights, row_weight_N)
        return y, *vjp(dy)

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_weights_of_rows(implementation, dtype):
    """y, dx, dw and the gradient of the rows' weights; unused rows hold NaN, their weights too."""
    x_ND, weights, sizes_G, dy = make("ffn", 300, [129, 0, 64, 20, 1], dtype)
    used = 214
    row_weight_N = jnp.asarray(np.random.default_rng(1).normal(size=300), jnp.float32)
    x, w, dy64 = (np.asarray(a, np.float64) for a in (x_ND, row_weight_N, dy))
    w[used:] = 0
    y, dx, *dw = numpy_answer("ffn", x_ND, weights, sizes_G, np.asarray(dy64 * w[:, None]))
    y = numpy_answer("ffn", x, weights, sizes_G, dy64)[0]
    want = [y * w[:, None], dx, *dw, (y * dy64).sum(1)]

    x_ND, dy = x_ND.at[used:].set(jnp.nan), dy.at[used:].set(jnp.nan)
    row_weight_N = row_weight_N.at[used:].set(jnp.nan)
    got = weighted_program(implementation)(x_ND, weights, sizes_G, row_weight_N, dy)
    got = [np.asarray(a) for a in jax.tree.leaves(got)]
    assert_close(got, want, BOUNDS[dtype])
    for rows in (got[0], got[1], got[-1]):
        assert (rows[used:] == 0).all()


@pytest.mark.parametrize("sizes", [[321, 0, 320, 1, 65, 577, 96, 20], [0, 64, 0, 129, 0, 0, 7, 0]])
def test_matches_float64_with_large_weights(sizes):
    """`cpu` cuts groups into more and larger tiles where weights are large."""
    case = make("ffn", 1400, sizes, d_model=512, d_ff=512)
    got = value_and_grads("ffn", *case, implementation="cpu")
    assert_close(got, numpy_answer("ffn", *case), BOUNDS["float32"])


@pytest.mark.parametrize(("implementation", "op"), VARIANTS)
def test_matches_float64_in_bfloat16(implementation, op):
    case = make(op, *GROUPS["empty groups, unused rows"], "bfloat16")
    got = value_and_grads(op, *case, implementation=implementation)
    assert {a.dtype.name for a in got} == {"bfloat16"}
    assert_close(got, numpy_answer(op, *case), BOUNDS["bfloat16"])


@pytest.mark.parametrize(("implementation", "op"), VARIANTS)
def test_unused_rows_and_empty_groups_are_exactly_zero(implementation, op):
    x_ND, weights, sizes_G, dy = make(op, 100, [0, 21, 0, 40])
    x_ND, dy = x_ND.at[61:].set(jnp.nan), dy.at[61:].set(jnp.nan)
    y, dx, *dw = value_and_grads(op, x_ND, weights, sizes_G, dy, implementation=implementation)
    assert (y[61:] == 0).all()
    assert (dx[61:] == 0).all()
    assert all((w[[0, 2]] == 0).all() for w in dw)
    assert all(np.isfinite(a).all() for a in (y, dx, *dw))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_infinite_weights_reach_no_other_row(implementation):
    x_ND, (w_GDF,), sizes_G, _ = make("matmul", 64, [5, 7, 20])
    run = jax.jit(lambda w: gm.grouped_matmul(x_ND, w, sizes_G, implementation=implementation))
    y_NF, spoilt_NF = np.asarray(run(w_GDF)), np.asarray(run(w_GDF.at[1].set(jnp.inf)))
    others = np.r_[0:5, 12:64]
    assert not np.isfinite(spoilt_NF[5:12]).any()
    np.testing.assert_array_equal(spoilt_NF[others], y_NF[others])


def test_preferred_element_type():
    x_ND, weights, sizes_G, dy = make("matmul", 100, [60, 30], "bfloat16")
    for implementation in IMPLEMENTATIONS:
        kwargs = {"implementation": implementation, "preferred_element_type": jnp.float32}
        got = value_and_grads("matmul", x_ND, weights, sizes_G, dy, **kwargs)
        assert [a.dtype.name for a in got] == ["float32", "bfloat16", "bfloat16"]
        want = numpy_answer("matmul", x_ND, weights, sizes_G, dy)
        assert_close(got[:1], want[:1], BOUNDS["float32"])


@pytest.mark.parametrize(("dtype", "exact"), [("float32", 1), ("float16", 1), ("bfloat16", 0)])
def test_products_of_cpu_are_exact_on_every_backend(dtype, exact):
    """GPUs and TPUs round float32 unless they are told not to."""
    x_ND, weights, sizes_G, dy = make("ffn", 100, [60, 30], dtype)
    text = program("ffn", implementation="cpu").lower(x_ND, weights, sizes_G, dy).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert dots
    assert all(line.count("HIGHEST, HIGHEST") == exact for line in dots)


# --- transformations -------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_shared_weights_are_summed_in_shard_map(implementation):
    """Weights split over `expert` and shared over `data`: their gradient is a sum over `data`."""
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    num_rows = 40
    sizes = np.random.default_rng(2).multinomial(num_rows - 3, np.ones(2) / 2, size=8)
    x_ND, weights, _, dy = make("ffn", 8 * num_rows, [0] * 8)

    def loss(x_ND, weights, sizes_MG):
        def local(x_ND, weights, sizes_G):
            y = gm.grouped_ffn(x_ND, *weights, sizes_G[0], implementation=implementation)
            return y

        both = P(("data", "expert"))
        # JAX's interpreter of kernels does not know check_vma; the compiled kernels do, and are
        # compiled with it in test_pallas_tpu.py
        f = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(both, P("expert"), both),
            out_specs=both,
            check_vma=implementation != "pallas_tpu_interpret",
        )
        return jnp.sum(f(x_ND, weights, sizes_MG) * dy)

    sizes_MG = jnp.asarray(sizes, jnp.int32)
    dx, dw = jax.jit(jax.grad(loss, argnums=(0, 1)))(x_ND, weights, sizes_MG)

    want_dx, want_dw = np.zeros(x_ND.shape), [np.zeros(w.shape) for w in weights]
    for device in range(8):
        rows = slice(device * num_rows, (device + 1) * num_rows)
        groups = slice(device % 4 * 2, device % 4 * 2 + 2)
        local_weights = [w[groups] for w in weights]
        _, d, *ws = numpy_answer("ffn", x_ND[rows], local_weights, sizes[device], dy[rows])
        want_dx[rows] = d
        for total, w in zip(want_dw, ws, strict=True):
            total[groups] += w
    assert_close([np.asarray(a) for a in (dx, *dw)], [want_dx, *want_dw], BOUNDS["float32"])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_devices_may_differ_in_their_first_group_alone(implementation, op):
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    x_ND, weights, _, _ = make(op, 20, [0] * 4)
    sizes_G = jnp.array([8, 9], jnp.int32)

    def run(x_ND, weights, first):
        how = {"first_group": first, "implementation": implementation}
        return OPS[op](x_ND, *weights, sizes_G, **how)

    def local(x_ND, weights):
        return run(x_ND, weights, jax.lax.axis_index("expert") * 2)[None]

    f = jax.shard_map(local, mesh=mesh, in_specs=(P(), P()), out_specs=P("expert"))
    got, vjp = jax.vjp(jax.jit(f), x_ND, weights)
    want, vjp_alone = jax.vjp(lambda *a: jnp.stack([run(*a, 0), run(*a, 2)]), x_ND, weights)
    for a, b in zip(*map(jax.tree.leaves, (vjp(got), vjp_alone(want))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_under_checkpoint_and_scan_over_layers():
    x_ND, weights, sizes_G, _ = make("ffn", 90, [30, 0, 41])
    stacked = [jnp.stack([w, w * 0.5, w * 0.25]) for w in weights]

    def loss(stacked, x_ND, *, implementation, remat):
        def layer(x_ND, weights):
            return x_ND + gm.grouped_ffn(x_ND, *weights, sizes_G, implementation=implementation), ()

        body = jax.checkpoint(layer) if remat else layer
        return jnp.sum(jnp.sin(jax.lax.scan(body, x_ND, stacked)[0]))

    def grads(**kwargs):
        out = jax.jit(jax.grad(lambda *a: loss(*a, **kwargs), argnums=(0, 1)))(stacked, x_ND)
        return [np.asarray(a) for a in jax.tree.leaves(out)]

    plain = grads(implementation="cpu", remat=False)
    for a, b in zip(plain, grads(implementation="cpu", remat=True), strict=True):
        np.testing.assert_array_equal(a, b)
    assert_close(plain, grads(implementation="reference", remat=False), 4e-6)


def test_sizes_past_the_buffer_are_cut_off_when_traced():
    x_ND, weights, _, _ = make("matmul", 50, [0, 0, 0])
    run = jax.jit(lambda sizes_G: gm.grouped_matmul(x_ND, *weights, sizes_G))
    for sizes in ([20, 60, 9], [20, 2**31 - 1, 2**31 - 1]):
        got = run(jnp.array(sizes, jnp.int32))
        np.testing.assert_array_equal(got, run(jnp.array([20, 30, 0], jnp.int32)))
    got = run(jnp.array([20, -7, 9], jnp.int32))
    np.testing.assert_array_equal(got, run(jnp.array([20, 0, 9], jnp.int32)))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_sizes_of_a_narrow_type_are_whole_numbers(implementation, dtype):
    """Their sums are beyond it."""
    w_GDF = jnp.stack([jnp.full((4, 4), 1.0 + group) for group in range(3)])
    sizes_G = jnp.array([100, 100, 100], dtype)
    y_NF = gm.grouped_matmul(jnp.ones((300, 4)), w_GDF, sizes_G, implementation=implementation)
    np.testing.assert_array_equal(y_NF[:, 0], np.repeat([4.0, 8.0, 12.0], 100))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "pallas_gpu_interpret"])
@pytest.mark.parametrize(("num_rows", "num_groups"), [(5, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("op", OPS)
def test_no_row_or_no_group_makes_zeros(op, num_rows, num_groups, implementation):
    x_ND, weights, sizes_G, dy = make(op, num_rows, [0] * num_groups, "bfloat16")
    got = value_and_grads(op, x_ND, weights, sizes_G, dy, implementation=implementation)
    for found, like in zip(got, [dy, x_ND, *weights], strict=True):
        assert (found.shape, found.dtype) == (like.shape, like.dtype)
        assert not found.any()


@pytest.mark.parametrize("op", OPS)
def test_rows_in_numpy_are_told_what_runs_here(op):
    x_ND, weights, sizes_G, _ = make(op, 8, [5, 3])
    with pytest.raises(Refused, match=r"'pallas_tpu': runs on TPUs, and x_ND lies on cpu"):
        OPS[op](np.asarray(x_ND), *weights, sizes_G, implementation="pallas_tpu")
