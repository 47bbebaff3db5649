"""Bit-identity, a promise of `cpu` alone, tested with `==`.

The bits of a row depend on that row alone, those of dw on the rows of its group.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.kernels.oracle import (
    OPS,
    among_others,
    assert_rows_keep_their_bits,
    make,
    value_and_grads,
)


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
        buffers = [among_others(a, num_rows, before, chosen, rng) for a in (x_XD, dy_XD)]
        sizes_G = jnp.asarray(sizes, jnp.int32)
        y, dx, *_ = value_and_grads("ffn", buffers[0], weights, sizes_G, buffers[1])
        return [a[before : before + len(chosen)] for a in (y, dx)]

    if counts is None:
        counts = [1, 16, 63, 64, 65, 255, *rng.integers(0, 41, 8), *rng.integers(0, 301, 8)]
    assert_rows_keep_their_bits(run, counts, rng)


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
