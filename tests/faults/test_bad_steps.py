"""Steps that are not finite or spike: nothing changes, the batch is kept, and can be run again."""

import dataclasses
import io
import math
import zipfile

import grain
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import data, metrics
from moe_jax.errors import Refused
from moe_jax.train import inputs, loop, replay, spikes
from moe_jax.train import step as step_lib
from moe_jax.train.bad_batch import BadBatch
from tests import tiny
from tests.faults import harness

LONG = (pytest.mark.faults, pytest.mark.timeout(7200))
# first token of a batch that makes its step bad -> what is added to its loss, in losses
MARKS = {7: math.nan, 8: math.inf, 9: 30.0}
KINDS = {"nan": (7,), "inf": (8,), "spike": (9,), "nan, inf, spike": (7, 8, 9)}


class Poisoned(grain.DatasetIterator):
    """The batches of a run; those of some steps are made to start with a mark."""

    def __init__(self, batches, marks):
        super().__init__()
        self._batches, self._marks, self._step = batches, marks, 0

    def __next__(self):
        window_BS1 = next(self._batches)
        self._step += 1
        window_BS1[:, 0] = 1
        window_BS1[0, 0] = self._marks.get(self._step, 1)
        return window_BS1

    def get_state(self):
        return {"inner": self._batches.get_state(), "step": self._step}

    def set_state(self, state):
        self._batches.set_state(state["inner"])
        self._step = state["step"]


class WithoutBad(Poisoned):
    """The same without the batches that are bad."""

    def __next__(self):
        while True:
            window_BS1 = super().__next__()
            if window_BS1[0, 0] == 1:
                return window_BS1


@pytest.fixture
def poison(monkeypatch):
    """Makes chosen steps bad: a mark for each."""
    batches, cross_entropy = data.batches, step_lib.cross_entropy
    build = step_lib.transformer.build_forward

    def install(marks, kind=Poisoned):
        monkeypatch.setattr(data, "batches", lambda *a: kind(batches(*a), marks))
        marked = {}

        def bad(logits_BSV, target_BS):
            loss = cross_entropy(logits_BSV, target_BS)
            added = sum(jnp.where(marked["first"] == m, v, 0.0) for m, v in MARKS.items())
            return loss + added * loss

        def build_forward(*args, **kwargs):
            forward = build(*args, **kwargs)

            def run(model, token_BS, table):
                marked["first"] = token_BS[0, 0]
                return forward(model, token_BS, table)

            return run

        monkeypatch.setattr(step_lib, "cross_entropy", bad)
        monkeypatch.setattr(step_lib.transformer, "build_forward", build_forward)

    with pytest.MonkeyPatch.context() as monkeypatch:
        yield install


def train(config, workdir):
    corpus, plan = inputs.prepare(config, workdir)
    loop.train(config, workdir, corpus, plan)


def config_of(steps, **fields):
    return tiny.config(
        mesh={"data": 1, "expert": 1},  # compiles in a fraction of the time
        model__dispatch="local",
        model__num_layers=1,
        train__num_steps=steps,
        train__checkpoint_every=steps,
        train__eval_every=steps,
        train__max_bad_steps=3,
        **fields,
    )


def marks_of(kind, num_steps):
    """Steps that are bad, with their marks: from the tenth on, when the window is full."""
    rng = np.random.default_rng(3)
    steps = sorted(rng.choice(np.arange(10, num_steps, 2), num_steps // 8, replace=False).tolist())
    return {step: KINDS[kind][i % len(KINDS[kind])] for i, step in enumerate(steps)}


@pytest.mark.parametrize(
    ("kind", "num_steps"),
    [
        ("nan, inf, spike", 24),
        *(pytest.param(kind, 400, marks=LONG) for kind in ("nan", "inf", "spike")),
    ],
)
def test_bad_steps(kind, num_steps, poison, tmp_path, monkeypatch, capsys):
    """The run is bit by bit the one whose data does not have these batches; one is run again."""
    marks = marks_of(kind, num_steps)
    fields = {"train__spike_sigma": 20.0, "train__spike_window": 8}
    config = config_of(num_steps, **fields)
    poison(marks)
    train(config, tmp_path / "bad")
    path = tmp_path / "bad" / "bad_steps" / f"{min(marks)}.npz"
    assert f"--replay={path}" in capsys.readouterr().err
    if kind == "nan, inf, spike":
        check_replay(config, tmp_path / "bad", path, capsys)

    poison(marks, kind=WithoutBad)
    make = step_lib.optimizer_lib.make  # learning rates follow the number of steps: of the whole
    monkeypatch.setattr(step_lib.optimizer_lib, "make", lambda c, _: make(c, num_steps))
    left = num_steps - len(marks)
    train(config_of(left, **fields), tmp_path / "without")
    rows = metrics.read(tmp_path / "bad" / "metrics.jsonl")[1]
    good = [(r["loss"], r["grad_norm"]) for r in rows if r["step"] not in marks]
    expected = metrics.read(tmp_path / "without" / "metrics.jsonl")[1]
    ours = harness.arrays(tmp_path / "bad", num_steps)
    theirs = harness.arrays(tmp_path / "without", left)
    identical = good == [(r["loss"], r["grad_norm"]) for r in expected] and all(
        ours[name].tobytes() == theirs[name].tobytes() for name in ours if name != "bad_steps"
    )
    kept = {int(path.stem) for path in (tmp_path / "bad" / "bad_steps").iterdir()}
    lost = len(marks.keys() ^ kept)
    harness.told(len(marks), lost, identical, kind)
    assert (lost, identical) == (0, True)
    assert int(ours["bad_steps"]) == len(marks)


def check_replay(config, workdir, path, capsys):
    """The first bad step, a NaN, again: from the beginning, as no checkpoint is before it."""
    batch = inputs.bad_batch(config, path)
    corpus, plan = inputs.prepare(config, workdir)
    assert replay.replay(config, workdir, corpus, plan, batch)
    said = capsys.readouterr().out
    assert "the batch is the one that the data has for this step: yes" in said
    assert "loss and grad norm have the bits that they had: yes" in said
    assert "blocks.attention_norm_D: 16 values are not finite" in said


def test_files_that_are_no_bad_step_are_refused(tmp_path):
    config = config_of(8)
    batch = BadBatch(3, tiny.tokens(8, 17), math.nan, 1.0, math.inf)
    path = batch.write(tmp_path)
    found = inputs.bad_batch(config, path)
    np.testing.assert_array_equal(found.window_BS1, batch.window_BS1)
    other = tiny.config(model__num_layers=1, data__seq_len=8)
    with pytest.raises(Refused, match="must hold a batch"):
        inputs.bad_batch(other, path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(Refused, match="is not a bad step"):
        inputs.bad_batch(config, path)
    np.savez(path, step=np.array([{}], object))
    with pytest.raises(Refused, match="is not a bad step"):
        inputs.bad_batch(config, path)


def hostile(kind, good):
    """The bytes of an archive that holds `good`, but for what is wrong with it."""
    file = io.BytesIO()
    arrays = dataclasses.asdict(good)
    if kind == "a step that is infinite":
        np.savez(file, **arrays | {"step": math.inf})
    elif kind == "numbers that are arrays":
        np.savez(file, **arrays | {"loss": np.zeros(3)})
    elif kind == "an array missing":
        np.savez(file, step=3)
    elif kind == "nothing much, unpacked much":
        np.savez_compressed(file, **arrays | {"window_BS1": np.zeros(2**25, np.int32)})
    else:
        np.savez_compressed(file, **arrays)
    data = bytearray(file.getvalue())
    entry = zipfile.ZipFile(file).getinfo("window_BS1.npy") if kind in BYTES else None
    if entry:  # in the local header and in the directory
        local, listed = entry.header_offset, data.rindex(b"window_BS1.npy") - 46
        at, value = BYTES[kind]
        start = local + 30 + sum(data[local + 26 : local + 30 : 2])  # sizes below 256
        for place in [start] if at is None else [local + at, listed + at + 2]:
            data[place] = value
    return bytes(data)


# kind -> a byte of the local header, or None for the first of the packed bytes; what it becomes
BYTES = {"encrypted": (6, 1), "packed in an unknown way": (8, 77), "damaged": (None, 7)}


@pytest.mark.parametrize(
    "kind",
    [
        *("a step that is infinite", "numbers that are arrays", "an array missing"),
        *("nothing much, unpacked much", *BYTES),
    ],
)
def test_archives_that_lie_are_refused(kind, tmp_path):
    path = tmp_path / "3.npz"
    path.write_bytes(hostile(kind, BadBatch(3, tiny.tokens(8, 17), math.nan, 1.0, math.inf)))
    with pytest.raises(Refused, match=r"--replay = .*is not a bad step"):
        inputs.bad_batch(config_of(8), path)


def test_a_header_that_claims_more_than_there_is_allocates_nothing(tmp_path):
    header = io.BytesIO()
    claimed = {"descr": "<i4", "fortran_order": False, "shape": (1 << 46,)}
    np.lib.format.write_array_header_1_0(header, claimed)
    with zipfile.ZipFile(tmp_path / "3.npz", "w") as archive:
        for field in dataclasses.fields(BadBatch):
            archive.writestr(f"{field.name}.npy", header.getvalue() + bytes(8))
    with pytest.raises(Refused, match=r"is not a bad step .*bytes claimed, 8 present"):
        inputs.bad_batch(config_of(8), tmp_path / "3.npz")


def test_the_limit_is_k_deviations_above_the_last_good_losses():
    rng = np.random.default_rng(0)
    losses = rng.normal(3, 0.1, 20).astype(np.float32)
    recent = spikes.Recent.empty(8)
    for i, loss in enumerate(losses):
        window = losses[max(0, i - 8) : i]
        expected = window.mean() + 4 * window.std() if i >= 8 else np.inf
        assert float(recent.limit(4.0)) == pytest.approx(expected, rel=1e-6)
        assert float(recent.limit(0.0)) == np.inf
        recent = recent.with_loss(jnp.float32(loss))


def test_losses_that_have_settled_leave_room():
    recent = spikes.Recent.empty(4)
    for _ in range(4):
        recent = recent.with_loss(jnp.float32(2.0))
    assert float(recent.limit(5.0)) == pytest.approx(2.0 * (1 + 5 * spikes.SMALLEST_DEVIATION))
