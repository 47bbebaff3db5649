"""What holds for every plan: valid, between bound and greedy, under its cap, the same per seed.

The random instances (instances.py) DEFAULT in the default run, all of them with

    python -m pytest -m slow tests/placement/test_properties.py
"""

import dataclasses
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import __main__ as command_line
from moe_jax.placement import cost, solve, spare, topology, with_copies
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.placement.solution import Solution
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from tests.placement import instances

LIMIT = 60.0
# every objective with every dispatch, cap, number of nodes, replicas; what takes long left out
ALONE = [180, 181, 182, 183, 184, 190, 196, 199, 201, 205, 210]  # hops, moetuner
DEFAULT = [*sorted({*range(36)} - {26, 34}), 49, *ALONE]
EVERY = sorted(range(instances.ALL), key=lambda number: number not in DEFAULT)
TWICE = [*range(0, 36, 6), 183, 184, 199, 210]  # solved again in every run
AGAIN = [*range(36, instances.FEW, 6), *range(instances.FEW, instances.ALL)]
SOLVED: dict[int, tuple[Problem, Solution]] = {}


def solved(number: int) -> tuple[Problem, Solution]:
    """The instance and its plan; the search ends by itself, long before the time limit."""
    if number not in SOLVED:
        problem = within_reach(instances.instance(number))
        SOLVED[number] = problem, solve.solve_problem(problem, number, LIMIT)
    return SOLVED[number]


def within_reach(problem: Problem) -> Problem:
    """The problem, or with the cap that its refusal offers.

    Copies that a rule chooses may balance less well than single experts.
    """
    if not problem.has_replicas or problem.load_cap is None:
        return problem
    try:
        with_copies.begin(problem)
    except Refused as refused:
        (offered,) = re.findall(r"Use ([\d.]+) or more", str(refused))
        return dataclasses.replace(problem, load_cap=LoadCap(float(offered)))
    return problem


def check_valid(problem: Problem, placement: Placement) -> None:
    slots_LP = placement.physical_to_logical_LP.tolist()
    experts, devices = problem.trace.num_experts, problem.num_devices
    each = (problem.num_slots or experts) // devices
    assert len(slots_LP) == problem.trace.num_layers
    for row in slots_LP:
        assert set(row) == set(range(experts))
        assert len(row) == each * devices
        for device in range(devices):
            here = row[device * each : (device + 1) * each]
            assert len(set(here)) == each


def check_cap(problem: Problem, placement: Placement) -> None:
    cap = problem.load_cap
    if cap is None:
        return
    load_LM = instances.loads_LM(problem, placement)
    if not cap.relative:
        assert (load_LM.max(axis=1) <= cap.factor * load_LM.mean(axis=1) * (1 + 1e-9)).all()
    elif not placement.has_replicas:
        reached_L = instances.reachable_L(problem)
        assert (load_LM.max(axis=1) <= cap.factor * reached_L * (1 + 1e-9)).all()
    elif problem.objective != "exflow":  # its caps are over what shares reach
        reached_L = instances.loads_LM(problem, spare.balanced(problem)).max(axis=1)
        assert (load_LM.max(axis=1) <= cap.factor * reached_L * (1 + 1e-9)).all()


def test_every_run_has_everything():
    """Of each objective every dispatch, cap, number of nodes, without replicas and with them."""
    for objective in (*instances.OBJECTIVES, *instances.ALONE):
        every = [one for one in instances.COMBINATIONS if one[0] == objective]
        shown = [instances.COMBINATIONS[number] for number in DEFAULT]
        shown = [one for one in shown if one[0] == objective]
        for axis in range(1, 5):
            assert {one[axis] for one in shown} == {one[axis] for one in every}, objective
    assert len(instances.COMBINATIONS) <= instances.ALL


REFUSED = {
    "rows": "objective = 'rows': gathered dispatch moves the same rows under every placement. "
    "Use --objective=seconds or --objective=load.",
    "moetuner": "num_slots = 12: MoETuner has no replicas. "
    "Leave --slots out, or choose --objective=seconds.",
}


@pytest.mark.parametrize("objective", REFUSED)
def test_what_has_no_meaning_is_refused(objective, tmp_path, capsys):
    """At once, in a sentence, by the command as well; and nothing else is."""
    trace = synthetic.realistic(num_tokens=40, num_layers=2, num_experts=8, top_k=2, seed=0)
    path = tmp_path / "t.npz"
    trace_lib.save(trace, path)
    for one in instances.every((objective,)):
        _, dispatch, _, nodes, replicas = one
        machine, slots = topology.nodes_by_devices(nodes, 4), 12 if replicas else None
        if instances.has_a_meaning(one):
            Problem(trace, machine, objective, dispatch, num_slots=slots)
            continue
        with pytest.raises(Refused) as refused:
            Problem(trace, machine, objective, dispatch, num_slots=slots)
        assert str(refused.value) == REFUSED[objective]
        words = ["solve", str(path), "--devices=4", f"--objective={objective}", "--time-limit=0"]
        words += [f"--dispatch={dispatch}", f"--nodes={nodes}", f"--out={tmp_path / 'p.json'}"]
        assert command_line.main([*words, *["--slots=12"] * replicas]) == 1
        assert REFUSED[objective] in capsys.readouterr().err
        assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("number", instances.rest_slow(EVERY, len(DEFAULT)))
def test_every_plan(number):
    """Valid, valued as counted, above its bound, at most greedy, under its cap."""
    problem, (placement, report) = solved(number)
    check_valid(problem, placement)
    assert report.objective == pytest.approx(instances.counted(problem, placement), rel=1e-9)
    assert 0 <= report.bound <= report.objective <= report.greedy * (1 + 1e-12)
    check_cap(problem, placement)
    if not problem.has_replicas:
        for device_LE in instances.draws(problem, 20, seed=number):
            value = problem.value(device_LE)
            assert report.bound <= value
            drawn = Placement.from_device_LE(device_LE, problem.num_devices)
            assert value == pytest.approx(instances.counted(problem, drawn), rel=1e-9)


@pytest.mark.parametrize(
    "number",
    instances.rest_slow([*TWICE, *sorted({*AGAIN} - {*TWICE})], len(TWICE)),
)
def test_a_seed_gives_one_plan(number):
    """The search ends by itself, so the plan does not depend on the machine's speed.

    The bound may: its relaxation improves for a share of the time.
    """
    problem, first = solved(number)
    again = solve.solve_problem(dataclasses.replace(problem), number, LIMIT)
    if not (first.report.finished and again.report.finished):
        pytest.skip("the machine is too busy: the time limit ended a search")
    assert again.placement.digest == first.placement.digest
    assert again.report.objective == first.report.objective


LIMITED = [
    *sorted({(*one[:2], 12) for one in instances.combinations(instances.OBJECTIVES)}),
    *itertools.product(("rows", "seconds"), ["shuffled"], [12]),
    *itertools.product(instances.ALONE, ["exchange"], [12]),
    *itertools.product(("rows", "seconds"), cost.TIED, [24]),  # where a count takes a while
]


@pytest.mark.slow
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize(
    ("objective", "dispatch", "layers", "replicas"),
    [
        (*one, replicas)
        for one, replicas in itertools.product(LIMITED, [False, True])
        if not (one[0] == "moetuner" and replicas)  # refused
    ],
)
def test_time_limit_is_kept(objective, dispatch, layers, replicas, capped, tmp_path):
    trace = synthetic.realistic(
        num_tokens=20_000 if layers == 12 else 200_000,
        num_layers=layers,
        num_experts=64,
        top_k=4,
        seed=0,
        num_sequences=40,
    )
    trace_lib.save(trace, tmp_path / "t.npz")
    words = ["--load-cap=1.2x"] * capped + ["--slots=72"] * replicas
    assert after_the_limit(tmp_path, objective, dispatch, words) < 0.4


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--pin=*:3:5"], ["--previous=old.json", "--move-budget=20%"]])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize(
    ("objective", "dispatch"),
    [
        ("rows", "exchange"),
        ("rows", "coherent"),
        ("seconds", "hierarchical"),
        ("seconds", "coherent"),
        ("exflow", "exchange"),
        ("hops", "exchange"),
        ("load", "exchange"),
    ],
)
def test_time_limit_is_kept_from_where_people_are(objective, dispatch, capped, words, tmp_path):
    """With copies; counting a plan takes a second and more of the four."""
    sizes = {"num_tokens": 200_000, "num_layers": 24, "num_experts": 32, "top_k": 4}
    trace = synthetic.realistic(**sizes, seed=0, num_sequences=40)
    trace_lib.save(trace, tmp_path / "t.npz")
    old = spare.balanced(Problem(trace, topology.flat(8), "rows", num_slots=40))
    Plan(old).write(tmp_path / "old.json")  # within the cap: above it a plan is looked for longer
    words = [*words, "--slots=40", *["--load-cap=1.3x"] * capped]
    words += ["--nodes=2"] * (dispatch == "hierarchical")
    assert after_the_limit(tmp_path, objective, dispatch, words) < 0.4


def after_the_limit(folder, objective: str, dispatch: str, words: list[str]) -> float:
    """Seconds of processor time after 4, in a process of its own, whose start is not counted.

    On a machine that does other work as well, a second of work after the limit takes several: what
    is over the limit counts by the share of the processor that the process had.
    """
    words = ["solve", "t.npz", "--devices=8", "--out=p.json", "--json", *words]
    words += [f"--objective={objective}", f"--dispatch={dispatch}", "--time-limit=4"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "moe_jax.placement", *words],
        capture_output=True,
        check=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    share = min(worked / (time.monotonic() - started), 1.0)
    return (json.loads(done.stdout)["seconds"] - 4.0) * share


@pytest.mark.parametrize("seed", range(12))
def test_layers_of_two_plans_with_copies_keep_the_cap_together(seed):
    """Where tokens stay, which copy serves depends on the layers before: each kept it alone."""
    rng = np.random.default_rng(seed)
    trace = synthetic.realistic(num_tokens=80, num_layers=4, num_experts=6, top_k=2, seed=seed)
    problem = Problem(trace, topology.flat(3), "rows", "coherent", num_slots=9)
    one, other = (random_copies(rng, 4, 6, 3) for _ in range(2))
    best = spare.valued(problem, one)
    cap_L = cost.computed_LM(trace.expert_ids_TLK, one, "coherent").max(axis=1) * 1.02
    found = spare.better(problem, best, other, cap_L).placement
    load_LM = cost.computed_LM(trace.expert_ids_TLK, found, "coherent")
    assert (load_LM.max(axis=1) <= cap_L * (1 + 1e-9)).all()


def random_copies(rng, layers: int, experts: int, devices: int) -> Placement:
    """Every device holds its share of the experts and one more."""
    rows = []
    for _ in range(layers):
        own_MS = rng.permutation(experts).reshape(devices, -1)
        more_M = [rng.choice(np.setdiff1d(np.arange(experts), own_S)) for own_S in own_MS]
        rows.append(np.column_stack([own_MS, more_M]).ravel())
    return Placement(np.stack(rows), experts, devices)


@pytest.mark.parametrize("objective", ["seconds", "rows", "load"])
@pytest.mark.parametrize("dispatch", ["exchange", "hierarchical", "coherent"])
def test_one_layer(objective, dispatch):
    """A chain of one layer has no transitions, whatever the dispatch."""
    trace = synthetic.realistic(num_tokens=90, num_layers=1, num_experts=8, top_k=3, seed=0)
    problem = Problem(trace, topology.nodes_by_devices(2, 4), objective, dispatch)
    placement, report = solve.solve_problem(problem, 0, time_limit=20)
    assert report.objective == pytest.approx(instances.counted(problem, placement), rel=1e-9)
    assert report.bound <= report.objective <= report.greedy
