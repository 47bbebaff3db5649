"""Load caps of other sequences: what these are expected to add, and what plans under them keep."""

import dataclasses
import json

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import __main__ as command_line
from moe_jax.placement import compare, cost, solve, spare, topology, unseen
from moe_jax.placement.limits.caps import LoadCap
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import Problem
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace


def alike(seed: int) -> Trace:
    """120 sequences of 50 tokens, of which 15 agree in the best expert of the first layer."""
    drawn = synthetic.realistic(
        num_tokens=6000, num_layers=3, num_experts=16, top_k=2, seed=seed, num_sequences=120
    )
    ids_TLK = drawn.expert_ids_TLK
    of_a_kind = np.argsort(ids_TLK[:1800, 0, 0], kind="stable").reshape(120, 15)
    others = np.arange(1800, 6000).reshape(120, 35)
    order_T = np.concatenate([of_a_kind, others], axis=1).ravel()
    return dataclasses.replace(drawn, expert_ids_TLK=ids_TLK[order_T])


TRACE = alike(5)
HELD = LoadCap(1.3, held=True)


def problem(trace: Trace = TRACE, cap: LoadCap | None = None, **others) -> Problem:
    return Problem(trace, topology.flat(4), "rows", load_cap=cap, **others)


def over_mean_L(trace: Trace, placement: Placement, dispatch: str = "exchange") -> np.ndarray:
    load_LM = cost.computed_LM(trace.expert_ids_TLK, placement, dispatch)
    return load_LM.max(axis=1) / load_LM.mean(axis=1)


def test_what_is_expected_is_what_halves_of_a_trace_differ_by():
    """Over 40 splits: the fullest device of a half by its excess over the other half's load."""
    device_LE = problem().packed_LE
    placement = Placement.from_device_LE(device_LE, 4)
    told, seen = [], []
    for seed in range(40):
        halves = trace_lib.split(TRACE, seed)
        told.append(unseen.expected(problem(halves.plan_half), device_LE))
        mine_LM, other_LM = (
            cost.computed_LM(half.expert_ids_TLK, placement)
            for half in (halves.plan_half, halves.judge_half)
        )
        share_LM, other_LM = (
            a_LM / a_LM.mean(axis=1, keepdims=True) for a_LM in (mine_LM, other_LM)
        )
        seen.append((other_LM - share_LM).max(axis=1).mean())
    assert np.mean(told) == pytest.approx(np.mean(seen), rel=0.1)
    assert np.mean(seen) > 0.05


def test_devices_count_by_their_speeds():
    """One device: nothing is added; a slow one is full sooner."""
    device_LE = problem().packed_LE
    even = unseen.expected(problem(), device_LE)
    flops = (4e14, 4e14, 4e14, 1e14)
    slow = dataclasses.replace(topology.flat(4), device_flops=flops)
    assert unseen.expected(Problem(TRACE, slow, "rows"), device_LE) > 1.3 * even
    alone = Problem(TRACE, topology.flat(1), "load")
    assert unseen.expected(alone, np.zeros((3, 16), int)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("slots", [None, 20])
@pytest.mark.parametrize(("objective", "dispatch"), [("rows", "exchange"), ("exflow", "coherent")])
def test_a_plan_keeps_the_cap_less_what_is_added(objective, dispatch, slots):
    given = Problem(TRACE, topology.flat(4), objective, dispatch, load_cap=HELD, num_slots=slots)
    known = solve.resolved(given)
    assert known.load_cap.unseen > 0.03
    assert str(known.load_cap) == "1.3held"
    assert solve.resolved(known) is known
    placement = solve.solve_problem(given, 0, time_limit=3).placement
    kept = known.load_cap.planned
    assert kept == LoadCap(1.3 - known.load_cap.unseen)
    assert (over_mean_L(TRACE, placement, dispatch) <= kept.factor * (1 + 1e-9)).all()
    loose = dataclasses.replace(given, load_cap=None)
    free = solve.solve_problem(loose, 0, time_limit=3).placement
    assert over_mean_L(TRACE, free, dispatch).max() > kept.factor


def test_what_cannot_be_told_or_kept_is_refused():
    one = dataclasses.replace(TRACE, seq_len=np.array([TRACE.num_tokens]))
    with pytest.raises(Refused, match="one sequence does not tell"):
        solve.resolved(problem(one, HELD))
    with pytest.raises(Refused, match="load_cap = '1held'") as error:
        solve.resolved(problem(cap=LoadCap(1.0, held=True)))
    offered = LoadCap.parse(str(error.value).split("Use ")[1].split(" ")[0])
    assert np.isfinite(solve.resolved(problem(cap=offered)).cap_L).all()


def test_packing_that_misses_it_offers_a_cap_of_its_kind():
    """Two experts a device, one of them with most of the load."""
    ids_TLK = np.zeros((400, 1, 1), np.uint8)
    ids_TLK[::2, 0, 0] = np.arange(200) % 4
    skew = Trace(ids_TLK, num_experts=4, seq_len=np.full(40, 10))
    given = Problem(skew, topology.flat(2), "load", load_cap=LoadCap(1.2, held=True))
    with pytest.raises(Refused, match=r"load_cap = '1\.2held'") as error:
        _ = solve.resolved(given).cap_L
    offered = LoadCap.parse(str(error.value).split("Use ")[1].split(" ")[0])
    assert offered.held
    again = dataclasses.replace(given, load_cap=offered)
    assert np.isfinite(solve.resolved(again).cap_L).all()


def test_the_command_says_what_it_plans_for(tmp_path, capsys):
    path, out = tmp_path / "t.npz", tmp_path / "p.json"
    trace_lib.save(TRACE, path)
    words = ["solve", str(path), "--devices=4", f"--out={out}", "--objective=rows"]
    words += ["--time-limit=1", "--load-cap=1.3held"]
    assert command_line.main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["load_cap"]
    half = trace_lib.split(TRACE, 0).plan_half
    placement = Plan.read(out).placement
    assert over_mean_L(half, placement).max() <= 1.3 - said["unseen"] + 1e-9
    assert command_line.main(words) == 0
    assert f"{1.3 - said['unseen']:.4f} over the mean here" in capsys.readouterr().out


def test_every_combination_takes_it(tmp_path, capsys):
    path = tmp_path / "t.npz"
    trace_lib.save(TRACE, path)
    words = ["compare", str(path), "--every", "--machines=flat4", "--caps=1.3held"]
    words += ["--objective=rows", "--dispatches=exchange", "--time-limit=1", "--json"]
    assert command_line.main(words) == 0
    (line,) = json.loads(capsys.readouterr().out)["lines"]
    assert line["cap"] == "1.3held"


def test_it_is_told_on_what_is_planned_on_alone():
    """Not on the whole trace, and not on the half that judges."""
    halves = trace_lib.split(TRACE, 0)
    planned, judged = compare.halves_of(halves, problem(cap=HELD))
    assert planned.load_cap == solve.resolved(problem(halves.plan_half, HELD)).load_cap
    assert planned.load_cap != solve.resolved(problem(cap=HELD)).load_cap
    assert judged.load_cap is None


@pytest.mark.parametrize("command", ["compare", "verdict", "homes"])
def test_other_commands_take_it(command, tmp_path, capsys):
    path = tmp_path / "t.npz"
    trace_lib.save(TRACE, path)
    words = [command, str(path), "--devices=4", "--time-limit=1", "--json"]
    words += {"compare": ["--methods=lpt"], "homes": ["--joint"]}.get(command, [])
    assert command_line.main([*words, "--load-cap=1.3held"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert command_line.main([*words, "--load-cap=1held"]) == 1
    assert "load_cap = '1held': loads that are even" in capsys.readouterr().err


def test_a_layer_that_nobody_uses_adds_nothing():
    """Told, planned and refused like any other: no division by its load."""
    ids_TLK = TRACE.expert_ids_TLK.copy()
    ids_TLK[:, 1] = TRACE.no_expert
    empty = dataclasses.replace(TRACE, expert_ids_TLK=ids_TLK)
    device_LE = problem(empty).packed_LE
    alone = [
        dataclasses.replace(TRACE, expert_ids_TLK=ids_TLK[:, n : n + 1], layer_ids=(n,))
        for n in (0, 2)
    ]
    used = [
        unseen.expected(problem(one), device_LE[[n]]) for one, n in zip(alone, (0, 2), strict=True)
    ]
    assert unseen.expected(problem(empty), device_LE) < np.mean(used)
    assert np.isfinite(solve.resolved(problem(empty, HELD)).load_cap.unseen)
    with pytest.raises(Refused, match=r"Use 1\.[0-9]+held"):
        solve.resolved(problem(empty, LoadCap(1.0, held=True)))


def test_the_plan_that_is_filled_has_the_same_cap_or_one_over_what_it_reaches():
    """Without copies the sequences planned on have a cap of their own, wherever it is in reach."""
    wide = solve.resolved(problem(cap=HELD, num_slots=20))
    assert spare.without(wide).load_cap == wide.load_cap.planned
    added = wide.load_cap.unseen
    tight = solve.resolved(problem(cap=LoadCap(1.001 + added, held=True), num_slots=20))
    cap = spare.without(tight).load_cap
    assert cap.relative
    assert cap.factor == pytest.approx(1.001)
