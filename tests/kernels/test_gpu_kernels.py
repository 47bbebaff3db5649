"""The Hopper kernels, interpreted with a look out for races; values against the oracle.

Interpreting is slow: few shapes, chosen to end within tiles, with groups that are empty, whole, and
of every kind of end. What is compiled for a GPU is lowered here, as far as it goes without one; and
where there is one, every test of values runs it, too:

    JAX_PLATFORMS=cuda,cpu pytest -m 'slow or not slow' tests/kernels/test_gpu_kernels.py
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moe_jax.config import fields
from moe_jax.errors import Refused
from moe_jax.kernels import cpu, gpu, hopper, pallas_gpu, scaled
from moe_jax.kernels import grouped_matmul as gm
from moe_jax.kernels.gpu import work
from moe_jax.kernels.operands import Operands, Result, Weight
from tests.kernels.oracle import (
    BOUNDS,
    SLOW,
    among_others,
    assert_close,
    assert_rows_keep_their_bits,
    make,
    numpy_answer,
    value_and_grads,
)

BOTH = pytest.mark.parametrize(
    "kernels",
    [
        pytest.param(
            "pallas_gpu_interpret",
            marks=pytest.mark.skipif(
                not hasattr(plgpu, "InterpretGPUParams") or jax.default_backend() != "cpu",
                reason="this JAX interprets no GPU kernels, or has a GPU to run them",
            ),
        ),
        pytest.param(
            "pallas_gpu",
            marks=pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU"),
        ),
    ],
)
LOWERED = pytest.mark.skipif(
    jax.__version_info__ < gpu.OLDEST_JAX, reason="this JAX lowers no sums of rows for GPUs"
)
# rows of the buffer, rows of each group
PATTERNS = {
    "uneven": (150, [37, 0, 70, 3, 0]),
    "nothing": (70, [0, 0]),
    "one group": (140, [0, 140, 0]),
    "full": (136, [8, 64, 64]),
}


@BOTH
@pytest.mark.parametrize(
    ("op", "pattern", "how"),
    [
        ("matmul", "uneven", {}),
        *(pytest.param("matmul", name, {}, marks=SLOW) for name in list(PATTERNS)[1:]),
        *(
            pytest.param(op, name, {"pre_activations": how}, marks=SLOW)
            for op in ("ffn", "swiglu")
            for name in PATTERNS
            for how in ("recompute", "store")
        ),
    ],
)
def test_values_and_gradients(op, pattern, how, kernels):
    args = make(op, *PATTERNS[pattern], dtype="bfloat16", d_model=72, d_ff=88)
    found = value_and_grads(op, *args, implementation=kernels, **how)
    assert_close(found, numpy_answer(op, *args), BOUNDS["bfloat16"])


@BOTH
@pytest.mark.slow
def test_several_tiles_of_columns(kernels):
    args = make("matmul", *PATTERNS["uneven"], dtype="float16", d_model=136, d_ff=456)
    found = value_and_grads("matmul", *args, implementation=kernels)
    assert_close(found, numpy_answer("matmul", *args), BOUNDS["bfloat16"])


@BOTH
@pytest.mark.slow
def test_weights_that_are_stored_transposed(kernels):
    x_ND, (w_GDF,), sizes_G, dy = make("matmul", 60, [9, 0, 30], dtype="bfloat16")
    args = x_ND, [w_GDF.swapaxes(1, 2)], sizes_G, dy
    y, dx, dw = value_and_grads("matmul", *args, transpose_w=True, implementation=kernels)
    expected = numpy_answer("matmul", x_ND, [w_GDF], sizes_G, dy)
    assert_close([y, dx, dw.swapaxes(1, 2)], expected, BOUNDS["bfloat16"])


@BOTH
@pytest.mark.slow
@pytest.mark.parametrize("pre_activations", ["recompute", "store"])
@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu"])
def test_biases_and_weights_of_rows(activation, pre_activations, kernels):
    """Two pieces of a tile."""
    x_ND, weights, sizes_G, dy = make("ffn", 90, [37, 0, 40], dtype="bfloat16", d_model=72)
    rng = np.random.default_rng(1)
    wide = [jnp.asarray(rng.normal(size=(3, n)), jnp.float32) for n in (80, 80, 72)]
    weight_N = jnp.asarray(rng.uniform(size=90), jnp.float32).at[77:].set(jnp.nan)

    def run(implementation):
        def f(x_ND, weights, biases, weight_N):
            names = ("bias_gate_GF", "bias_up_GF", "bias_down_GD")
            kwargs = dict(zip(names, biases, strict=True), row_weight_N=weight_N)
            kwargs |= {"activation": activation, "implementation": implementation}
            kwargs |= {"pre_activations": pre_activations}
            return gm.grouped_ffn(x_ND, *weights, sizes_G, **kwargs)

        dtype = jnp.float32 if implementation == "reference" else x_ND.dtype
        args = jax.tree.map(lambda a: a.astype(dtype), (x_ND, weights))
        y, vjp = jax.vjp(f, *args, wide, weight_N)
        return [np.asarray(a, np.float64) for a in jax.tree.leaves((y, vjp(dy.astype(y.dtype))))]

    assert_close(run(kernels), run("reference"), BOUNDS["bfloat16"])


@BOTH
def test_others_may_hold_anything(kernels):
    """NaN in rows of no group reaches no result; in rows of a group, that group alone."""
    x_ND, weights, sizes_G, dy = make("matmul", 70, [13, 21, 20], dtype="bfloat16", d_model=64)
    dirty = (a.at[13:34].set(jnp.nan).at[54:].set(jnp.nan) for a in (x_ND, dy))
    x_NaN, dy_NaN = dirty
    args = x_NaN, weights, sizes_G, dy_NaN
    found = value_and_grads("matmul", *args, implementation=kernels)
    y, dx, dw = map(np.array, found)
    clean = numpy_answer("matmul", x_ND, weights, sizes_G, dy)
    clean[0][13:34], clean[1][13:34], clean[2][1] = 0, 0, 0
    y[13:34], dx[13:34], dw[1] = 0, 0, 0
    assert_close([y, dx, dw], clean, BOUNDS["bfloat16"])


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")
def test_bits_of_a_row_depend_on_no_other_row():
    """Not on where it stands in a tile, nor on who else is there; y and dx."""
    rng = np.random.default_rng(0)
    x_XD, dy_XF = (jnp.asarray(rng.normal(size=(300, n)), jnp.bfloat16) for n in (256, 384))
    w_GDF = jnp.asarray(rng.normal(size=(3, 256, 384)) / 16, jnp.bfloat16)

    def run(num_rows, before, chosen, after):
        x, dy = (among_others(np.asarray(a), num_rows, before, chosen, rng) for a in (x_XD, dy_XF))
        sizes_G = jnp.asarray([before, len(chosen), after], jnp.int32)
        found = value_and_grads("matmul", x, [w_GDF], sizes_G, dy, implementation="pallas_gpu")
        return [a[before : before + len(chosen)] for a in found[:2]]

    assert_rows_keep_their_bits(run, [1, 2, 7, 40, 41, 63, 64, 65, 128, 200, 299, 300], rng)


def test_the_default_on_such_a_gpu_is_by_types():
    x_ND, (w_GDF,), sizes_G, _ = make("matmul", 40, [9, 31])
    narrow = x_ND.astype(jnp.bfloat16), w_GDF.astype(jnp.bfloat16)
    assert hopper.chosen(*narrow) is pallas_gpu
    assert hopper.chosen(narrow[0], scaled.quantised(w_GDF, "int8")) is cpu
    assert hopper.chosen(x_ND, w_GDF) is cpu
    found, expected = (
        gm.grouped_matmul(x_ND, w_GDF, sizes_G, implementation=name) for name in ("hopper", "cpu")
    )
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(Refused, match="pre_activations = 'store': is for bfloat16"):
        gm.grouped_swiglu(
            *(x_ND, w_GDF, w_GDF, sizes_G), implementation="hopper", pre_activations="store"
        )


@pytest.mark.parametrize(("capability", "expected"), [("9.0", "hopper"), ("8.0", "cpu")])
def test_the_default_is_by_gpu(capability, expected, monkeypatch):
    device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    monkeypatch.setattr(jax, "__version_info__", gpu.OLDEST_JAX)
    assert gm.default_implementation(device) == expected
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert gm.default_implementation(device) == "cpu"


@pytest.mark.parametrize("num_rows", [1, 7, 64, 300])
def test_every_row_has_one_item(num_rows):
    rng = np.random.default_rng(num_rows)
    for _ in range(50):
        sizes = rng.multinomial(rng.integers(num_rows + 1), rng.dirichlet(np.full(5, 0.3)))
        found, place_N = work.list_work(jnp.asarray(sizes, jnp.int32), num_rows, 128)
        count_1, group_W, eighth_W, low_W, high_W = map(np.asarray, found)
        assert all((high_W > low_W)[: count_1[0]])
        assert not any((high_W > low_W)[count_1[0] :])
        groups = np.full(num_rows, -1)
        for item, (group, eighth) in enumerate(zip(group_W, eighth_W, strict=True)):
            for place in range(low_W[item], high_W[item]):
                row = 8 * eighth + place
                assert groups[row] == -1
                assert place_N[row] == item * 128 + place
                groups[row] = group
        unused = num_rows - sizes.sum()
        np.testing.assert_array_equal(groups, np.repeat(np.arange(6), [*sizes, unused]))


def lower(f, *shapes):
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


B16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32


def test_a_product_is_lowered():
    def y(x_ND, w_GDF, sizes_G):
        operands = Operands([x_ND], [Weight(w_GDF)], (((0, 0),),))
        return pallas_gpu.COMPILED.rows("y", operands, sizes_G, lambda s, *_: s, [Result(B16)])

    assert "mosaic_gpu" in lower(y, ((1024, 256), B16), ((4, 256, 512), B16), ((4,), I32))


def test_a_gradient_of_weights_is_lowered():
    def dw(x_ND, dy, sizes_G):
        return pallas_gpu.COMPILED.columns("dw", x_ND, [dy], sizes_G, B16)

    assert "mosaic_gpu" in lower(dw, ((1024, 256), B16), ((1024, 512), B16), ((4,), I32))


@LOWERED
@pytest.mark.slow
def test_an_ffn_is_lowered():
    """All kernels of both passes, under a mesh whose axes are checked."""
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), *[P("expert")] * 3, P(), P()), out_specs=P()
    )
    def loss(x_ND, gate, up, down, sizes_G, weight_N):
        args = x_ND, gate, up, down, sizes_G
        y_ND = gm.grouped_ffn(*args, row_weight_N=weight_N, implementation="pallas_gpu")
        return jax.lax.psum(y_ND.astype(F32).sum(), "expert")

    up, down = ((4, 256, 512), B16), ((4, 512, 256), B16)
    shapes = ((1024, 256), B16), up, up, down, ((4,), I32), ((1024,), F32)
    text = lower(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 5)), *shapes)
    assert text.count("custom_call @mosaic_gpu") >= 6


def test_a_config_may_name_them():
    named = {name for name in gm.IMPLEMENTATIONS if "interpret" not in name}
    assert named == set(fields.KERNELS) - {""}


@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu", "hopper"])
def test_a_model_for_other_devices_is_refused(name):
    with pytest.raises(Refused, match=r"model.kernels = .*the devices are of 'cpu'"):
        gm.check_platform(name, "cpu")
    for own in ("cpu", "reference", "pallas_gpu_interpret"):
        gm.check_platform(own, "cpu")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dtype": "float32"}, "bfloat16 and float16"),
        ({"scale": True}, "no weights in int8"),
        ({}, "runs on GPUs|needs JAX 0.11"),
    ],
)
def test_what_it_cannot_do_is_refused(change, named):
    x_ND, weights, sizes_G, _ = make("swiglu", 8, [3], dtype=change.get("dtype", "bfloat16"))
    how = {}
    if "scale" in change:
        narrow = [scaled.quantised(w, "int8") for w in weights]
        weights = [w.values for w in narrow]
        how = {"w_gate_scale_GF": narrow[0].scale, "w_up_scale_GF": narrow[1].scale}
    with pytest.raises(Refused, match=named):
        gm.grouped_swiglu(x_ND, *weights, sizes_G, implementation="pallas_gpu", **how)
