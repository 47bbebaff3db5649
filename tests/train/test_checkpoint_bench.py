"""The benchmark of checkpoints measures what it says, on a model of a few kilobytes."""

import numpy as np

from moe_jax.checkpoint import integrity
from moe_jax.train import checkpoint_bench
from tests import tiny


def test_both_tables(monkeypatch):
    """Half of the starts, and no other, look at digests; every round saves once."""
    monkeypatch.setattr(integrity, "SMALL_BYTES", 0)
    hashed, digests = [], integrity.Digests
    monkeypatch.setattr(integrity, "Digests", lambda *a: hashed.append(a) or digests(*a))
    config = tiny.config(
        mesh={"data": 1, "expert": 2}, model__num_layers=1, train__checkpoints_kept=1
    )
    costs = checkpoint_bench.measure(config, rounds=1)
    assert len(hashed) == 2 * (1 + 1)  # warm and cold, and once more to compile
    assert [len(costs.starts[key]) for key in costs.starts] == [1, 1, 1, 1]
    assert (len(costs.calls), len(costs.alone)) == (1, 4)
    assert costs.stall_in_steps == max(costs.calls) / np.median(costs.alone)
    said = checkpoint_bench.text(costs, config)
    for words in ("warm", "cold", "cost", "the longest call takes", "of a median step"):
        assert words in said
