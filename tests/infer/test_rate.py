"""The command that reads a model beside its bare files."""

import pytest

from moe_jax.infer import rate
from tests.hf import golden


@pytest.mark.parametrize("order", [[], ["--training"]])
def test_prints_both_and_their_ratio(order, capsys):
    assert rate.main([str(golden.ROOT / "mixtral"), "--rounds=1", *order]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["cold", "cold,", "warm", "warm,"]
    assert all("MB/s, import" in line and "ratio" in line for line in lines)


def test_no_rounds_are_refused(capsys):
    assert rate.main([str(golden.ROOT / "mixtral"), "--rounds=0"]) == 1
    assert "--rounds = 0: must be at least 1" in capsys.readouterr().err
