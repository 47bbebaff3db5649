"""Llama, a model without MoE layers: against transformers, served, trained, in and out."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax import checkpoint, metrics, permute
from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax.errors import Refused
from moe_jax.hf import folder as folder_lib
from moe_jax.hf import save
from moe_jax.infer import load, run
from moe_jax.infer.serving import sizes
from moe_jax.infer.serving.engine import Engine as ServingEngine
from moe_jax.infer.serving.request import Options
from moe_jax.infer.serving.runner import Runner
from moe_jax.infer.text import Bytes
from moe_jax.model import transformer
from moe_jax.train import inputs, loop
from tests import tiny
from tests.hf import golden
from tests.hf.test_infer import request

BOUND = 2e-5  # of the range of the logits
DENSE = {"num_experts": 1, "top_k": 1, "num_dense_layers": 2, "d_ff": 24, "d_ff_dense": 24}


@pytest.mark.parametrize("dispatch", ["local", "exchange"])
def test_logits_and_greedy_tokens_with_a_cache(dispatch):
    texts = (*golden.texts("llama"), *golden.padded_on_the_left("llama"))
    engine = golden.engine("llama", dispatch)  # "exchange": tokens of 4 devices
    generation = engine.generate([text.prompt for text in texts], 64, golden.GREEDY)
    logits_BSV = np.asarray(generation.logits_BSV)
    for number, text in enumerate(texts):
        assert generation.tokens[number] == text.tokens
        length = len(text.prompt)
        assert golden.deviation(logits_BSV[number, :length], text.logits_RV[:length]) <= BOUND
    assert not any(record.computed_LP.any() for record in generation.records)


def test_logits_without_a_cache():
    mesh = mesh_lib.make()
    model = golden.model("llama", golden.contiguous("llama", 1), mesh)
    forward = jax.jit(transformer.build_forward(golden.config("llama", 1).model, mesh))
    table = permute.table(golden.contiguous("llama", 1))
    for text in golden.texts("llama"):
        token_BS = np.array([[*text.prompt, *text.tokens][:-1]], np.int32)
        logits_SV = np.asarray(forward(model, token_BS, table).logits_BSV)[0]
        assert golden.deviation(logits_SV[text.rows], text.logits_RV) <= BOUND


def test_requests_that_come_and_go_are_answered_with_the_same_tokens():
    config, mesh = golden.config("llama", 1), mesh_lib.make()
    placement = golden.contiguous("llama", 1)
    model = golden.model("llama", placement, mesh)
    limits = sizes.limits(config.model, mesh, context=128, seats=2)
    engine = ServingEngine(Runner(config, mesh, model, permute.table(placement), limits), Bytes())
    texts, answers = golden.texts("llama"), {}
    for number, text in enumerate(texts):
        said = answers[number] = []
        engine.submit(text.prompt, Options(max_tokens=64), said.append)
    while engine.step():
        pass
    for number, text in enumerate(texts):
        assert [part.token for part in answers[number] if part.token is not None] == text.tokens


def test_export_gives_the_bytes_that_were_read(tmp_path):
    mesh = mesh_lib.make()
    placement, found = golden.contiguous("llama", 1), golden.found_layout("llama")
    arrays = checkpoint.flatten(golden.model("llama", placement, mesh))
    source = golden.tensors("llama")
    dtypes = {name: source.dtype(name) for name in source.file_of}
    like = golden.ROOT / "llama"
    save.export(arrays, found, placement, tmp_path / "out", dtypes=dtypes, like=like)
    written = folder_lib.tensors(tmp_path / "out")
    assert written.file_of.keys() == source.file_of.keys()
    for name in source.file_of:
        np.testing.assert_array_equal(written.array(name), source.array(name))


def test_what_has_no_experts_is_not_recorded():
    for how in ({"record": "t.npz"}, {"measure": "m.npz"}):
        with pytest.raises(Refused, match="all layers of this model are dense"):
            run.run(request("llama", **how))


def test_config_json_says_dense_layers_on_devices_for_tokens():
    config = golden.config("llama", devices=4)
    assert (config.mesh.data, config.mesh.expert) == (4, 1)
    assert (config.model.num_moe_layers, config.model.num_plan_layers) == (0, 1)
    assert transformer.num_active_parameters(config.model) == transformer.num_parameters(
        config.model
    )


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"model": {"top_k": 2, "num_experts": 2}}, "model.num_experts"),
        ({"model": {"d_ff": 16}}, "model.d_ff"),
        ({"model": {"num_dense_layers": 3}}, "model.num_dense_layers"),
        ({"mesh": {"expert": 2}}, "mesh.expert"),
        ({"replan": {"every": 100}}, "replan.every"),
    ],
)
def test_rules_of_a_model_without_experts(overrides, field):
    plain = dataclasses.asdict(tiny.config(mesh={"data": 2}))
    plain["model"] |= DENSE | overrides.pop("model", {})
    for group, values in overrides.items():
        plain[group] |= values
    with pytest.raises(Refused) as refused:
        config_lib.from_config_dict(plain)
    assert refused.value.field == field


def test_trains_and_goes_on(tmp_path):
    """A run that ends after 3 steps and is continued has the bits of one that is not; it learns."""
    how = {f"model__{name}": value for name, value in DENSE.items()}
    config = tiny.config(mesh={"data": 2}, **how)
    first = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=3))
    for name, parts in (("whole", (config,)), ("stopped", (first, config))):
        for part in parts:
            corpus, plan = inputs.prepare(part, tmp_path / name)
            with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
                loop.train(part, tmp_path / name, corpus, plan)
    sources = [load.find(str(tmp_path / name), None) for name in ("whole", "stopped")]
    source, mesh = sources[1], tiny.mesh(config)
    whole, trained = (load.parameters(each, mesh) for each in sources)
    assert trained.blocks is None
    for mine, expected in zip(jax.tree.leaves(trained), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(mine, expected)
    rows = metrics.read(tmp_path / "stopped" / "metrics.jsonl")[1]
    assert rows[-1]["loss"] < rows[0]["loss"]
    answer = load.engine(source, mesh).generate([[1, 2, 3]], 2, golden.GREEDY)
    assert len(answer.tokens[0]) == 2
