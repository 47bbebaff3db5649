"""Published families against transformers: logits, routing and 64 greedy tokens, float32.

The whole continuation is compared: cached decoding step by step, and without a cache at once.
"""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax import mesh as mesh_lib
from moe_jax import permute
from moe_jax.infer import engine as engine_lib
from moe_jax.infer import record
from moe_jax.infer.serving import sizes
from moe_jax.infer.serving.engine import Engine as Serving
from moe_jax.infer.serving.request import Options
from moe_jax.infer.serving.runner import Runner
from moe_jax.infer.text import Bytes
from moe_jax.model import transformer
from tests.hf import golden

BOUND = 2e-5  # of the range of the logits
USUAL = ("qwen2_moe", "gpt_oss", "deepseek_v3")  # without a cache; the others are slow


CASES = [  # most are slow; tests/model/test_parts.py has every part in every dispatch
    pytest.param(dispatch, family, marks=() if usual else pytest.mark.slow)
    for dispatch in ("local", "exchange", "gathered", "hierarchical", "shuffled", "coherent")
    for family in (*golden.FAMILIES, *golden.WINDOWS)
    for usual in [dispatch == "local" and family not in (*golden.WINDOWS[1:], "deepseek_v2")]
]


@pytest.mark.parametrize(("dispatch", "family"), CASES)
def test_logits_routing_and_greedy_tokens_with_a_cache(dispatch, family):
    """Prompts of five lengths in one batch, padded on the right here; transformers had two of them
    alone and three in a batch padded on the left."""
    texts, padded = golden.texts(family), golden.padded_on_the_left(family)
    engine = golden.engine(family, dispatch)
    prompts = [text.prompt for text in (*texts, *padded)]
    generation = engine.generate(prompts, 64, golden.GREEDY)
    assert_same(generation, (*texts, *padded))
    routed = record.routed_tokens([generation], 8)
    model = golden.config(family).model
    trace = record.trace([generation], golden.config(family), "")
    assert trace.layer_ids == tuple(range(model.num_dense_layers, model.num_layers))
    start = 0
    for text in texts:
        length = len(text.experts_SLK)
        np.testing.assert_array_equal(
            routed.expert_TLK[start : start + length], text.experts_SLK, strict=False
        )
        start += length


def assert_same(generation: engine_lib.Generation, texts: tuple[golden.Text, ...]) -> None:
    """Tokens, and logits of the prompts."""
    logits_BSV = np.asarray(generation.logits_BSV)
    for number, text in enumerate(texts):
        assert generation.tokens[number] == text.tokens
        length = len(text.prompt)
        assert golden.deviation(logits_BSV[number, :length], text.logits_RV[:length]) <= BOUND


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in USUAL else pytest.mark.slow)
        for family in (*golden.FAMILIES, *golden.WINDOWS)
    ],
)
def test_logits_and_routing_without_a_cache(family):
    config = golden.config(family, devices=2)
    mesh = mesh_lib.of_config(config.mesh)
    placement = golden.random_placement(family, seed=1, devices=2)
    model = golden.model(family, placement, mesh)
    forward = jax.jit(transformer.build_forward(config.model, mesh))
    longest = 80
    for text in golden.texts(family):
        whole = [*text.prompt, *text.tokens][:-1]
        token_BS = np.zeros((2, longest), np.int32)
        token_BS[0, : len(whole)] = whole
        real_BS = np.arange(longest)[None] < np.array([len(whole), 0])[:, None]
        output = forward(model, token_BS, permute.table(placement), real_BS=real_BS)
        expert_SLK = np.asarray(output.record.expert_BSK)[:, 0, : len(whole)].swapaxes(0, 1)
        np.testing.assert_array_equal(expert_SLK, text.experts_SLK)
        logits_SV = np.asarray(output.logits_BSV)[0]
        assert golden.deviation(logits_SV[text.rows], text.logits_RV) <= BOUND
        continued = logits_SV[len(text.prompt) - 1 : len(whole)].argmax(-1)
        assert continued.tolist() == text.tokens


def test_padding_is_no_part_of_the_length_of_a_text():
    """LongRoPE goes by it: 70 tokens, padded to 128, are fewer than the 100 of pre-training."""
    family = "phimoe"
    prompt = golden.texts(family)[0].prompt[:1] + list(range(69))
    padded = golden.engine(family, "local").generate([prompt], 1, golden.GREEDY).logits_BSV
    config, mesh = golden.config(family, 1, "local"), mesh_lib.make()
    assert padded.shape[1] > config.model.rope.original_seq_len > len(prompt)
    placement = golden.contiguous(family, 1)
    forward = jax.jit(transformer.build_forward(config.model, mesh))
    token_BS = np.array([prompt], np.int32)
    alone = forward(golden.model(family, placement, mesh), token_BS, permute.table(placement))
    deviation = golden.deviation(np.asarray(padded)[0, : len(prompt)], alone.logits_BSV[0])
    assert deviation <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("family", [*golden.FAMILIES, *golden.WINDOWS])
def test_served_tokens_are_those_of_the_reference(family):
    """Requests that come and go, over a cache in blocks. Few seats: they wait, and are cut."""
    made = golden.config(family, 2)
    mesh, placement = mesh_lib.of_config(made.mesh), golden.random_placement(family, 0, 2)
    sized = sizes.limits(made.model, mesh, seats=4, budget=40)
    served = Serving(
        Runner(
            *(made, mesh, golden.model(family, placement, mesh), permute.table(placement), sized)
        ),
        Bytes(),
    )
    texts = (*golden.texts(family), *golden.padded_on_the_left(family))
    said = [[] for _ in texts]
    for text, parts in zip(texts, said, strict=True):
        options = Options(max_tokens=len(text.tokens), ignore_end=True)
        served.submit(text.prompt, options, parts.append)
        served.step()
    while served.step():
        pass
    for text, parts in zip(texts, said, strict=True):
        assert [part.token for part in parts] == text.tokens


@pytest.mark.slow
def test_latent_attention_in_bfloat16():
    """A whole model in 16 bits, cached: near what transformers says in 32 (choices may turn)."""
    family = "deepseek_v3"
    made = golden.config(family, 1, "local")
    made = dataclasses.replace(made, model=dataclasses.replace(made.model, dtype="bfloat16"))
    mesh = mesh_lib.of_config(made.mesh)
    placement = golden.contiguous(family, 1)
    served = engine_lib.Engine(
        made, mesh, golden.model(family, placement, mesh), permute.table(placement)
    )
    text = golden.texts(family)[0]
    generation = served.generate([text.prompt], 3, golden.GREEDY)
    expected_SV = text.logits_RV[: len(text.prompt)]
    logits_SV = np.asarray(generation.logits_BSV)[0, : len(text.prompt)]
    assert np.mean(np.abs(logits_SV - expected_SV)) < 0.02 * np.ptp(expected_SV)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*golden.FAMILIES, *golden.WINDOWS])
def test_bits_do_not_depend_on_the_placement(family):
    prompts = [text.prompt for text in golden.texts(family)]
    expected = golden.engine(family).generate(prompts, 4, golden.GREEDY)
    placed = golden.engine(family, placement=golden.random_placement(family, seed=5))
    actual = placed.generate(prompts, 4, golden.GREEDY)
    assert actual.tokens == expected.tokens
    np.testing.assert_array_equal(actual.logits_BSV, expected.logits_BSV)
