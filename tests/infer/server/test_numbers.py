"""What /metrics and the page say of an engine that has counted: without a model."""

import numpy as np

from moe_jax.infer.server import live, prometheus
from moe_jax.infer.serving.engine import Engine
from moe_jax.infer.serving.scheduler import Scheduler
from moe_jax.infer.serving.stats import Stats
from tests import tiny
from tests.infer.serving.test_engine import TIGHT, TWO


def counted(**model):
    """An engine of two devices that has counted in every MoE layer, one row more on device 1."""
    engine = Engine.__new__(Engine)  # of no runner
    model = {f"model__{name}": value for name, value in model.items()}
    engine.config, engine.stats = tiny.config(mesh=TWO, **model), Stats()
    engine.scheduler, engine.plan_digest = Scheduler(TIGHT), "1" * 64
    engine.read_counters = lambda: None
    count(engine, 1)
    return engine


def count(engine, tokens):
    layers, experts = engine.config.model.num_plan_layers, engine.config.model.num_experts
    rows_LMM = np.full((layers, 2, 2), tokens)
    computed_LP = np.full((layers, experts), tokens)
    computed_LP[:, -1] += 1
    engine.stats.step(tokens, 0, 0, 0.0, 0.0)
    engine.stats.rows(rows_LMM, rows_LMM, computed_LP)


def row_of_one(engine):
    """Rows computed: one, of the first slot in the first layer."""
    computed_LP = np.zeros_like(engine.stats.computed_LP)
    computed_LP[0, 0] = 1
    return computed_LP


def pages(engine):
    """(metrics by name, page)"""
    text = prometheus.page(engine, None, waiting=0, draining=False, rate=0.0)
    lines = (line.rpartition(" ") for line in text.splitlines() if line[0] != "#")
    html = live.html(engine, None, "tiny", waiting=0, rate=0.0)
    return {name: float(value) for name, _, value in lines}, html


def test_layers_have_the_numbers_of_the_model():
    """As in traces, plans and pins: the first of these has no experts."""
    values, html = pages(counted(num_layers=3, num_dense_layers=1, d_ff_dense=8))
    assert 'moe_jax_computed_rows_total{layer="2",device="1"}' in values
    layers = {name.split('"')[1] for name in values if "{layer=" in name}
    assert layers == {"1", "2"}
    assert "layer 2, device 1: " in html
    assert "layer 0, " not in html


def test_load_and_traffic_are_those_of_the_plan_in_use():
    """Counters go on; what is a state is counted anew once all experts have moved."""
    engine = counted()
    count(engine, 9)  # over all: 1 + 9 in each expert, and two more in one of device 1
    values, html = pages(engine)
    assert values['moe_jax_load_max_over_mean{layer="0"}'] == 42 / 41
    assert html.count("since the start") == 2
    assert "0 to 1: 40 rows" in html
    engine.stats.plan_changed("2" * 64)
    values, html = pages(engine)
    assert values['moe_jax_load_max_over_mean{layer="0"}'] == 0
    assert "0 to 1: " not in html
    engine.stats.rows(*(0 * rows for rows in (engine.stats.dispatch_LMM,) * 2), row_of_one(engine))
    values, _ = pages(engine)
    assert values['moe_jax_load_max_over_mean{layer="0"}'] == 2  # one row, on one of two devices
    assert values['moe_jax_load_max_over_mean{layer="1"}'] == 0
    engine.stats.plan_changed("2" * 64)
    count(engine, 2)
    values, html = pages(engine)
    assert values['moe_jax_load_max_over_mean{layer="0"}'] == 9 / 8.5
    assert values['moe_jax_computed_rows_total{layer="0",device="0"}'] == 49
    assert values['moe_jax_rows_out_total{source="0",destination="1"}'] == 24
    assert "0 to 1: 8 rows" in html
    assert html.count("since plan 222222222222 came into use, 2 tokens ago") == 2
    assert "since the start" not in html
