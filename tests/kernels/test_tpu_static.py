"""Predictions from compiled schedules: how they are read and counted, not what they say."""

import importlib
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.kernels import bench
from moe_jax.kernels.tpu import bundles, chips, static, table, tiles, traffic

COMPILER = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed (pip install libtpu; Linux x86-64)",
)

# step loop: 3 bundles; a product in a loop of its own; one in the loop; 201 of zeroing; the last
SCHEDULE = "\n".join(
    [
        "     0   :  { %1 = setup }",
        "   0x1 LB: > { %2 = a }",
        "   0x2   : > { %3 = b }",
        "   0x3   :  {}",
        "   0x4 LB: >> { %4 = vmatmul.f32.gmra.mxu0 }",
        "   0x5   : >> { %5 = vmatmul.f32.gmra.mxu1 ;; %6 = vmatmul.f32.gmra.mxu0 }",
        "   0x6 PF: > { %7 = c }",
        "   0x7 LB: >> { %8 = vmatmul.f32.gmra.mxu0 }",
        *(f"   0x{8 + i:x} {'PF' if i == 0 else '  '}: > {{ %9 = vst }}" for i in range(201)),
        " 0x100 PF: > { %10 = branch }",
    ]
)


def test_schedules_are_read_by_loop():
    found = bundles.parse(SCHEDULE)
    assert found == bundles.Bundles(step=5, whole=2, part=1, group=201)
    with pytest.raises(ValueError, match="expected two pieces with products"):
        bundles.parse("   0x1 LB: > { %2 = a }")


@pytest.mark.parametrize("tile_rows", [128, 256, 512])
def test_visits_cover_every_row_of_a_group(tile_rows):
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes_G = rng.multinomial(4096, rng.dirichlet(np.ones(9) * 0.5))
        whole, edges, parts = static.visits(sizes_G, tile_rows)
        inside = touched = touching = 0
        for start, end in zip(np.cumsum(sizes_G) - sizes_G, np.cumsum(sizes_G), strict=True):
            rows = np.arange(start, end)
            tiles_of, counts = np.unique(rows // tile_rows, return_counts=True)
            inside += (counts == tile_rows).sum()
            touching += (counts < tile_rows).sum()
            partial = tiles_of[counts < tile_rows]
            kept = rows[np.isin(rows // tile_rows, partial)]
            touched += len(np.unique(kept // tiles.PART_ROWS))
        assert (whole, edges, parts) == (inside, touching, touched)


def test_predictions_by_hand():
    """One chunk of 4,096 bundles a tile: exactly the peak of a chip with four multipliers."""
    chip = chips.CHIPS["v5e"]._replace(flops=2 * 4 * 128 * 128 * 1.5e9)
    tile = tiles.Tile(512, 1024, 512, 512)
    plan = tiles.Plan("y", tile, 4096, 4, 1024, 2048, 1, bytes=0, most_bytes=0)
    found = bundles.Bundles(step=0, whole=4096, part=4096, group=9999)
    prediction = static.predict(plan, found, chip, 4096)
    assert prediction.share["uniform"] == pytest.approx(1.0)
    assert prediction.share["multinomial"] < 1.0
    slow = static.predict(plan._replace(bytes=819_000_000), found, chip, 4096)
    assert (slow.bound, slow.seconds["uniform"]) == ("bytes", pytest.approx(1e-3))
    uneven = static.predict(plan._replace(most_bytes=819_000_000_000), found, chip, 4096)
    assert uneven.seconds["uniform"] == prediction.seconds["uniform"]
    assert uneven.seconds["zipf"] == pytest.approx(1.0)
    two = static.predict(plan, found, chip._replace(cores=2), 4096)
    assert two.seconds["uniform"] == pytest.approx(prediction.seconds["uniform"])  # multipliers
    assert two.bound == "multipliers"


def test_tiles_of_the_table_fit_and_divide():
    for (chip, kind, dtype, num_sum, _), tile in table.TABLE.items():
        tile = tiles.Tile(*tile)
        assert chip in chips.CHIPS
        assert dtype == "bfloat16"
        assert tile.rows % tiles.PART_ROWS == 0
        columns = kind in static.COLUMNS
        assert columns or num_sum % tile.sum == 0
        side = tile.sum if columns else tile.out
        assert side % tile.chunk == 0
        assert tile.chunk >= min(side, chips.CHIPS[chip].multiplier)


def run(module, *options):
    command = [sys.executable, "-m", f"moe_jax.kernels.tpu.{module}", *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])["rows"]


@COMPILER
def test_static_table_for_a_chip_that_is_not_there():
    rows = run("static", "--chips=v6e", "--shapes=quickstart")
    names = ["y", "dx", "dw", "gate_up", "down", "dh_gate_up", "dx2", "dw2", "dw"]
    assert sorted(r["kernel"] for r in rows) == sorted(names)
    for r in rows:
        assert r["measured"] is False
        assert 0 < r["share"]["uniform"] <= 1.001
        assert r["bundles"]["whole"] > 0


@COMPILER
@pytest.mark.parametrize("name", ["quickstart", *(pytest.param(n, marks=pytest.mark.slow)
                         for n in ("olmoe", "qwen3"))])  # fmt: skip
def test_fused_moves_fewer_bytes_than_unfused(name):
    """In the compiled program: gate, up and the float32 result are not written and read again."""
    (row,) = run("traffic", "--chips=v5e", f"--shapes={name}")
    ways, shape = row["ways"], bench.SHAPES[name]
    n, d, f = shape.num_rows, shape.d_model, shape.d_ff
    saved = ways["unfused"]["forward"]["gigabytes"] - ways["recompute"]["forward"]["gigabytes"]
    assert saved > (8 * n * f + 8 * n * d) / 1e9
    both = {way: ways[way]["forward+backward"] for way in ways}
    assert both["store"]["temporary_megabytes"] > both["recompute"]["temporary_megabytes"]
    for way in ("recompute", "store"):
        for quantity in ("gigabytes", "temporary_megabytes"):
            assert both[way][quantity] < both["unfused"][quantity]


def test_the_way_with_the_fewest_bytes_and_the_one_with_the_least_memory_are_named():
    def found(gigabytes, megabytes):
        return {"gigabytes": gigabytes, "temporary_megabytes": megabytes}

    ways = {
        "unfused": {"forward": found(3.0, 9.0), "forward+backward": found(9.0, 30.0)},
        "recompute": {"forward": found(2.0, 1.0), "forward+backward": found(8.0, 10.0)},
        "store": {"forward+backward": found(7.0, 20.0)},
    }
    *_, forward, both = traffic.as_table([{"shape": "s", "chip": "v5e", "ways": ways}]).splitlines()
    assert forward.endswith("| recompute | recompute |")
    assert both.endswith("| 7.00 | 30.0 | 10.0 | 20.0 | store | recompute |")


@pytest.mark.parametrize("module", ["static", "traffic"])
def test_wrong_options_are_refused(module, capsys):
    main = importlib.import_module(f"moe_jax.kernels.tpu.{module}").main
    assert main(["--shapes=g16"]) == 1
    assert "--shapes = 'g16': must be among mixtral" in capsys.readouterr().err
    assert main(["--chips=v4"]) == 1
    assert "--chips = 'v4': must be among v5e" in capsys.readouterr().err
