"""`finished`: no deadline, share of one or estimate cut anything that the plan depends on.

Machines of any speed are made of a clock that goes on at every look: a search that looks so often
until its limit is cut at the same place in every run of a test. Programs (HiGHS) keep a time of
their own; here they end by themselves.
"""

import ast
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from moe_jax import placement
from moe_jax.placement import (
    baselines,
    chainwise,
    clock,
    coherent_seconds,
    ilp,
    layerwise,
    moetuner_search,
    relax,
    solution,
    solve,
    staying,
    topology,
)
from moe_jax.placement.baselines import moetuner as two_stages
from moe_jax.placement.homes import joint
from moe_jax.placement.limits import caps
from moe_jax.placement.limits import search as limits_search
from moe_jax.placement.limits.pins import Pins
from moe_jax.placement.limits.previous import Previous
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import LoadCap, Problem
from tests.placement import instances

LIMIT = 1000.0  # seconds: far more than programs take
FAST = 10**9  # looks at the clock until then: more than any search takes
TIMES = (0.5, 1.1)  # as often as an uncut search looks; the parts of it have shares of that
EXPERTS, DEVICES = 8, 4
TRACE = instances.noisy_trace(1, num_tokens=60)
SHORT = instances.noisy_trace(1, num_tokens=40, num_layers=2, num_experts=8)


@pytest.fixture(autouse=True)
def quick(short_search, monkeypatch):
    """Shorter still, so that searches end by themselves soon; programs have all the time."""
    bound = relax.lower_bound
    monkeypatch.setattr(relax, "lower_bound", lambda problem, end, _=0: bound(problem, end, 4))
    monkeypatch.setattr(chainwise, "SWEEPS", (40, 20))
    monkeypatch.setattr(chainwise, "PATIENCE", 2)
    monkeypatch.setattr(coherent_seconds, "SHAKES", 15)
    monkeypatch.setattr(limits_search, "REFINED", 1)
    monkeypatch.setattr(staying, "SWEEPS", 1)
    monkeypatch.setattr(two_stages, "WHOLE", 0)  # one program of all layers takes long
    monkeypatch.setattr(solve, "WHOLE_SECONDS", LIMIT)
    monkeypatch.setattr(layerwise, "BALANCE_SECONDS", LIMIT)
    monkeypatch.setattr(staying, "SECONDS", LIMIT)


@pytest.fixture
def looks(monkeypatch):
    """Sets a clock that is looked at so often until the limit; it goes on with every look."""

    def set_clock(number: float) -> Iterator[int]:
        count = itertools.count()
        monkeypatch.setattr(time, "monotonic", lambda: LIMIT * next(count) / number)
        return count

    return set_clock


def problem(objective: str, dispatch: str = "exchange", kind: str = "", **changes) -> Problem:
    """A small one; `kind` is "copies", "nodes", "in use", "pins" or a load cap."""
    machine = topology.nodes_by_devices(2 if kind == "nodes" else 1, DEVICES)
    trace = SHORT if kind in ("copies", "in use") else TRACE
    if kind == "copies":
        changes["num_slots"] = 12
    if kind == "in use":
        changes["previous"] = Previous(Placement.contiguous(2, EXPERTS, DEVICES), 6)
    if kind == "pins":
        held_LEM = np.zeros((trace.num_layers, EXPERTS, DEVICES), bool)
        held_LEM[:, 3, 1] = True
        changes["pins"] = Pins(held_LEM)
    if kind[:1].isdigit():
        changes["load_cap"] = LoadCap.parse(kind)
    return Problem(trace, machine, objective, dispatch, steady=0.003, **changes)


class Outcome(NamedTuple):
    """Has it finished; the plan and its value."""

    finished: bool
    plan: tuple[str, float]


def outcome(some: Problem, limit: float = LIMIT) -> Outcome:
    """Of a solve, whose report says in words what `finished` says."""
    plan, report = solve.solve_problem(dataclasses.replace(some), 3, limit)
    assert (solution.CUT in report.note.split("; ")) is not report.finished
    return Outcome(report.finished, (plan.digest, report.objective))


@pytest.mark.parametrize(
    ("objective", "dispatch", "kind"),
    [
        *(("seconds", one, "") for one in ("exchange", "coherent", "gathered", "shuffled")),
        *(("rows", one, "") for one in ("hierarchical", "coherent")),
        *(("rows", "exchange", kind) for kind in ("in use", "pins", "copies")),
        *(("exflow", "exchange", kind) for kind in ("nodes", "1.2x", "in use", "copies")),
        *((one, "exchange", "") for one in ("load", *instances.ALONE)),
        *(("hops", "exchange", kind) for kind in ("1.1x", "copies")),
        ("seconds", "coherent", "1.2x"),
    ],
)
def test_finished_at_any_speed_is_one_plan(objective, dispatch, kind, looks):
    """And a search that has its time has finished."""
    some, count = problem(objective, dispatch, kind), looks(FAST)
    ample = outcome(some)
    assert ample.finished
    taken = next(count)
    for times in TIMES:
        looks(times * taken)
        found = outcome(some)
        assert not found.finished or found.plan == ample.plan, times


@pytest.mark.parametrize("objective", ["seconds", "rows"])
def test_a_look_at_all_placements_that_an_estimate_left_out_was_cut(
    objective, looks, all_placements
):
    """However quick the search in its place: more time gives another plan."""
    some, found = problem(objective, "coherent"), []
    for limit in (1e-3, 1e-2, 60.0):
        looks(FAST)
        found.append(outcome(some, limit))
    assert not found[0].finished
    assert found[-1].finished
    assert len({one.plan for one in found if one.finished}) == 1


@pytest.mark.parametrize("objective", ["rows", "seconds"])
def test_homes_and_experts_together_too(objective, looks):
    some, count = problem(objective), looks(FAST)
    start_LE = baselines.contiguous(TRACE.num_layers, EXPERTS, DEVICES).astype(np.int64)
    ample = joint.solve(some, start_LE, 3, LIMIT)
    assert ample.finished
    taken = next(count)
    for times in TIMES:
        looks(times * taken)
        found = joint.solve(some, start_LE, 3, LIMIT)
        if found.finished:
            np.testing.assert_array_equal(found.device_LE, ample.device_LE)
            np.testing.assert_array_equal(found.home_S, ample.home_S)
    looks(1)
    assert not joint.solve(some, start_LE, 3, LIMIT).finished


def test_no_time_is_a_cut():
    for kind, objective in itertools.product(("", "copies", "in use"), ("rows", "exflow")):
        assert not solve.solve_problem(problem(objective, kind=kind), 0, 0.0).report.finished
    # the plan for balance alone is the answer there: nothing would follow
    assert solve.solve_problem(problem("load", kind="copies"), 0, 0.0).report.finished


def test_what_is_late_and_who_is_told():
    past, far = time.monotonic() - 1, time.monotonic() + 1e6
    assert clock.late(past)  # nobody watches
    with clock.watched() as outer:
        assert not clock.late(far)
        assert 0 < clock.left(far) <= 1e6
        assert clock.late(clock.share(past, 0.5))
        assert outer.cut
    for cut in (lambda: clock.late(past), lambda: clock.left(past), clock.cut):
        with clock.watched() as outer:
            with clock.apart():
                cut()
            assert not outer.cut
            with clock.watched() as before:
                pass
            with clock.watched() as inner:
                cut()
            with clock.watched() as after:
                pass
        assert (before.cut, inner.cut, after.cut, outer.cut) == (False, True, False, True)
    assert time.monotonic() < clock.share(far, 0.5) < far
    assert clock.share(far, 1.0) == pytest.approx(far)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_programs_say_that_their_time_ended_them(seconds):
    size = 4 if seconds else 16  # devices: 60 s are enough, or 1 ms is not
    rng = np.random.default_rng(0)
    load_E = rng.lognormal(size=2 * size)
    with clock.watched() as even:
        ilp.balance(load_E, size, seconds)
    with clock.watched() as staged:
        two_stages.clusters(load_E, size, True, seconds)
    assert even.cut is staged.cut is (not seconds)


def test_a_program_that_found_nothing_was_cut_whatever_follows(monkeypatch):
    monkeypatch.setattr(two_stages, "WHOLE", 10**6)
    monkeypatch.setattr(two_stages, "_together", lambda *_: (None, False))
    cluster_LE = baselines.random(TRACE.num_layers, EXPERTS, DEVICES, 1)
    _, done = two_stages.devices(problem("moetuner").tuner, cluster_LE, 60.0)
    assert not done


@pytest.mark.parametrize("worth", [0.0, 1e6])
def test_two_stages_that_are_left_out_for_lack_of_time(worth, monkeypatch):
    monkeypatch.setattr(moetuner_search, "WORTH", worth)
    assert outcome(problem("moetuner"), 60.0).finished is (not worth)


def test_even_loads_that_time_cut_are_so_for_every_search(monkeypatch):
    """They are made once for a problem, maybe before anybody watches."""
    some = problem("rows", kind="1.6")
    met = caps.met

    def cut(*args):
        clock.cut()
        return met(*args)

    assert solve.solve_problem(dataclasses.replace(some), 0, 60.0).report.finished
    monkeypatch.setattr(caps, "met", cut)
    _ = some.balanced_LE
    for _ in range(2):
        assert not solve.solve_problem(some, 0, 60.0).report.finished


def test_a_free_plan_that_gave_but_a_bound_may_have_been_cut(monkeypatch, all_placements):
    whole = solve.solve_problem

    def in_no_time(inner, seed, limit, progress):
        return whole(inner, seed, 0.0, progress)

    monkeypatch.setattr(solve, "solve_problem", in_no_time)
    assert whole(problem("load", kind="in use"), 0, 60.0).report.finished
    monkeypatch.setattr(solve.whole_lib, "solved", lambda *_: None)
    assert not whole(problem("load", kind="in use"), 0, 60.0).report.finished


@pytest.mark.parametrize("gaps", [False, True])
def test_what_is_told_on_the_way_may_stay_the_best_where_tokens_have_gaps(gaps, monkeypatch):
    monkeypatch.setattr(coherent_seconds, "TELL", -1.0)
    trace = instances.with_gaps(TRACE, np.random.default_rng(0)) if gaps else TRACE
    some = dataclasses.replace(problem("seconds", "coherent"), trace=trace)
    start_LE, far = baselines.random(3, EXPERTS, DEVICES, 1), time.monotonic() + 1e6
    with clock.watched() as watch:
        told = list(coherent_seconds.descended(coherent_seconds.model(some), start_LE, far))
    assert len(told) > 1
    assert watch.cut is gaps


BOUNDS = (
    *("contact_bound", "copies_homes", "copies_relax", "hops_bound", "hops_ranks", "relax"),
    *("semidefinite", "uneven_bound"),
)
MEASURES = (  # how long something takes, or when it begins and should end
    *("balance", "baselines/moetuner", "clock", "coherent_seconds", "commands/homes", "compare"),
    *("limits/caps", "limits/search", "limits/slots", "progress", "solve", "solve_copies"),
    *("staying", "with_copies"),
)


def test_what_plans_depend_on_asks_this_clock():
    """Else a cut is forgotten. A module that is new here reads the time for something else."""
    (folder,) = placement.__path__
    found = set()
    for path in pathlib.Path(folder).rglob("*.py"):
        names = {getattr(node, "attr", None) for node in ast.walk(ast.parse(path.read_text()))}
        if names & {"monotonic", "perf_counter"}:
            found.add(str(path.relative_to(folder).with_suffix("")))
    assert found == {*BOUNDS, *MEASURES}
