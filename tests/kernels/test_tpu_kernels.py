"""The TPU kernels, interpreted, with tiles that cut every axis; values against the oracle.

test_grouped_matmul.py runs them with the tiles that the rule gives small shapes: whole axes. Here
the summed axis is cut (128 of 256), tiles of the result reach beyond it (256 of 300), in chunks of
128, and groups end inside tiles of rows (256, cut into parts of 128).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.kernels import grouped_matmul as gm
from moe_jax.kernels.operands import Operands, Result, Weight
from moe_jax.kernels.tpu import chips, tiles
from tests.kernels.oracle import BOUNDS, OPS, SLOW, assert_close, make

# rows of the buffer, rows of each group
GROUPS = {
    "edges inside tiles": (700, [130, 0, 255, 1, 200, 0]),
    "one group has all": (600, [0, 600, 0]),
    "whole tiles": (768, [256, 512, 0]),
    "fewer rows than a part": (50, [7, 0, 40]),
    "no rows used": (300, [0, 0, 0]),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Every operation with these tiles: rows, summed axis, result; chunks of 128 columns."""
    monkeypatch.setattr(tiles, "TABLE", _Everything())
    with tiles.traced(tiles.Rule(products=1)):
        yield


class _Everything:
    def get(self, key):
        _, kind, _, num_sum, _ = key
        if kind in ("dw", "dw2", "dbias"):
            return (256, 256, 128, 128) if num_sum % 128 == 0 else (256, num_sum, 128, num_sum)
        return 256, 128 if num_sum % 128 == 0 else num_sum, 256, 128


@functools.cache
def case(op, groups, dtype, d_model=256, d_ff=300):
    num_rows, sizes = GROUPS[groups]
    x_ND, weights, sizes_G, dy = make(op, num_rows, sizes, dtype, d_model=d_model, d_ff=d_ff)
    rng, num_groups, used = np.random.default_rng(1), len(sizes), sum(sizes)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x_ND, dy = (a.at[used:].set(jnp.nan) for a in (x_ND, dy))
    named = {}
    if op != "matmul":
        named = {"bias_gate_GF": normal(num_groups, d_ff), "bias_up_GF": normal(num_groups, d_ff)}
    if op == "ffn":
        named["bias_down_GD"] = normal(num_groups, d_model)
        named["row_weight_N"] = normal(num_rows).at[used:].set(jnp.nan)
    return x_ND, weights, named, sizes_G, dy


def results(op, args, **how):
    x_ND, weights, named, sizes_G, dy = args

    @jax.jit
    def run(x_ND, weights, named, dy):
        y, vjp = jax.vjp(lambda x, w, n: OPS[op](x, *w, sizes_G, **n, **how), x_ND, weights, named)
        return y, *vjp(dy)

    return [np.asarray(a) for a in jax.tree.leaves(run(x_ND, weights, named, dy))]


CASES = [
    ("ffn", "edges inside tiles", "float32", "recompute"),
    ("ffn", "edges inside tiles", "float32", "store"),
    ("swiglu", "edges inside tiles", "float32", "recompute"),
    ("ffn", "edges inside tiles", "bfloat16", "recompute"),
    ("matmul", "whole tiles", "bfloat16", "recompute"),
    ("matmul", "one group has all", "float32", "recompute"),
    ("matmul", "fewer rows than a part", "float32", "recompute"),
]
LONG = [
    (op, groups, dtype, kept)
    for op in OPS
    for groups in GROUPS
    for dtype in ("float32", "bfloat16")
    for kept in (("recompute",) if op == "matmul" else ("recompute", "store"))
]
LONG = [pytest.param(*c, marks=SLOW) for c in LONG if c not in CASES]


@pytest.mark.parametrize(("op", "groups", "dtype", "kept"), CASES + LONG)
def test_values_and_gradients_with_cut_axes(small_tiles, op, groups, dtype, kept):
    activation = {} if op == "matmul" else {"activation": "clamped_swiglu"}
    keep = {} if op == "matmul" else {"pre_activations": kept}
    args = case(op, groups, dtype)
    got = results(op, args, implementation="pallas_tpu_interpret", **keep, **activation)
    want = results(op, args, implementation="reference", **activation)
    # stored in bfloat16, pre-activations lose bits that the activation's derivative shows
    bound = BOUNDS[dtype] * (2 if kept == "store" and dtype == "bfloat16" else 1)
    assert_close(got, want, bound)
    used = sum(GROUPS[groups][1])
    for rows in got[:2]:
        assert (rows[used:] == 0).all()


@pytest.mark.parametrize(
    "op", ["ffn", *(pytest.param(op, marks=SLOW) for op in ("swiglu", "matmul"))]
)
def test_weights_stored_transposed(small_tiles, op):
    x_ND, weights, named, sizes_G, dy = case(op, "edges inside tiles", "float32")
    args = x_ND, [w.swapaxes(1, 2) for w in weights], named, sizes_G, dy
    y, dx, *rest = results(op, args, implementation="pallas_tpu_interpret", transpose_w=True)
    rest[: len(weights)] = [dw.swapaxes(1, 2) for dw in rest[: len(weights)]]
    want = results(op, (x_ND, weights, named, sizes_G, dy), implementation="reference")
    assert_close([y, dx, *rest], want, BOUNDS["float32"])


def test_store_is_refused_where_it_is_not_there():
    x_ND, (w, *_), _, sizes_G, _ = case("swiglu", "fewer rows than a part", "float32")
    run = functools.partial(gm.grouped_swiglu, x_ND, w, w, sizes_G)
    with pytest.raises(Refused, match=r"pre_activations = 'store': the cpu implementation only r"):
        run(pre_activations="store", implementation="cpu")
    with pytest.raises(Refused, match=r"pre_activations = 'keep': must be one of recompute, store"):
        run(pre_activations="keep")


# --- sizes of tiles --------------------------------------------------------------------------


def shaped(num_rows, num_sum, num_out, dtype="bfloat16", num_groups=8):
    x_NA = jax.ShapeDtypeStruct((num_rows, num_sum), dtype)
    w_GAB = jax.ShapeDtypeStruct((num_groups, num_sum, num_out), dtype)
    weights = [Weight(w_GAB), Weight(w_GAB)]
    return Operands([x_NA], weights, (((0, 0),), ((0, 1),))), [Result(jnp.dtype(dtype))]


@pytest.mark.parametrize("chip", chips.CHIPS)
@pytest.mark.parametrize("widths", [(4096, 14336), (14336, 4096), (2880, 2880), (48, 80)])
def test_tiles_fit_on_chip_and_divide_what_is_summed(chip, widths):
    operands, found = shaped(8192, *widths)
    with chips.assume(chip):
        tile = tiles.for_rows("a kind", operands, found)
        assert tiles.on_chip(tile, operands, found) < chips.CHIPS[chip].vmem
    assert widths[0] % tile.sum == 0
    assert tile.rows % tiles.PART_ROWS == 0


@pytest.mark.parametrize(
    ("num_out", "width"),
    [(1024, 512), (768, 384), (2880, 1536), (200, 128), (128, 128), (700, 384)],
)
def test_both_cores_of_a_chip_have_tiles(num_out, width):
    operands, found = shaped(1024, 512, num_out)
    with chips.assume("v5p"):
        assert tiles.for_rows("a kind", operands, found).out == width


def test_axes_that_cannot_be_cut_are_refused_by_name():
    operands, found = shaped(512, 128 * 1024 + 1, 256)
    with pytest.raises(Refused, match=r"no tile of 131073 x 256 weights fits .* implementation='c"):
        tiles.for_rows("a kind", operands, found)
    assert tiles.padding(4097) + 4097 == 4608
    assert [tiles.padding(length) for length in (80, 2880, 4096, 14336)] == [0] * 4


@pytest.mark.parametrize(
    ("chip", "num_rows", "rows"),
    [("v5e", 1, 1), ("v5e", 50, 50), ("v5e", 200, 128), ("v5e", 700, 256), ("v6e", 700, 512)],
)
def test_row_tiles_are_parts_or_all_rows(chip, num_rows, rows):
    """As few as hide the loading of weights: twice the multiplier's width."""
    operands, found = shaped(num_rows, 256, 256)
    with chips.assume(chip):
        assert tiles.for_rows("a kind", operands, found).rows == rows
