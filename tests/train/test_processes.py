"""Two processes with four devices each, and four with two, train as one with eight does."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from moe_jax import checkpoint, metrics
from moe_jax import config as config_lib
from moe_jax.checkpoint import integrity
from moe_jax.train import inputs, resume
from tests import tiny
from tests.processes import ROOT, apart_flags, run_all
from tests.train import loads


def command(workdir, num_steps, *more):
    return [
        sys.executable,
        str(ROOT / "train.py"),
        "--config=configs/quickstart.py:smoke",
        f"--workdir={workdir}",
        "--config.model.d_model=16",
        "--config.data.seq_len=32",
        "--config.data.max_bytes=300000",
        "--config.train.eval_sequences=8",
        "--config.train.log_every=1",
        "--config.train.checkpoint_every=2",
        f"--config.train.num_steps={num_steps}",
        *more,
    ]


def sizes(devices):
    """Flags of a mesh; a small one has a small model, too."""
    experts = min(devices, 4)
    small = ["--config.model.num_layers=1", "--config.model.num_experts=4"] if devices == 2 else []
    return [
        f"--config.mesh.data={devices // experts}",
        f"--config.mesh.expert={experts}",
        *small,
    ]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("processes", "devices", "goes_on"),
    [
        (2, 2, False),
        pytest.param(2, 8, True, marks=pytest.mark.slow),
        pytest.param(4, 8, True, marks=pytest.mark.slow),
    ],
)
def test_several_processes_equal_one(processes, devices, goes_on, tmp_path):
    """And the run of several goes on in one process, that of one in several."""
    mesh = sizes(devices)

    def start_one(name, num_steps):
        return run_all(
            [command(tmp_path / name, num_steps, f"--config.virtual_devices={devices}", *mesh)]
        )[0]

    def start_several(num_steps):
        apart = apart_flags(processes)
        each = f"--config.virtual_devices={devices // processes}"
        probe = "--config.train.probe_every=1"  # they time each other, which changes nothing
        return run_all(
            [command(tmp_path / "several", num_steps, each, *mesh, probe, flag) for flag in apart]
        )

    said = start_several(2)
    assert "step     2/2" in said[0]
    assert not any("step" in other for other in said[1:])  # the first process speaks for all
    start_one("one", 2)
    if goes_on:
        assert "resuming after step 2" in start_one("several", 3)
        assert "resuming after step 3" in start_several(4)[0]
        start_one("one", 3)
        start_one("one", 4)

    read = (metrics.read(tmp_path / name / "metrics.jsonl")[1] for name in ("several", "one"))
    several, one = read
    assert [row["step"] for row in several] == list(range(1, 5 if goes_on else 3))
    # the same tokens take the same ways; sums over processes are made in another order
    for row in several[:2]:  # of steps of several processes: every host's times
        for host in range(processes):
            assert row[f"host_{host}_matmul_seconds"] > 0
            assert row[f"host_{host}_message_seconds"] > 0
    for row, expected in zip(several, one, strict=True):
        assert row["rows_moved"] == expected["rows_moved"]
        assert row["load_imbalance"] == expected["load_imbalance"]
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-6)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A step of data 2 x expert 4 with numbers of its own everywhere, its config, its arrays."""
    root, rng = tmp_path_factory.mktemp("stored"), np.random.default_rng(0)
    config = tiny.config(mesh={"data": 2, "expert": 4})

    def drawn(leaf):
        values = rng.integers(1, 2**31, leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    with jax.numpy_dtype_promotion("standard"):
        corpus, plan = inputs.prepare(config, root / "run")
        mesh = tiny.mesh(config)
        run, plan = resume.start_or_resume(config, mesh, root / "run", corpus, plan)
        run.state = jax.tree.map(drawn, run.state)
        with resume.Checkpoints(config, root / "run", run, plan) as checkpoints:
            next(run.batches)
            run.step = 1
            checkpoints.save_last(run, None)
    folder = root / "run" / "checkpoints" / "1"
    contents = checkpoint.read_contents(folder)
    return root, config, checkpoint.restore_numpy(folder, contents), contents.extra["data_state"]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_several_processes_load_every_bit(processes, stored):
    """Parameters, moments, key, counters, position: what each device holds is what was stored."""
    root, config, arrays, position = stored
    config = dataclasses.replace(config, virtual_devices=8 // processes)
    file = root / f"{processes}.json"
    file.write_text(config_lib.to_json(config))
    apart = apart_flags(processes) if processes > 1 else ["=off"]
    words = [sys.executable, "-m", "tests.train.loads", str(file), str(root / "run")]
    said = run_all([[*words, flag.partition("=")[2]] for flag in apart], stderr=None)
    held = [json.loads(each.splitlines()[-1]) for each in said]
    assert [(each["devices"], each["here"]) for each in held] == [(8, 8 // processes)] * processes
    assert {json.dumps(each["position"]) for each in held} == {json.dumps(position)}
    assert {each["step"] for each in held} == {1}
    assert len({each["batch"] for each in held}) == 1
    covered = {name: np.zeros(array.shape, int) for name, array in arrays.items()}
    for each in held:
        for name, index, digest in each["shards"]:
            part = tuple(slice(*bounds) for bounds in index)
            assert loads.digest(arrays[name][part]) == digest, (name, index)
            covered[name][part] += 1
    assert all(count.min() > 0 for count in covered.values())
    assert sum(len(each["shards"]) for each in held) == 8 * len(arrays)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_experts_move_in_several_processes(tmp_path):
    """The first process plans, all move between the same two steps, the curve stays."""
    moves = [f"--config.replan.{name}" for name in ("every=4", "record_steps=4", "seconds=0.2")]
    several = [
        command(tmp_path / "several", 24, "--config.virtual_devices=4", *moves, flag)
        for flag in apart_flags(2)
    ]
    said = run_all(several)
    assert "experts moved" in said[0]
    assert "experts moved" not in said[1]
    run_all([command(tmp_path / "one", 24)])
    read = (metrics.read(tmp_path / name / "metrics.jsonl")[1] for name in ("several", "one"))
    several, one = read
    assert any("moved_experts" in row for row in several)
    assert [row["rows_moved"] for row in several] != [row["rows_moved"] for row in one]
    for row, expected in zip(several, one, strict=True):
        np.testing.assert_allclose(row["loss"], expected["loss"], rtol=1e-4)
    assert list((tmp_path / "several" / "plans").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("share", [0, 1])
def test_a_damaged_step_is_left_by_all_processes(share, tmp_path):
    """One process finds the file that is wrong, in its share; none of them takes the step."""
    devices = "--config.virtual_devices=4"
    run_all([command(tmp_path, 4, devices, flag) for flag in apart_flags(2)])
    newest = tmp_path / "checkpoints" / "4"
    listed = json.loads((newest / integrity.MANIFEST).read_text())
    large = sorted(name for name in listed if listed[name]["size"] > integrity.SMALL_BYTES)
    data = bytearray((newest / large[share]).read_bytes())
    data[len(data) // 2] ^= 1
    (newest / large[share]).write_bytes(data)
    said = run_all([command(tmp_path, 6, devices, flag) for flag in apart_flags(2)])
    assert "skipping checkpoint 4: " in said[0]
    assert large[share] in said[0]
    assert "resuming after step 2" in said[0]
    assert (tmp_path / "checkpoints" / "6").is_dir()
