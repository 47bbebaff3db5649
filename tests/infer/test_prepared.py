"""Experts as inference reads them: the same values under other axes, never copied by a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import permute
from moe_jax.infer import prepared as prepared_lib
from moe_jax.infer.engine import Engine
from moe_jax.infer.prepared import prepared
from moe_jax.infer.sampling import Sampling
from moe_jax.model import attention, layers, moe, parameter, transformer
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


WIDE = {"model__d_model": 48, "model__d_head": 24, "model__qk_norm": "head"}


def test_projections_are_turned_and_say_the_same():
    config = tiny.config(mesh={"data": 1, "expert": 1}, model__dispatch="local", **WIDE)
    mesh, model = tiny.mesh(config), transformer.Transformer(jax.random.key(0), config.model)
    found = prepared(config.model, mesh, model)
    weights = found.blocks.attention
    assert all(map(parameter.is_turned, (*attention.matrices(weights), found.output_DV)))
    before = model.blocks.attention
    np.testing.assert_array_equal(
        weights.query_DHQ[...], np.moveaxis(np.asarray(before.query_DHQ[...]), 1, 3)
    )
    np.testing.assert_array_equal(
        weights.output_HQD[...], np.moveaxis(np.asarray(before.output_HQD[...]), 3, 1)
    )
    np.testing.assert_array_equal(found.output_DV[...], np.asarray(model.output_DV[...]).T)
    assert prepared(config.model, mesh, found) is found
    forward = jax.jit(transformer.build_forward(config.model, mesh))
    table = tiny.table(tiny.contiguous(1))
    said, expected = (forward(m, tiny.tokens(4, 9), table).logits_BSV for m in (found, model))
    np.testing.assert_allclose(said, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changed", [
    {"model__dispatch": "coherent"}, {"model__dispatch": "shuffled"}, {"model__d_head": 6}
], ids=str)  # fmt: skip
def test_what_has_layers_of_its_own_or_is_narrow_is_not_turned(changed):
    config = tiny.config(mesh={"data": 4, "expert": 2}, **{**WIDE, "model__qk_norm": "", **changed})
    model = transformer.Transformer(jax.random.key(0), config.model)
    found = prepared(config.model, tiny.mesh(config), model)
    assert not parameter.is_turned(found.blocks.attention.key_DGQ)
    assert parameter.is_turned(found.output_DV) == ("model__d_head" in changed)


@pytest.mark.parametrize(
    ("d_model", "num_heads", "d_head"), [(16, 2, 8), (48, 4, 24), (192, 8, 24)]
)
def test_few_rows_keep_their_bits_against_turned_matrices(d_model, num_heads, d_head):
    """Among 320 others, 4 alone; against matrices that are not turned some widths do not."""
    sizes = {"d_model": d_model, "num_heads": num_heads, "num_kv_heads": 2, "d_head": d_head}
    config = tiny.config(
        mesh={"data": 1, "expert": 1},
        model__dispatch="local",
        **{f"model__{name}": size for name, size in sizes.items()},
    )
    mesh, model = tiny.mesh(config), transformer.Transformer(jax.random.key(0), config.model)
    found, setting = prepared(config.model, mesh, model), attention.setting_of(config.model)
    layer = jax.tree.map(lambda leaf: leaf[0], found.blocks.attention)
    output_VD = found.output_DV[...]
    assert all(map(parameter.is_turned, (*attention.matrices(layer), found.output_DV)))

    @jax.jit
    def rows(layer, output_VD, x_T1D, at_T1):
        query, key, value = attention.project(x_T1D, layer, at_T1, setting)
        mixed = jnp.concatenate([key, value] * (num_heads // 4), axis=2) if num_heads > 2 else key
        out = attention.project_out(mixed, layer)
        return query, key, value, out, layers.logits(out, output_VD, None)

    rng = np.random.default_rng(0)
    x_T1D = rng.normal(size=(320, 1, d_model)).astype(np.float32)
    at_T1 = rng.integers(0, 60, (320, 1)).astype(np.int32)
    weights = layer, output_VD  # arguments: the compiler may turn constants back
    expected = rows(*weights, x_T1D, at_T1)
    for count in (4, 5, 8, 16, 64, 80):
        for _ in range(4):
            some = rng.permutation(320)[:count]
            for said, wanted in zip(
                rows(*weights, x_T1D[some], at_T1[some]), expected, strict=True
            ):
                np.testing.assert_array_equal(said, np.asarray(wanted)[some])


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
    experts, found_experts = shapes.blocks.moe, found.blocks.moe
    assert jax.tree.structure(experts) == jax.tree.structure(found_experts)
    pairs = zip(jax.tree.leaves(experts), jax.tree.leaves(found_experts), strict=True)
    assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)
    # The rest is turned when it is there: by sizes of single matrices, and they are small.
    filled = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    again = prepared(config.model, mesh, filled)
    assert jax.tree.structure(again) == jax.tree.structure(found)
    assert not moe.is_transposed(abstract.blocks.moe)
