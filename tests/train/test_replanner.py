"""Experts that move while the model trains: the curve is that of a run whose experts stay."""

import jax
import numpy as np
import pytest

from moe_jax import checkpoint, metrics, permute, replan
from moe_jax.errors import Refused
from moe_jax.placement import move as move_lib
from moe_jax.placement import topology as topology_lib
from moe_jax.placement.plan import Placement, Plan
from moe_jax.train import inputs, replanner, resume
from tests import tiny
from tests.train import test_loop

STEPS = 14
DEVICES = 2
HERE = tiny.contiguous(DEVICES)
OFTEN = {"every": 4, "record_steps": 4, "seconds": 0.05}


def config(combine="reproducible", replan=None, **more):
    return tiny.config(
        model__combine=combine,
        model__expert_bias=True,
        train__num_steps=STEPS,
        train__checkpoint_every=7,
        train__eval_every=7,
        mesh={"data": 2, "expert": DEVICES},
        **({"replan": replan} if replan else {}),
        **more,
    )


@pytest.fixture(scope="module")
def stays(tmp_path_factory):
    """A run whose experts stay."""
    workdir = tmp_path_factory.mktemp("stays")
    with jax.numpy_dtype_promotion("standard"):
        test_loop.train(config(), workdir)
    return workdir


@pytest.fixture
def at_once(monkeypatch):
    """Every plan is taken as worth it, and none is waited for: runs are the same each time."""
    decide = replan.decide

    def adopted(setting, before, recorded, seed=0, progress=None):
        found = decide(setting, before, recorded, seed, progress)
        # another plan each time, whatever the search found
        other = Plan(tiny.random_placement(seed, before.num_devices))
        return replan.Decision(**{**vars(found), "adopt": True, "plan": other})

    monkeypatch.setattr(replan, "decide", adopted)
    start = replan.Background.start

    def waited(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self._thread.join()

    monkeypatch.setattr(replan.Background, "start", waited)


def moves(workdir):
    rows = metrics.read(workdir / "metrics.jsonl")[1]
    return [(row["step"], row["moved_experts"]) for row in rows if "moved_experts" in row]


def test_the_curve_keeps_every_bit(stays, tmp_path, at_once, capsys):
    workdir = tmp_path / "moves"
    test_loop.train(config(replan=OFTEN), workdir)
    assert test_loop.curve(workdir) == test_loop.curve(stays)
    # recorded until step 4, 8, 12; read and planned one step later; moved before the next
    assert [step for step, _ in moves(workdir)] == [6, 10, 14]
    assert capsys.readouterr().out.count("training stood still for") >= 3

    before, rows = HERE, metrics.read(workdir / "metrics.jsonl")[1]
    for step in (5, 9, 13):
        after = Plan.read(workdir / "plans" / f"{step}.json").placement
        moved = int((before.device_LE != after.device_LE).sum())
        assert rows[step]["moved_experts"] == moved  # the row of the next step
        values = 3 * 16 * 24 + 24 + 24 + 16  # of an expert, with two moments each
        assert rows[step]["moved_bytes"] == moved * 3 * values * 4
        before = after
    _same_model(stays, workdir, before)


def _same_model(stays, workdir, last):
    """What is saved last is under the last plan, and holds the same parameters and moments."""
    folders = [folder / "checkpoints" / str(STEPS) for folder in (stays, workdir)]
    contents = [checkpoint.read_contents(folder) for folder in folders]
    assert contents[1].plan.placement == last != HERE
    arrays, moved = (
        checkpoint.restore_numpy(folder, held)
        for folder, held in zip(folders, contents, strict=True)
    )
    back = permute.apply_to_arrays(moved, contents[1].arrays, last, HERE)
    assert back.keys() == arrays.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.slow
def test_exact_keeps_every_bit(tmp_path, at_once):
    test_loop.train(config("exact"), tmp_path / "stays")
    test_loop.train(config("exact", OFTEN), tmp_path / "moves")
    assert test_loop.curve(tmp_path / "moves") == test_loop.curve(tmp_path / "stays")
    _same_model(tmp_path / "stays", tmp_path / "moves", _plan(tmp_path / "moves", 13))


def _plan(workdir, step):
    return Plan.read(workdir / "plans" / f"{step}.json").placement


class Killed(BaseException):
    pass


def test_a_run_that_dies_after_a_move_goes_on_from_its_checkpoint(
    stays, tmp_path, at_once, monkeypatch, capsys
):
    """Step 7 is saved under the plan of step 5; the run dies in the move after step 9.

    It goes on under the plan that was stored, not under the one that its config began with, which
    is said. The plan of step 9 is none of this run.
    """
    Plan(tiny.random_placement(77, DEVICES)).write(tmp_path / "plan.json")
    named = config(replan=OFTEN, placement=str(tmp_path / "plan.json"))
    adopt = replanner.Replanner.adopt

    def dies(self, run):
        cost = adopt(self, run)
        if run.step == 9:
            raise Killed
        return cost

    monkeypatch.setattr(replanner.Replanner, "adopt", dies)
    workdir = tmp_path / "run"
    with pytest.raises(Killed):
        test_loop.train(named, workdir)
    (step,) = checkpoint.steps(workdir / "checkpoints")
    stored = checkpoint.read_contents(workdir / "checkpoints" / str(step)).plan.placement
    assert stored == _plan(workdir, 5)

    began_with = []
    resumed = replanner.Replanner.__init__

    def begins(self, *args):
        resumed(self, *args)
        began_with.append((args[-1].placement, plans()))

    def plans():
        return sorted(path.name for path in (workdir / "plans").iterdir())

    assert plans() == ["5.json", "9.json"]
    monkeypatch.setattr(replanner.Replanner, "__init__", begins)
    monkeypatch.setattr(replanner.Replanner, "adopt", adopt)
    test_loop.train(named, workdir)
    assert began_with == [(stored, ["5.json"])]
    assert "moe_jax.placement apply puts steps under it" in capsys.readouterr().out
    assert test_loop.curve(workdir) == test_loop.curve(stays)


def test_a_plan_that_cannot_be_written_ends_nothing(stays, tmp_path, at_once, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "plans").write_text("no folder")
    test_loop.train(config(replan=OFTEN), workdir)
    assert capsys.readouterr().err.count("training goes on, the next checkpoint has the plan") == 3
    assert len(moves(workdir)) == 3
    assert test_loop.curve(workdir) == test_loop.curve(stays)
    last = checkpoint.read_contents(workdir / "checkpoints" / str(STEPS)).plan.placement
    _same_model(stays, workdir, last)


def test_plans_are_made_from_what_the_model_chose(tmp_path, monkeypatch, capsys):
    """What was recorded is what the dispatch counted in these steps; a failed search ends
    nothing."""
    seen = []

    def kept(setting, before, recorded, seed=0, progress=None):
        seen.append((seed, before, recorded, setting.interval))
        raise Refused("plan", 0, "none here", "go on")

    monkeypatch.setattr(replan, "decide", kept)
    test_loop.train(config(replan=OFTEN), tmp_path / "run")
    assert "no new plan (plan = 0: none here" in capsys.readouterr().err
    assert not moves(tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == STEPS
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")[1]
    # after the last plan one step is left to serve
    served = [(seed, interval) for seed, _, _, interval in seen]
    assert served == [(5, 4), (9, 4), (13, 1)][: len(seen)]
    seed, before, recorded, _ = seen[0]
    assert len(recorded) == 4
    for step, trace in enumerate(recorded, start=seed - 4):
        assert trace.num_tokens == 8 * 16
        device_TLK = before.device_LE[np.arange(2)[:, None], trace.expert_ids_TLK]
        load_LM = np.stack(
            [np.bincount(d.ravel(), minlength=DEVICES) for d in device_TLK.swapaxes(0, 1)]
        )
        imbalance = float((load_LM.max(1) / load_LM.mean(1)).mean())
        assert rows[step - 1]["load_imbalance"] == pytest.approx(imbalance, rel=1e-6)


def test_a_plan_that_waits_to_be_adopted_is_not_replaced(tmp_path, monkeypatch):
    """Several processes adopt it a step after the first has found it."""
    nothing = move_lib.move(HERE, HERE, topology_lib.flat(DEVICES), 0)
    first, second = (
        replan.Decision(adopt, "", Plan(HERE), 1, 1, 1, 1, 0, nothing, 0) for adopt in (True, False)
    )
    ready, begun = [first], []
    monkeypatch.setattr(replan.Background, "take", lambda self: ready.pop(0) if ready else None)
    monkeypatch.setattr(replan.Background, "start", lambda self, *_, **__: begun.append(self))
    run = object.__new__(resume.Run)  # nothing else of it is read
    run.step = 0
    planner = replanner.Replanner(config(), tiny.mesh(config()), tmp_path, run, Plan(HERE))
    planner._setting = None
    expert_LBSK = np.broadcast_to(np.arange(2, dtype=np.int16), (tiny.LAYERS, 8, 16, 2))
    planner._recorded = [expert_LBSK] * replan.LEAST_STEPS
    assert planner.found()
    ready.append(second)
    planner._begin(9)
    assert not planner.found()
    assert (planner._decision, ready, begun) == (first, [second], [])


@pytest.mark.slow
def test_copies_move_too(tmp_path, at_once, monkeypatch):
    monkeypatch.setattr(tiny, "random_placement", lambda seed, devices: _copies(seed))
    Plan(_copies(1)).write(tmp_path / "plan.json")
    plan = {"placement": str(tmp_path / "plan.json")}
    test_loop.train(config(**plan), tmp_path / "stays")
    test_loop.train(config(replan=OFTEN, **plan), tmp_path / "moves")
    assert moves(tmp_path / "moves")
    stays, moved = (test_loop.curve(tmp_path / name) for name in ("stays", "moves"))
    np.testing.assert_allclose(
        [row[1] for row in moved], [row[1] for row in stays], rtol=1e-5
    )  # sums over copies follow the copies


def _copies(seed) -> Placement:
    return tiny.replicated_placement(seed, DEVICES, slots=12)


def test_pins_that_cannot_be_are_refused_before_any_device_work(tmp_path):
    named = config(replan=OFTEN | {"pins": "0:1:0, 0:99:0"})
    with pytest.raises(Refused, match="experts go from 0 to 7") as refused:
        inputs.prepare(named, tmp_path / "run")
    assert refused.value.field == "replan.pins"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"replan": {"every": 3}}, "replan.every"),
        ({"replan": {"every": 8, "record_steps": 3}}, "replan.record_steps"),
        ({"replan": {"pins": "0:0:0"}}, "replan.pins"),
        ({"replan": {"every": -1}}, "replan.every"),
        ({"replan": {"min_gain": 1.0}}, "replan.min_gain"),
        ({"replan": {"every": 8}, "mesh": {"data": 8}}, "replan.every"),
        ({"replan": {"every": 8}, "model__dispatch": "shuffled"}, "replan.every"),
    ],
)
def test_wrong_fields_are_refused(fields, named):
    with pytest.raises(Refused) as refused:
        tiny.config(**fields)
    assert refused.value.field == named
