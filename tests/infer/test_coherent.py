"""Serving with coherent dispatch: the answers of exchange, rows as the cost module counts them."""

import jax
import numpy as np
import pytest

from moe_jax import permute
from moe_jax.infer import record
from moe_jax.infer.engine import Engine
from moe_jax.placement.plan import Plan
from moe_jax.sim import measurement, replay
from tests import tiny
from tests.infer.test_engine import GREEDY


def generate(dispatch, placement, prompts):
    config = tiny.config(model__dispatch=dispatch)
    model = permute.apply(tiny.model(), tiny.contiguous(), placement)
    engine = Engine(config, tiny.mesh(config), model, tiny.table(placement))
    return config, engine.generate(prompts, 6, GREEDY)


@pytest.mark.parametrize(
    "placement",
    [
        pytest.param(tiny.random_placement(1), marks=pytest.mark.slow),
        pytest.param(tiny.replicated_placement(1, stay_on_nodes=1), marks=pytest.mark.slow),
        pytest.param(tiny.replicated_placement(2), marks=pytest.mark.slow),
    ],
    ids=["single", "stay", "local"],
)
def test_answers_are_those_of_exchange_and_rows_those_of_the_cost_module(tmp_path, placement):
    prompts = tiny.tokens(8, 8).tolist()
    _, expected = generate("exchange", placement, prompts)
    config, generation = generate("coherent", placement, prompts)
    assert generation.tokens == expected.tokens
    logits, expected_logits = map(jax.device_get, (generation.logits_BSV, expected.logits_BSV))
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-5)

    path = tmp_path / "m.npz"
    record.write_measurement(path, [generation], prompts, config, Plan(placement))
    measured = measurement.read(path)
    assert measured.meta.dispatch == "coherent"
    predicted = replay.predict(measured, placement)
    checks = replay.check_counts("before", measured, predicted, range(len(measured.computed_LP)))
    assert [check.problem for check in checks] == [None] * len(checks)
    # With two experts only one can be elsewhere: a sum of one row is that row.
    moved = measured.dispatch_LMM.sum() + measured.combine_LMM.sum()
    assert predicted.partial_rows == moved
