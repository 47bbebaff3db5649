"""Random machines (nodes of any size, speeds, torus): every plan valid, counted, bounded, capped.

The first FEW in the default run, all of them with

    python -m pytest -m slow tests/placement/test_machines.py
"""

import dataclasses
import json

import numpy as np
import pytest

from moe_jax.placement import cost, solve, topology
from moe_jax.placement.__main__ import main
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.placement.seconds import Work
from moe_jax.placement.topology import Tier, Topology
from moe_jax.placement.torus import Torus
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from tests.placement import instances

FEW, ALL = 20, 120
TORI = (Torus((2, 2), (False, True)), Torus((3,), (True,)), Torus((4,), (False,)))
OBJECTIVES = ("seconds", "seconds", "rows", "exflow", "hops", "load")


def machine(rng: np.random.Generator) -> Topology:
    """Of two to six devices."""
    fast = Tier(float(rng.choice([1e9, 1e11])), float(rng.choice([0.0, 1e-6])))
    slow = Tier(fast.bandwidth / float(rng.choice([1, 9])), 2e-6)
    if rng.random() < 0.4:
        torus = TORI[rng.integers(len(TORI))]
        made = Topology("torus", 1, torus.size, fast, slow, 1e12, torus)
    else:
        sizes = tuple(rng.integers(1, 4, size=2).tolist())
        made = dataclasses.replace(topology.uneven(sizes), fast=fast, slow=slow, device_flops=1e12)
    if rng.random() < 0.5:
        flops = tuple((1e12 * rng.choice([0.5, 1.0, 2.0], size=made.num_devices)).tolist())
        made = dataclasses.replace(made, device_flops=flops)
    return made


def instance(number: int) -> Problem:
    rng = np.random.default_rng([11, number])
    there = machine(rng)
    devices = there.num_devices
    trace = synthetic.realistic(
        num_tokens=int(rng.integers(40, 150)),
        num_layers=int(rng.integers(2, 4)),
        num_experts=devices * int(rng.integers(2, 4)),
        top_k=int(rng.integers(1, 4)),
        seed=number,
        num_sequences=4,
    )
    objective = OBJECTIVES[number % len(OBJECTIVES)]
    dispatch = str(rng.choice(["exchange", "hierarchical", "coherent"]))
    slots = None
    if objective != "hops" and rng.random() < 0.2:
        slots = trace.num_experts + devices
    work = Work(num_shared_experts=int(rng.integers(2)), batch_tokens=4096)
    cap = LoadCap(1.2, relative=True) if rng.random() < 0.5 else None
    return Problem(trace, there, objective, dispatch, work, cap, slots)


def counted(problem: Problem, placement: Placement) -> float:
    """Token by token, from the rows of cost.py."""
    ids_TLK, there = problem.trace.expert_ids_TLK, problem.topology
    if problem.objective == "load":
        load_LM = cost.computed_LM(
            ids_TLK, placement, problem.dispatch, None, there.devices_per_node
        )
        speed_M = there.flops_M / there.flops_M.mean()
        return float(((load_LM / speed_M).max(axis=1) / load_LM.mean(axis=1)).mean())
    return instances.counted(problem, placement)


def numbers():
    rest = [pytest.param(n, marks=pytest.mark.slow) for n in range(FEW, ALL)]
    return [*range(FEW), *rest]


@pytest.mark.parametrize("number", numbers())
def test_every_plan(number):
    problem = instance(number)
    found = solve.solve_problem(problem, number, 2.0)
    placement, report = found
    assert report.objective == pytest.approx(counted(problem, placement), rel=1e-9)
    assert 0 <= report.bound <= report.objective <= report.greedy * (1 + 1e-12)
    if problem.has_replicas:
        return
    sizes_M = np.bincount(placement.device_LE.ravel())
    assert (sizes_M == problem.slots * problem.trace.num_layers).all()
    load_LM = cost.computed_LM(problem.trace.expert_ids_TLK, placement)
    largest_LM = problem.cap_L[:, None] * problem.topology.flops_M / problem.topology.flops_M.mean()
    assert (load_LM <= largest_LM * (1 + 1e-9)).all()
    for device_LE in instances.draws(problem, 20, seed=number):
        value = problem.value(device_LE)
        assert report.bound <= value
        drawn = Placement.from_device_LE(device_LE, problem.num_devices)
        assert value == pytest.approx(counted(problem, drawn), rel=1e-9)


MACHINES = [
    ["--node-sizes=3,1"],
    ["--devices=4", "--device-flops=4e14,4e14,1e14,1e14"],
    ["--topology=mesh.json"],
]


@pytest.mark.parametrize("words", MACHINES, ids=lambda words: words[-1])
def test_commands(words, tmp_path, capsys, monkeypatch):
    """Every command that takes a machine, and the page."""
    monkeypatch.chdir(tmp_path)
    mesh = Topology("mesh", 1, 4, torus=Torus((2, 2), (False, False)))
    (tmp_path / "mesh.json").write_text(json.dumps(mesh.to_json()), encoding="utf-8")
    trace = synthetic.realistic(
        num_tokens=400, num_layers=2, num_experts=8, top_k=2, seed=1, num_sequences=20
    )
    trace_lib.save(trace, tmp_path / "t.npz")
    limit = ["--time-limit=1", *words]
    assert main(["solve", "t.npz", "--out=p.json", "--report=page.html", *limit]) == 0
    assert main(["compare", "t.npz", "--dispatch=hierarchical", *limit]) == 0
    assert main(["verdict", "t.npz", *limit]) == 0
    assert main(["homes", "t.npz", "--dispatch=hierarchical", "--plan=p.json", *limit]) == 0
    capsys.readouterr()
    assert main(["evaluate", "t.npz", "p.json", "--json"]) == 0
    plan = Plan.read(tmp_path / "p.json")
    there = topology.from_json(plan.topology)
    said = json.loads(capsys.readouterr().out)["plans"][0]["seconds_per_layer"]["exchange"]
    closed = Problem(trace, there, "seconds", "exchange").value_of(plan.placement)
    assert said == pytest.approx(closed, rel=1e-12)  # counted token by token, and in closed form
    assert there.devices_per_node in (4, (3, 1))
