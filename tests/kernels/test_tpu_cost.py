"""Bytes that tiles move, against a walk over the kernels' grids; the rule that chooses by them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels import bench
from moe_jax.kernels.operands import Operands, Result, Weight
from moe_jax.kernels.tpu import chips, cost, tiles, traffic, work

BFLOAT16 = jnp.dtype("bfloat16")


def array(*dims):
    return jax.ShapeDtypeStruct(dims, BFLOAT16)


def fetched(indices, block_bytes):
    """A block is fetched, or written, when its index changes."""
    return sum(1 for _ in itertools.groupby(indices)) * block_bytes


# equal groups whose edges are edges of tiles, and groups that end inside tiles
SIZES = {"equal": [64, 64, 64, 64], "uneven": [70, 50, 90, 46]}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("part", "out"), [(512, 128), (512, 384), (128, 256), (256, 768)])
def test_bytes_of_rows_are_those_of_a_walk_over_the_grid(sizes, part, out):
    num_rows, num_sum, num_out, rows = 256, 512, 768, 32
    x_NA, w_GAB = array(num_rows, num_sum), array(4, num_sum, num_out)
    operands = Operands([x_NA, x_NA], [Weight(w_GAB)], (((0, 0), (1, 0)),))
    items = work.with_unused(jnp.asarray(SIZES[sizes], jnp.int32), num_rows, rows)
    # only inactive items are at the end: they repeat the last block
    walk = [(int(g), int(t)) for g, t, a in np.stack(items[:3]).T if a]
    steps = num_sum // part
    grid = list(itertools.product(range(num_out // out), walk, range(steps)))
    want = 2 * fetched([(t, s) for _, (_, t), s in grid], rows * part * 2)
    want += fetched([(g, s, o) for o, (g, _), s in grid], part * out * 2)
    want += fetched([(t, o) for o, (_, t), _ in grid], rows * out * 2)
    count = cost.equal_items if sizes == "equal" else cost.uneven_items
    moved = cost.bytes_of_rows(
        operands,
        [Result(BFLOAT16)],
        cost.Tile(rows, part, out, 128),
        count(num_rows, 4, rows),
    )
    assert moved == want


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("d", "f"), [(512, 768), (128, 768), (512, 256), (256, 384)])
def test_bytes_of_columns_are_those_of_a_walk_over_the_grid(sizes, d, f):
    num_rows, d_model, d_ff, rows = 256, 512, 768, 32
    items = work.list_work(jnp.asarray(SIZES[sizes], jnp.int32), num_rows, rows, least=1)
    walk = [(int(g), int(t)) for g, t in np.stack(items[:2]).T]
    grid = list(itertools.product(range(d_model // d), range(d_ff // f), walk))
    want = fetched([(t, i) for i, _, (_, t) in grid], rows * d * 2)
    want += 2 * fetched([(t, j) for _, j, (_, t) in grid], rows * f * 2)
    want += 2 * fetched([(g, i, j) for i, j, (g, _) in grid], d * f * 2)
    x_ND, dy_NF = array(num_rows, d_model), array(num_rows, d_ff)
    tile = cost.Tile(rows, d, f, 128)
    moved = cost.bytes_of_columns(x_ND, [dy_NF, dy_NF], 4, BFLOAT16, tile)
    assert moved == want


def test_seconds_by_hand():
    """4 groups of 1,024 rows, 2 of 3 tiles of 512 in parts: 512 whole and 512 + 128 in parts."""
    chip = chips.CHIPS["v5e"]._replace(flops=1e12, bandwidth=1e12, clock=1e9)
    operands = Operands([array(4096, 1024)], [Weight(array(4, 1024, 512))], (((0, 0),),))
    results, flops = [Result(BFLOAT16)], 2 * 4 * (1024 + 128) * 1024 * 512
    num_bytes = 2 * (4096 * 1024 + 4 * 1024 * 512 + 4096 * 512)
    tile = cost.Tile(512, 1024, 512, 512)
    found = cost.seconds_of_rows(chip, operands, results, tile)
    assert found == pytest.approx((flops + num_bytes) / 1e12)
    # half of the axis at a time: 11 items read rows and weights, sums are stored twice
    num_bytes = 2 * 11 * (512 * 1024 + 1024 * 512) + 2 * 4096 * 512
    found = cost.seconds_of_rows(chip, operands, results, tile._replace(sum=512))
    stored = 2 * 4 * (1024 + 128) * 512 / 1024
    assert found == pytest.approx((flops + num_bytes) / 1e12 + stored / 1e9)
    # two cores share tiles of the result: one tile keeps half of the chip busy
    alone = cost.seconds_of_rows(chip._replace(cores=2), operands, results, tile)
    num_bytes = 2 * (4096 * 1024 + 4 * 1024 * 512 + 4096 * 512)
    assert alone == pytest.approx((2 * flops + num_bytes) / 1e12)


def plans(chip, name, way):
    """Kernels of an FFN's forward and backward pass: traced, not compiled."""
    shape = bench.SHAPES[name]
    n, d, f, g = shape.num_rows, shape.d_model, shape.d_ff, shape.num_groups
    weight_N = jax.ShapeDtypeStruct((n,), "float32")
    sizes_G = jax.ShapeDtypeStruct((g,), "int32")
    args = [array(n, d), array(g, d, f), array(g, d, f), array(g, f, d), weight_N]

    def both(args, sizes_G, dy_ND):
        return traffic._with_gradients(traffic.WAYS[way], args, sizes_G, dy_ND)

    with chips.assume(chip), tiles.traced(tiles.Rule()) as found:
        jax.eval_shape(both, args, sizes_G, array(n, d))
    return found


@pytest.mark.parametrize("chip", chips.CHIPS)
def test_tiles_of_the_longest_sums_are_cut_and_move_less(chip):
    """dx of Mixtral's gate and up: a whole axis of 14,336 would leave room for 256 columns, so that
    rows are read 16 times."""
    (plan,) = [p for p in plans(chip, "mixtral", "recompute") if p.kind == "dx2"]
    rows, weights = 2 * 2 * 8192 * 14336, 2 * 2 * 8 * 14336 * 4096
    assert plan.bytes < 0.5 * (16 * rows + weights)
    assert plan.tile.sum < plan.num_sum


@pytest.mark.parametrize(
    ("chip", "name"), [("v5e", "mixtral"), *((chip, "deepseek_v3") for chip in chips.CHIPS)]
)
def test_stored_pre_activations_move_hardly_more_bytes_than_separate_matmuls(chip, name):
    """In the kernels alone: what the compiler does between those of the unfused way is not here."""
    stored, unfused = (sum(p.bytes for p in plans(chip, name, way)) for way in ("store", "unfused"))
    assert stored < 1.05 * unfused
