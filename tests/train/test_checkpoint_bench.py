"""The benchmark of checkpoints measures what it says, on a model of a few kilobytes."""

import dataclasses
import json
import pathlib
import subprocess

import numpy as np
import pytest

from moe_jax.train import checkpoint_bench
from tests import tiny


def test_both_tables(monkeypatch):
    """Half of the starts, and no other, look at digests; every round saves once."""
    asked, start = [], checkpoint_bench._start

    def first_is_real(words):
        asked.append(words)
        if len(asked) > 1:
            return 9.0, 2.0
        before, restore = start(words)
        assert before > 0 < restore
        [manifest] = pathlib.Path(words[1]).glob("checkpoints/*/integrity.json")
        listed = json.loads(manifest.read_text())
        for file in listed.values():
            file["sha256"] = "0" * 64
        manifest.write_text(json.dumps(listed))
        assert start([*words[:2], "not"])
        with pytest.raises(subprocess.CalledProcessError):
            start(words)
        return before, restore

    monkeypatch.setattr(checkpoint_bench, "_start", first_is_real)
    config = tiny.config(
        mesh={"data": 1, "expert": 2}, model__num_layers=1, train__checkpoints_kept=1
    )
    config = dataclasses.replace(config, virtual_devices=2)
    costs = checkpoint_bench.measure(config, rounds=2)
    assert [words[-1] for words in asked] == [*["verified", "not"] * 2, *["not", "verified"] * 2]
    assert [len(costs.starts[key]) for key in costs.starts] == [2, 2, 2, 2]
    assert (len(costs.calls), len(costs.alone)) == (2, 8)
    assert costs.stall_in_steps == max(costs.calls) / np.median(costs.alone)
    costs.starts["warm", False] = [(9.0, 2.0), (9.0, 2.0)]
    costs.starts["warm", True] = [(10.0, 2.5), (10.0, 3.0)]
    said = checkpoint_bench.text(costs, config)
    for words in ("the longest call takes", "of a median step"):
        assert words in said
    rows = [line.split() for line in said.splitlines() if ": " in line]
    [restore, whole] = [row[2:5] for row in rows if row[0] == "warm:"]
    assert restore == ["2.000", "2.750", "37.5%"]
    assert whole == ["11.000", "12.750", "87.5%"]
