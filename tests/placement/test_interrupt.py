"""Ctrl-C: what is written, what is said, and that the second one ends the process at once."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.placement import __main__ as command_line
from moe_jax.placement import solve, spare, start, topology
from moe_jax.placement.commands import homes as homes_command
from moe_jax.placement.commands import interrupt
from moe_jax.placement.commands import solve as solve_command
from moe_jax.placement.homes import joint
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.placement.progress import Ticker
from moe_jax.placement.solution import Interrupted, Progress
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib

# A process as a terminal starts it: Ctrl-C arrives. It tells its progress ten times a second.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from moe_jax.placement import __main__, progress
progress.TICK = 0.1
sys.exit(__main__.main(sys.argv[1:]))
"""
# The same, but nothing is raised in the search: as inside an integer program of HiGHS.
DEAF = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from moe_jax.placement import __main__, solve
def deaf(*_):
    signal.signal(signal.SIGINT, lambda *_: None)
    print("deaf", file=sys.stderr, flush=True)
    time.sleep(50)
solve.solve_problem = deaf
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.fixture
def trace_path(tmp_path):
    trace = synthetic.realistic(
        num_tokens=4000, num_layers=6, num_experts=16, top_k=2, seed=0, num_sequences=20
    )
    trace_lib.save(trace, tmp_path / "t.npz")
    return tmp_path / "t.npz"


class Interrupting:
    """A progress callback that raises as Ctrl-C does, when `stage` comes for the `nth` time."""

    def __init__(self, stage: str, nth: int = 1):
        self.stage, self.left, self.last = stage, nth, None

    def __call__(self, progress: Progress) -> None:
        self.last = progress
        self.left -= progress.stage == self.stage
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["greedy", "bound", "search"])
@pytest.mark.parametrize("objective", ["exflow", "rows", "seconds"])
def test_the_best_so_far_travels_with_the_interrupt(trace_path, objective, stage):
    problem = Problem(trace_lib.load(trace_path), topology.flat(4), objective)
    tell = Interrupting(stage, nth=2 if stage == "search" else 1)
    with pytest.raises(Interrupted) as stopped:
        solve.solve_problem(problem, 0, 10.0, tell)
    placement, report = stopped.value.solution
    assert report.interrupted
    assert not report.finished
    assert "interrupted" in report.note
    assert report.objective == tell.last.objective == problem.value(placement.device_LE)
    assert report.bound <= report.objective <= report.greedy < np.inf
    json.dumps(report.to_json(), allow_nan=False)


def test_the_load_cap_holds_in_what_is_left(trace_path):
    trace = trace_lib.load(trace_path)
    problem = Problem(trace, topology.flat(4), "rows", load_cap=LoadCap(1.2, relative=True))
    with pytest.raises(Interrupted) as stopped:
        solve.solve_problem(problem, 0, 10.0, Interrupting("greedy"))
    assert problem.all_allowed(stopped.value.solution.placement.device_LE)


def test_before_there_is_a_placement_it_stays_ctrl_c(trace_path, monkeypatch):
    def construct(problem):
        raise KeyboardInterrupt

    monkeypatch.setattr(solve, "constructed", construct)
    problem = Problem(trace_lib.load(trace_path), topology.flat(4), "rows")
    with pytest.raises(KeyboardInterrupt) as stopped:
        solve.solve_problem(problem, 0, 10.0)
    assert not isinstance(stopped.value, Interrupted)


@pytest.mark.parametrize("stage", ["search", "replicas"])
def test_replicas_leave_a_plan_with_all_slots(trace_path, stage):
    problem = Problem(trace_lib.load(trace_path), topology.flat(4), "rows", num_slots=20)
    with pytest.raises(Interrupted) as stopped:
        solve.solve_problem(problem, 0, 2.0, Interrupting(stage))
    placement, report = stopped.value.solution
    assert placement.num_slots == 20
    assert report.interrupted
    assert report.objective == pytest.approx(problem.value_of(placement))
    first = spare.valued(problem, spare.balanced(problem)).value
    assert report.objective <= first * (1 + 1e-12)


def test_history_holds_every_improvement_and_the_bound(trace_path):
    problem = Problem(trace_lib.load(trace_path), topology.flat(4), "rows")
    report = solve.solve_problem(problem, 0, 2.0).report
    second_I, value_I, bound_I = np.array(report.history).T
    assert (np.diff(second_I) >= 0).all()
    assert (np.diff(value_I) <= 0).all()
    assert (np.diff(bound_I) >= 0).all()
    assert (value_I[0], value_I[-1], bound_I[-1]) == (
        report.greedy,
        report.objective,
        report.bound,
    )
    assert bound_I[-1] > 0
    assert ((np.diff(value_I) < 0) | (np.diff(bound_I) > 0)).all()


def interrupted_search(monkeypatch, stage: str = "search") -> None:
    """`solve` of this process gets Ctrl-C when `stage` begins."""
    solve_problem = solve.solve_problem
    monkeypatch.setattr(
        solve_command.solve_lib,
        "solve_problem",
        lambda problem, seed, limit, tell: solve_problem(problem, seed, limit, Interrupting(stage)),
    )


def test_solve_writes_and_marks_what_it_found(trace_path, tmp_path, monkeypatch, capsys):
    interrupted_search(monkeypatch)
    out = tmp_path / "p.json"
    words = ["solve", str(trace_path), "--devices=4", f"--out={out}"]
    assert command_line.main(words) == 130
    captured = capsys.readouterr()
    assert "(interrupted: the best so far)" in captured.out
    assert captured.err.endswith(f"interrupted: wrote the best plan so far to {out}\n")
    assert Plan.read(out).provenance["interrupted"] is True
    assert command_line.main([*words, "--json"]) == 130
    answer = json.loads(capsys.readouterr().out)
    assert answer["interrupted"] is True
    assert answer["plan_digest"] == Plan.read(out).digest
    assert answer["held_out"] is not None


def test_a_search_that_ends_is_not_marked(trace_path, tmp_path, capsys):
    out = tmp_path / "p.json"
    words = ["solve", str(trace_path), "--devices=4", f"--out={out}", "--time-limit=1", "--json"]
    assert command_line.main(words) == 0
    assert json.loads(capsys.readouterr().out)["interrupted"] is False
    assert "interrupted" not in Plan.read(out).provenance


def test_ctrl_c_while_judging_leaves_the_plan(trace_path, tmp_path, monkeypatch, capsys):
    def judge(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(solve_command.evidence, "judge", judge)
    out = tmp_path / "p.json"
    words = ["solve", str(trace_path), "--devices=4", f"--out={out}", "--time-limit=0"]
    assert command_line.main(words) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"interrupted: wrote {out}, not judged\n"
    assert "interrupted" not in Plan.read(out).provenance  # the search had ended


def test_ctrl_c_while_writing_keeps_the_file_that_is_there(
    trace_path, tmp_path, monkeypatch, capsys
):
    def fsync(_):
        raise KeyboardInterrupt

    out = tmp_path / "p.json"
    before = Plan(Placement.contiguous(6, 16, 4))
    before.write(out)
    monkeypatch.setattr("os.fsync", fsync)
    words = ["solve", str(trace_path), "--devices=4", f"--out={out}", "--time-limit=0"]
    monkeypatch.setattr(solve_command.options_lib, "outputs_ok", lambda options: None)
    assert command_line.main(words) == 130
    assert capsys.readouterr().err == "interrupted: nothing written\n"
    assert Plan.read(out) == before
    assert sorted(tmp_path.iterdir()) == [out, trace_path]


@pytest.mark.parametrize("stage", ["plan: search", "plan: judging", "null test: search"])
def test_verdict_writes_the_plan_that_it_would_have_judged(
    stage, trace_path, tmp_path, monkeypatch, capsys
):
    told, real = [], Ticker.tell

    def tell(self, progress):
        told.append(progress.stage)
        real(self, progress)
        if progress.stage == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ticker, "tell", tell)
    out = tmp_path / "p.json"
    words = ["verdict", str(trace_path), "--devices=4", "--time-limit=1", f"--out={out}"]
    code, captured = command_line.main(words), capsys.readouterr()
    assert code == 130
    assert captured.out == ""
    assert told[-1] == stage
    assert captured.err.endswith(f"wrote the best plan so far to {out}, not judged\n")
    plan = Plan.read(out)
    assert plan.provenance["interrupted"] is True
    assert "verdict" not in plan.provenance
    halves = trace_lib.split(trace_lib.load(trace_path), 0)
    problem = Problem(halves.plan_half, topology.flat(4))
    contiguous = Placement.contiguous(6, 16, 4)
    assert problem.value_of(plan.placement) < problem.value_of(contiguous)


@pytest.mark.parametrize("where", ["plan", "numbers", "experts", "rules"])
def test_homes_leave_the_plan(where, trace_path, tmp_path, monkeypatch, capsys):
    """In the plan that the search starts from, before and after its first result, while judging."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    if where == "plan":
        interrupted_search(monkeypatch)
    elif where == "numbers":
        monkeypatch.setattr(joint, "numbered", stop)
    elif where == "experts":
        monkeypatch.setattr(joint, "_moved", stop)
    else:
        monkeypatch.setattr(homes_command.report, "study", stop)
    plan, rules = tmp_path / "p.json", tmp_path / "h.json"
    words = ["homes", str(trace_path), "--devices=4", "--time-limit=3", f"--out={rules}"]
    assert command_line.main([*words, f"--out-plan={plan}"]) == 130
    captured = capsys.readouterr()
    best = "" if where == "rules" else "the best plan so far to "
    assert captured.out == ""
    assert captured.err.endswith(f"interrupted: wrote {best}{plan}, no homes for it\n")
    assert not rules.exists()
    origin = Plan.read(plan).provenance
    assert origin.get("interrupted", False) is (where != "rules")
    problem = Problem(trace_lib.split(trace_lib.load(trace_path), 0).plan_half, topology.flat(4))
    value = problem.value_of(Plan.read(plan).placement)
    assert value < problem.value_of(Placement.contiguous(6, 16, 4))
    if where == "experts":  # after numbers, its homes counted in
        found = origin["homes"]
        assert found["value"] == min(found["seated"], found["numbered"])
        assert origin["objective"] == found["value"]

    assert command_line.main(words) == 130
    assert capsys.readouterr().err.endswith("interrupted: nothing written\n")


@pytest.mark.parametrize("command", ["compare", "verdict"])
def test_other_commands_write_nothing(command, trace_path, monkeypatch, capsys):
    def tell(self, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_jax.placement.progress.Ticker.tell", tell)
    assert command_line.main([command, str(trace_path), "--devices=4", "--time-limit=2"]) == 130
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("interrupted: nothing written\n")


def started(program: str, *words) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen, word: str) -> None:
    for line in process.stderr:
        if word in line:
            return
    raise AssertionError(f"ended with {process.wait()} before it said {word!r}")


def test_a_real_process_writes_the_best_so_far(trace_path, tmp_path):
    out = tmp_path / "p.json"
    process = started(PROGRAM, "solve", trace_path, "--devices=4", f"--out={out}", "--json")
    with process:
        wait_for(process, "gap")  # a line of progress: there is a plan
        process.send_signal(signal.SIGINT)
        answer, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert interrupt.ONCE_MORE in said
    assert "Traceback" not in said
    assert said.endswith(f"interrupted: wrote the best plan so far to {out}\n")
    assert json.loads(answer)["plan_digest"] == Plan.read(out).digest
    assert Plan.read(out).provenance["interrupted"] is True
    assert sorted(tmp_path.iterdir()) == [out, trace_path]


def test_the_second_ctrl_c_ends_a_process_that_does_not_listen(trace_path, tmp_path):
    process = started(DEAF, "solve", trace_path, "--devices=4", f"--out={tmp_path / 'p.json'}")
    with process:
        wait_for(process, "deaf")
        process.send_signal(signal.SIGINT)
        wait_for(process, interrupt.ONCE_MORE)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "interrupted: ended at once\n"
    assert sorted(tmp_path.iterdir()) == [trace_path]


# Ctrl-C reaches the process while it imports a module; started as `python -m` and `moe-place` do.
IMPORTING = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
module, way, sys.argv = sys.argv[1], sys.argv[2], ["moe-place", *sys.argv[3:]]
if way == "-m":
    runpy.run_module("moe_jax.placement", run_name="__main__", alter_sys=True)
from moe_jax.placement import start
sys.exit(start.main())
"""


@pytest.mark.parametrize("way", ["-m", "moe-place"])
@pytest.mark.parametrize(
    "module", ["numpy", "scipy.optimize", "moe_jax.placement.commands.verdict"]
)
def test_ctrl_c_while_python_imports_is_one_line(module, way, trace_path, tmp_path):
    process = started(
        IMPORTING, module, way, "solve", trace_path, "--devices=4", f"--out={tmp_path / 'p.json'}"
    )
    with process:
        answer, said = process.communicate(timeout=60)
    assert (process.returncode, answer, said) == (130, "", "interrupted: nothing written\n")
    assert sorted(tmp_path.iterdir()) == [trace_path]


def test_a_background_job_stays_deaf_to_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        start.guard()
        start.ready()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
