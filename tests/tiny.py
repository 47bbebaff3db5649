"""A model small enough for every test, and the things that tests make from it."""

import functools

import jax
import numpy as np

from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax import permute
from moe_jax.model import transformer
from moe_jax.placement import replication, shares
from moe_jax.placement.plan import Placement
from moe_jax.train import step as step_lib

LAYERS, EXPERTS = 2, 8


def config(**overrides):
    """The tiny config; overrides as `model__top_k=1`."""
    plain = {
        "name": "tiny",
        "platform": "cpu",
        "mesh": {"data": 2, "expert": 4},
        "model": {
            "vocab_size": 256,
            "num_layers": LAYERS,
            "d_model": 16,
            "num_heads": 4,
            "num_kv_heads": 2,
            "d_head": 4,
            "d_ff": 24,
            "num_experts": EXPERTS,
            "top_k": 2,
            "max_seq_len": 64,
        },
        "data": {"seq_len": 16, "global_batch": 8, "max_bytes": 100_000},
        "optimizer": {"warmup_steps": 2, "learning_rate": 1e-2},
        "train": {
            "num_steps": 6,
            "log_every": 2,
            "eval_every": 3,
            "eval_sequences": 8,
            "checkpoint_every": 3,
        },
    }
    for key, value in overrides.items():
        group, _, field = key.partition("__")
        if field:
            plain[group] = {**plain[group], field: value}
        else:
            plain[group] = value
    return config_lib.from_config_dict(plain)


def mesh(tiny_config):
    return mesh_lib.of_config(tiny_config.mesh)


@functools.cache
def model(data=2, expert=4):
    """The tiny model with its experts split over a mesh."""
    sized = config(mesh={"data": data, "expert": expert})
    shardings = jax.tree.map(
        lambda leaf: leaf.sharding, step_lib.abstract_state(sized, mesh(sized))
    )
    single = transformer.Transformer(jax.random.key(1), sized.model)
    return jax.device_put(single, shardings.model)


def tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, length)).astype(np.int32)


def contiguous(devices=4):
    return Placement.contiguous(LAYERS, EXPERTS, devices)


def random_placement(seed, devices=4, *, layers=LAYERS, experts=EXPERTS):
    rng = np.random.default_rng(seed)
    slots_LP = np.stack([rng.permutation(experts) for _ in range(layers)])
    return Placement(slots_LP.astype(np.int32), experts, devices)


def table(placement):
    return permute.table(placement)


def replicated_placement(seed, devices=4, slots=2 * EXPERTS, stay_on_nodes=0):
    """Some experts in several slots; shares of copies (the rule `stay`) for so many nodes."""
    rng = np.random.default_rng(seed)
    load_LE = rng.lognormal(0, 1.5, (LAYERS, EXPERTS))
    placement = replication.balanced_slots(load_LE, slots, devices)
    if not stay_on_nodes:
        return placement
    expert_LP = placement.physical_to_logical_LP
    weight_LXP = rng.random((LAYERS, stay_on_nodes + 1, slots))
    pairs = zip(weight_LXP, expert_LP, strict=True)
    share_LXP = np.stack([shares.quantised(*pair) for pair in pairs])
    share_LXP[-1] = 0  # the rule of this layer is `local`
    return Placement(expert_LP, EXPERTS, devices, share_LXP)
