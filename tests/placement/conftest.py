"""Fixtures of the planner's tests."""

import pytest

from moe_jax.placement import relax


@pytest.fixture
def loose_bound(monkeypatch):
    """Most of a tiny solve is its bound, which test_bounds.py tests: here it takes one step."""
    bound = relax.lower_bound
    monkeypatch.setattr(relax, "lower_bound", lambda *words, **_: bound(*words, steps=1))
