"""A whole training step on meshes with several axes above 1 is the step of one device."""

import functools

import jax
import numpy as np
import pytest

from moe_jax import checkpoint, permute
from moe_jax import mesh as mesh_lib
from moe_jax.infer.engine import Engine
from moe_jax.infer.sampling import Sampling
from moe_jax.model import parameter
from moe_jax.placement.plan import Plan
from moe_jax.train import step as step_lib
from tests import tiny

EVERY_AXIS = {
    "node": {"data": 2, "node": 2, "expert": 2, "attention": "replicated"},
    "fsdp_tensor": {"fsdp": 2, "expert": 2, "tensor": 2},
    "fsdp": {"fsdp": 4, "expert": 2},
    "shuffled": {"fsdp": 2, "expert": 4},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("node", "fsdp")]
NAMES = ["fsdp_tensor", "shuffled", *SLOW]
ONE = {"data": 1, "expert": 1}


def config(mesh, **overrides):
    dispatch = "local" if mesh == ONE else "exchange"
    dispatch = "shuffled" if mesh == EVERY_AXIS["shuffled"] else dispatch
    return tiny.config(mesh=mesh, model__dispatch=dispatch, **overrides)


@functools.cache
def step_of(name):
    """(config, step) of a mesh; layers are computed again in the backward pass of two of them."""
    mesh = EVERY_AXIS.get(name, ONE)
    again = name in ("fsdp_tensor", "shuffled")
    made = config(mesh, train__remat="layer" if again else "none")
    return made, step_lib.build_step(made, tiny.mesh(made))


def run(name, placement=None, num_steps=2):
    """(state, its experts where they started; metrics of the last step)."""
    made, step = step_of(name)
    mesh, devices = tiny.mesh(made), made.mesh.expert_devices
    logical = tiny.contiguous(devices)
    placement = placement or logical
    table = jax.tree.map(functools.partial(mesh_lib.put_replicated, mesh), tiny.table(placement))
    state = permute.apply(step_lib.initial_state(made, mesh), logical, placement)
    for i in range(num_steps):
        window_BS1 = mesh_lib.put_batch(mesh, tiny.tokens(8, 17, seed=i))
        state, metrics = step(state, window_BS1, table)
    return permute.apply(state, placement, logical), jax.device_get(metrics)


@functools.cache
def expected():
    return run("one")


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_are_those_of_one_device(name):
    state, metrics = run(name)
    expected_state, expected_metrics = expected()
    for scalar in ("loss", "load_balance", "z", "grad_norm"):
        actual = getattr(metrics, scalar)
        np.testing.assert_allclose(actual, getattr(expected_metrics, scalar), rtol=2e-6)
    for actual, wanted in zip(
        jax.tree.leaves((state.model, state.opt_state)),
        jax.tree.leaves((expected_state.model, expected_state.opt_state)),
        strict=True,
    ):
        # Adam divides by the size of the gradient: rounding of small ones shows in full.
        error = np.abs(np.asarray(actual) - np.asarray(wanted)).max(initial=0)
        assert error <= 2e-5 * np.abs(wanted).max(initial=1e-30), (error, np.abs(wanted).max())


@pytest.mark.parametrize("name", [pytest.param("node", marks=pytest.mark.slow), "fsdp_tensor"])
def test_training_bits_do_not_depend_on_the_placement(name):
    made, _ = step_of(name)
    state, metrics = run(name)
    moved, moved_metrics = run(name, tiny.random_placement(3, made.mesh.expert_devices))
    assert metrics.loss == moved_metrics.loss
    assert metrics.grad_norm == moved_metrics.grad_norm
    jax.tree.map(np.testing.assert_array_equal, state, moved)


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_state_is_sharded_like_its_parameters(name):
    made, _ = step_of(name)
    state, _ = run(name, num_steps=1)
    by_name = {key: leaf.sharding for key, leaf in checkpoint.flatten(state.model).items()}
    moments = checkpoint.flatten(state.opt_state)
    found = {key: leaf.sharding for key, leaf in moments.items() if leaf.ndim}
    assert len(found) == 2 * len(by_name)
    for key, sharding in found.items():
        (parameter_name,) = [name for name in by_name if key.endswith(f".{name}")]
        assert sharding == by_name[parameter_name]
    # Parameters and both moments: all but norms and router are split over what their axes say.
    shard = state.model.blocks.moe.gate_PDF[...].addressable_shards[0].data
    mesh = made.mesh
    per_layer = tiny.EXPERTS // mesh.expert_devices, 16 // mesh.fsdp, 24 // mesh.tensor
    assert shard.shape == (tiny.LAYERS, *per_layer)


def test_a_checkpoint_moves_between_meshes(tmp_path):
    """Saved by one mesh under one placement, restored on another: every bit, then the same step."""
    state, _ = run("fsdp_tensor", num_steps=1)
    arrays = checkpoint.flatten(state)
    infos = checkpoint.describe(arrays, checkpoint.flatten(parameter.logical_axes(state)))
    plan = Plan(tiny.contiguous(2))
    folder = checkpoint.save(tmp_path, arrays, checkpoint.Contents(1, infos, plan, {}))

    other, step = step_of("node")
    mesh = tiny.mesh(other)
    abstract = step_lib.abstract_state(other, mesh)
    contents = checkpoint.read_contents(folder)
    restored = checkpoint.restore(folder, contents, checkpoint.flatten(abstract), plan.placement)
    for key, array in restored.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(arrays[key]))
        assert array.sharding == checkpoint.flatten(abstract)[key].sharding
    table = tiny.table(tiny.contiguous(other.mesh.expert_devices))
    table = jax.tree.map(functools.partial(mesh_lib.put_replicated, mesh), table)
    window_BS1 = mesh_lib.put_batch(mesh, tiny.tokens(8, 17, seed=1))
    _, metrics = step(checkpoint.unflatten(abstract, restored), window_BS1, table)
    np.testing.assert_allclose(metrics.loss, expected()[1].loss, rtol=2e-6)


@pytest.mark.parametrize("name", ["fsdp_tensor", *SLOW])
def test_inference_gives_the_tokens_of_one_device(name):
    prompts = [[72, 101, 108, 108, 111], [1, 2, 3], [200]]
    generations = {}
    for which in (name, "one"):
        made = config(EVERY_AXIS.get(which, ONE))
        mesh, devices = tiny.mesh(made), made.mesh.expert_devices
        model = step_lib.initial_state(made, mesh).model
        engine = Engine(made, mesh, model, tiny.table(tiny.contiguous(devices)))
        generations[which] = engine.generate(prompts, 4, Sampling())
        home_B, shards = generations[which].home_B, made.mesh.token_devices
        assert home_B.tolist() == [shard % devices for shard in range(shards)] * (
            len(home_B) // shards
        )
    assert generations[name].tokens == generations["one"].tokens
