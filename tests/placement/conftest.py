"""Fixtures of the planner's tests."""

import pathlib

import numpy as np
import pytest

from moe_jax.placement import chainwise, enumerated, relax, staying
from moe_jax.placement.limits import whole
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace

FEW = 80  # steps of a bound: the first cuts are among them
SWEEPS = (200, 80)  # of an annealing: enough for problems of a dozen experts
PROGRAMS = 8  # sweeps of programs for copies


@pytest.fixture(autouse=True)
def short_search(request, monkeypatch):
    """Most of a tiny solve is the refining of its bound, annealing and programs, as long as for
    large problems.

    A bound holds after any number of steps; test_bounds.py and test_anneal.py say their own number.
    Slow tests take all.
    """
    bound = relax.lower_bound
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(chainwise, "SWEEPS", SWEEPS)
        monkeypatch.setattr(staying, "SWEEPS", PROGRAMS)
        monkeypatch.setattr(
            relax,
            "lower_bound",
            lambda problem, end, steps=relax.STEPS: bound(
                problem, end, FEW if steps == relax.STEPS else steps
            ),
        )


@pytest.fixture
def all_placements():
    """For tests of plans that come from a look at all placements of a layer."""


@pytest.fixture(autouse=True)
def searched(request, monkeypatch):
    """Small cases are there for searches and bounds, unused where all placements are looked at."""
    if "all_placements" not in request.fixturenames:
        monkeypatch.setattr(enumerated, "solved", lambda *_: None)
        monkeypatch.setattr(whole, "solved", lambda *_: None)


@pytest.fixture
def loose_bound(short_search, monkeypatch):
    """One step, for tests that read no bound."""
    bound = relax.lower_bound
    monkeypatch.setattr(relax, "lower_bound", lambda problem, end, _: bound(problem, end, 1))


@pytest.fixture
def trace_path(tmp_path) -> pathlib.Path:
    """Of 12 sequences on 4 devices."""
    trace = synthetic.realistic(
        num_tokens=600, num_layers=3, num_experts=8, top_k=2, seed=0, num_sequences=12
    )
    homes = np.arange(12) % 4
    path = tmp_path / "t.npz"
    trace_lib.save(Trace(trace.expert_ids_TLK, 8, trace.seq_len, seq_home=homes), path)
    return path
