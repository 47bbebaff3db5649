"""Every implementation against NumPy in float64: values, dx and dw, for awkward groups.

Errors are judged relative to the largest entry; the bounds are a few roundings of the dtype.
Bit-identity is a promise of `cpu` alone, and tested with `==`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.errors import Refused
from moe_jax.kernels import grouped_matmul as gm

OPS = {
    "matmul": gm.grouped_matmul,
    "swiglu": gm.grouped_swiglu,
    "ffn": gm.grouped_ffn,
}
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
IMPLEMENTATIONS = ["reference", "cpu", "pallas_tpu_interpret"]
# the TPU kernels are slow to interpret, and ffn calls them for all three matmuls
VARIANTS = [(i, op) for i in IMPLEMENTATIONS for op in OPS if op == "ffn" or "pallas" not in i]
SLOW = pytest.mark.slow
BOUNDS = {"float32": 2e-6, "bfloat16": 1.2e-2}


def make(op, num_rows, sizes, dtype="float32", seed=0, d_model=48, d_ff=80):
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
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        error = np.abs(a.astype(np.float64) - b).max() / max(np.abs(b).max(), 1e-30)
        assert error <= bound, f"result {i}: relative error {error:.2e} > {bound:.2e}"


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


# --- the bits of a row depend on that row alone, those of dw on the rows of its group --------


def split_rows(array, sizes):
    return np.split(array[: sum(sizes)], np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("op", ["matmul", "ffn"])
def test_bits_do_not_depend_on_where_a_group_stands(op):
    sizes = [300, 0, 17, 1, 350, 16, 255, 129]
    x_ND, weights, sizes_G, dy = make(op, sum(sizes), sizes, d_model=128, d_ff=256)
    y, dx, *dw = value_and_grads(op, x_ND, weights, sizes_G, dy)
    rows = [split_rows(np.asarray(a), sizes) for a in (x_ND, dy, y, dx)]
    rng = np.random.default_rng(1)
    # other orders, longer buffers, and fewer groups at once, as on more devices
    for num_rows, chosen in [
        (sum(sizes), rng.permutation(8)),
        (4096, rng.permutation(8)),
        (275, [6, 2, 3]),
        (1, [3]),
    ]:
        chosen_sizes = [sizes[g] for g in chosen]
        x_new, dy_new, *expected = (np.concatenate([r[g] for g in chosen]) for r in rows)
        # what stands in unused rows must not matter either
        unused = ((0, num_rows - sum(chosen_sizes)), (0, 0))
        got = value_and_grads(
            op,
            jnp.asarray(np.pad(x_new, unused, constant_values=7.0)),
            [w[np.asarray(chosen)] for w in weights],
            jnp.asarray(chosen_sizes, jnp.int32),
            jnp.asarray(np.pad(dy_new, unused, constant_values=np.inf)),
        )
        for a, b in zip(got[:2], expected, strict=True):
            np.testing.assert_array_equal(a[: sum(chosen_sizes)], b)
        for a, b in zip(got[2:], dw, strict=True):
            np.testing.assert_array_equal(a, b[np.asarray(chosen)])


EVERY_COUNT = pytest.param(range(301), marks=pytest.mark.slow, id="every count")


@pytest.mark.parametrize("counts", [pytest.param(None, id="some counts"), EVERY_COUNT])
@pytest.mark.parametrize(
    ("d_model", "d_ff", "dtype"),
    [
        (192, 96, "float32"),
        (192, 96, "bfloat16"),
        (512, 1024, "float32"),
        (48, 100, "float32"),
        *(
            pytest.param(*shape, dtype, marks=pytest.mark.slow)
            for shape in ((64, 128), (128, 256), (384, 768), (24, 40), (512, 1024))
            for dtype in ("float32", "bfloat16")
            if (shape, dtype) != ((512, 1024), "float32")
        ),
    ],
)
def test_bits_of_a_row_depend_on_no_other_row(d_model, d_ff, dtype, counts):
    """Any rows, in any order, often or never, in any company: y and dx as among all 300."""
    x_ND, weights, _, dy = make("ffn", 330, [0] * 3, dtype, d_model=d_model, d_ff=d_ff)
    rng = np.random.default_rng(0)
    x_XD, dy_XD = (np.asarray(a)[:300] for a in (x_ND, dy))

    def run(num_rows, before, chosen, after):
        """y and dx of the chosen rows, which stand between other groups."""
        sizes = [before, len(chosen), after]
        buffers = []
        for rows_XD in (x_XD, dy_XD):
            others_ND = rng.normal(size=(num_rows, d_model)).astype(rows_XD.dtype)
            others_ND[before : before + len(chosen)] = rows_XD[chosen]
            buffers.append(jnp.asarray(others_ND))
        sizes_G = jnp.asarray(sizes, jnp.int32)
        y, dx, *_ = value_and_grads("ffn", buffers[0], weights, sizes_G, buffers[1])
        return [a[before : before + len(chosen)] for a in (y, dx)]

    whole = run(700, 0, np.arange(300), 0)
    few = rng.integers(0, 41, 8)
    for count in (
        [1, 16, 63, 64, 65, 255, *few, *rng.integers(0, 301, 8)] if counts is None else counts
    ):
        chosen = rng.choice(300, int(count), replace=bool(rng.integers(2)))
        for num_rows in (700, 41) if count <= 41 else (700,):
            before = int(rng.integers(num_rows - count + 1))
            after = int(rng.integers(num_rows - count - before + 1))
            for found, expected in zip(run(num_rows, before, chosen, after), whole, strict=True):
                np.testing.assert_array_equal(found, expected[chosen])


@pytest.mark.parametrize("op", ["swiglu", "ffn"])
def test_bits_are_the_same_under_shard_map(op):
    """8 devices with 2 groups each and a buffer of their own, against all 16 groups on one."""
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(900, rng.dirichlet(np.ones(16)))
    x_ND, weights, sizes_G, dy = make(op, 900, sizes, d_model=128, d_ff=256)
    y, dx, *dw = value_and_grads(op, x_ND, weights, sizes_G, dy)

    per_device = sizes.reshape(8, 2).sum(1)
    room = int(per_device.max()) + 5

    def spread(a):
        parts = np.split(np.asarray(a), np.cumsum(per_device)[:-1])
        return jnp.asarray(np.concatenate([np.pad(p, ((0, room - len(p)), (0, 0))) for p in parts]))

    mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(x_ND, weights, sizes_G, dy):
        y, vjp = jax.vjp(lambda x, w: OPS[op](x, *w, sizes_G), x_ND, weights)
        return y, *vjp(dy)

    spec = P("expert")
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))
    y_8, dx_8, dw_8 = sharded(spread(x_ND), weights, sizes_G, spread(dy))
    np.testing.assert_array_equal(y_8, spread(y))
    np.testing.assert_array_equal(dx_8, spread(dx))
    for a, b in zip(dw_8, dw, strict=True):
        np.testing.assert_array_equal(a, b)


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
    got = run(jnp.array([20, 60, 9], jnp.int32))
    np.testing.assert_array_equal(got, run(jnp.array([20, 30, 0], jnp.int32)))


# --- refusals --------------------------------------------------------------------------------

X, W, DOWN, SIZES = (4, 6), (2, 6, 8), (2, 8, 6), [1, 3]


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("matmul", {0: np.ones(4)}, r"x_ND.shape = \(4,\): must have 2 axes. Pass an array \[N, D"),
        ("matmul", {1: np.ones((6, 8))}, r"w_GDF.shape = \(6, 8\): must have 3 axes"),
        ("matmul", {2: np.ones((1, 2), int)}, r"group_sizes_G.shape = \(1, 2\): must have 1 axes"),
        ("matmul", {1: np.ones((2, 5, 8))}, r"w_GDF.shape = \(2, 5, 8\): axis 1 must be 6, as x_N"),
        ("matmul", {1: np.ones((3, 6, 8))}, r"axis 0 must be 2, as group_sizes_G.shape\[0\] is"),
        ("swiglu", {2: np.ones((2, 6, 9))}, r"w_up_GDF.shape = .* axis 2 must be 8, as w_gate_GDF"),
        ("ffn", {3: np.ones((2, 6, 8))}, r"w_down_GFD.shape = .* axis 1 must be 8, as w_gate_GDF"),
        ("ffn", {3: np.ones((2, 8, 7))}, r"axis 2 must be 6, as x_ND.shape\[1\].*\(2, 8, 6\)"),
        ("matmul", {2: np.ones(2)}, r"group_sizes_G.dtype = 'float32': must be an integer type"),
        ("matmul", {2: np.array([-1, 2])}, r"no size may be negative \(entry 0 is\)"),
        ("matmul", {2: np.array([3, 2])}, r"must sum to at most N = 4, .* sums to 5"),
        ("matmul", {0: np.ones(X, np.int32)}, r"x_ND.dtype = 'int32': must be one of float32"),
        ("matmul", {1: np.ones(W, np.float16)}, r"w_GDF.dtype = 'float16': must equal the dtype"),
    ],
)
def test_wrong_arrays_are_refused(op, change, message):
    args = {
        "matmul": [np.ones(X), np.ones(W), np.array(SIZES)],
        "swiglu": [np.ones(X), np.ones(W), np.ones(W), np.array(SIZES)],
        "ffn": [np.ones(X), np.ones(W), np.ones(W), np.ones(DOWN), np.array(SIZES)],
    }[op]
    for position, array in change.items():
        args[position] = array
    narrow = {"float64": "float32", "int64": "int32"}
    args = [jnp.asarray(a, narrow.get(a.dtype.name, a.dtype)) for a in args]
    with pytest.raises(Refused, match=message):
        OPS[op](*args)


@pytest.mark.parametrize(
    ("row_weight", "message"),
    [
        (np.ones((4, 1), np.float32), r"row_weight_N.shape = \(4, 1\): must have 1 axes"),
        (np.ones(3, np.float32), r"row_weight_N.shape = \(3,\): must be \(4,\), one weight for"),
        (np.ones(4, np.int32), r"row_weight_N.dtype = 'int32': must be one of float32"),
    ],
)
def test_wrong_weights_of_rows_are_refused(row_weight, message):
    x_ND, weights, sizes_G, _ = make("ffn", 4, [4])
    with pytest.raises(Refused, match=message):
        gm.grouped_ffn(x_ND, *weights, sizes_G, row_weight_N=jnp.asarray(row_weight))


@pytest.mark.parametrize(
    ("name", "bias", "message"),
    [
        ("bias_gate_GF", np.ones(8), r"bias_gate_GF.shape = \(8,\): must have 2 axes"),
        ("bias_up_GF", np.ones((2, 6)), r"bias_up_GF.shape = \(2, 6\): must be \(2, 8\)"),
        ("bias_down_GD", np.ones((2, 8)), r"bias_down_GD.shape = \(2, 8\): must be \(2, 6\)"),
        ("bias_down_GD", np.ones((2, 6), np.int32), r"bias_down_GD.dtype = 'int32': must be one"),
    ],
)
def test_wrong_biases_are_refused(name, bias, message):
    bias = jnp.asarray(bias, jnp.float32 if bias.dtype == np.float64 else bias.dtype)
    x_ND, w_GDF, w_GFD = jnp.ones(X), jnp.ones(W), jnp.ones(DOWN)
    with pytest.raises(Refused, match=message):
        gm.grouped_ffn(x_ND, w_GDF, w_GDF, w_GFD, jnp.asarray(SIZES), **{name: bias})


def test_wrong_choices_are_refused_while_tracing():
    x_ND, weights, sizes_G, _ = make("matmul", 4, [4])
    with pytest.raises(Refused, match=r"implementation = 'cuda': must be one of reference, cpu"):
        jax.jit(lambda x: gm.grouped_matmul(x, *weights, sizes_G, implementation="cuda"))(x_ND)
    with pytest.raises(Refused, match=r"activation = 'gelu': must be one of swiglu, clamped_swig"):
        gm.grouped_swiglu(x_ND, *weights, *weights, sizes_G, activation="gelu")
    with pytest.raises(Refused, match=r"preferred_element_type = 'int8': must be one of float32"):
        gm.grouped_matmul(x_ND, *weights, sizes_G, preferred_element_type=jnp.int8)
