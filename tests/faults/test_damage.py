"""Files of a checkpoint that are not what was saved: named, moved aside, the step before used.

Every fault hits a real checkpoint of a run; what is restored afterwards is compared bit by bit.
"""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from moe_jax import checkpoint
from moe_jax.checkpoint import integrity
from moe_jax.errors import Refused
from moe_jax.placement.plan import Placement, Plan
from tests.faults import harness

LONG = (pytest.mark.faults, pytest.mark.timeout(7200))


def flip(path, rng):
    """One bit."""
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def truncate(path, rng):
    """Cut at any length, to nothing included."""
    data = path.read_bytes()
    path.write_bytes(data[: rng.integers(len(data))])


def delete(path, rng):
    path.unlink()


def zero(path, rng):
    """A block of zeros, as file systems leave after a loss of power."""
    data = bytearray(path.read_bytes())
    start = rng.integers(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)


def swap_plan(path, rng):
    """Another valid plan, of the same sizes."""
    folder = next(above for above in path.parents if (above / "plan.json").exists())
    old = Plan.read(folder / "plan.json").placement
    order_P = rng.permutation(old.num_slots)
    slots_LP = old.physical_to_logical_LP[:, order_P]
    Plan(Placement(slots_LP, old.num_experts, old.num_devices)).write(folder / "plan.json")


FAULTS = {
    # fault: (times in the default run, in the campaign)
    flip: (10, 400),
    truncate: (4, 250),
    delete: (3, 150),
    zero: (4, 150),
    swap_plan: (2, 50),
}


@pytest.mark.parametrize("size", [0, pytest.param(1, marks=LONG)], ids=["short", "long"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_damage(fault, size, whole, tmp_path):
    source = whole(20) / "checkpoints"
    newest, before = sorted(checkpoint.steps(source), reverse=True)[:2]
    expected = harness.arrays(source.parent, before)
    rng = np.random.default_rng(2)
    done = lost = 0
    identical = True
    directory = tmp_path / "checkpoints"
    while done < FAULTS[fault][size]:
        shutil.rmtree(directory, ignore_errors=True)
        for step in (newest, before):
            shutil.copytree(source / str(step), directory / str(step))
        paths = sorted(path for path in (directory / str(newest)).rglob("*") if path.is_file())
        path = paths[rng.integers(len(paths))]
        if rng.random() < 0.5:  # of the arrays: is read while it is hashed
            path = max(paths, key=lambda path: path.stat().st_size)
            assert path.stat().st_size > integrity.SMALL_BYTES
        good = _bytes(directory)
        fault(path, rng)
        if _bytes(directory) == good:
            continue  # zeros over zeros are no fault
        done += 1
        said: list[str] = []
        found = checkpoint.restore_newest(
            directory, checkpoint.restore_numpy, said.append, move_bad=True
        )
        named = bool(said) and str(directory / str(newest)) in said[0]
        moved = bool(list((directory / "bad").glob(f"{newest}-*/why.txt")))
        lost += (found.folder.name, named, moved) != (str(before), True, True)
        identical = identical and all(
            found.value[name].tobytes() == array.tobytes() for name, array in expected.items()
        )
    harness.told(done, lost, identical, fault.__name__.replace("_", "-"))
    assert (lost, identical) == (0, True)


def _bytes(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_run_goes_on_from_the_step_before_a_damaged_one(start, whole, tmp_path):
    """Through the program, twice: the second start finds nothing bad any more."""
    workdir = tmp_path / "run"
    shutil.copytree(whole(20), workdir)
    newest, before = sorted(checkpoint.steps(workdir / "checkpoints"), reverse=True)[:2]
    victim = workdir / "checkpoints" / str(newest) / "meta.json"
    victim.write_bytes(victim.read_bytes()[:-1])
    process = start(workdir, 20)
    assert process.wait() == 0
    assert "meta.json" in process.said()
    assert "/bad/" in process.said()
    assert harness.resumed_after(process) == before
    assert harness.same_end(workdir, whole(20))
    harness.log_of(workdir).unlink()
    process = start(workdir, 20)
    assert process.wait() == 0
    assert "skipping" not in process.said()


def test_a_run_that_does_not_verify_says_so(start, whole, tmp_path):
    """A bit of an array that nothing but its digest tells is then taken as it is."""
    workdir = tmp_path / "run"
    shutil.copytree(whole(20), workdir)
    newest = max(checkpoint.steps(workdir / "checkpoints"))
    flip_in_manifest(workdir / "checkpoints" / str(newest))
    process = start(workdir, 20, train__checkpoints_verified=False)
    assert process.wait() == 0
    assert f"step {newest}: read in" in process.said()
    assert "its digests were not compared (train.checkpoints_verified = False)" in process.said()
    assert "skipping" not in process.said()
    process = start(workdir, 20)
    assert process.wait() == 0
    assert f"skipping checkpoint {newest}: " in process.said()
    assert "verified meanwhile and for" in process.said()


def flip_in_manifest(folder):
    """Another digest than that of the arrays' file, which itself is good."""
    listed = json.loads((folder / integrity.MANIFEST).read_text())
    largest = max(listed.values(), key=lambda entry: entry["size"])
    largest["sha256"] = "0" * 64
    (folder / integrity.MANIFEST).write_text(json.dumps(listed))


def test_a_run_whose_steps_are_all_damaged_is_refused_again_and_again(start, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole(20), workdir)
    for step in checkpoint.steps(workdir / "checkpoints"):
        (workdir / "checkpoints" / str(step) / "plan.json").unlink()
    for _ in range(2):
        process = start(workdir, 20)
        assert process.wait() == 1
        assert "every step is damaged" in process.said()


@pytest.fixture
def step_folder(whole, tmp_path):
    source = whole(20) / "checkpoints"
    newest = str(checkpoint.steps(source)[-1])
    shutil.copytree(source / newest, tmp_path / newest)
    return tmp_path / newest


def test_links_out_of_the_folder_are_refused(step_folder):
    path = max(step_folder.rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    outside = step_folder.parent / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)  # the same bytes
    with pytest.raises(Refused, match="links are not followed"):
        checkpoint.read_contents(step_folder)


def test_a_linked_folder_is_refused(step_folder):
    outside = step_folder.parent / "outside"
    shutil.move(step_folder / "state", outside)
    (step_folder / "state").symlink_to(outside)
    with pytest.raises(Refused, match="links are not followed"):
        checkpoint.read_contents(step_folder)


def test_a_linked_step_is_refused(step_folder):
    (step_folder.parent / "99").symlink_to(step_folder)
    with pytest.raises(Refused, match="is a link"):
        checkpoint.read_contents(step_folder.parent / "99")


def test_a_manifest_cannot_name_files_outside(step_folder):
    manifest = step_folder / "integrity.json"
    (step_folder.parent / "outside").write_text("x")
    listed = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(listed | {"../outside": listed["meta.json"]}))
    with pytest.raises(Refused, match="outside"):
        checkpoint.read_contents(step_folder)


def test_a_pipe_is_refused_without_being_opened(step_folder):
    os.mkfifo(step_folder / "state" / "pipe")
    with pytest.raises(Refused, match="pipe"):
        checkpoint.read_contents(step_folder)


def test_a_step_under_another_number_is_refused(step_folder):
    moved = step_folder.with_name("99")
    step_folder.rename(moved)
    with pytest.raises(Refused, match="is of step"):
        checkpoint.read_contents(moved)
