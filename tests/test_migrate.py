"""Experts moved between devices of a live model: what `permute.apply` gives, nothing else."""

import jax
import numpy as np
import pytest

from moe_jax import mesh as mesh_lib
from moe_jax import migrate, permute
from moe_jax.errors import Refused
from moe_jax.placement import move as move_lib
from moe_jax.placement import topology as topology_lib
from moe_jax.placement.plan import Placement
from moe_jax.train import step as step_lib
from tests import tiny

MESHES = (
    {"data": 2, "expert": 4},
    {"node": 2, "expert": 2, "tensor": 2},
    pytest.param({"fsdp": 2, "expert": 4}, marks=pytest.mark.slow),
    pytest.param({"node": 2, "expert": 4}, marks=pytest.mark.slow),
)


def state_of(mesh_sizes, **overrides):
    """A training state in which all values of all experts differ."""
    config = tiny.config(mesh=mesh_sizes, **overrides)
    rng = np.random.default_rng(0)

    def filled(leaf):
        values = rng.normal(size=leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    return config, jax.tree.map(filled, step_lib.abstract_state(config, tiny.mesh(config)))


def copied(tree):
    return jax.tree.map(lambda leaf: leaf.copy(), tree)


@pytest.mark.parametrize("mesh_sizes", MESHES, ids=str)
def test_as_the_gather_says(mesh_sizes):
    config, state = state_of(mesh_sizes)
    devices = config.mesh.expert_devices
    mover, old = migrate.Mover(tiny.mesh(config), state), tiny.contiguous(devices)
    moved = copied(state)
    for seed in range(3):
        new = tiny.random_placement(seed, devices)
        expected = permute.apply(state, tiny.contiguous(devices), new)
        moved = mover(moved, migrate.route(old, new))
        jax.tree.map(np.testing.assert_array_equal, moved, expected)
        for found, wanted in zip(jax.tree.leaves(moved), jax.tree.leaves(state), strict=True):
            assert found.sharding == wanted.sharding
        old = new
    assert len(mover._programs) == 1  # placements are arguments


@pytest.mark.parametrize(
    "mesh_sizes",
    [
        {"data": 2, "expert": 4},
        {"fsdp": 2, "expert": 4},
        {"expert": 4, "tensor": 2},
        {"fsdp": 2, "node": 2, "expert": 2},
    ],
    ids=str,
)
def test_biases_move_with_their_experts(mesh_sizes):
    """They do not lie over all the mesh axes that the matrices lie over."""
    config, state = state_of(mesh_sizes, model__expert_bias=True)
    devices = config.mesh.expert_devices
    old, new = tiny.contiguous(devices), tiny.random_placement(1, devices)
    expected = permute.apply(state.model, old, new)
    mover = migrate.Mover(tiny.mesh(config), state.model)
    moved = mover(copied(state.model), migrate.route(old, new))
    jax.tree.map(np.testing.assert_array_equal, moved, expected)
    assert {leaf.sharding for leaf in jax.tree.leaves(moved)} == {
        leaf.sharding for leaf in jax.tree.leaves(expected)
    }


def test_copies_come_from_any_holder():
    config, state = state_of(MESHES[0])
    old = tiny.replicated_placement(0)
    here = permute.apply(state, tiny.contiguous(), old)
    mover = migrate.Mover(tiny.mesh(config), here)
    for seed in range(1, 4):
        new = tiny.replicated_placement(seed)
        expected = permute.apply(here, old, new)
        moved = mover(copied(here), migrate.route(old, new))
        jax.tree.map(np.testing.assert_array_equal, moved, expected)


def test_one_device_serves_all_others():
    """Every device asks the same one: more rows leave it than it has slots."""
    expert_LP = np.array([[0, 1, 2, 3, 0, 2, 1, 3]], np.int32)
    old = Placement(expert_LP, 4, 4)
    new = Placement(np.array([[0, 1, 0, 1, 0, 1, 2, 3]], np.int32), 4, 4)
    way = migrate.route(old, new)
    assert way.count_LMM.sum() == way.moved_L[0] == (permute.source_slots(old, new) // 2 != [
        [0, 0, 1, 1, 2, 2, 3, 3]
    ]).sum()  # fmt: skip


@pytest.mark.parametrize("each", [3, 15])
def test_without_copies_there_is_one_size(each):
    """So nothing is compiled for a move that the identity was not compiled for."""
    old = Placement.contiguous(tiny.LAYERS, 4 * each, 4)
    new = Placement(np.roll(old.physical_to_logical_LP, each, axis=1), 4 * each, 4)
    ways = migrate.route(old, old), migrate.route(old, new)
    assert ways[1].count_LMM.sum(axis=2).max() == each
    assert ways[0].send_LMN.shape == ways[1].send_LMN.shape


def test_several_dtypes_travel_together():
    config, _ = state_of(MESHES[0])
    mesh = tiny.mesh(config)
    state = step_lib.initial_state(config, mesh)
    half = jax.tree.map(
        lambda leaf: leaf.astype("bfloat16") if leaf.dtype == np.float32 else leaf, state.model
    )
    tree, new = (state.model, half), tiny.random_placement(1)
    expected = permute.apply(tree, tiny.contiguous(), new)
    moved = migrate.Mover(mesh, tree)(copied(tree), migrate.route(tiny.contiguous(), new))
    jax.tree.map(np.testing.assert_array_equal, moved, expected)


def test_layer_by_layer_the_model_stays_whole():
    config, state = state_of(MESHES[0])
    mesh, old, new = tiny.mesh(config), tiny.contiguous(), tiny.random_placement(2)
    mover, way, moving = migrate.Mover(mesh, state), migrate.route(old, new), copied(state)
    for layer in range(tiny.LAYERS):
        moving = mover(moving, way, layer, layer + 1)
        half = migrate.between(old, new, layer + 1)
        jax.tree.map(np.testing.assert_array_equal, moving, permute.apply(state, old, half))
    assert half == new
    assert migrate.between(old, new, 0) == old


@pytest.mark.parametrize("seed", range(20))
def test_what_crosses_is_what_the_planner_counts(seed):
    old, new = tiny.random_placement(seed), tiny.random_placement(seed + 100)
    counted = move_lib.move(old, new, topology_lib.flat(4), 1000)
    way = migrate.route(old, new)
    assert way.moved_L.sum() == counted.experts
    assert (np.diagonal(way.count_LMM, axis1=1, axis2=2) == 0).all()
    assert migrate.route(old, old).moved_L.sum() == 0


def test_bytes_of_an_expert():
    config, state = state_of(MESHES[0])
    mover = migrate.Mover(tiny.mesh(config), state)
    model = config.model  # three matrices, with two moments each
    assert mover.expert_bytes == 3 * 3 * model.d_model * model.d_ff * 4


def test_other_sizes_are_refused():
    with pytest.raises(Refused, match="16 slots on 4 devices"):
        migrate.route(tiny.contiguous(), tiny.replicated_placement(0))
    with pytest.raises(Refused, match="8 slots on 2 devices"):
        migrate.route(tiny.contiguous(4), tiny.contiguous(2))


@pytest.mark.slow
def test_a_mesh_of_one_device_moves_slots():
    config, _ = state_of({"expert": 1})
    mesh = mesh_lib.make(1, 1)
    state = step_lib.initial_state(config, mesh)
    new = tiny.random_placement(3, devices=1)
    expected = permute.apply(state, tiny.contiguous(1), new)
    moved = migrate.Mover(mesh, state)(copied(state), migrate.route(tiny.contiguous(1), new))
    jax.tree.map(np.testing.assert_array_equal, moved, expected)
