"""`shuffled` against the other dispatches, its homes against a slow rule, its rows counted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import mesh as mesh_lib
from moe_jax import permute
from moe_jax.errors import Refused
from moe_jax.infer import sampling
from moe_jax.infer.engine import Engine
from moe_jax.model import transformer
from moe_jax.model.dispatch import homes
from moe_jax.placement import cost, row_homes
from moe_jax.train import step as step_lib
from tests import slow_homes, tiny


@pytest.mark.parametrize("seed", range(40))
def test_homes_follow_the_rule(seed):
    rng = np.random.default_rng(seed)
    num_devices, top_k = int(rng.choice([1, 2, 4, 8])), int(rng.choice([1, 2, 4]))
    device_XK = rng.integers(0, num_devices, (num_devices * int(rng.integers(1, 9)), top_k))
    device_XK = np.minimum(device_XK, rng.integers(0, num_devices))  # uneven
    device_XK[rng.random(len(device_XK)) < 0.2] = -1
    home_X = homes.balanced(jnp.asarray(device_XK, jnp.int32), num_devices)
    assert np.asarray(home_X).tolist() == slow_homes.balanced(device_XK, num_devices)
    planned_X = row_homes.balanced(device_XK, num_devices, None)
    np.testing.assert_array_equal(planned_X, home_X)


def sized(dispatch, mesh, **model):
    return tiny.config(
        mesh=mesh, model__dispatch=dispatch, **{f"model__{k}": v for k, v in model.items()}
    )


@functools.cache
def program(dispatch, mesh_items, top_k, num_kv_heads):
    config = sized(dispatch, dict(mesh_items), top_k=top_k, num_kv_heads=num_kv_heads, num_heads=8)
    mesh = tiny.mesh(config)
    forward = transformer.build_forward(config.model, mesh)

    def loss(model, token_BS, real_BS, table):
        output = forward(model, token_BS, table, real_BS=real_BS)
        nats = step_lib.cross_entropy(output.logits_BSV, token_BS)
        return nats, (output.logits_BSV, output.record)

    return config, jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(dispatch, mesh, placement, top_k=2, num_kv_heads=2, length=13):
    config, compiled = program(dispatch, tuple(mesh.items()), top_k, num_kv_heads)
    model = transformer.Transformer(jax.random.key(1), config.model)
    slots_LP = placement.physical_to_logical_LP
    layer_L1 = np.arange(len(slots_LP))[:, None]
    experts = model.blocks.moe
    for name in EXPERT_ARRAYS:
        param = getattr(experts, name)
        param[...] = param[...][layer_L1, slots_LP]
    token_BS = tiny.tokens(16, length)
    real_BS = np.arange(length)[None] < np.random.default_rng(1).integers(4, length + 1, (16, 1))
    (_, (logits_BSV, record)), grads = compiled(model, token_BS, real_BS, tiny.table(placement))
    logical_LP = np.argsort(slots_LP, axis=1)
    for name in EXPERT_ARRAYS:
        grad = getattr(grads.blocks.moe, name)
        grad[...] = grad[...][layer_L1, logical_LP]
    return np.asarray(logits_BSV), real_BS, record, [np.asarray(g) for g in jax.tree.leaves(grads)]


def assert_planned(record, placement, groups, combine, position_T=None):
    """Homes, rows and computed rows of all layers are what cost.py says from expert ids alone."""
    ids_TLK = np.asarray(record.expert_BSK).transpose(1, 2, 0, 3).reshape(-1, tiny.LAYERS, 2)
    step_tokens = len(ids_TLK) // groups
    where = {"position_T": position_T, "step_tokens": step_tokens}
    rows = cost.rows(ids_TLK, placement, "shuffled", None, combine, **where)
    assert rows.dispatch_LMM.dtype == np.int64
    assert rows.dispatch_LMM.any()
    np.testing.assert_array_equal(record.traffic.dispatch_MM, rows.dispatch_LMM)
    np.testing.assert_array_equal(record.traffic.combine_MM, rows.combine_LMM)
    computed_LP = cost.computed_LP(ids_TLK, placement, "shuffled", **where)
    np.testing.assert_array_equal(record.traffic.computed_P, computed_LP)
    begun = cost.homes(placement, len(ids_TLK), None, "shuffled", step_tokens)[0]
    steps = cost.walk(ids_TLK, placement, "shuffled", begun, **where)
    home_LT = np.asarray(record.home_BS).reshape(tiny.LAYERS, -1)
    np.testing.assert_array_equal([step.home_T for step in steps], home_LT)


EXPERT_ARRAYS = ("gate_PDF", "up_PDF", "down_PFD")
MESHES = [
    {"data": 2, "expert": 4},
    {"data": 1, "expert": 8},
    {"data": 1, "node": 2, "expert": 2},
    {"data": 1, "fsdp": 2, "expert": 4},
    {"data": 2, "expert": 2, "tensor": 2},
    {"data": 1, "node": 2, "expert": 2, "tensor": 2},
]


@pytest.mark.parametrize(
    ("mesh", "top_k", "num_kv_heads"),
    [
        (MESHES[0], 2, 2),
        pytest.param(MESHES[0], 1, 8, marks=pytest.mark.slow),
        pytest.param(MESHES[1], 2, 2, marks=pytest.mark.slow),
        pytest.param(MESHES[1], 8, 8, marks=pytest.mark.slow),
        (MESHES[3], 2, 2),
        (MESHES[4], 2, 2),  # a key/value head on two devices
        pytest.param(MESHES[5], 2, 8, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_equals_exchange(mesh, top_k, num_kv_heads):
    placement = tiny.random_placement(3, mesh["expert"])
    logits_BSV, real_BS, record, grads = run("shuffled", mesh, placement, top_k, num_kv_heads)
    expected_BSV, _, other, expected = run("exchange", mesh, placement, top_k, num_kv_heads)
    scale = np.abs(expected_BSV).max()
    assert np.abs(logits_BSV - expected_BSV)[real_BS].max() < 1e-5 * scale
    np.testing.assert_array_equal(record.expert_BSK, other.expert_BSK)
    largest = max(np.abs(grad).max() for grad in expected)
    for grad, other_grad in zip(grads, expected, strict=True):
        # with k = 1 the router's gradient is nothing but rounding
        scale = max(np.abs(other_grad).max(), 1e-3 * largest)
        np.testing.assert_allclose(grad, other_grad, rtol=0, atol=3e-5 * scale)


@pytest.mark.parametrize(
    "mesh",
    [MESHES[0], *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[1:])],
    ids=str,
)
def test_placement_and_rows(mesh):
    """Placements change no logit's bits; rows are those of an exchange from the homes chosen."""
    devices = mesh["expert"] * mesh.get("node", 1)
    expected_BSV, *_ = run("shuffled", mesh, tiny.contiguous(devices))
    moved = 0
    for seed in range(3):
        placement = tiny.random_placement(seed, devices)
        logits_BSV, real_BS, record, _ = run("shuffled", mesh, placement)
        np.testing.assert_array_equal(logits_BSV[real_BS], expected_BSV[real_BS])
        assert_planned(record, placement, mesh["data"] * mesh.get("fsdp", 1), "exact")
        for layer in range(tiny.LAYERS):
            ids_TK = np.asarray(record.expert_BSK[layer]).reshape(-1, 2)
            home_T = np.asarray(record.home_BS[layer]).reshape(-1)
            in_group = home_T.reshape(mesh["data"], -1)
            assert all((np.bincount(g) == g.size // devices).all() for g in in_group)
            one = dataclasses.replace(
                placement, physical_to_logical_LP=placement.physical_to_logical_LP[layer][None]
            )
            rows = cost.rows(ids_TK[:, None], one, "exchange", home_T.astype(np.int64), "exact")
            np.testing.assert_array_equal(record.traffic.dispatch_MM[layer], rows.dispatch_LMM[0])
            np.testing.assert_array_equal(record.traffic.combine_MM[layer], rows.combine_LMM[0])
            moved += (home_T != np.asarray(record.home_BS[0]).reshape(-1)).sum()
    assert moved > 0


def test_rows_of_plans_with_copies():
    """Homes follow the first copies; the copy that serves is chosen from there. Partial sums."""
    config = sized("shuffled", {"data": 2, "expert": 4}, combine="partial")
    forward = jax.jit(transformer.build_forward(config.model, tiny.mesh(config)))
    model, single = transformer.Transformer(jax.random.key(1), config.model), tiny.contiguous()
    token_BS = tiny.tokens(16, 13)
    real_BS = np.arange(13)[None] < np.random.default_rng(1).integers(4, 14, (16, 1))
    position_T = (np.arange(16)[:, None] + np.arange(13)).ravel()
    for seed in range(3):
        placement = tiny.replicated_placement(seed, slots=12)
        moved = jax.tree.map(np.asarray, permute.apply(model, single, placement))
        record = forward(moved, token_BS, tiny.table(placement), real_BS=real_BS).record
        assert_planned(record, placement, 2, "partial", position_T)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MESHES[0], MESHES[4]], ids=str)
def test_serves(mesh):
    """Prefill and decode give the tokens of `exchange`."""
    said = []
    for dispatch in ("exchange", "shuffled"):
        config = sized(dispatch, mesh)
        model = transformer.Transformer(jax.random.key(1), config.model)
        placement = tiny.random_placement(0, mesh["expert"])
        engine = Engine(config, tiny.mesh(config), model, tiny.table(placement))
        prompts = [list(range(5)), [7] * 11, [3, 1]]
        said.append(engine.generate(prompts, 12, sampling.Sampling()).tokens)
    assert said[0] == said[1]


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(Refused, match=r"model.num_heads = 4: must be divisible by the 8 devices"):
        sized("shuffled", {"data": 1, "expert": 8})
    with pytest.raises(Refused, match=r"model.num_heads = 4: must be divisible by the 8 devices"):
        sized("shuffled", {"data": 1, "expert": 4, "tensor": 2})
    with pytest.raises(Refused, match=r"model.num_kv_heads = 3.*or divide them"):
        sized("shuffled", {"data": 1, "expert": 4}, num_heads=12, num_kv_heads=3)


@pytest.mark.slow
def test_one_device_is_an_exchange_with_nobody():
    mesh = {"data": 8, "expert": 1}
    logits_BSV, real_BS, *_ = run("shuffled", mesh, tiny.contiguous(1))
    expected_BSV, *_ = run("exchange", mesh, tiny.contiguous(1))
    assert np.abs(logits_BSV - expected_BSV)[real_BS].max() < 1e-5 * np.abs(expected_BSV).max()
    assert mesh_lib.size(tiny.mesh(sized("shuffled", mesh)), mesh_lib.EXPERT) == 1
