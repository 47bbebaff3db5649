"""The kernel bench: its output, for one small shape. What it measures is not judged here."""

import json

import numpy as np
import pytest

from moe_jax.kernels import bench

OPTIONS = ["--shapes=decode", "--seconds=0", "--no-ragged"]


def test_json_and_table_hold_every_contender(capsys):
    assert bench.main([*OPTIONS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert (found["device"], found["dtype"], found["shapes"]["decode"]["num_groups"]) == (
        "cpu",
        "float32",
        4,
    )
    assert (row["shape"], row["pattern"], row["direction"]) == ("decode", "half-empty", "forward")
    for name in ("milliseconds", "megabytes"):
        assert set(row[name]) == {"dense", "cpu"}
        assert all(value > 0 for value in row[name].values())
    for name in ("ratio", "cpu_ratio"):
        assert set(row[name]) == {"cpu"}
    lines = bench.table(found["rows"]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 3


@pytest.mark.parametrize("pattern", ["uniform", "multinomial", "zipf", "half-empty", "one-group"])
def test_group_sizes_sum_to_the_rows(pattern):
    sizes_G = bench.group_sizes(pattern, 1000, 16)
    assert sizes_G.sum() == 1000
    assert sizes_G.min() >= 0
    if pattern == "half-empty":
        assert (sizes_G == 0).sum() >= 8
    if pattern == "one-group":
        assert np.count_nonzero(sizes_G) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes=g17"], "--shapes = 'g17': must be among g16, g64"),
        (["--shapes=decode", "--patterns=zip"], "--patterns = 'zip': must be among uniform"),
        (
            ["--shapes=decode", "--patterns=zipf"],
            "--patterns = 'zipf': none is measured for decode",
        ),
    ],
)
def test_wrong_options_are_refused(options, message, capsys):
    assert bench.main(options) == 1
    assert message in capsys.readouterr().err
