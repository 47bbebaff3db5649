"""What the grouped operations refuse, and with which words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.kernels import grouped_matmul as gm
from tests.kernels.oracle import OPS, make

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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_sizes_G": [1, 3]}, r"group_sizes_G = \[1, 3\]: must be an array. Pass an ar"),
        ({"first_group": 1.5}, r"first_group = 1.5: must be one integer. Pass a layer's first gro"),
        ({"first_group": jnp.array([0])}, r"first_group = .*\[0\].*: must be one integer"),
        ({"preferred_element_type": "foo"}, r"preferred_element_type = 'foo': must be one of floa"),
    ],
)
def test_what_is_no_array_or_type_is_refused(change, message):
    args = {"x_ND": jnp.ones(X), "w_GDF": jnp.ones(W), "group_sizes_G": jnp.asarray(SIZES)}
    with pytest.raises(Refused, match=message):
        gm.grouped_matmul(**(args | change))


def test_wrong_choices_are_refused_while_tracing():
    x_ND, weights, sizes_G, _ = make("matmul", 4, [4])
    with pytest.raises(Refused, match=r"implementation = 'cuda': must be one of reference, cpu"):
        jax.jit(lambda x: gm.grouped_matmul(x, *weights, sizes_G, implementation="cuda"))(x_ND)
    with pytest.raises(Refused, match=r"activation = 'gelu': must be one of swiglu, clamped_swig"):
        gm.grouped_swiglu(x_ND, *weights, *weights, sizes_G, activation="gelu")
    with pytest.raises(Refused, match=r"activation = \['swiglu'\]: must be one of swiglu, clamped"):
        gm.grouped_swiglu(x_ND, *weights, *weights, sizes_G, activation=["swiglu"])
    with pytest.raises(Refused, match=r"preferred_element_type = 'int8': must be one of float32"):
        gm.grouped_matmul(x_ND, *weights, sizes_G, preferred_element_type=jnp.int8)
