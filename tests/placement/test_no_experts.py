"""Layers, halves and windows in which no token has an expert: planned and judged, or refused."""

import dataclasses

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import __main__ as command_line
from moe_jax.placement import evidence, solve, swaps
from moe_jax.placement import topology as topology_lib
from moe_jax.placement.problem import Problem
from moe_jax.placement.report import view
from moe_jax.placement.windows import windows
from moe_jax.routing import __main__ as statistics
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace

FLAT = topology_lib.flat(4)


def made(*layers: int, sequences=slice(None)) -> Trace:
    """40 sequences of 15 tokens; those chosen have no expert in these layers."""
    trace = synthetic.realistic(
        num_tokens=600, num_layers=3, num_experts=8, top_k=2, seed=0, num_sequences=40
    )
    ids_SNLK = trace.expert_ids_TLK.reshape(40, 15, 3, 2).copy()
    for layer in layers:
        ids_SNLK[sequences, :, layer] = trace.no_expert
    return dataclasses.replace(trace, expert_ids_TLK=ids_SNLK.reshape(600, 3, 2))


def planning_half() -> np.ndarray:
    """int64 [20]: the sequences that are planned on with seed 0."""
    named = dataclasses.replace(made(), seq_home=np.arange(40))
    return trace_lib.split(named, 0).plan_half.seq_home


def run(*words) -> int:
    return command_line.main([str(word) for word in words])


SOME = {"two layers": made(1, 2), "planned on": made(1, sequences=planning_half())}
EXFLOW = ("--objective=exflow", "--slots=12")
IN_USE = ("--slots=12", "--previous=old_copies.json", "--move-budget=30%")
CAPPED = ("--slots=12", "--load-cap=1.2x")
WORDS = {  # sub-command and options, by what went wrong there
    "copies of exflow": ("solve", "--out=new.json", *EXFLOW),
    "copies of exflow compared": ("compare", "--methods=contiguous,exflow", *EXFLOW),
    "copies in use, rows": ("solve", "--out=new.json", "--objective=rows", *IN_USE),
    "copies in use, hops": ("solve", "--out=new.json", "--objective=hops", *IN_USE),
    "copies capped, hops": ("solve", "--out=new.json", "--objective=hops", *CAPPED),
    "coherent seconds": ("solve", "--out=new.json", "--dispatch=coherent"),
    "coherent rows in use": (
        *("solve", "--out=new.json", "--objective=rows", "--dispatch=coherent"),
        *("--previous=old.json", "--move-budget=30%"),
    ),
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS.keys())
@pytest.mark.parametrize("some", SOME)
def test_layers_without_experts_are_planned(some, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trace_lib.save(SOME[some], "t.npz")
    few = ("t.npz", "--devices=4", "--time-limit=0.1")
    for name, more in (("old.json", ()), ("old_copies.json", ("--slots=12",))):
        if f"--previous={name}" in words:
            begin = ("--objective=load", "--time-limit=0", f"--out={name}", *more)
            assert run("solve", "t.npz", "--devices=4", *begin) == 0
    assert run(words[0], *few, *words[1:]) == 0
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("slots", [None, 12])
def test_the_largest_load_of_a_layer_without_experts_is_the_mean(slots):
    """So every figure says, the bound included; else plans could be better than is proven."""
    trace = made(1)
    placement, report = solve.solve(trace, FLAT, objective="load", num_slots=slots, time_limit=0)
    problem = Problem(trace, FLAT, "load", num_slots=slots)
    figures = evidence.judge(trace, placement, FLAT)
    assert report.objective == pytest.approx(figures.load_mean.value)
    assert problem.value_of(placement) == pytest.approx(figures.load_mean.value)
    assert 1 - 1e-6 <= report.bound <= report.objective
    assert problem.counted_L(placement)[1] == 1
    drawn_LM = view.view("after", problem, placement).load_over_mean_LM
    assert drawn_LM.max(axis=1).mean() == pytest.approx(figures.load_mean.value)
    if slots is None:
        device_E, pair = placement.device_LE[1], np.array([[0], [1]])
        assert swaps.values_P(problem, 1, device_E, *pair).tolist() == [1.0]


@pytest.mark.parametrize("part", ["planned", "judged"])
def test_a_half_without_experts_is_refused(part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    half = planning_half() if part == "planned" else np.setdiff1d(np.arange(40), planning_half())
    trace_lib.save(made(0, 1, 2, sequences=half), "t.npz")
    for words in (("solve", "--out=new.json"), ("compare",), ("homes",), ("verdict",)):
        assert run(words[0], "t.npz", "--devices=4", *words[1:]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"expert_ids = 255: no token of the half that is {part} on has an expert" in error


@pytest.mark.parametrize("split", ["time", "name"])
def test_a_window_without_experts_is_refused(split):
    trace = made(0, 1, 2, sequences=slice(20, 40))
    names = ("one/a",) * 20 + ("other/a",) * 20
    with pytest.raises(Refused, match=r"no token of what is (planned|judged) on .* has an expert"):
        windows(dataclasses.replace(trace, seq_name=names), split, seed=0)


def test_statistics_of_a_layer_without_experts(tmp_path, capsys):
    """An even load everywhere else: the mean over layers is 1."""
    token_T = np.arange(8, dtype=np.uint8)
    ids_TLK = np.stack([token_T, np.full(8, 255, np.uint8)], axis=1)[:, :, None]
    trace_lib.save(Trace(ids_TLK, 8, np.array([8])), tmp_path / "t.npz")
    assert statistics.main([str(tmp_path / "t.npz")]) == 0
    assert "hottest expert over the mean: 1.000, worst layer 1.000" in capsys.readouterr().out
