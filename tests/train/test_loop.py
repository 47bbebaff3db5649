"""A run from start to end: what it leaves behind, and that stopping in between changes nothing."""

import dataclasses
import json
import pathlib
import shutil
import threading

import jax
import numpy as np
import pytest

from moe_jax import checkpoint, metrics
from moe_jax import config as config_lib
from moe_jax import data as data_lib
from moe_jax import mesh as mesh_lib
from moe_jax.checkpoint import integrity
from moe_jax.errors import Refused
from moe_jax.infer import load
from moe_jax.placement.plan import Plan
from moe_jax.train import inputs, loop, only_run, resume, step
from tests import tiny


def train(config, workdir):
    workdir.mkdir(exist_ok=True)
    corpus, plan = inputs.prepare(config, workdir)
    loop.train(config, workdir, corpus, plan)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 6 steps."""
    workdir = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        train(tiny.config(), workdir)
    return workdir


def curve(workdir):
    rows = metrics.read(workdir / "metrics.jsonl")[1]
    return [(row["step"], row["loss"], row["grad_norm"], row.get("heldout_loss")) for row in rows]


def test_work_directory(whole):
    header, rows = metrics.read(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert header["unigram_loss"] > 0
    assert rows[2]["heldout_loss"] > 0
    assert rows[5]["tokens_per_s"] > 0
    assert checkpoint.steps(whole / "checkpoints") == [3, 6]
    assert json.loads((whole / "config.json").read_text())["name"] == "tiny"
    assert list((whole / "tensorboard").iterdir())
    assert not list(whole.rglob("*.tmp"))


def test_resumed_curve_is_bit_identical(whole, tmp_path):
    resumed = tmp_path / "resumed"
    _copy_until(whole, resumed, 3)
    train(tiny.config(), resumed)
    assert curve(resumed) == curve(whole)
    for first, second in _final_arrays(whole, resumed):
        np.testing.assert_array_equal(first, second)


def test_steps_that_stay(tmp_path):
    """The newest, every so many, and the best by held-out loss, each for its own reason."""
    kept = {"checkpoints_kept": 1, "checkpoints_kept_every": 4, "checkpoints_kept_best": 1}
    often = {"checkpoint_every": 1, "eval_every": 5, "num_steps": 7}  # all that is saved is
    rates = {"optimizer__learning_rate": 1.0}  # the loss falls, then doubles
    config = tiny.config(**{f"train__{k}": v for k, v in (kept | often).items()}, **rates)
    train(config, tmp_path / "run")
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")[1]
    best = min(rows, key=lambda row: row["heldout_loss"])["step"]
    assert best not in (4, 7)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == sorted({best, 4, 7})


def _copy_until(source, target, last_step):
    """What a kill right after the checkpoint of `last_step` leaves: later lines half written."""
    shutil.copytree(
        source / "checkpoints" / str(last_step), target / "checkpoints" / str(last_step)
    )
    shutil.copy(source / "config.json", target)
    text = (source / "metrics.jsonl").read_text()
    (target / "metrics.jsonl").write_text(text[: len(text) - 40])


def _final_arrays(*workdirs):
    arrays = []
    for workdir in workdirs:
        folder = workdir / "checkpoints" / "6"
        arrays.append(checkpoint.restore_numpy(folder, checkpoint.read_contents(folder)))
    assert arrays[0].keys() == arrays[1].keys()
    return [(arrays[0][name], arrays[1][name]) for name in arrays[0]]


def test_another_text_is_said_and_the_same_is_not(whole, tmp_path, capsys):
    _copy_until(whole, tmp_path, 3)
    train(tiny.config(train__num_steps=4), tmp_path)
    assert "another text" not in capsys.readouterr().err
    train(tiny.config(train__num_steps=5, data__max_bytes=90_000), tmp_path / "other")
    config = tiny.config(train__num_steps=6, data__max_bytes=90_000)
    corpus, plan = inputs.prepare(config, tmp_path / "other")
    changed = dataclasses.replace(corpus, train=corpus.train[::-1].copy())
    loop.train(config, tmp_path / "other", changed, plan)
    assert "step 5: trained on another text than there is now" in capsys.readouterr().err


def test_steps_of_another_config_are_said_where_no_config_refuses_them(whole, tmp_path, capsys):
    _copy_until(whole, tmp_path / "same", 3)
    (tmp_path / "same" / "config.json").unlink()
    train(tiny.config(), tmp_path / "same")
    assert "another config" not in capsys.readouterr().err
    assert curve(tmp_path / "same")[-1] == curve(whole)[-1]
    _copy_until(whole, tmp_path / "other", 3)
    config = tiny.config(optimizer__learning_rate=0.5, train__num_steps=4)
    (tmp_path / "other" / "config.json").write_text(config_lib.to_json(config))  # not the steps'
    train(config, tmp_path / "other")
    assert "step 3: of a run with another config" in capsys.readouterr().err


@pytest.mark.parametrize("same", [True, False])
def test_processes_with_other_texts_are_refused(same, monkeypatch):
    """What three processes would gather, one of which may have read another text."""
    text = np.arange(9, dtype=np.uint8)
    monkeypatch.setattr(jax, "process_count", lambda: 3)

    def gathered(mine):
        return np.stack([mine, mine, mine if same else mine[::-1]])

    monkeypatch.setattr(mesh_lib.multihost_utils, "process_allgather", gathered)
    corpus = data_lib.Corpus(text, text, "shared")
    if same:
        resume.check_text(corpus)
    else:
        with pytest.raises(Refused, match="another text for process 2 than for process 0"):
            resume.check_text(corpus)


def test_two_runs_do_not_share_a_work_directory(whole, tmp_path, monkeypatch):
    """Whoever holds the lock: here this process, for one that is starting."""
    monkeypatch.setattr(only_run, "WAIT", 0.0)
    _copy_until(whole, tmp_path, 3)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with only_run.only_run(tmp_path), pytest.raises(Refused, match="another run is going on in it"):
        train(tiny.config(), tmp_path)
    after = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert set(after) - set(before) == {pathlib.Path(".lock")}
    train(tiny.config(train__num_steps=4), tmp_path)


def test_a_run_that_waited_for_one_of_another_config_is_refused(whole, tmp_path):
    """Both began in an empty folder: what the first one wrote is looked at under the lock."""
    config = tiny.config(optimizer__learning_rate=0.5)
    corpus, plan = inputs.prepare(config, tmp_path)
    _copy_until(whole, tmp_path, 3)
    with pytest.raises(Refused, match=r"\(optimizer\.learning_rate = 0\.01 there, 0\.5 here\)"):
        loop.train(config, tmp_path, corpus, plan)
    assert config_lib.read(tmp_path / "config.json") == tiny.config()


def test_all_processes_are_refused_a_run_of_another_config(tmp_path, monkeypatch):
    """This is process 1, which has not looked: it is told by what is gathered."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(mesh_lib, "in_any_process", lambda flag: True)
    with pytest.raises(Refused, match=r"another config.*see what process 0"):
        loop._check_same_run(tiny.config(), tmp_path)


def test_a_run_started_on_another_mesh_is_read_before_it_saves(whole, tmp_path):
    """config.json is of the mesh that it was started on last, the step of the one before."""
    _copy_until(whole, tmp_path, 6)
    train(tiny.config(mesh={"data": 1, "expert": 8}), tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [6]
    source = load.find(str(tmp_path), None)
    assert source.plan.placement.num_devices == 8
    model = load.parameters(source, tiny.mesh(source.config))
    expected = load.parameters(load.find(str(whole), None), tiny.mesh(tiny.config()))
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_damaged_step_is_named_and_the_one_before_is_used(whole, tmp_path, capsys):
    _copy_until(whole, tmp_path / "run", 3)
    _copy_until(whole, tmp_path / "run6", 6)
    (tmp_path / "run6/checkpoints/6").rename(tmp_path / "run/checkpoints/6")
    victim = max((tmp_path / "run/checkpoints/6/state").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    train(tiny.config(), tmp_path / "run")
    assert victim.name in capsys.readouterr().err
    assert curve(tmp_path / "run") == curve(whole)


@pytest.mark.parametrize(
    "position",
    [-5, 10**26, float("inf"), 2.5, True, "3", None, [3], {}, {"next_index": 3, "x": 1}, 16],
)
def test_a_position_that_is_not_that_of_the_step_is_damage(position, whole, tmp_path, capsys):
    """Digests that were made to fit it: Grain takes any of them, or fails as it likes."""
    _copy_until(whole, tmp_path, 3)
    folder = tmp_path / "checkpoints" / "3"
    meta = json.loads((folder / "meta.json").read_text())
    named = position if isinstance(position, dict) else {"next_index": position}
    meta["extra"]["data_state"] = named
    (folder / "meta.json").write_text(json.dumps(meta))
    integrity.write(folder)
    with pytest.raises(Refused, match="every step is damaged"):
        train(tiny.config(), tmp_path)
    assert "skipping checkpoint 3: " in (said := capsys.readouterr().err)
    assert "holds no position in this data" in said


def test_a_zero_below_zero_is_zero(tmp_path):
    text = config_lib.to_json(tiny.config(optimizer__weight_decay=0.0))
    changed = text.replace('"weight_decay": 0.0', '"weight_decay": -0.0')
    assert changed != text
    (tmp_path / "config.json").write_text(changed)
    inputs.prepare(tiny.config(optimizer__weight_decay=0.0), tmp_path)


def test_what_another_run_is_told_by_may_not_differ(tmp_path):
    """Not by the length of the run, which may, and comes before its seed."""
    (tmp_path / "config.json").write_text(config_lib.to_json(tiny.config()))
    other = tiny.config(train__num_steps=9, mesh={"data": 4, "expert": 2}, train__seed=5)
    with pytest.raises(Refused, match=r"another config \(train\.seed = 0 there, 5 here\)"):
        inputs.prepare(other, tmp_path)
    router = tiny.config(train__num_steps=9, model__router_scale=2.0)  # named where it is not 1
    with pytest.raises(Refused, match=r"\(model\.router_scale = 1\.0 there, 2\.0 here\)"):
        inputs.prepare(router, tmp_path)


def test_a_run_stops_after_bad_steps_in_a_row(tmp_path, monkeypatch):
    build = step.build_step

    def poisoned(config, mesh):
        train_step = build(config, mesh)

        def run(state, window, table):
            scale = state.model.final_norm_D
            scale[...] = scale[...] * np.float32(np.nan)
            return train_step(state, window, table)

        return run

    watched = []
    leave = resume.Checkpoints.__exit__

    def left(checkpoints, *error):
        """A save that never ends has somebody who says so."""
        watched.extend(thread.name for thread in threading.enumerate())
        leave(checkpoints, *error)

    monkeypatch.setattr(resume.Checkpoints, "__exit__", left)
    monkeypatch.setattr(step, "build_step", poisoned)
    with pytest.raises(Refused, match="2 steps in a row were not finite"):
        train(tiny.config(train__max_bad_steps=2), tmp_path)
    rows = metrics.read(tmp_path / "metrics.jsonl")[1]
    assert [row["loss"] for row in rows] == [None, None]
    assert rows[-1]["bad_steps"] == 2
    assert "watchdog" in watched
    assert not checkpoint.steps(tmp_path / "checkpoints")


def test_training_under_a_plan_gives_the_same_curve(whole, tmp_path):
    Plan(tiny.random_placement(3)).write(tmp_path / "plan.json")
    train(tiny.config(placement=str(tmp_path / "plan.json")), tmp_path / "run")
    assert curve(tmp_path / "run") == curve(whole)
    rows, expected = (metrics.read(w / "metrics.jsonl")[1] for w in (tmp_path / "run", whole))
    assert [r["rows_moved"] for r in rows] != [r["rows_moved"] for r in expected]


def test_experts_are_moved_where_another_plan_wants_them(whole, tmp_path, capsys):
    _copy_until(whole, tmp_path / "run", 3)
    Plan(tiny.random_placement(3)).write(tmp_path / "plan.json")
    train(tiny.config(placement=str(tmp_path / "plan.json")), tmp_path / "run")
    assert "training under" in capsys.readouterr().out
    assert curve(tmp_path / "run") == curve(whole)
    contents = checkpoint.read_contents(tmp_path / "run" / "checkpoints" / "6")
    assert contents.plan.placement == tiny.random_placement(3)


def test_what_is_saved_is_the_state_of_its_step(tmp_path, monkeypatch):
    """Steps go on, and donate the arrays, while they are being written."""
    copies, start_save = {}, checkpoint.start_save

    def copied(saver, arrays, contents):
        copies[contents.step] = {name: np.array(array) for name, array in arrays.items()}
        start_save(saver, arrays, contents)

    monkeypatch.setattr(checkpoint, "start_save", copied)
    train(tiny.config(train__checkpoint_every=1, train__checkpoints_kept=9), tmp_path)
    assert sorted(copies) == checkpoint.steps(tmp_path / "checkpoints") == [1, 2, 3, 4, 5, 6]
    for number, arrays in copies.items():
        folder = tmp_path / "checkpoints" / str(number)
        saved = checkpoint.restore_numpy(folder, checkpoint.read_contents(folder))
        for name, array in arrays.items():
            np.testing.assert_array_equal(saved[name], array)
