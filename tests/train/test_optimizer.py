"""The optimizer: what weight decay is for."""

import re

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import OptimizerConfig
from moe_jax.train import optimizer, step
from tests import tiny

VECTORS = re.compile("norm|bias|sink|correction|share_D")
KINDS = {
    "plain": {},
    "norms and biases of heads": {"qk_norm": "all", "attention_bias": "qkvo", "norm": "layer"},
    "norms of a head": {"qk_norm": "head", "attention_bias": "qkv"},
    "biases of experts": {"expert_bias": True, "router_bias": True, "output_bias": True},
    "shared": {"d_ff_shared": 16, "shared_gate": True, "router_correction": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_decayed_and_nothing_else(kind):
    config = tiny.config(**{f"model__{name}": value for name, value in KINDS[kind].items()})
    model = jax.tree.map(jnp.ones_like, step.initial_state(config, tiny.mesh(config)).model)
    decay = optimizer.make(OptimizerConfig(weight_decay=0.5, warmup_steps=0), 10)
    no_grads = jax.tree.map(jnp.zeros_like, model)
    changes, _ = decay.update(no_grads, decay.init(model), model)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(changes)]
    moved = [bool((change != 0).all()) for change in jax.tree.leaves(changes)]
    assert moved == [VECTORS.search(name) is None for name in names]
    assert True in moved
    assert False in moved
