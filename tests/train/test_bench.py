"""The table of dispatches: a small run prints every line, and wrong words are refused."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_prints_every_line():
    ways = ["exchange/exact", "gathered/partial"]
    command = [sys.executable, "-m", "moe_jax.train.bench", "--json", "--seconds=0.1"]
    command += ["--config=configs/quickstart.py:smoke", f"--ways={','.join(ways)}"]
    command += ["--config.model.num_layers=1", "--config.data.seq_len=8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    tables = json.loads(done.stdout)
    assert [line["name"] for line in tables["step"]] == ways
    assert [line["name"] for line in tables["layer"]][:2] == ["layer", "experts + copy"]
    assert all(line["milliseconds"] > 0 for lines in tables.values() for line in lines)
    exact, gathered = (line["rows"] for line in tables["step"])
    assert gathered == 2 * 3  # 4 devices: to three others and back
    assert 0 < exact < gathered


@pytest.mark.parametrize(
    ("way", "rule"),
    [
        ("exchange", "must be dispatch/combine"),
        ("exchange/exakt", "must be one of"),
        ("coherent/exact", "serves only"),
    ],
)
def test_a_way_that_is_none_is_refused(way, rule):
    command = [sys.executable, "-m", "moe_jax.train.bench", f"--ways={way}"]
    command += ["--config=configs/quickstart.py:smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert rule in done.stderr
    assert done.stdout == ""
