"""Overlap: tokens in chunks give what all tokens at once give."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax.model.dispatch import chunks
from moe_jax.placement.plan import Placement
from tests.model.test_dispatch import E, assert_close, problem, run

SHAPE = (2, 4)
SCRIPT = pathlib.Path(__file__).with_name("compile_overlap.py")
CASES = [
    ("exchange", "exact", 2),
    ("gathered", "reproducible", 4),
    *(
        pytest.param(dispatch, combine, degree, marks=pytest.mark.slow)
        for dispatch, combine, degrees in (
            ("exchange", "exact", (4, 8)),
            ("exchange", "reproducible", (2, 4, 8)),
            ("exchange", "partial", (2,)),
            ("gathered", "exact", (2, 4, 8)),
            ("gathered", "reproducible", (2, 8)),
        )
        for degree in degrees
    ),
]
# At these widths XLA rounds a row among 16 otherwise than one among 64, and experts have about 20
# rows, chunks fewer than 16.
WIDTHS = {"d_model": 192, "d_ff": 96}


@pytest.mark.parametrize(("dispatch", "combine", "degree"), CASES)
def test_chunks_change_nothing(dispatch, combine, degree):
    """Outputs and gradients of tokens to the bit, whatever the degree.

    Gradients of experts are added up in other parts; those of the router's weights are sums over
    d_model, whose order the compiler chooses by the number of tokens.
    """
    args = problem(0, 8 * 41, 2, **WIDTHS)  # 41 tokens a device: not divisible
    slots = np.random.default_rng(0).permutation(E)[None].astype(np.int32)
    placement = Placement(slots, E, SHAPE[1])
    y_TD, grads, traffic = run(SHAPE, dispatch, args, placement, combine, overlap_degree=degree)
    whole_TD, whole_grads, whole = run(SHAPE, dispatch, args, placement, combine)
    np.testing.assert_array_equal(y_TD, whole_TD)
    np.testing.assert_array_equal(grads[0], whole_grads[0])
    for grad, expected in zip(grads[1:], whole_grads[1:], strict=True):
        assert_close(grad, expected, 1e-6)
    for name in ("dispatch_MM", "combine_MM", "distinct_MM", "computed_P", "dropped_ME"):
        np.testing.assert_array_equal(getattr(traffic, name), getattr(whole, name))


def test_weight_gradients_in_chunks_are_bit_identical_under_placements():
    args = problem(1, 8 * 13, 2)
    _, expected_grads, _ = run(SHAPE, "exchange", args, overlap_degree=2)
    for seed in range(5):
        slots = np.random.default_rng(seed).permutation(E)[None].astype(np.int32)
        _, grads, _ = run(SHAPE, "exchange", args, Placement(slots, E, 4), overlap_degree=2)
        jax.tree.map(np.testing.assert_array_equal, grads, expected_grads)


@pytest.mark.parametrize("num_tokens", [1, 3, 8, 13])
@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_every_token_is_in_one_chunk(num_tokens, degree):
    bounds = list(chunks._bounds(num_tokens, degree))
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(num_tokens))
    assert len(bounds) == min(degree, num_tokens)
    assert max(b - a for a, b in bounds) - min(b - a for a, b in bounds) <= 1


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed (pip install libtpu; Linux x86-64)",
)
def test_compiled_for_a_tpu_exchanges_surround_kernels():
    """One chunk: rows out, experts, rows home, one after the other. Several: some overlap."""
    degrees = (1, 4)
    run = subprocess.run(
        [sys.executable, SCRIPT, "v5e:2x4", *map(str, degrees)],
        capture_output=True,
        text=True,
        timeout=540,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for degree, line in zip(degrees, run.stdout.splitlines()[-2:], strict=True):
        found = json.loads(line)
        assert found["degree"] == degree
        assert found["exchanges"] == found["asynchronous"] == 2 * degree  # out and home
        assert found["kernels"] == 2 * degree  # gate and up, down
        assert (found["around_kernels"] > 0) == (degree > 1)
