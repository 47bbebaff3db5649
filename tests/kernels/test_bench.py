"""The kernel bench: its output, for one small shape. What it measures is not judged here."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.kernels import bench, opponents, roofline

OPTIONS = ["--shapes=decode", "--seconds=0", "--opponents="]


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
        assert set(row[name]) == {"dense", "cpu", "cpu, transposed"}
        assert all(value > 0 for value in row[name].values())
    for name in ("ratio", "cpu_ratio"):
        assert set(row[name]) == {"cpu", "cpu, transposed"}
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
        ([*OPTIONS, "--implementation=hopper"], "--implementation = 'hopper': runs on platform"),
        *(
            ([*OPTIONS, f"--seconds={bad}"], f"--seconds = {float(bad)}: seconds, at least 0")
            for bad in ("nan", "-1")
        ),
        ([*OPTIONS, "--passes=dx"], "--passes = 'dx': decode have none of these"),
    ],
)
def test_wrong_options_are_refused(options, message, capsys):
    assert bench.main(options) == 1
    assert message in capsys.readouterr().err


def test_opponents_that_cannot_run_are_named_and_left_out(capsys):
    options = ["--shapes=decode", "--seconds=0", "--opponents=megablox,ragged_dot", "--json"]
    assert bench.main(options) == 0
    out, err = capsys.readouterr()
    (row,) = json.loads(out)["rows"]
    assert "decode: megablox left out: runs on TPUs, and this is a cpu" in err
    assert set(row["ratio"]) == {"cpu", "cpu, transposed", "ragged_dot"}
    assert row["left_out"] == {"megablox": "runs on TPUs, and this is a cpu"}
    assert row["roofline"] == dict.fromkeys(row["ratio"])  # no peaks are known
    with pytest.raises(Refused, match=r"'megablox': takes multiples of 128 rows, and the buffer h"):
        opponents.opponent("megablox", "tpu", 130)
    with pytest.raises(Refused, match=r"--opponents = 'cutlass': must be among ragged_dot, batche"):
        opponents.opponent("cutlass", "gpu", 128)


def test_batched_takes_equal_groups_alone():
    """Their values are those of a dot for each group."""
    dot = opponents.opponent("batched", "cpu", 12, equal_groups=True)
    rng = np.random.default_rng(0)
    x_ND, w_GDF = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((12, 5), (3, 5, 7)))
    want = np.concatenate([x_ND[4 * g : 4 * g + 4] @ w_GDF[g] for g in range(3)])
    np.testing.assert_allclose(dot(x_ND, w_GDF, jnp.full(3, 4)), want, rtol=0, atol=1e-5)
    for shape, patterns in (("g16", {"uniform", "zipf"}), ("decode", {"uniform"})):
        able, left_out = bench._able(["batched"], bench.SHAPES[shape], patterns)
        assert not able
        assert "groups that differ or leave rows unused" in left_out["batched"]
    assert "batched" in bench._able(["batched"], bench.SHAPES["g64"], {"uniform"})[0]


def test_megablox_is_called_as_it_wants_and_unused_rows_are_zero():
    """Interpreted, with its own kernel: the values of the dense product."""
    from jax.experimental.pallas.ops.tpu import megablox

    interpreted = functools.partial(megablox.gmm, interpret=True)
    rng = np.random.default_rng(0)
    x_ND, w_GDF = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((256, 128), (2, 128, 128))
    )
    y_NF = opponents._megablox(interpreted, x_ND, w_GDF, jnp.array([100, 28], jnp.int32))
    want = np.concatenate([x_ND[:100] @ w_GDF[0], x_ND[100:128] @ w_GDF[1]])
    np.testing.assert_allclose(y_NF[:128], want, rtol=0, atol=1e-4)
    assert (np.asarray(y_NF[128:]) == 0).all()


def test_roofline_by_hand():
    """Of 100 rows, 10 x 20 weights, 3 groups with rows, 2 bytes a value."""
    assert roofline.least("matmul", "forward", 100, 10, 20, 3, 2) == (40e3, 2 * (1000 + 600 + 2000))
    flops, num_bytes = roofline.least("matmul", "dx+dw", 100, 10, 20, 3, 2)
    assert (flops, num_bytes) == (80e3, 2 * (2 * 1000 + 2 * 600 + 2000))
    flops, num_bytes = roofline.least("ffn", "forward+backward", 100, 10, 20, 3, 2)
    assert (flops, num_bytes) == (360e3, 2 * (5 * 1000 + 9 * 600))
    peak = roofline.Peak(flops=1e3, bandwidth=1e3)
    assert roofline.seconds(peak, 5e3, 2e3) == 5.0
    assert roofline.seconds(peak, 1e3, 2e3) == 2.0


def test_share_of_the_roofline_is_printed_where_peaks_are_known(monkeypatch):
    kind = jax.devices()[0].device_kind
    assert bench._roofline(bench.SHAPES["g16"], "uniform", "forward", 1.0) is None
    monkeypatch.setitem(roofline.PEAKS, kind, roofline.Peak(1e12, 1e15))
    monkeypatch.setattr(bench, "default_dtype", lambda: "bfloat16")
    share = bench._roofline(bench.SHAPES["g16"], "uniform", "forward", 10.0)
    assert share == pytest.approx(2 * 4096 * 512 * 1024 / 1e12 / 10e-3)
