"""Steps that are not finite or spike: nothing changes, the batch is kept, and can be run again."""

import math

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import checkpoint, data, metrics
from moe_jax.errors import Refused
from moe_jax.train import loop, replay, spikes
from moe_jax.train import step as step_lib
from moe_jax.train.bad_batch import BadBatch
from tests import tiny
from tests.faults import harness

LONG = (pytest.mark.faults, pytest.mark.timeout(7200))
MARK = 7  # first token of a sequence that makes a step bad


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


class Poisoned(grain.DatasetIterator):
    """The batches of a run; some sequences are made to start with the mark."""

    def __init__(self, batches, steps):
        super().__init__()
        self._batches, self._steps, self._step = batches, steps, 0

    def __next__(self):
        window_BS1 = next(self._batches)
        self._step += 1
        window_BS1[:, 0] = 1
        window_BS1[0, 0] = MARK if self._step in self._steps else 1
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
            if window_BS1[0, 0] != MARK:
                return window_BS1


@pytest.fixture
def poison(monkeypatch):
    """Makes chosen steps bad: `value` is added to the loss of a batch with the mark."""
    batches, cross_entropy = data.batches, step_lib.cross_entropy
    build = step_lib.transformer.build_forward

    def install(steps, value, kind=Poisoned):
        monkeypatch.setattr(data, "batches", lambda *a: kind(batches(*a), set(steps)))
        marked = {}

        def bad(logits_BSV, target_BS):
            loss = cross_entropy(logits_BSV, target_BS)
            return loss + jnp.where(marked["first"] == MARK, value, 0.0) * loss

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
    corpus, plan = loop.prepare(config, workdir)
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


@pytest.mark.parametrize(("kind", "value"), [("nan", math.nan), ("inf", math.inf), ("spike", 30.0)])
@pytest.mark.parametrize("size", ["short", pytest.param("long", marks=LONG)])
def test_bad_steps(kind, value, size, poison, tmp_path):
    """The run is bit by bit the one whose data does not have these batches."""
    steps = {"short": 24, "long": 400}[size]
    if size == "short" and kind == "inf":
        pytest.skip("as nan; in the long form")
    first = 10  # a window must be full before a spike can be seen
    rng = np.random.default_rng(3)
    bad = sorted(rng.choice(np.arange(first, steps, 2), steps // 8, replace=False).tolist())
    spikes_on = {"train__spike_sigma": 20.0, "train__spike_window": 8}
    poison(bad, value)
    config = config_of(steps, **spikes_on)
    train(config, tmp_path / "bad")
    poison(bad, value, kind=WithoutBad)
    fewer = config_of(steps - len(bad), **spikes_on)
    # The learning rate follows the number of steps: of the run with all of them.
    optimizer = step_lib.optimizer_lib.make
    step_lib.optimizer_lib.make = lambda c, _: optimizer(c, steps)
    try:
        train(fewer, tmp_path / "without")
    finally:
        step_lib.optimizer_lib.make = optimizer
    rows = metrics.read(tmp_path / "bad" / "metrics.jsonl")[1]
    good = [(r["loss"], r["grad_norm"]) for r in rows if r["step"] not in bad]
    expected = metrics.read(tmp_path / "without" / "metrics.jsonl")[1]
    ours = harness.arrays(tmp_path / "bad", steps)
    theirs = harness.arrays(tmp_path / "without", steps - len(bad))
    identical = good == [(r["loss"], r["grad_norm"]) for r in expected] and all(
        ours[name].tobytes() == theirs[name].tobytes() for name in ours if name != "bad_steps"
    )
    kept = sorted(int(path.stem) for path in (tmp_path / "bad" / "bad_steps").iterdir())
    lost = len(set(bad) ^ set(kept))
    harness.told(len(bad), lost, identical, kind)
    assert (lost, identical) == (0, True)
    assert int(ours["bad_steps"]) == len(bad)


def test_a_bad_step_is_run_again(poison, tmp_path, capsys):
    config = config_of(8)
    poison([6], math.nan)
    train(config, tmp_path)
    path = tmp_path / "bad_steps" / "6.npz"
    assert f"--replay={path}" in capsys.readouterr().err
    batch = replay.read(config, path)
    corpus, plan = loop.prepare(config, tmp_path)
    assert replay.replay(config, tmp_path, corpus, plan, batch)
    said = capsys.readouterr().out
    assert "the batch is the one that the data has for this step: yes" in said
    assert "loss and grad norm have the bits that they had: yes" in said
    assert "blocks.attention_norm_D: 16 values are not finite" in said
    assert checkpoint.steps(tmp_path / "checkpoints") == [8]


def test_files_that_are_no_bad_step_are_refused(tmp_path):
    config = config_of(8)
    batch = BadBatch(3, tiny.tokens(8, 17), math.nan, 1.0, math.inf)
    path = batch.write(tmp_path)
    found = replay.read(config, path)
    np.testing.assert_array_equal(found.window_BS1, batch.window_BS1)
    other = tiny.config(model__num_layers=1, data__seq_len=8)
    with pytest.raises(Refused, match="must hold a batch"):
        replay.read(other, path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(Refused, match="is not a bad step"):
        replay.read(config, path)
    np.savez(path, step=np.array([{}], object))
    with pytest.raises(Refused, match="is not a bad step"):
        replay.read(config, path)


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
