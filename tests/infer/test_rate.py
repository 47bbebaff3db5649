"""The command that reads a model beside its bare files."""

import os

import pytest

from moe_jax.infer import rate
from tests.hf import golden


@pytest.mark.parametrize("order", [[], ["--training"]])
def test_prints_both_and_their_ratio(order, capsys):
    assert rate.main([str(golden.ROOT / "mixtral"), "--rounds=1", *order]) == 0
    lines = capsys.readouterr().out.splitlines()
    ways = ["cold", "warm"] if hasattr(os, "posix_fadvise") else ["warm"]
    assert [line.split()[0] for line in lines] == [
        f"{way}{end}" for way in ways for end in ("", ",")
    ]
    assert all("MB/s, import" in line and "ratio" in line for line in lines)


def test_no_rounds_are_refused(capsys):
    assert rate.main([str(golden.ROOT / "mixtral"), "--rounds=0"]) == 1
    assert "--rounds = 0: must be at least 1" in capsys.readouterr().err
