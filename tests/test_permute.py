"""Moving experts: values are copied, never changed; there and back restores every bit."""

import errno
import json
import shutil

import jax
import numpy as np
import pytest

from moe_jax import checkpoint, permute
from moe_jax import config as config_lib
from moe_jax.errors import Refused
from moe_jax.model import parameter
from moe_jax.placement.plan import Placement, Plan
from moe_jax.train import step as step_lib
from tests import tiny


@pytest.fixture(scope="module")
def state():
    """A training state whose moments are not zero, all values different."""
    config = tiny.config()
    state = step_lib.initial_state(config, tiny.mesh(config))
    leaves, structure = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    filled = [
        jax.device_put(rng.normal(size=leaf.shape).astype(np.float32), leaf.sharding)
        if leaf.dtype == np.float32
        else leaf
        for leaf in leaves
    ]
    return jax.tree.unflatten(structure, filled)


def test_apply_then_invert_restores_parameters_and_moments(state):
    for seed in range(100):
        placement = tiny.random_placement(seed)
        there = permute.apply(state, tiny.contiguous(), placement)
        back = permute.apply(there, placement, tiny.contiguous())
        jax.tree.map(np.testing.assert_array_equal, back, state)


def test_every_expert_lands_in_its_slot(state):
    placement = tiny.random_placement(5)
    moved = permute.apply(state, tiny.contiguous(), placement)
    for name in ("gate_PDF", "up_PDF", "down_PFD"):
        for tree in ("model", "mu", "nu"):
            before, after = (
                np.asarray(getattr(_part(s, tree).blocks.moe, name)[...]) for s in (state, moved)
            )
            for layer, slots in enumerate(placement.physical_to_logical_LP):
                for slot, expert in enumerate(slots):
                    np.testing.assert_array_equal(after[layer, slot], before[layer, expert])
    untouched = (moved.model.embedding_VD, state.model.embedding_VD)
    np.testing.assert_array_equal(untouched[0][...], untouched[1][...])


def _part(state, tree):
    return state.model if tree == "model" else getattr(state.opt_state[0], tree)


def test_sharding_is_kept(state):
    moved = permute.apply(state, tiny.contiguous(), tiny.random_placement(1))
    before, after = jax.tree.leaves(state), jax.tree.leaves(moved)
    assert [leaf.sharding for leaf in after] == [leaf.sharding for leaf in before]


def test_composition(state):
    """a -> b -> c is a -> c."""
    b, c = tiny.random_placement(1), tiny.random_placement(2)
    twice = permute.apply(permute.apply(state, tiny.contiguous(), b), b, c)
    once = permute.apply(state, tiny.contiguous(), c)
    jax.tree.map(np.testing.assert_array_equal, twice, once)


def test_replicas_take_the_copy_on_their_own_device():
    old = Placement(np.array([[0, 1, 2, 0, 3, 1, 2, 3]], np.int32), 4, 4)
    new = Placement(np.array([[1, 0, 2, 3, 0, 3, 1, 2]], np.int32), 4, 4)
    source = permute.source_slots(old, new)
    #                         device 0     1     2     3
    np.testing.assert_array_equal(source, [[1, 0, 2, 4, 0, 4, 1, 6]])


def _save(state, folder, plan):
    arrays = checkpoint.flatten(state)
    axes = checkpoint.flatten(parameter.logical_axes(state))
    contents = checkpoint.Contents(3, checkpoint.describe(arrays, axes), plan, {"a": 1})
    return checkpoint.save(folder, arrays, contents)


def test_checkpoint_is_permuted_like_the_live_state(state, tmp_path):
    source = _save(state, tmp_path / "checkpoints", Plan(tiny.contiguous()))
    placement = tiny.random_placement(7)
    Plan(placement).write(tmp_path / "plan.json")
    told = permute.apply_to_checkpoint(tmp_path / "plan.json", source, tmp_path / "out" / "3")
    assert placement.digest[:12] in told
    contents = checkpoint.read_contents(tmp_path / "out" / "3")
    assert contents.plan.placement == placement
    assert (contents.step, contents.extra) == (3, {"a": 1})
    arrays = checkpoint.restore_numpy(tmp_path / "out" / "3", contents)
    live = checkpoint.flatten(permute.apply(state, tiny.contiguous(), placement))
    assert arrays.keys() == live.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, live[name])

    # and back, from the file alone
    Plan(tiny.contiguous()).write(tmp_path / "back.json")
    permute.apply_to_checkpoint(tmp_path / "back.json", tmp_path / "out" / "3", tmp_path / "back")
    contents = checkpoint.read_contents(tmp_path / "back")
    original = checkpoint.flatten(state)
    for name, array in checkpoint.restore_numpy(tmp_path / "back", contents).items():
        np.testing.assert_array_equal(array, original[name])


@pytest.fixture
def workdir(state, tmp_path):
    """A run with a tokenizer of its own."""
    workdir = tmp_path / "old" / "run"
    _save(state, workdir / "checkpoints", Plan(tiny.contiguous()))
    (workdir / "tokenizer").mkdir()
    (workdir / "tokenizer" / "tokenizer.json").write_text("{}")
    (workdir / "config.py").write_text("pass")
    _configure(workdir, "tokenizer")
    Plan(tiny.random_placement(7)).write(tmp_path / "plan.json")
    return workdir


def _configure(workdir, tokenizer):
    config = tiny.config(data={"seq_len": 16, "global_batch": 8, "tokenizer": tokenizer})
    (workdir / "config.json").write_text(config_lib.to_json(config))


def _files(folder):
    return {path.name: path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_moved_with_what_it_needs(workdir, tmp_path):
    permute.apply_to_checkpoint(tmp_path / "plan.json", workdir, tmp_path / "new")
    assert checkpoint.steps(tmp_path / "new" / "checkpoints") == [3]
    shutil.rmtree(tmp_path / "new" / "checkpoints")
    shutil.rmtree(workdir / "checkpoints")
    assert _files(tmp_path / "new") == _files(workdir)
    assert (tmp_path / "new" / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.parametrize("kind", ["absolute", "none"])
def test_a_tokenizer_elsewhere_stays_there(kind, workdir, tmp_path):
    _configure(workdir, str(workdir / "tokenizer") if kind == "absolute" else "")
    permute.apply_to_checkpoint(tmp_path / "plan.json", workdir, tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        *("checkpoints", "config.json", "config.py")
    }


def test_a_tokenizer_beside_the_run_must_be_beside_the_new_one(workdir, tmp_path):
    (workdir / "tokenizer").rename(workdir.parent / "tokenizer")
    _configure(workdir, "../tokenizer")
    with pytest.raises(Refused, match=r"data\.tokenizer = '\.\./tokenizer': lies beside"):
        permute.apply_to_checkpoint(tmp_path / "plan.json", workdir, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    permute.apply_to_checkpoint(tmp_path / "plan.json", workdir, workdir.parent / "new")
    assert json.loads((workdir.parent / "new" / "config.json").read_text())["name"] == "tiny"


def test_a_run_without_a_config_is_refused_before_anything_is_written(workdir, tmp_path):
    (workdir / "config.json").unlink()
    with pytest.raises(Refused, match=r"CHECKPOINT_IN = .*without a config\.json"):
        permute.apply_to_checkpoint(tmp_path / "plan.json", workdir, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def _full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("where", "name"), [(shutil, "copyfile"), (checkpoint.contents, "write")], ids=["copy", "save"]
)
def test_of_a_run_that_finds_no_room_nothing_is_left(where, name, workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(where, name, _full)
    with pytest.raises(Refused, match=r"could not be written.*No space left on device"):
        permute.apply_to_checkpoint(tmp_path / "plan.json", workdir, tmp_path / "out" / "new")
    assert not any((tmp_path / "out").glob("*"))


def test_what_a_kill_left_does_not_stay(workdir, tmp_path, monkeypatch):
    source, out = workdir / "checkpoints" / "3", tmp_path / "out"
    (out / ".new.step" / ".2.tmp").mkdir(parents=True)
    permute.apply_to_checkpoint(tmp_path / "plan.json", source, out / "new")
    assert [path.name for path in out.iterdir()] == ["new"]
    monkeypatch.setattr(checkpoint.contents, "write", _full)
    with pytest.raises(Refused, match="No space left on device"):
        permute.apply_to_checkpoint(tmp_path / "plan.json", source, out / "other")
    assert [path.name for path in out.iterdir()] == ["new"]


def test_a_step_is_not_named_like_another(workdir, tmp_path):
    """Readers would call it damaged."""
    source, four = workdir / "checkpoints" / "3", tmp_path / "out" / "4"
    with pytest.raises(Refused, match=rf"like step 4, and .* is step 3\. name {four.parent}/3"):
        permute.apply_to_checkpoint(tmp_path / "plan.json", source, four)
    assert not four.parent.exists()
    permute.apply_to_checkpoint(tmp_path / "plan.json", workdir, four)  # a run may be
    assert checkpoint.steps(four / "checkpoints") == [3]


def test_a_config_that_is_too_large_is_not_read(workdir, tmp_path):
    config = workdir / "config.json"
    config.write_text(config.read_text() + " " * 2**24)
    with pytest.raises(Refused, match=r"config\.json = .*at most 16777216 bytes"):
        permute.apply_to_checkpoint(tmp_path / "plan.json", workdir, tmp_path / "new")


@pytest.mark.parametrize("dense", [0, 2])
def test_the_layers_of_a_step_have_their_numbers_in_the_model(dense):
    sizes = {"num_layers": tiny.LAYERS + dense, "num_dense_layers": dense}
    config = tiny.config(
        model__d_ff_dense=8 * (dense > 0),
        **{f"model__{name}": value for name, value in sizes.items()},
    )
    state = step_lib.abstract_state(config, tiny.mesh(config))
    axes = checkpoint.flatten(parameter.logical_axes(state))
    infos = checkpoint.describe(checkpoint.flatten(state), axes)
    found = permute._layer_ids(checkpoint.Contents(0, infos, Plan(tiny.contiguous()), {}))
    assert tuple(found) == config.model.moe_layer_ids


def test_refusals(state, tmp_path):
    source = _save(state, tmp_path / "checkpoints", Plan(tiny.contiguous()))
    other = Placement.contiguous(tiny.LAYERS + 1, tiny.EXPERTS, 4)
    Plan(other).write(tmp_path / "other.json")
    with pytest.raises(Refused, match="another model"):
        permute.apply_to_checkpoint(tmp_path / "other.json", source, tmp_path / "out")
    Plan(tiny.random_placement(0), (1, 2)).write(tmp_path / "others.json")
    with pytest.raises(Refused, match=r"layer_ids = '1-2': .*here the MoE layers are 0-1"):
        permute.apply_to_checkpoint(tmp_path / "others.json", source, tmp_path / "out")
    Plan(tiny.random_placement(0)).write(tmp_path / "plan.json")
    with pytest.raises(Refused, match="exists already"):
        permute.apply_to_checkpoint(tmp_path / "plan.json", source, source)
    with pytest.raises(Refused, match="must be a step directory"):
        permute.apply_to_checkpoint(tmp_path / "plan.json", tmp_path / "no", tmp_path / "out")
    assert not (tmp_path / "out").exists()
