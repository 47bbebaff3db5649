"""Replicated experts in the running layer: the rule, outputs, gradients, bits, traffic.

The rule's oracle is placement/copies.py, the layer's is the dense one of test_dispatch.py, which
knows of no copies; what is counted is held against placement/cost.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import mesh as mesh_lib
from moe_jax import permute
from moe_jax.model import moe
from moe_jax.model.dispatch.table import Home, Table, rule_position, slots_of
from moe_jax.placement import copies, cost, replication, shares
from moe_jax.placement.plan import Placement
from tests.model.test_dispatch import E, assert_close, problem, run_oracle

ONE_ROW, TWO_ROWS, NODES = (1, 1, 8), (2, 1, 4), (2, 2, 2)  # data, node, expert
SETTINGS = [
    (ONE_ROW, "exchange", "exact", 2),
    (TWO_ROWS, "exchange", "partial", 2),
    (NODES, "hierarchical", "exact", 2),
    (NODES, "gathered", "exact", 2),
    (TWO_ROWS, "gathered", "partial", 2),
    *(
        pytest.param(shape, dispatch, combine, top_k, marks=pytest.mark.slow)
        for shape, dispatch, combine, top_k in (
            *((TWO_ROWS, "exchange", "exact", top_k) for top_k in (1, 2, 8)),
            *((NODES, "hierarchical", "partial", top_k) for top_k in (1, 2, 8)),
            *((NODES, dispatch, "exact", 8) for dispatch in ("gathered", "hierarchical")),
            *((NODES, "exchange", combine, 2) for combine in ("exact", "partial", "reproducible")),
            (ONE_ROW, "exchange", "partial", 8),
            (ONE_ROW, "gathered", "exact", 1),
        )
    ),
]


def replicated(seed, *, experts=E, slots=None, devices=4, nodes=1, layers=1, stay=False):
    """A random plan with some experts in several slots; `stay` gives it shares of copies."""
    rng = np.random.default_rng(seed)
    load_LE = rng.lognormal(0, 1.5, (layers, experts))
    placement = replication.balanced_slots(load_LE, slots or 2 * experts, devices)
    if not stay:
        return placement
    expert_LP = placement.physical_to_logical_LP
    weight_LXP = rng.random((layers, nodes + 1, placement.num_slots))
    share_LXP = np.stack(
        [shares.quantised(*pair) for pair in zip(weight_LXP, expert_LP, strict=True)]
    )
    if layers > 1:
        share_LXP[-1] = 0  # the rule of this layer is `local`
    return Placement(expert_LP, experts, devices, share_LXP)


def layer_of(placement, layer=0):
    return jax.tree.map(lambda array: array[layer], permute.table(placement))


def padded(placement, devices, nodes, layer=0):
    """The table of a layer with room for any plan, so that one program takes them all."""
    table = layer_of(placement, layer)
    slot_ER, end_XER = table.logical_to_physical_ER, table.share_end_XER
    if end_XER is None:
        end_XER = np.zeros((nodes + 1, *slot_ER.shape), np.int32)
    more = devices - slot_ER.shape[1]
    slot_ER = np.pad(slot_ER, ((0, 0), (0, more)), constant_values=-1)
    end_XER = np.pad(end_XER, ((0, 0), (0, 0), (0, more)), mode="edge")
    return Table(slot_ER, table.num_replicas_E, end_XER)


@pytest.mark.parametrize("stay", [False, True], ids=["local", "stay"])
def test_slots_are_those_of_the_planner(stay):
    choose = jax.jit(slots_of)
    rng = np.random.default_rng(0)
    for seed in range(40):
        nodes, per_node, each = [(1, 4, 3), (2, 2, 5), (4, 1, 4), (2, 3, 3)][seed % 4]
        devices = nodes * per_node
        sizes = {"experts": 8, "slots": each * devices, "devices": devices, "nodes": nodes}
        placement = replicated(seed, **sizes, layers=2, stay=stay)
        expert_TK = np.argsort(rng.random((40, 8)), axis=1)[:, :3]
        expert_TK[rng.random(40) < 0.2] = -1
        position_T = rng.integers(0, 5000, 40)
        for layer in range(2):
            rule = copies.candidates(placement, layer, per_node)
            for device in rng.choice(devices, 3, replace=False):
                found = choose(
                    jnp.asarray(expert_TK, jnp.int32),
                    jnp.asarray(position_T, jnp.int32),
                    padded(placement, devices, nodes, layer),
                    Home(jnp.int32(device), per_node, each),
                )
                expected = rule.slots_TK(expert_TK, np.full(40, device), position_T)
                np.testing.assert_array_equal(found, expected)


def test_a_decode_step_takes_turns():
    """Eight sequences at one position, an expert with two copies elsewhere: four tokens each."""
    placement = Placement(np.array([[0, 1, 0, 1, 2, 3, 2, 3]], np.int32), 4, 4)
    position_BS = rule_position(jnp.full((8, 1), 17, jnp.int32))
    home = Home(jnp.int32(3), 4, 2)
    expert_TK = jnp.zeros((8, 1), jnp.int32)
    slot_TK = slots_of(expert_TK, position_BS.reshape(-1), layer_of(placement), home)
    np.testing.assert_array_equal(np.bincount(slot_TK.ravel(), minlength=4), [4, 0, 4, 0])


@functools.cache
def program(shape, dispatch, combine):
    data, node, expert = shape
    compute = moe.build_dispatch(
        mesh_lib.make(data, expert, node=node),
        dispatch=dispatch,
        combine=combine,
    )

    def loss(x_TD, expert_TK, weight_TK, gate, up, down, table, position_T):
        y_TD, traffic = compute(
            *(x_TD, expert_TK, weight_TK, table),
            moe.Experts((gate, up, down)),
            position_T=position_T,
        )
        cotangent_TD = jnp.cos(jnp.arange(x_TD.size, dtype=jnp.float32)).reshape(x_TD.shape)
        return jnp.sum(y_TD * cotangent_TD), (y_TD, traffic)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3, 4, 5), has_aux=True))


def run(shape, dispatch, combine, args, placement, position_T=None):
    """(outputs, gradients with those of copies added up, traffic)."""
    _, node, expert = shape
    if position_T is None:
        position_T = np.arange(len(args[0]))
    slots_P = placement.physical_to_logical_LP[0]
    weights = [weight[slots_P] for weight in args[3:]]
    table = padded(placement, node * expert, node)
    (_, (y_TD, traffic)), grads = program(shape, dispatch, combine)(
        *args[:3], *weights, table, jnp.asarray(position_T, jnp.int32)
    )
    summed = [np.zeros((E, *grad.shape[1:]), np.float32) for grad in grads[2:]]
    for total, grad in zip(summed, grads[2:], strict=True):
        np.add.at(total, slots_P, np.asarray(grad))
    return np.asarray(y_TD), [*map(np.asarray, grads[:2]), *summed], traffic


def placement_for(shape, seed, **changes):
    _, node, expert = shape
    return replicated(seed, devices=node * expert, nodes=node, **changes)


@pytest.mark.compiled_quickly
@pytest.mark.parametrize(("shape", "dispatch", "combine", "top_k"), SETTINGS, ids=str)
def test_outputs_and_gradients(shape, dispatch, combine, top_k):
    args = problem(0, 8 * 13, top_k, routing="holes")
    expected_TD, expected_grads = run_oracle(args)
    for stay in (False, True):
        placement = placement_for(shape, 1, stay=stay)
        y_TD, grads, _ = run(shape, dispatch, combine, args, placement)
        assert_close(y_TD, expected_TD, 3e-6)
        for grad, expected in zip(grads, expected_grads, strict=True):
            assert_close(grad, expected, 3e-6)


@pytest.mark.parametrize(
    ("shape", "dispatch"),
    [
        pytest.param(ONE_ROW, "exchange", marks=pytest.mark.slow),
        (NODES, "hierarchical"),
        pytest.param(TWO_ROWS, "gathered", marks=pytest.mark.slow),
        pytest.param(NODES, "exchange", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_exact_outputs_have_the_bits_of_single_experts(shape, dispatch):
    """Also the gradients of tokens and weights; those of experts are sums over other tokens.

    Of an expert's rows each copy computes some, and the kernel gives a row the same bits in any
    company. At these widths XLA rounds a row among 16 otherwise than one among 64; single experts
    have about 20 rows, most copies fewer than 16.
    """
    args = problem(3, 8 * 40, 2, d_model=192, d_ff=96)
    single = Placement.contiguous(1, E, shape[1] * shape[2])
    expected_TD, expected_grads, _ = run(shape, dispatch, "exact", args, single)
    for seed in range(6):
        placement = placement_for(shape, seed, stay=seed % 2 == 1)
        y_TD, grads, _ = run(shape, dispatch, "exact", args, placement)
        np.testing.assert_array_equal(y_TD, expected_TD)
        for grad, expected in zip(grads[:2], expected_grads[:2], strict=True):
            np.testing.assert_array_equal(grad, expected)


def homes_of(shape, num_tokens):
    """The device of every token of a batch that is split over the mesh."""
    data, node, expert = shape
    return np.arange(num_tokens) // (num_tokens // (data * node * expert)) % (node * expert)


@pytest.mark.parametrize(("shape", "dispatch", "combine", "top_k"), SETTINGS, ids=str)
def test_traffic_is_what_the_planner_says(shape, dispatch, combine, top_k):
    num_tokens, per_node = 8 * 13, shape[2]
    homes_T = homes_of(shape, num_tokens)
    for seed in range(12):
        routing = ("random", "holes", "one", "few")[seed % 4]
        args = problem(seed, num_tokens, top_k, routing=routing)
        placement = placement_for(shape, seed, stay=seed % 3 == 1)
        position_T = np.random.default_rng(seed).integers(0, 5000, num_tokens)
        _, _, traffic = run(shape, dispatch, combine, args, placement, position_T)
        tokens = (np.asarray(args[1])[:, None], placement)
        where = {"devices_per_node": per_node, "position_T": position_T}
        rows = cost.rows(*tokens, dispatch, homes_T, combine, **where)
        np.testing.assert_array_equal(traffic.dispatch_MM, rows.dispatch_LMM[0])
        np.testing.assert_array_equal(traffic.combine_MM, rows.combine_LMM[0])
        computed_LP = cost.computed_LP(*tokens, dispatch, homes_T, **where)
        np.testing.assert_array_equal(traffic.computed_P, computed_LP[0])
        once = cost.rows(*tokens, "exchange", homes_T, "partial", **where)
        np.testing.assert_array_equal(traffic.distinct_MM, once.dispatch_LMM[0])
