"""The MoE layer on meshes where several axes are larger than 1: oracle, bits, traffic.

The oracle and its problems are those of test_dispatch.py; what is new is who holds what.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax import mesh as mesh_lib
from moe_jax import permute
from moe_jax.config import MeshConfig
from moe_jax.model import moe
from moe_jax.model.dispatch import schemes, wire
from moe_jax.placement import cost
from moe_jax.placement.plan import Placement
from tests.model.test_dispatch import E, assert_close, problem, run_oracle

MESHES = [
    MeshConfig(data=2, node=2, expert=2),
    MeshConfig(fsdp=2, expert=4),
    MeshConfig(expert=4, tensor=2),
    MeshConfig(fsdp=2, node=2, tensor=2),
]


@functools.cache
def program(shape, dispatch, combine):
    """(outputs, traffic, gradients of sum(y * cos(0, 1, ...))), jitted."""
    compute = moe.build_dispatch(
        mesh_lib.of_config(shape), dispatch=dispatch, combine=combine, implementation="cpu"
    )

    def loss(x_TD, expert_TK, weight_TK, gate, up, down, table):
        y_TD, traffic = compute(x_TD, expert_TK, weight_TK, table, moe.Experts((gate, up, down)))
        cotangent_TD = jnp.cos(jnp.arange(x_TD.size, dtype=jnp.float32)).reshape(x_TD.shape)
        return jnp.sum(y_TD * cotangent_TD), (y_TD, traffic)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3, 4, 5), has_aux=True))


def run(shape, dispatch, args, placement, combine="exact", *, program=program):
    """(outputs, gradients with experts in logical order, traffic)."""
    table = jax.tree.map(lambda t: t[0], permute.table(placement))
    slots_P = placement.physical_to_logical_LP[0]
    tokens, weights = args[:3], [weight[slots_P] for weight in args[3:]]
    (_, (y_TD, traffic)), grads = program(shape, dispatch, combine)(*tokens, *weights, table)
    logical_P = np.argsort(slots_P)
    grads = [*grads[:2], *(np.asarray(grad)[logical_P] for grad in grads[2:])]
    return np.asarray(y_TD), [np.asarray(grad) for grad in grads], traffic


def random_placement(seed, shape):
    slots_LP = np.random.default_rng(seed).permutation(E)[None].astype(np.int32)
    return Placement(slots_LP, E, shape.expert_devices)


NODES = [
    MeshConfig(data=2, node=2, expert=2),
    MeshConfig(node=2, expert=4),
    MeshConfig(node=4, expert=2),
    MeshConfig(node=8, expert=1),
    MeshConfig(data=2, node=1, expert=4),
]


def cases():
    for shape in MESHES:
        yield shape, "exchange", "exact", 2
    yield MESHES[0], "gathered", "exact", 2
    for way in (("gathered", "exact"), ("exchange", "partial"), ("hierarchical", "partial")):
        yield pytest.param(MESHES[-1], *way, 2, marks=pytest.mark.slow)
    for shape in NODES[:2]:
        yield shape, "hierarchical", "exact", 2
    for shape in NODES[2:]:  # another compile each
        yield pytest.param(shape, "hierarchical", "exact", 2, marks=pytest.mark.slow)
    for top_k in (1, 8):
        yield pytest.param(NODES[0], "hierarchical", "exact", top_k, marks=pytest.mark.slow)
    for top_k in (1, 8):
        yield pytest.param(NODES[1], "hierarchical", "partial", top_k, marks=pytest.mark.slow)
    yield NODES[1], "hierarchical", "partial", 2


@pytest.mark.compiled_quickly
@pytest.mark.parametrize(("shape", "dispatch", "combine", "top_k"), list(cases()), ids=str)
def test_outputs_and_gradients(shape, dispatch, combine, top_k):
    args = problem(0, 8 * 13, top_k)
    y_TD, grads, _ = run(shape, dispatch, args, random_placement(0, shape), combine)
    expected_TD, expected_grads = run_oracle(args)
    assert_close(y_TD, expected_TD, 3e-6)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected, 3e-6)


@pytest.mark.parametrize("routing", ["one", "few", "holes", "none"])
def test_uneven_routing(routing):
    args = problem(1, 8 * 13, 2, routing=routing)
    y_TD, grads, _ = run(NODES[0], "hierarchical", args, random_placement(1, NODES[0]))
    expected_TD, expected_grads = run_oracle(args)
    assert_close(y_TD, expected_TD, 3e-6)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected, 3e-6)


@pytest.mark.compiled_quickly
@pytest.mark.parametrize(
    ("shape", "dispatch", "combine", "near"),
    [
        (NODES[0], "hierarchical", "partial", 2),
        pytest.param(NODES[0], "hierarchical", "exact", 1, marks=pytest.mark.slow),
        pytest.param(NODES[2], "hierarchical", "exact", 2, marks=pytest.mark.slow),
        pytest.param(NODES[2], "hierarchical", "exact", 4, marks=pytest.mark.slow),
        pytest.param(NODES[1], "hierarchical", "reproducible", 4, marks=pytest.mark.slow),
        pytest.param(NODES[1], "exchange", "exact", 2, marks=pytest.mark.slow),
        pytest.param(NODES[4], "exchange", "reproducible", 4, marks=pytest.mark.slow),
        pytest.param(NODES[3], "hierarchical", "exact", 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_between_processes_rows_are_those_within_one(shape, dispatch, combine, near, monkeypatch):
    """Messages of other sizes, between nodes in halves, on axes within a process in blocks.

    Taken as if `near` devices shared a process; here all do.
    """
    args, placement = problem(2, 8 * 67, 2), random_placement(2, shape)
    expected_TD, expected_grads, expected = run(shape, dispatch, args, placement, combine)
    monkeypatch.setattr(wire, "transport_of", lambda mesh: wire.LINKS)
    monkeypatch.setattr(wire, "near_of", lambda mesh: near)
    monkeypatch.setattr(wire, "LARGE", 1)
    y_TD, grads, traffic = run(
        shape, dispatch, args, placement, combine, program=program.__wrapped__
    )
    np.testing.assert_array_equal(y_TD, expected_TD)
    for grad, same in zip(grads, expected_grads, strict=True):
        np.testing.assert_array_equal(grad, same)
    for name in ("dispatch_MM", "combine_MM"):
        np.testing.assert_array_equal(getattr(traffic, name), getattr(expected, name))
    assert (np.asarray(traffic.padding_MM) != np.asarray(expected.padding_MM)).any()


@pytest.mark.parametrize(
    ("shape", "near", "dispatch", "maxima", "blocks"),
    [
        (NODES[1], 4, "exchange", 0, False),
        (NODES[1], 4, "hierarchical", 0, True),
        (NODES[1], 2, "hierarchical", 0, False),  # two processes a node
        (NODES[0], 2, "hierarchical", 2, True),  # replicas ask each other, once a hop
        (MeshConfig(node=3, expert=2), 3, "hierarchical", 0, False),  # a node in two processes
    ],
    ids=str,
)
def test_slots_are_gathered_once_and_counts_follow(shape, near, dispatch, maxima, blocks):
    """Collectives in the program of one layer between processes of `near` devices each."""
    axes, num_slots = mesh_lib.EXPERT, 4 * shape.expert_devices
    setting = schemes.Setting(axes, num_slots, wire.LINKS, near, "exact")

    def layer(x_TD, slot_TK, weight_TK):
        identity = lambda rows_AD, group_sizes_e: rows_AD  # noqa: E731
        return schemes.SCHEMES[dispatch](x_TD, slot_TK, weight_TK, identity, setting)[0]

    spec, mesh = PartitionSpec(mesh_lib.BATCH), mesh_lib.of_config(shape)
    sharded = jax.shard_map(layer, mesh=mesh, in_specs=spec, out_specs=spec)
    rows = 16 * shape.token_devices
    slots, weights = jnp.zeros((rows, 2), jnp.int32), jnp.zeros((rows, 2), jnp.float32)
    text = str(jax.make_jaxpr(sharded)(jnp.zeros((rows, 4)), slots, weights))
    assert len(re.findall(r"\ball_gather\b", text)) == 1
    assert len(re.findall(r"\bpmax\b", text)) == maxima
    assert bool(re.search(r"\ball_to_all\b", text)) == blocks


def homes(num_tokens, shape):
    """Tokens are split over replicas, then node by node over the holders of one set of experts."""
    devices = shape.expert_devices
    return (np.arange(num_tokens) // (num_tokens // shape.token_devices) % devices).astype(np.int32)


@pytest.mark.parametrize(
    ("shape", "dispatch", "combine"),
    [
        (NODES[0], "gathered", "exact"),
        (NODES[0], "exchange", "exact"),
        (NODES[0], "hierarchical", "exact"),
        (NODES[0], "hierarchical", "partial"),
        (NODES[0], "hierarchical", "reproducible"),
        pytest.param(NODES[1], "hierarchical", "exact", marks=pytest.mark.slow),
        *((shape, "exchange", "exact") for shape in MESHES[1:]),
        (MESHES[2], "exchange", "reproducible"),
    ],
    ids=str,
)
def test_bits_and_traffic_under_placements(shape, dispatch, combine):
    args = problem(1, 8 * 13, 2)
    devices = shape.expert_devices
    expected_TD, expected_grads, _ = run(
        shape, dispatch, args, Placement.contiguous(1, E, devices), combine
    )
    for seed in range(4):
        placement = random_placement(seed, shape)
        y_TD, grads, traffic = run(shape, dispatch, args, placement, combine)
        if combine != "partial":
            np.testing.assert_array_equal(y_TD, expected_TD)
            for grad, expected in zip(grads, expected_grads, strict=True):
                np.testing.assert_array_equal(grad, expected)
        if dispatch == "gathered":  # counted in test_dispatch.py
            continue
        ids_TLK, home_T = np.asarray(args[1])[:, None], homes(8 * 13, shape)
        rows = cost.rows(ids_TLK, placement, dispatch, home_T, combine, shape.expert)
        np.testing.assert_array_equal(traffic.dispatch_MM, rows.dispatch_LMM[0])
        np.testing.assert_array_equal(traffic.combine_MM, rows.combine_LMM[0])
