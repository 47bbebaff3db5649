"""Plots come out for any size without a warning, and the same numbers give the same bytes."""

import dataclasses

import numpy as np
import pytest

from moe_jax.placement.plan import Plan
from moe_jax.sim import plots
from moe_jax.sim.curves import Curves


def side(name, num_layers, num_devices, seed=0):
    rng = np.random.default_rng(seed)
    shape = (num_layers, num_devices, num_devices)
    rows_LMM = rng.integers(0, 2_000_000, shape) * (1 - np.eye(num_devices, dtype=int))
    return plots.Side(name, rows_LMM, rows_LMM, rows_LMM.sum(1))


@pytest.mark.parametrize("size", [(1, 1), (2, 8), (48, 64)])
def test_any_number_of_layers_and_devices(size):
    before, after = side("before", *size), side("after", *size, seed=1)
    assert plots.traffic(before, after, "narrow").startswith(b"\x89PNG")
    assert plots.load(before, after, range(size[0]), "narrow").startswith(b"\x89PNG")


def test_the_same_numbers_give_the_same_bytes():
    curves = Curves({0: 5.0, 1: 3.0}, {}, None)
    assert plots.loss(curves) == plots.loss(curves)
    assert plots.loss(curves) != plots.loss(Curves({0: 5.0, 1: 3.5}, {}, None))


def test_both_sides_share_one_colour_scale(monkeypatch):
    limits = []
    drawn = plots._cells

    def cells(axes, values, colours, scale, text):
        limits.append(scale)
        return drawn(axes, values, colours, scale, text)

    monkeypatch.setattr(plots, "_cells", cells)
    before, after = side("before", 2, 4), side("after", 2, 4, seed=1)
    plots.traffic(before, after)
    highest = max(int(s.dispatch_LMM.sum(0).max()) for s in (before, after))
    assert limits == [(0, highest)] * 4


def drawn(monkeypatch):
    """The figures that are drawn, before they become bytes."""
    figures = []
    saved = plots._png
    monkeypatch.setattr(plots, "_png", lambda figure: figures.append(figure) or saved(figure))
    return figures


def test_layers_have_the_numbers_of_the_model(case, monkeypatch):
    figures = drawn(monkeypatch)
    case.plan = Plan(case.plan.placement, layer_ids=(1, 2, 5))  # 0, 3 and 4 are dense
    assert case.run() == 0
    loads = [f for f in figures if f.axes[0].get_ylabel() == "layer"]
    assert len(loads) == 2
    for axes in [axes for figure in loads for axes in figure.axes[:2]]:
        assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "5"]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("load_M", [[5, 4, 4, 3], [8, 4, 4, 0], [16, 0, 0, 0]])
def test_the_scale_of_loads_is_not_below_zero_and_has_the_mean_in_its_middle(monkeypatch, load_M):
    figures = drawn(monkeypatch)
    after = dataclasses.replace(side("after", 1, 4), load_LM=np.array([load_M]))
    plots.load(after, after, [0])
    (bar,) = [axes for axes in figures[0].axes if "mean of the layer" in axes.get_xlabel()]
    most = load_M[0] / 4
    assert bar.get_xlim() == pytest.approx((max(0, 2 - most), most))
    image = figures[0].axes[0].images[0]
    middle, end = (image.cmap(image.norm(ratio)) for ratio in (1.0, most))
    assert middle == image.cmap(0.5)
    assert end == image.cmap(1.0)
