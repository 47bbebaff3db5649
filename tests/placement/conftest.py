"""Fixtures of the planner's tests."""

import pytest

from moe_jax.placement import relax

FEW = 80  # steps of a bound: the first cuts are among them


@pytest.fixture(autouse=True)
def short_bound(request, monkeypatch):
    """Most of a tiny solve is the refining of its bound, which test_bounds.py tests.

    A bound holds after any number of steps; slow tests and those that say how many take them all.
    """
    bound = relax.lower_bound
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(
            relax,
            "lower_bound",
            lambda problem, end, steps=relax.STEPS: bound(
                problem, end, FEW if steps == relax.STEPS else steps
            ),
        )


@pytest.fixture
def loose_bound(short_bound, monkeypatch):
    """One step, for tests that read no bound."""
    bound = relax.lower_bound
    monkeypatch.setattr(relax, "lower_bound", lambda problem, end, _: bound(problem, end, 1))
