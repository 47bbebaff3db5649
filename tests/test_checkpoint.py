"""Checkpoints: bit-equal there and back, and nothing silent when a file is not what it was."""

import json
import os
import re
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import checkpoint
from moe_jax import mesh as mesh_lib
from moe_jax.checkpoint import integrity, newest, preservation, saver
from moe_jax.errors import Refused
from moe_jax.placement.plan import Placement, Plan
from tests import tiny

AXES = {"a.w": ("layer", "expert"), "a.r": ("layer", "router"), "a.b": ("",), "n": ()}


@pytest.fixture
def saved(tmp_path):
    mesh = mesh_lib.make(2, 4)
    rng = np.random.default_rng(0)
    arrays = {
        "a.w": jax.device_put(
            rng.normal(size=(2, 8)).astype(np.float32),
            NamedSharding(mesh, PartitionSpec(None, "expert")),
        ),
        "a.b": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "a.r": jnp.ones((2, 8), jnp.float32),
        "n": jnp.asarray(7, jnp.int32),
    }
    contents = checkpoint.Contents(
        4, checkpoint.describe(arrays, AXES), Plan(tiny.contiguous()), {"data_state": [1, {"x": 2}]}
    )
    return checkpoint.save(tmp_path / "checkpoints", arrays, contents), arrays


def _target(arrays, mesh_shape=(4, 2)):
    """Another mesh than the one it was saved from."""
    mesh = mesh_lib.make(*mesh_shape)
    spec = {"a.w": PartitionSpec(None, "expert")}
    return {
        name: jax.ShapeDtypeStruct(
            array.shape,
            array.dtype,
            sharding=NamedSharding(mesh, spec.get(name, PartitionSpec())),
        )
        for name, array in arrays.items()
    }


def test_round_trip_on_another_mesh(saved):
    folder, arrays = saved
    contents = checkpoint.read_contents(folder)
    assert (contents.step, contents.extra) == (4, {"data_state": [1, {"x": 2}]})
    assert contents.arrays["a.w"].axes == ("layer", "expert")
    restored = checkpoint.restore(folder, contents, _target(arrays), contents.plan.placement)
    for name, array in arrays.items():
        assert restored[name].dtype == array.dtype
        np.testing.assert_array_equal(restored[name], array)
    assert restored["a.w"].sharding == _target(arrays)["a.w"].sharding
    for name, array in checkpoint.restore_numpy(folder, contents).items():
        np.testing.assert_array_equal(array, arrays[name])


def test_another_placement_is_refused(saved):
    folder, arrays = saved
    contents = checkpoint.read_contents(folder)
    with pytest.raises(Refused, match="permute it first"):
        checkpoint.restore(folder, contents, _target(arrays), tiny.random_placement(0))


def test_other_arrays_are_refused(saved):
    folder, arrays = saved
    contents = checkpoint.read_contents(folder)
    target = _target(arrays)
    target["a.w"] = jax.ShapeDtypeStruct((2, 9), jnp.float32)
    target["a.b"] = jax.ShapeDtypeStruct((5,), jnp.float32)
    target["new"] = jax.ShapeDtypeStruct((), jnp.float32)
    with pytest.raises(Refused) as refusal:
        checkpoint.restore(folder, contents, target, None)
    for part in ("float32[2, 8]", "float32[2, 9]", "bfloat16[5]", "new: absent", "3 arrays differ"):
        assert part in str(refusal.value)


def test_arrays_that_the_model_does_not_have_are_refused(saved):
    folder, arrays = saved
    contents = checkpoint.read_contents(folder)
    target = _target(arrays)
    del target["n"]  # a group of its own: may be left out
    checkpoint.restore(folder, contents, target, None)
    del target["a.b"]
    with pytest.raises(
        Refused, match=r"a\.b: bfloat16\[5\] in the checkpoint, absent in the model"
    ):
        checkpoint.restore(folder, contents, target, None)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"shape": [9]}, r"holds a\.b as bfloat16\[5\], but meta.json says bfloat16\[9\]"),
        ({"shape": [2**40]}, "but meta.json says"),
        ({"shape": [-1]}, "is not a checkpoint's"),
        ({"shape": [2.5]}, "is not a checkpoint's"),
        ({"dtype": "float16"}, "but meta.json says float16"),
        ({"dtype": "object at"}, "is not a checkpoint's"),
        ({"dtype": "(1,f4"}, "is not a checkpoint's"),
        ({"axes": [[]]}, "is not a checkpoint's"),
    ],
)
def test_claims_that_the_data_does_not_hold_are_refused(change, rule, saved):
    """A manifest that was made to fit: what would be allocated or cast is checked all the same."""
    folder, _ = saved
    meta = json.loads((folder / "meta.json").read_text())
    meta["arrays"]["a.b"] |= change
    (folder / "meta.json").write_text(json.dumps(meta))
    integrity.write(folder)
    with pytest.raises(Refused, match=rule):
        checkpoint.restore_numpy(folder, checkpoint.read_contents(folder))


def test_a_chunk_larger_than_its_array_is_refused_before_it_is_allocated(saved):
    """A few bytes of a store may ask for any chunk: eight numbers of a gigabyte."""
    folder, _ = saved
    store = {"driver": "ocdbt", "base": f"file://{folder}/state/", "path": "a.b/"}
    metadata = {"shape": [5], "chunks": [2**28], "dtype": "bfloat16", "compressor": None}
    spec = {"driver": "zarr", "kvstore": store, "metadata": metadata}
    ts.open(spec, create=True, delete_existing=True).result()
    integrity.write(folder)
    with pytest.raises(integrity.Damaged, match=r"of shape \[5\], in chunks of \[268435456\]"):
        checkpoint.restore_numpy(folder, checkpoint.read_contents(folder))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("_METADATA", {"skip_deserialize": True}),
        ("_METADATA", {"value_type": "string"}),
        ("_CHECKPOINT_METADATA", None),
    ],
)
def test_what_orbax_takes_for_something_else_is_damaged(name, change, saved):
    folder, _ = saved
    text = "[" * 100_000
    if change:
        fields = json.loads((folder / "state" / name).read_text())
        next(iter(fields["tree_metadata"].values()))["value_metadata"] |= change
        text = json.dumps(fields)
    (folder / "state" / name).write_text(text)
    integrity.write(folder)
    with pytest.raises(integrity.Damaged, match="is no data of Orbax"):
        checkpoint.restore_numpy(folder, checkpoint.read_contents(folder))


def test_a_chunk_that_cannot_be_decoded_makes_a_bad_step(three):
    directory, read, asked = three
    store = {"driver": "ocdbt", "base": f"file://{directory / '6' / 'state'}/"}
    ts.KvStore.open(store).result().write("a.b/0", b"x").result()
    integrity.write(directory / "6")
    said: list[str] = []
    assert checkpoint.restore_newest(directory, read, said.append).contents.step == 5
    assert asked == [6, 5]
    assert "cannot be read (FAILED_PRECONDITION" in said[0]


@pytest.mark.parametrize(
    ("placement", "rule"),
    [
        (Placement(np.array([[0, 1, 2, 3] * 2] * 2), 4, 4), "has 4 experts, and a.r of .* 8"),
        (Placement(np.array([[*range(8)] * 2] * 2), 8, 4), "has 16 slots, and a.w of .* 8"),
        (Placement.contiguous(3, 8, 4), "has 3 layers, and a.[rw] of .* 2"),
    ],
)
def test_a_plan_of_another_model_makes_a_bad_step(placement, rule, three):
    """Its own digests hold, and those of the step."""
    directory, read, _ = three
    meta = json.loads((directory / "6" / "meta.json").read_text())
    meta["plan_digest"] = placement.digest
    (directory / "6" / "meta.json").write_text(json.dumps(meta))
    Plan(placement).write(directory / "6" / "plan.json")
    integrity.write(directory / "6")
    said: list[str] = []
    assert checkpoint.restore_newest(directory, read, said.append).contents.step == 5
    assert checkpoint.newest_good(directory, said.append)[0].name == "5"
    assert all(re.search(rule, line) for line in said)


@pytest.mark.parametrize("name", ["/tmp/w", "../w", "a/w", "", "..", "a\\w", "a\0w", "ä", "-a"])
def test_names_of_arrays_are_no_paths(name, saved):
    folder, _ = saved
    meta = json.loads((folder / "meta.json").read_text())
    meta["arrays"][name] = meta["arrays"].pop("a.w")
    (folder / "meta.json").write_text(json.dumps(meta))
    integrity.write(folder)
    with pytest.raises(integrity.Damaged, match="array name"):
        checkpoint.read_contents(folder)


def test_only_arrays_that_are_named_are_looked_for(saved, tmp_path, monkeypatch):
    """Orbax's own list is compared before Orbax follows it, and there is one store for all."""
    folder, _ = saved
    listed = folder / "state" / "_METADATA"
    good = listed.read_text()
    monkeypatch.setattr(ocp.Checkpointer, "metadata", lambda *_: pytest.fail("was looked for"))
    for bad in (good.replace('"a.w"', json.dumps(f"{tmp_path}/w")), "{}", '{"tree_metadata": [1]}'):
        listed.write_text(bad)
        integrity.write(folder)
        with pytest.raises(integrity.Damaged, match=r"do not both hold|is not Orbax's"):
            checkpoint.restore_numpy(folder, checkpoint.read_contents(folder))
    listed.write_text(good)
    (folder / "state" / "manifest.ocdbt").unlink()
    integrity.write(folder)
    with pytest.raises(integrity.Damaged, match=r"manifest\.ocdbt.* is missing"):
        checkpoint.restore_numpy(folder, checkpoint.read_contents(folder))


def test_another_plan_with_a_manifest_that_fits_is_refused(saved):
    folder, _ = saved
    Plan(tiny.random_placement(0)).write(folder / "plan.json")
    integrity.write(folder)
    with pytest.raises(Refused, match="is not the plan that the arrays were saved under"):
        checkpoint.read_contents(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", '{"a": 1}', "\x00", "1" * 9999])
@pytest.mark.parametrize("name", ["integrity.json", "meta.json"])
def test_files_that_are_no_json_of_ours_are_refused(name, text, saved):
    folder, _ = saved
    (folder / name).write_text(text)
    if name != "integrity.json":
        integrity.write(folder)
    with pytest.raises(Refused, match=name.replace(".", r"\.")):
        checkpoint.read_contents(folder)


def test_files_are_bounded_before_they_are_read(saved, monkeypatch):
    folder, _ = saved
    monkeypatch.setattr(integrity, "MAX_JSON_BYTES", 100)
    with pytest.raises(Refused, match="at most 100 bytes"):
        checkpoint.read_contents(folder)


def test_more_than_memory_is_refused(saved, monkeypatch):
    folder, _ = saved
    contents = checkpoint.read_contents(folder)
    monkeypatch.setattr(os, "sysconf", lambda name: 4)
    with pytest.raises(Refused, match="this machine 16 of memory"):
        checkpoint.restore_numpy(folder, contents)


def _every_file(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_changed_file_is_named(saved):
    folder, _ = saved
    for path in _every_file(folder):
        good = path.read_bytes()
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 0x10
        for bad in (bytes(flipped), good[:-1], good + b"x"):
            path.write_bytes(bad)
            # a name that changed in the manifest itself accuses the file that had it
            named = "." if path.name == integrity.MANIFEST else path.name.replace(".", r"\.")
            with pytest.raises(Refused, match=named):
                checkpoint.read_contents(folder)
        path.write_bytes(good)
    checkpoint.read_contents(folder)


def test_missing_and_surplus_files_are_named(saved):
    folder, _ = saved
    (folder / "surplus").write_text("x")
    with pytest.raises(Refused, match="surplus"):
        checkpoint.read_contents(folder)
    (folder / "surplus").unlink()
    (folder / "plan.json").unlink()
    with pytest.raises(Refused, match=r"plan\.json"):
        checkpoint.read_contents(folder)


def test_unknown_version_is_refused(saved):
    folder, _ = saved
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"version": 99}))
    integrity.write(folder)
    with pytest.raises(Refused, match="is of version 99, and this program reads version 1"):
        checkpoint.read_contents(folder)


def test_a_step_of_another_version_is_not_moved_aside(three):
    """It is the newest and whole: going on from the one before would lose what it holds."""
    directory, read, _ = three
    meta = json.loads((directory / "6" / "meta.json").read_text())
    (directory / "6" / "meta.json").write_text(json.dumps(meta | {"version": 2}))
    integrity.write(directory / "6")
    said: list[str] = []
    for look in (
        checkpoint.newest_good,
        lambda *a, **k: checkpoint.restore_newest(a[0], read, a[1], **k),
    ):
        with pytest.raises(Refused, match="use the program that wrote it"):
            look(directory, said.append, move_bad=True)
    assert not said
    assert checkpoint.steps(directory) == [4, 5, 6]


def test_newest_good_step(saved, tmp_path):
    folder, arrays = saved
    contents = checkpoint.read_contents(folder)
    newer = checkpoint.Contents(9, contents.arrays, contents.plan, {})
    checkpoint.save(folder.parent, arrays, newer)
    (folder.parent / ".12.tmp").mkdir()  # what a kill in the middle of a save leaves
    said: list[str] = []
    assert checkpoint.newest_good(folder.parent, said.append)[0].name == "9"
    (folder.parent / "9" / "meta.json").write_text("{}")
    assert checkpoint.newest_good(folder.parent, said.append)[0].name == "4"
    assert len(said) == 1
    assert "meta.json" in said[0]
    (folder / "meta.json").write_text("{}")
    with pytest.raises(Refused, match="every step is damaged"):
        checkpoint.newest_good(folder.parent, said.append)
    assert checkpoint.newest_good(tmp_path / "none", said.append) is None


def save_again(folder, arrays, *steps):
    """The same arrays as later steps."""
    contents = checkpoint.read_contents(folder)
    for step in steps:
        newer = checkpoint.Contents(step, contents.arrays, contents.plan, {})
        checkpoint.save(folder.parent, arrays, newer)


@pytest.fixture
def three(saved):
    """Steps 4, 5 and 6, read into the host by a `read` that notes what it is asked for."""
    folder, arrays = saved
    save_again(folder, arrays, 5, 6)
    asked = []

    def read(folder, contents):
        asked.append(int(folder.name))
        return checkpoint.restore_numpy(folder, contents)

    return folder.parent, read, asked


def _largest(folder):
    return max(_every_file(folder / "state"), key=lambda path: path.stat().st_size)


def _flip(path):
    good = path.read_bytes()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])


@pytest.mark.parametrize("small", [0, 2**16], ids=["while it is read", "before"])
def test_what_was_read_of_a_damaged_step_is_not_given_out(small, three, monkeypatch):
    """Whatever came of reading it, the file that is not what was saved is to blame."""
    monkeypatch.setattr(integrity, "SMALL_BYTES", small)
    directory, read, asked = three
    damaged = _largest(directory / "6")
    _flip(damaged)
    said: list[str] = []
    found = checkpoint.restore_newest(directory, read, said.append, move_bad=True)
    assert (found.contents.step, found.folder.name) == (5, "5")
    assert asked == ([5] if small else [6, 5])
    assert str(damaged) in said[0]
    assert "SHA-256" in said[0]
    assert said[1].startswith("moved checkpoint 6")
    assert checkpoint.steps(directory) == [4, 5]


@pytest.mark.parametrize("file", ["plan.json", None], ids=["small", "large"])
def test_a_run_does_not_begin_anew_without_being_told(file, saved, monkeypatch):
    """The parameters it began with are whole, and all that it made of them is not."""
    monkeypatch.setattr(integrity, "SMALL_BYTES", 2**10)
    folder, arrays = saved
    contents = checkpoint.read_contents(folder)
    began = checkpoint.Contents(0, contents.arrays, contents.plan, {"only": "model"})
    checkpoint.save(folder.parent, arrays, began)
    _flip(folder / file if file else _largest(folder))
    with pytest.raises(Refused, match="every step is damaged but 0, which the run began with"):
        checkpoint.restore_newest(folder.parent, lambda *_: None, [].append, move_bad=True)
    assert checkpoint.steps(folder.parent) == [0, 4]
    answers = checkpoint.newest_good(folder.parent, [].append)  # to answer with, or to replay
    assert answers[0].name == "0"


def test_digests_that_were_begun_ahead(three, monkeypatch):
    """A start waits for these, and makes none of its own, where they are of the step it finds."""
    monkeypatch.setattr(integrity, "SMALL_BYTES", 0)
    directory, _, _ = three

    def found(**more):
        found = checkpoint.restore_newest(directory, lambda *_: None, [].append, **more)
        return found.contents.step

    ahead = checkpoint.digests_ahead(directory)
    assert (ahead.folder.name, ahead.first_wrong()) == ("6", None)
    _flip(_largest(directory / "6"))  # when they are known: else nothing would tell whose were used
    _flip(_largest(directory / "5"))
    assert found(ahead=ahead) == 6
    assert found(ahead=ahead, before=6) == 4  # of 6, they say nothing of 5
    assert found(ahead=checkpoint.digests_ahead(directory)) == 4
    ahead.share = (0, 2)
    assert found(ahead=ahead) == 4  # of another process


def test_digests_begun_ahead_serve_who_looks_before_reading(three, monkeypatch):
    """As infer.py does: nothing is made of a step before it is known to be good."""
    monkeypatch.setattr(integrity, "SMALL_BYTES", 0)
    directory, _, _ = three
    ahead = checkpoint.digests_ahead(directory)
    assert ahead.first_wrong() is None
    _flip(_largest(directory / "6"))  # as above
    assert checkpoint.newest_good(directory, [].append, ahead=ahead)[0].name == "6"
    assert checkpoint.newest_good(directory, [].append)[0].name == "5"
    again = checkpoint.digests_ahead(directory)
    assert checkpoint.newest_good(directory, [].append, ahead=again)[0].name == "5"


def test_nothing_is_begun_ahead_of_what_is_not_whole(three, tmp_path):
    directory, _, _ = three
    assert checkpoint.digests_ahead(tmp_path / "none") is None
    (tmp_path / "empty").mkdir()
    assert checkpoint.digests_ahead(tmp_path / "empty") is None
    (directory / "6" / "plan.json").unlink()
    os.mkfifo(directory / "6" / "plan.json")  # would never end
    assert checkpoint.digests_ahead(directory) is None
    (directory / "6" / "plan.json").unlink()
    assert checkpoint.digests_ahead(directory) is None


def test_what_reading_refuses_of_a_good_step_is_refused(three):
    """Arrays of another model do not make a step a bad one."""
    directory, _, asked = three

    def read(folder, contents):
        asked.append(int(folder.name))
        raise Refused("checkpoint arrays", "a", "differ", "use another config")

    with pytest.raises(Refused, match="use another config"):
        checkpoint.restore_newest(directory, read, [].append, move_bad=True)
    assert asked == [6]
    assert checkpoint.steps(directory) == [4, 5, 6]


def test_a_step_that_does_not_hold_what_it_says_is_a_bad_one(three):
    """Its digests are right: made by somebody, or by a program that was wrong."""
    directory, read, asked = three
    meta = json.loads((directory / "6" / "meta.json").read_text())
    meta["arrays"]["a.b"]["shape"] = [9]
    (directory / "6" / "meta.json").write_text(json.dumps(meta))
    integrity.write(directory / "6")
    said: list[str] = []
    found = checkpoint.restore_newest(directory, read, said.append)
    assert found.contents.step == 5
    assert "bfloat16[5], but meta.json says bfloat16[9]" in said[0]
    assert asked == [6, 5]


def test_bytes_that_cannot_be_read_leave_one_line(three, monkeypatch):
    """Orbax and tensorstore say more, each read for itself, when nobody listens any more."""
    monkeypatch.setattr(integrity, "SMALL_BYTES", 0)
    directory, read, asked = three
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    for path in (directory / "6" / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(bytes(path.stat().st_size))
    said: list[str] = []
    assert checkpoint.restore_newest(directory, read, said.append).contents.step == 5
    assert asked == [6, 5]
    assert len(said) == 1
    assert not printed
    other = types.SimpleNamespace(object=None, exc_type=ValueError, exc_traceback=None)
    sys.unraisablehook(other)
    assert printed == [other]


def test_digests_may_be_skipped_but_nothing_else(three, monkeypatch):
    monkeypatch.setattr(integrity, "SMALL_BYTES", 0)
    directory, _, _ = three
    listed = json.loads((directory / "6" / integrity.MANIFEST).read_text())
    for entry in listed.values():
        entry["sha256"] = "0" * 64
    (directory / "6" / integrity.MANIFEST).write_text(json.dumps(listed))
    said: list[str] = []

    def step(verify):
        found = checkpoint.restore_newest(
            directory, checkpoint.restore_numpy, said.append, verify=verify
        )
        assert checkpoint.newest_good(directory, [].append, verify=verify)[0] == found.folder
        return found.contents.step

    assert (step(False), said) == (6, [])
    assert step(True) == 5
    said.clear()
    path = _largest(directory / "6")
    path.write_bytes(path.read_bytes()[:-1])
    assert step(False) == 5
    assert "must be a file of" in said[0]


def test_bytes_that_nobody_verified_and_nothing_can_read_are_a_bad_step(three):
    directory, read, asked = three

    def unreadable(folder, contents):
        if folder.name == "6":
            raise ValueError("DATA_LOSS")
        return read(folder, contents)

    said: list[str] = []
    assert checkpoint.restore_newest(directory, unreadable, said.append, verify=False)
    assert asked == [5]
    assert "cannot be read (DATA_LOSS)" in said[0]
    with pytest.raises(ValueError, match="DATA_LOSS"):  # verified: not a matter of the files
        checkpoint.restore_newest(directory, unreadable, said.append)


def test_all_damaged_or_none_at_all(three, tmp_path):
    directory, read, asked = three
    assert checkpoint.restore_newest(tmp_path / "none", read, [].append) is None
    for step in (4, 5, 6):
        _flip(_largest(directory / str(step)))
    with pytest.raises(Refused, match="every step is damaged"):
        checkpoint.restore_newest(directory, read, [].append, move_bad=True)
    assert checkpoint.restore_newest(directory, read, [].append, before=4) is None
    assert checkpoint.steps(directory) == [4, 5, 6]
    assert not asked


def test_a_search_that_fails_ends_in_every_process(three, monkeypatch):
    """Of two processes, one after the other: the second is told, and waits for nothing."""
    directory, read, _ = three
    told: list[np.int32] = []

    def unreadable(_):
        raise PermissionError("planted")

    monkeypatch.setattr(newest.Search, "next", unreadable)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    tell = lambda step: told.append(step) or step  # noqa: E731
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", tell)
    with pytest.raises(PermissionError, match="planted"):
        checkpoint.restore_newest(directory, read, [].append)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda _: told.pop())
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(Refused, match="see what process 0 says"):
        checkpoint.restore_newest(directory, read, [].append)


def test_shares_of_digests_cover_every_file_once(saved, monkeypatch):
    monkeypatch.setattr(integrity, "SMALL_BYTES", 0)
    folder, _ = saved
    names = [path.relative_to(folder).as_posix() for path in _every_file(folder)]
    names = sorted(set(names) - {integrity.MANIFEST})
    for count in (1, 2, 3):
        for wrong, name in enumerate(names):
            _flip(folder / name)
            digests = [integrity.Digests(folder, (index, count)) for index in range(count)]
            found = [share.first_wrong() for share in digests]
            assert found[wrong % count] == wrong
            assert found.count(None) == count - 1
            assert all(name in str(share.refusal(wrong)) for share in digests)
            _flip(folder / name)


def test_old_steps_are_removed(saved):
    folder, arrays = saved
    contents = checkpoint.read_contents(folder)
    with saver.Saver(folder.parent, preservation.Kept(2).prune) as made:
        for step in (5, 6, 7):
            newer = checkpoint.Contents(step, contents.arrays, contents.plan, {})
            checkpoint.start_save(made, arrays, newer)
    assert checkpoint.steps(folder.parent) == [6, 7]


def test_old_steps_that_cannot_be_removed_end_no_save(saved, capfd):
    """A reader on a network file system holds their files; the new step is there and whole."""
    folder, arrays = saved
    contents = checkpoint.read_contents(folder)

    def held(directory):
        raise OSError(39, "Directory not empty")

    with saver.Saver(folder.parent, held) as made:
        newer = checkpoint.Contents(5, contents.arrays, contents.plan, {})
        checkpoint.start_save(made, arrays, newer)
    assert checkpoint.steps(folder.parent) == [4, 5]
    assert "old steps stay ([Errno 39]" in capfd.readouterr().err


def test_bad_steps_are_moved_aside_but_never_the_last(saved):
    folder, arrays = saved
    save_again(folder, arrays, 5, 6)
    for step in (5, 6):
        (folder.parent / str(step) / "plan.json").unlink()
    said: list[str] = []
    assert checkpoint.newest_good(folder.parent, said.append, move_bad=True)[1].step == 4
    assert checkpoint.steps(folder.parent) == [4]
    moved = sorted(path for path in (folder.parent / "bad").iterdir())
    assert [path.name.partition("-")[0] for path in moved] == ["5", "6"]
    assert all("plan.json': is missing" in (path / "why.txt").read_text() for path in moved)
    assert sum("moved checkpoint" in line for line in said) == 2
    (folder / "plan.json").unlink()
    with pytest.raises(Refused, match="every step is damaged"):
        checkpoint.newest_good(folder.parent, said.append, move_bad=True)
    assert checkpoint.steps(folder.parent) == [4]


def test_what_a_kill_leaves_is_put_in_order(saved):
    """A step that was being replaced is whole under its old name; the rest goes."""
    folder, _ = saved
    parent = folder.parent
    folder.rename(parent / ".4.old")
    for name in (".4.tmp", ".7.gone", ".8.tmp"):
        (parent / name / "state").mkdir(parents=True)
    (parent / ".not.tmp").mkdir()
    checkpoint.clean(parent)
    assert sorted(path.name for path in parent.iterdir()) == [".not.tmp", "4"]
    checkpoint.read_contents(folder)
    (parent / ".4.old").mkdir()
    checkpoint.clean(parent)
    assert sorted(path.name for path in parent.iterdir()) == [".not.tmp", "4"]


@pytest.mark.parametrize("place", ["folder", "file"])
def test_a_step_that_vanishes_or_cannot_be_read_is_skipped(place, saved, monkeypatch):
    folder, arrays = saved
    save_again(folder, arrays, 9)
    listed = integrity._listed

    def vanishing(step):
        if step.name != "9":
            return listed(step)
        if place == "folder":
            shutil.rmtree(step)  # after its manifest was read
            return listed(step)
        found = listed(step)
        (step / "plan.json").unlink()
        return found

    monkeypatch.setattr(integrity, "_listed", vanishing)
    said: list[str] = []
    assert checkpoint.newest_good(folder.parent, said.append)[0].name == "4"
    assert len(said) == 1
    assert "cannot be read (No such file" in said[0]


def test_names_that_are_no_steps_are_not(tmp_path):
    for name in ("3", "03", "-1", "x", "\u0663", "\u00b2", "12"):
        (tmp_path / name).mkdir()
    assert checkpoint.steps(tmp_path) == [3, 12]


def test_a_save_that_fails_leaves_nothing_and_says_why(saved, monkeypatch):
    folder, arrays = saved
    contents = checkpoint.read_contents(folder)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(integrity, "write", full)
    with saver.Saver(folder.parent) as made:
        newer = checkpoint.Contents(5, contents.arrays, contents.plan, {})
        checkpoint.start_save(made, arrays, newer)
        with pytest.raises(Refused, match="No space left on device"):
            made.wait()
        assert [path.name for path in folder.parent.iterdir()] == ["4"]
        monkeypatch.undo()
        checkpoint.start_save(made, arrays, newer)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["4", "5"]
