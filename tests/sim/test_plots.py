"""Plots come out for any size without a warning, and the same numbers give the same bytes."""

import numpy as np
import pytest

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
    for draw in (plots.traffic, plots.load):
        assert draw(before, after, "narrow").startswith(b"\x89PNG")


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
