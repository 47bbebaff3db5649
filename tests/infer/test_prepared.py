"""Experts as inference reads them: the same values under other axes, never copied by a step."""

import jax
import numpy as np
import pytest

from moe_jax import permute
from moe_jax.infer import prepared as prepared_lib
from moe_jax.infer.engine import Engine
from moe_jax.infer.prepared import prepared
from moe_jax.infer.sampling import Sampling
from moe_jax.model import moe
from tests import tiny


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_those_of_the_model(dtype):
    config = tiny.config(model__dtype=dtype)
    mesh, model = tiny.mesh(config), tiny.model()
    found = prepared(config.model, mesh, model)
    assert not moe.is_transposed(model.blocks.moe)
    assert moe.is_transposed(found.blocks.moe)
    for name in moe.MATRICES:
        before, after = (getattr(m.blocks.moe, name)[...] for m in (model, found))
        assert after.dtype == dtype
        np.testing.assert_array_equal(after, np.asarray(before.astype(dtype)).swapaxes(2, 3))
        assert after.sharding.spec[1] == before.sharding.spec[1]
    assert found.blocks.moe.router_DE[...] is model.blocks.moe.router_DE[...]
    assert prepared(config.model, mesh, found) is found


def test_a_placement_moves_prepared_experts():
    config = tiny.config()
    mesh, plan = tiny.mesh(config), tiny.random_placement(3)
    moved = permute.apply(tiny.model(), tiny.contiguous(), plan)
    found = permute.apply(prepared(config.model, mesh, tiny.model()), tiny.contiguous(), plan)
    expected = prepared(config.model, mesh, moved)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_model_may_be_used_up():
    config = tiny.config(mesh={"data": 1, "expert": 1}, model__dispatch="local")
    model = jax.tree.map(lambda a: a + 0, tiny.model(1, 1))
    prepared(config.model, tiny.mesh(config), model, use_up=True)
    assert all(getattr(model.blocks.moe, name)[...].is_deleted() for name in moe.MATRICES)
    assert not model.embedding_VD[...].is_deleted()


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_a_step_copies_no_layer_of_experts(shape):
    """A loop over layers would cut all experts of a layer out of the stack, used or not."""
    data, expert = shape
    config = tiny.config(mesh={"data": data, "expert": expert}, model__dispatch="exchange")
    engine = Engine(
        config, tiny.mesh(config), tiny.model(*shape), tiny.table(tiny.contiguous(expert))
    )
    token_B = np.zeros(8, np.int32)
    program = engine._programs.decode.lower(
        engine._model, engine._table, token_B, token_B, engine.empty_cache(8, 16)
    )
    here = tiny.EXPERTS // expert
    text = program.compile().as_text()
    assert f"f32[{tiny.LAYERS},{here},24,16]" in text  # the stack
    for of_layer in (f"[{here},24,16]", f"[1,{here},24,16]", f"[{here},16,24]"):
        assert f"f32{of_layer}" not in text


def test_a_prompt_without_its_logits_goes_on_alike():
    config = tiny.config()
    engine = Engine(config, tiny.mesh(config), tiny.model(), tiny.table(tiny.contiguous()))
    prompts = tiny.tokens(3, 9).tolist()
    prompts[1] = prompts[1][:4]
    whole, last = (
        engine.generate(prompts, 5, Sampling(), all_logits=wanted) for wanted in (True, False)
    )
    assert last.logits_BSV is None
    assert whole.tokens == last.tokens


def test_a_step_copies_no_cache_of_all_layers():
    """Keys and values of one position are written where the others lie."""
    config = tiny.config(mesh={"data": 1, "expert": 1}, model__dispatch="local")
    engine = Engine(config, tiny.mesh(config), tiny.model(1, 1), tiny.table(tiny.contiguous(1)))
    token_B, cache = np.zeros(8, np.int32), engine.empty_cache(8, 16)
    program = engine._programs.decode.lower(engine._model, engine._table, token_B, token_B, cache)
    whole = ",".join(map(str, cache.key_BCGQ.shape))
    made = [line.partition(" = ")[2] for line in program.compile().as_text().splitlines()]
    made = [line for line in made if line.startswith(f"f32[{whole}]")]
    assert made
    assert not [line for line in made if " copy(" in line or " broadcast(" in line]


def test_shapes_are_those_of_the_prepared_model():
    config = tiny.config()
    mesh, model = tiny.mesh(config), tiny.model()
    abstract = jax.eval_shape(lambda: model)
    shapes, found = prepared_lib.shapes(mesh, abstract), prepared(config.model, mesh, model)
    assert jax.tree.structure(shapes) == jax.tree.structure(found)
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(found), strict=True)
    assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)
    assert not moe.is_transposed(abstract.blocks.moe)
