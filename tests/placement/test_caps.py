"""Load caps in their three measures."""

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import __main__ as command_line
from moe_jax.placement import cost, solve, topology
from moe_jax.placement.limits.caps import LoadCap
from moe_jax.placement.plan import Plan
from moe_jax.placement.problem import Problem
from moe_jax.placement.seconds import Work
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib

TRACE = synthetic.realistic(
    num_tokens=500, num_layers=2, num_experts=12, top_k=2, seed=3, num_sequences=6
)
WORK = Work(batch_tokens=2000)


def problem(cap: LoadCap | None, num_slots: int | None = None) -> Problem:
    return Problem(TRACE, topology.flat(4), "rows", work=WORK, load_cap=cap, num_slots=num_slots)


def most_rows(placement) -> float:
    """Rows of the fullest device in a step, counted token by token."""
    return 4 * cost.computed_LM(TRACE.expert_ids_TLK, placement).max()


def test_caps_are_read_as_they_are_written():
    for text, cap in (
        ("1.1", LoadCap(1.1)),
        ("1.25x", LoadCap(1.25, relative=True)),
        ("9000rows", LoadCap(9000.0, rows=True)),
        ("0.5rows", LoadCap(0.5, rows=True)),
    ):
        assert LoadCap.parse(text) == cap
        assert str(cap) == text
    for text in ("rows", "0rows", "-5rows", "infrows", "nanrows", "0.9", "0.9x", "9000 rowsx", "x"):
        with pytest.raises(Refused, match="load_cap"):
            LoadCap.parse(text)


def test_rows_of_a_step_are_the_same_cap_as_their_share_of_the_mean():
    mean_L = problem(None).load_LE.sum(axis=1) / 4
    rows = problem(LoadCap(4 * 1.3 * mean_L[0], rows=True))
    assert rows.cap_L == pytest.approx(np.full(2, 1.3 * mean_L[0]))
    assert problem(LoadCap(1.3)).cap_L[0] == pytest.approx(rows.cap_L[0])


@pytest.mark.parametrize(("num_slots", "over_mean"), [(None, 1.35), (16, 1.15)])
def test_no_device_has_more_rows_than_the_cap(num_slots, over_mean):
    loose = solve.solve_problem(problem(None, num_slots), 0, time_limit=2).placement
    cap = 1000 * over_mean
    assert most_rows(loose) > cap
    capped = problem(LoadCap(cap, rows=True), num_slots)
    placement = solve.solve_problem(capped, 0, time_limit=2).placement
    assert most_rows(placement) <= cap


def test_rows_out_of_reach_name_the_least_that_is_not():
    with pytest.raises(Refused, match="load_cap = '500rows'") as error:
        _ = problem(LoadCap(500.0, rows=True)).cap_L
    least = LoadCap.parse(str(error.value).split("Use ")[1].split(" ")[0])
    assert least.rows
    assert np.isfinite(problem(least).cap_L).all()
    with pytest.raises(Refused):
        _ = problem(LoadCap(least.factor - 2, rows=True)).cap_L


def test_the_command_takes_rows(tmp_path, capsys):
    path, out = tmp_path / "t.npz", tmp_path / "p.json"
    trace_lib.save(TRACE, path)
    words = ["solve", str(path), "--devices=4", f"--out={out}", "--time-limit=1"]
    words += ["--objective=rows", "--batch-tokens=2000"]
    assert command_line.main([*words, "--load-cap=1500rows"]) == 0
    half = trace_lib.split(TRACE, 0).plan_half
    load_LM = cost.computed_LM(half.expert_ids_TLK, Plan.read(out).placement)
    assert load_LM.max() * 2000 / half.num_tokens <= 1500
    capsys.readouterr()
    assert command_line.main([*words, "--load-cap=10rows"]) == 1
    assert "Use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device-slots=4,4,4,3"], "Use --slots=12, which the smallest device holds"),
        (["--device-slots=6,6,2,2"], "Plan for the 2 devices with most room: they hold 6 each"),
        (["--device-slots=3,3,2,2"], "Use more devices, or devices with more memory"),
        (["--device-slots=4,4,4"], "4 whole numbers of at least 1"),
        (["--device-slots=4,4,4,x"], "4 whole numbers of at least 1"),
        (["--device-slots=4,4,4,0"], "4 whole numbers of at least 1"),
        (["--device-slots=4,4,4,4", "--slots=12"], "--slots=12 says something else"),
    ],
)
def test_slots_of_single_devices_are_refused_with_what_is_possible(
    tmp_path, capsys, words, message
):
    path, out = tmp_path / "t.npz", tmp_path / "p.json"
    trace_lib.save(TRACE, path)
    command = ["solve", str(path), "--devices=4", f"--out={out}", "--time-limit=0"]
    assert command_line.main([*command, *words]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_equal_slots_of_devices_are_the_slots_of_a_layer(tmp_path, capsys):
    path, out = tmp_path / "t.npz", tmp_path / "p.json"
    trace_lib.save(TRACE, path)
    words = ["solve", str(path), "--devices=4", f"--out={out}", "--time-limit=0"]
    assert command_line.main([*words, "--device-slots=4,4,4,4", "--objective=load"]) == 0
    assert Plan.read(out).placement.num_slots == 16
    capsys.readouterr()
