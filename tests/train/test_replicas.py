"""Training with replicated experts: copies stay equal, the curve is that of single experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import mesh as mesh_lib
from moe_jax import permute
from moe_jax.infer import load, sampling
from moe_jax.model import parameter
from moe_jax.placement.plan import Plan
from moe_jax.train import replicas
from moe_jax.train import step as step_lib
from tests import tiny
from tests.train import test_loop
from tests.train.test_step import build_step, run_steps, table_of


def expert_arrays(tree):
    leaves, axes = jax.tree.leaves(tree), jax.tree.leaves(parameter.logical_axes(tree))
    return [np.asarray(a) for a, names in zip(leaves, axes, strict=True) if "expert" in names]


def test_siblings_are_the_slots_of_the_same_expert():
    for seed in range(20):
        placement = tiny.replicated_placement(seed)
        slot_LER = jnp.asarray(placement.logical_to_physical_LER)
        copy_LPR = replicas.siblings(slot_LER, placement.num_slots)
        for expert_P, copy_PR in zip(placement.physical_to_logical_LP, copy_LPR, strict=True):
            for expert, copy_R in zip(expert_P, np.asarray(copy_PR), strict=True):
                found = [slot for slot in copy_R.tolist() if slot >= 0]
                assert found == np.flatnonzero(expert_P == expert).tolist()


def test_copies_stay_equal_and_learn_what_single_experts_learn():
    config, placement = tiny.config(), tiny.replicated_placement(0, stay_on_nodes=1)
    mesh, table = tiny.mesh(config), table_of(config, placement)
    state = step_lib.initial_state(config, mesh)
    initial = expert_arrays(state)
    state = permute.apply(state, tiny.contiguous(), placement)
    history = []
    for i in range(3):
        window = mesh_lib.put_batch(mesh, tiny.tokens(8, 17, seed=i))
        state, metrics = build_step(config)(state, window, table)
        history.append(jax.device_get(metrics))

    for array in expert_arrays(state):  # parameters and both moments
        for layer, slot_ER in enumerate(placement.logical_to_physical_LER):
            for slot_R in slot_ER:
                for slot in slot_R[1:][slot_R[1:] >= 0]:
                    np.testing.assert_array_equal(array[layer, slot], array[layer, slot_R[0]])

    expected_state, expected = run_steps(config, tiny.contiguous(), 3)
    # Outputs have the bits of single experts as long as the weights have; gradients add up copies.
    assert history[0].loss == expected[0].loss
    for one, other in zip(history, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
    state = permute.apply(state, placement, tiny.contiguous())
    moved = False
    for found, wanted, before in zip(
        expert_arrays(state), expert_arrays(expected_state), initial, strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
        moved = moved or (np.abs(wanted - before).max() > 1e-3)
    assert moved


@pytest.mark.slow
def test_a_run_resumes_and_answers(tmp_path):
    placement = tiny.replicated_placement(1)
    Plan(placement).write(tmp_path / "plan.json")
    Plan(tiny.contiguous()).write(tmp_path / "single.json")
    config = tiny.config(placement=str(tmp_path / "plan.json"))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    test_loop.train(config, whole)
    test_loop._copy_until(whole, resumed, 3)
    test_loop.train(config, resumed)
    assert test_loop.curve(resumed) == test_loop.curve(whole)

    stored, moved = (load.find(str(whole), plan) for plan in (None, str(tmp_path / "single.json")))
    assert stored.plan.placement == placement
    prompts = tiny.tokens(8, 8).tolist()
    answers = []
    for source in (stored, moved):
        engine = load.engine(source, tiny.mesh(config))
        answers.append(engine.generate(prompts, 4, sampling.Sampling()))
    assert answers[0].tokens == answers[1].tokens
    logits = [np.asarray(answer.logits_BSV) for answer in answers]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)
