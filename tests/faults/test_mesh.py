"""A run goes on on another mesh: every bit at load, the same data, losses within rounding."""

import itertools
import pathlib
import shutil

import grain
import jax
import numpy as np
import pytest

from moe_jax import checkpoint, data, metrics, permute
from moe_jax.placement.plan import Placement, Plan
from moe_jax.train import inputs, loop, resume
from tests import tiny
from tests.faults import harness

SHAPES = ((1, 8), (2, 4), (4, 2), (8, 1), (1, 1), (2, 2))  # data x expert
LONG = pytest.mark.faults
BEFORE, STEPS = 3, 6


def config_of(shape, **fields):
    return tiny.config(
        mesh=dict(zip(("data", "expert"), shape, strict=True)), model__num_layers=1, **fields
    )


def train(config, workdir):
    corpus, plan = inputs.prepare(config, workdir)
    loop.train(config, workdir, corpus, plan)


@pytest.fixture(scope="module")
def seen():
    """Batches that runs have drawn, as bytes."""
    drawn, batches = [], data.batches

    class Noted(grain.DatasetIterator):
        def __init__(self, *args):
            super().__init__()
            self._batches = batches(*args)

        def get_state(self):
            return self._batches.get_state()

        def set_state(self, state):
            self._batches.set_state(state)

        def __next__(self):
            window_BS1 = next(self._batches)
            drawn.append(window_BS1.tobytes())
            return window_BS1

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(data, "batches", Noted)
        yield drawn


@pytest.fixture(scope="module")
def source(seen, tmp_path_factory):
    """A run of 6 steps on 2 x 4: (what a kill after 3 left of it, the whole of it, its batches)."""
    half, whole = (tmp_path_factory.mktemp("source") / name for name in ("half", "whole"))
    with jax.numpy_dtype_promotion("standard"):
        train(config_of((2, 4), train__num_steps=STEPS), whole)
    step = pathlib.Path("checkpoints") / str(BEFORE)
    shutil.copytree(whole / step, half / step)
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(whole / name, half)
    return half, whole, list(seen)


def logical(arrays, plan):
    """The arrays with their experts in logical order."""
    placement = plan.placement
    shape = placement.num_layers, placement.num_experts, placement.num_devices
    return permute.apply_to_arrays(
        {name: np.asarray(array) for name, array in arrays.items()},
        arrays_infos(arrays),
        placement,
        Placement.contiguous(shape[0], shape[1], 1),
    )


def arrays_infos(arrays):
    axes = {name: ("layer", "expert") if "_P" in name.rpartition(".")[2] else () for name in arrays}
    return checkpoint.describe(arrays, axes)


def loaded(workdir, shape, **fields):
    """(state by name in logical order, run, plan) of a checkpoint on a mesh."""
    config = config_of(shape, train__num_steps=STEPS, **fields)
    corpus, plan = inputs.prepare(config, workdir)
    run, plan = resume.start_or_resume(config, tiny.mesh(config), workdir, corpus, plan)
    return logical(checkpoint.flatten(run.state), plan), run, plan


def differences(workdir, shape, expected, **fields):
    """Names of arrays that are not what was saved; and of the rest of the run."""
    found, run, _ = loaded(workdir, shape, **fields)
    wrong = [name for name in expected if found[name].tobytes() != expected[name].tobytes()]
    contents = checkpoint.read_contents(workdir / "checkpoints" / str(BEFORE))
    wrong += ["step"] if run.step != BEFORE else []
    wrong += ["data"] if run.batches.get_state() != contents.extra["data_state"] else []
    return wrong + (["names"] if found.keys() != expected.keys() else [])


def test_every_mesh_loads_every_bit(source):
    """Parameters, both moments, step, key, data position; then from there to every other mesh."""
    half = source[0]
    expected = harness.arrays(half, BEFORE)
    assert {"key", "bad_steps"} < expected.keys()
    wrong = {shape: differences(half, shape, expected) for shape in SHAPES}
    harness.told(len(SHAPES), sum(map(bool, wrong.values())), not any(wrong.values()), "mesh, load")
    assert not any(wrong.values()), wrong


@pytest.mark.parametrize(
    "stored", ["moved", "twelve", *(pytest.param(n, marks=LONG) for n in ("contiguous", "copies"))]
)
def test_every_placement_loads_on_every_mesh(stored, source, tmp_path):
    """With replicas too, and where slots cannot be split evenly over the new devices."""
    half, _, _ = source
    expected = harness.arrays(half, BEFORE)
    rng = np.random.default_rng(4)
    slots_LP = {
        "contiguous": np.arange(8),
        "moved": rng.permutation(8),
        "copies": np.array([0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 0, 1, 2, 3]),
        "twelve": np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]),
    }[stored][None].astype(np.int32)
    plan = Plan(Placement(slots_LP, 8, 2))
    plan.write(tmp_path / "plan.json")
    permute.apply_to_checkpoint(tmp_path / "plan.json", half, tmp_path / "run")
    shapes = ((2, 2), (8, 1), (1, 8)) if stored != "moved" else SHAPES
    wrong = {shape: differences(tmp_path / "run", shape, expected) for shape in shapes}
    assert not any(wrong.values()), wrong

    # and to a plan of the config's own
    placement = tiny.random_placement(5)
    named = Plan(Placement(placement.physical_to_logical_LP[:1], 8, 4))
    named.write(tmp_path / "named.json")
    fields = {"placement": str(tmp_path / "named.json")}
    assert not differences(tmp_path / "run", (2, 4), expected, **fields)
    assert loaded(tmp_path / "run", (2, 4), **fields)[2].placement == named.placement


def test_without_a_plan_of_its_own_a_run_keeps_that_of_its_checkpoint(source, tmp_path):
    plan = Plan(Placement(np.arange(8)[None, ::-1].astype(np.int32), 8, 4), provenance={"a": 1})
    plan.write(tmp_path / "plan.json")
    permute.apply_to_checkpoint(tmp_path / "plan.json", source[0], tmp_path / "run")
    assert loaded(tmp_path / "run", (2, 4))[2] == plan
    on_two = loaded(tmp_path / "run", (4, 2))[2].placement
    np.testing.assert_array_equal(
        on_two.physical_to_logical_LP, plan.placement.physical_to_logical_LP
    )


def test_a_run_numbers_the_layers_of_its_checkpoint_as_the_model_does():
    placement, none = tiny.random_placement(1), Plan(tiny.contiguous(), (3, 5))
    kept = resume._in_order(Plan(placement, (7, 8), provenance={"a": 1}), none, 1)
    assert kept == Plan(placement, (3, 5), provenance={"a": 1})
    two = resume._in_order(Plan(placement, (7, 8)), Plan(tiny.contiguous(2), (3, 5)), 1)
    assert (two.layer_ids, two.placement.num_devices) == ((3, 5), 2)


@pytest.mark.parametrize(
    "shape", [pytest.param(s, marks=() if s == (8, 1) else LONG) for s in SHAPES]
)
def test_a_run_goes_on_on_another_mesh(shape, source, seen, tmp_path):
    half, whole, batches = source
    workdir = tmp_path / "run"
    shutil.copytree(half, workdir)
    seen.clear()
    train(config_of(shape, train__num_steps=STEPS), workdir)
    lost = int(seen != batches[BEFORE:])  # none again, none left out
    ours, theirs = (metrics.read(w / "metrics.jsonl")[1] for w in (workdir, whole))
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    deviation = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=True))
    same = deviation <= 1e-6 and not any(
        a["loss"] != b["loss"] for a, b in zip(ours[:BEFORE], theirs, strict=False)
    )
    harness.told(1, lost, same, f"mesh, {shape[0]} x {shape[1]} (loss within {deviation:.1e})")
    assert (lost, same) == (0, True)
    if shape == (2, 4):
        assert deviation == 0


def test_batches_do_not_repeat_within_an_epoch(source):
    rows = [row for batch in source[2] for row in np.split(np.frombuffer(batch, np.int32), 8)]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(rows, 2))
