"""The MoE layer on meshes where several axes are larger than 1: oracle, bits, traffic.

The oracle and its problems are those of test_dispatch.py; what is new is who holds what.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import mesh as mesh_lib
from moe_jax import permute
from moe_jax.config import MeshConfig
from moe_jax.model import moe
from moe_jax.placement.plan import Placement
from tests.model.test_dispatch import E, assert_close, count_traffic, problem, run_oracle

MESHES = [MeshConfig(data=2, node=2, expert=2)]


@functools.cache
def program(shape, dispatch):
    """(outputs, traffic, gradients of sum(y * cos(0, 1, ...))), jitted."""
    compute = moe.build_dispatch(
        mesh_lib.of_config(shape), dispatch=dispatch, combine="exact", implementation="cpu"
    )

    def loss(x_TD, expert_TK, weight_TK, gate, up, down, table):
        y_TD, traffic = compute(x_TD, expert_TK, weight_TK, table, gate, up, down)
        cotangent_TD = jnp.cos(jnp.arange(x_TD.size, dtype=jnp.float32)).reshape(x_TD.shape)
        return jnp.sum(y_TD * cotangent_TD), (y_TD, traffic)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3, 4, 5), has_aux=True))


def run(shape, dispatch, args, placement):
    """(outputs, gradients with experts in logical order, traffic)."""
    table = jax.tree.map(lambda t: t[0], permute.table(placement))
    slots_P = placement.physical_to_logical_LP[0]
    tokens, weights = args[:3], [weight[slots_P] for weight in args[3:]]
    (_, (y_TD, traffic)), grads = program(shape, dispatch)(*tokens, *weights, table)
    logical_P = np.argsort(slots_P)
    grads = [*grads[:2], *(np.asarray(grad)[logical_P] for grad in grads[2:])]
    return np.asarray(y_TD), [np.asarray(grad) for grad in grads], traffic


def random_placement(seed, shape):
    slots_LP = np.random.default_rng(seed).permutation(E)[None].astype(np.int32)
    return Placement(slots_LP, E, shape.expert_devices)


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("dispatch", ["gathered", "exchange"])
def test_outputs_and_gradients(shape, dispatch):
    args = problem(0, 8 * 13, 2)
    y_TD, grads, _ = run(shape, dispatch, args, random_placement(0, shape))
    expected_TD, expected_grads = run_oracle(args)
    assert_close(y_TD, expected_TD, 3e-6)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected, 3e-6)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_bits_and_traffic_under_placements(shape):
    args = problem(1, 8 * 13, 3)
    expected_TD, expected_grads, _ = run(
        shape, "exchange", args, Placement.contiguous(1, E, shape.expert_devices)
    )
    for seed in range(4):
        placement = random_placement(seed, shape)
        y_TD, grads, traffic = run(shape, "exchange", args, placement)
        np.testing.assert_array_equal(y_TD, expected_TD)
        for grad, expected in zip(grads, expected_grads, strict=True):
            np.testing.assert_array_equal(grad, expected)
        out_MM, home_MM, _ = count_traffic(args[1], placement, shape.data, shape.expert_devices)
        np.testing.assert_array_equal(traffic.dispatch_MM, out_MM)
        np.testing.assert_array_equal(traffic.combine_MM, home_MM)
