"""Plans that start from a plan in use: pieces against brute force, the budget, the command."""

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import __main__ as command_line
from moe_jax.placement import baselines, solve, swaps, topology
from moe_jax.placement.limits import chained, knapsack, nearest, paths
from moe_jax.placement.limits import search as limits_search
from moe_jax.placement.limits.menu import Border, extended
from moe_jax.placement.limits.nearest import Within
from moe_jax.placement.limits.pins import Pins
from moe_jax.placement.limits.previous import MoveBudget, Previous, arrivals_L
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.placement.solution import Interrupted
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from tests.placement import instances

EVERYTHING = 10**6


pytestmark = pytest.mark.usefixtures("loose_bound")


def labels(experts: int, devices: int) -> list[np.ndarray]:
    equal = sorted(np.arange(experts) % devices)
    return [np.array(p) for p in sorted(set(itertools.permutations(equal)))]


def from_random(problem: Problem, seed: int, moves: int) -> Problem:
    """The problem with a random plan in use."""
    trace, devices = problem.trace, problem.num_devices
    old_LE = baselines.random(trace.num_layers, trace.num_experts, devices, seed)
    return dataclasses.replace(
        problem, previous=Previous(Placement.from_device_LE(old_LE, devices), moves)
    )


def best_by_moves(problem: Problem) -> dict[int, float]:
    """The least value for every number of moves, by trying all plans."""
    trace, old_LE = problem.trace, problem.previous.placement.device_LE
    all_labels, found = labels(trace.num_experts, problem.num_devices), {}
    chain = problem.chain(problem.top1_LEE)
    layers = range(trace.num_layers)
    allowed = [[row_E for row_E in all_labels if problem.allowed(n, row_E)] for n in layers]
    if problem.separable:
        alone = [[problem.layer_value(n, row_E) for row_E in allowed[n]] for n in layers]
    for choice in itertools.product(*(range(len(rows)) for rows in allowed)):
        device_LE = np.stack([allowed[n][c] for n, c in enumerate(choice)])
        if problem.separable:
            value = float(np.mean([alone[n][c] for n, c in enumerate(choice)]))
        else:
            value = problem.hops(chain.value(device_LE))
        moves = int((device_LE != old_LE).sum())
        found[moves] = min(found.get(moves, np.inf), value)
    return found


# The pieces


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_knapsack_equals_all_choices(seed, chain):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, size=4)
    moves = [rng.integers(0, 6, size=n) for n in sizes]
    value = [rng.normal(size=n) for n in sizes]
    edges = [
        rng.normal(size=(a, b)) if chain else np.tile(value[at + 1], (a, 1))
        for at, (a, b) in enumerate(itertools.pairwise(sizes))
    ]
    if chain:
        table = knapsack.chained(value[0], edges, moves, 20)
    else:
        table = knapsack.apart(value, moves, 20)

    def total(choice) -> float:
        steps = zip(edges, itertools.pairwise(choice), strict=True)
        return value[0][choice[0]] + sum(edge[c, d] for edge, (c, d) in steps)

    def count(choice) -> int:
        return int(sum(m[c] for m, c in zip(moves, choice, strict=True)))

    choices = list(itertools.product(*(range(n) for n in sizes)))
    for budget in range(21):
        allowed = [choice for choice in choices if count(choice) <= budget]
        found = table.choice(budget)
        if not allowed:
            assert found is None
            continue
        assert count(found) <= budget
        assert total(found) == pytest.approx(min(map(total, allowed)), abs=1e-12)
        assert table.value_B[budget] == pytest.approx(total(found), abs=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_nearest_labels_change_as_little_as_can_be(seed):
    rng = np.random.default_rng(seed)
    load_E, near_E = rng.lognormal(0, 0.5, 6), rng.permutation(np.arange(6) % 3)
    pin_E = np.where(rng.random(6) < 0.3, rng.integers(3, size=6), -1)
    if np.bincount(pin_E[pin_E >= 0], minlength=3).max() > 2:
        pin_E[:] = -1
    within = Within(pin_E, load_E, load_E.sum() / 3 * np.array([1.1, 1.2, 1.0]), 3)
    allowed = [row_E for row_E in labels(6, 3) if within.kept(row_E)]
    found = nearest.nearest(near_E, within, 10.0)
    if not allowed:
        assert found.device_E is None
        assert found.none_exist
        return
    assert within.kept(found.device_E)
    fewest = min(int((row_E != near_E).sum()) for row_E in allowed)
    assert int((found.device_E != near_E).sum()) == fewest


@pytest.mark.parametrize("moves", [0, 2, 3, 6])
def test_a_layer_is_reassigned_best_within_its_moves(moves):
    rng = np.random.default_rng(moves)
    load_E, benefit_EM = rng.lognormal(0, 0.3, 6), rng.normal(size=(6, 3))
    old_E = np.arange(6) % 3
    within = Within(np.array([0, -1, -1, -1, -1, -1]), load_E, load_E.sum() / 3 * 1.4, 3)
    allowed = [
        row_E for row_E in labels(6, 3) if within.kept(row_E) and (row_E != old_E).sum() <= moves
    ]
    found = nearest.best(benefit_EM, within, old_E, moves, 10.0).device_E
    worth = max(benefit_EM[np.arange(6), row_E].sum() for row_E in allowed)
    assert benefit_EM[np.arange(6), found].sum() == pytest.approx(worth)


MACHINES = [
    ("rows", "exchange", 1),
    ("rows", "hierarchical", 2),
    ("seconds", "exchange", 2),
    ("seconds", "hierarchical", 2),
    ("seconds", "gathered", 1),
    ("load", "exchange", 1),
    ("hops", "exchange", 2),
]


@pytest.mark.parametrize(("objective", "dispatch", "nodes"), MACHINES)
def test_scores_of_swaps_are_the_objective_after_them(objective, dispatch, nodes):
    trace = instances.tiny_trace(3, num_experts=8, top_k=3)
    machine = topology.nodes_by_devices(nodes, 4)
    machine = dataclasses.replace(machine, device_flops=(4e14, 2e14, 3e14, 4e14))
    problem = Problem(trace, machine, objective, dispatch)
    device_E = baselines.random(1, 8, 4, 5)[0]
    e_P, f_P = np.nonzero(np.triu(device_E[:, None] != device_E[None, :]))
    score_P = swaps.values_P(problem, 1, device_E, e_P, f_P)
    for e, f, score in zip(e_P, f_P, score_P, strict=True):
        after_E = device_E.copy()
        after_E[[e, f]] = after_E[[f, e]]
        assert score == pytest.approx(problem.layer_value(1, after_E), rel=1e-12)


@pytest.mark.parametrize("objective", ["rows", "seconds", "moetuner"])
def test_values_of_neighbours_add_up_to_the_objective(objective):
    trace = instances.tiny_trace(1, num_layers=3)
    problem = Problem(trace, topology.flat(3), objective, "coherent")
    device_LE = baselines.random(3, 6, 3, 2)
    rows = [row_E[None] for row_E in device_LE]
    edges = chained.counted_edges(problem, rows, np.inf)
    total = chained.counted_first(problem, rows[0])[0] + sum(edge[0, 0] for edge in edges)
    assert total / 3 == pytest.approx(problem.value(device_LE), rel=1e-12)


def test_a_menu_holds_exact_values_and_nothing_that_is_beaten():
    problem = Problem(instances.tiny_trace(2, num_experts=8), topology.flat(4), "rows")
    old_E, free_E = baselines.random(1, 8, 4, 1)[0], problem.balanced_LE[0]
    border = Border(problem, 0, old_E)
    extended(border, old_E, free_E, np.inf)
    menu = border.menu()
    for moves, value, device_E in zip(menu.moves_C, menu.value_C, menu.device_CE, strict=True):
        assert moves == (device_E != old_E).sum()
        assert value == pytest.approx(problem.layer_value(0, device_E), rel=1e-12)
        assert (np.bincount(device_E) == 2).all()
    assert menu.moves_C[0] == 0
    assert (np.diff(menu.moves_C) > 0).all()
    assert (np.diff(menu.value_C) < 0).all()


def test_a_descent_knows_the_moves_of_every_neighbour_it_offers():
    problem = Problem(instances.tiny_trace(2, num_experts=8), topology.flat(4), "rows")
    old_E, start_E = baselines.random(2, 8, 4, 1)
    border = Border(problem, 0, old_E)
    border.descend(start_E, 0.0, np.inf)
    for moves, (value, device_E) in border._best.items():
        assert moves == (device_E != old_E).sum()
        assert value == pytest.approx(problem.layer_value(0, device_E), rel=1e-12)


def test_gains_of_swaps_along_the_chain_are_what_it_keeps_more():
    trace = instances.tiny_trace(3, num_experts=8, num_layers=3)
    pin_LEM = np.zeros((3, 8, 4), bool)
    device_LE = baselines.random(3, 8, 4, 7)
    pin_LEM[1, 5, device_LE[1, 5]] = True
    machine = topology.nodes_by_devices(2, 4)
    problem = Problem(trace, machine, "exflow", load_cap=LoadCap(2.0), pins=Pins(pin_LEM))
    device_LE = np.where([[False], [True], [False]], device_LE, problem.balanced_LE)
    chain = problem.chain(problem.top1_LEE)
    gain_EE = paths.gains_EE(problem, chain, device_LE, 1)
    kept = []
    for e, f in np.ndindex(8, 8):
        after_LE = device_LE.copy()
        after_LE[1, [e, f]] = after_LE[1, [f, e]]
        if device_LE[1, e] == device_LE[1, f] or not problem.allowed(1, after_LE[1]):
            assert gain_EE[e, f] == -np.inf
            continue
        kept.append((e, f))
        more = chain.value(after_LE) - chain.value(device_LE)
        assert gain_EE[e, f] == pytest.approx(more, abs=1e-9)
    assert 0 < len(kept) < 8 * 6  # some are allowed, and pin and cap forbid some


# The whole


def free_plan(problem: Problem) -> np.ndarray:
    return solve.solve_problem(problem, 0, time_limit=3).placement.device_LE.astype(np.int64)


def within(problem: Problem, free_LE: np.ndarray) -> np.ndarray:
    """The best plan that the search offers, of those that keep everything; the start is one."""
    offers = [limits_search.start(problem)]
    steps = limits_search.search(problem, offers[0], free_LE, np.inf)
    offers += [step.device_LE for step in steps]
    return min(filter(problem.all_allowed, offers), key=problem.value)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("objective", ["rows", "seconds", "load", "exflow"])
def test_plans_within_a_budget_against_brute_force(objective, seed):
    problem = Problem(instances.tiny_trace(seed), topology.flat(3), objective)
    free_LE = free_plan(problem)
    best_by = best_by_moves(from_random(problem, seed, 0))
    for moves in (0, 2, 3, 5, EVERYTHING):
        one = from_random(problem, seed, moves)
        value = one.value(within(one, free_LE))
        best = min(value for count, value in best_by.items() if count <= moves)
        assert value == pytest.approx(best, rel=1e-12)


TIED = [
    ("exflow", "exchange", 2),
    ("rows", "coherent", 1),
    ("seconds", "coherent", 1),
    ("moetuner", "exchange", 2),
]


@pytest.mark.parametrize("seed", instances.rest_slow(range(22), 11))  # each kind once
def test_a_budget_is_kept_and_more_of_it_is_never_worse(seed):
    objective, dispatch, nodes = [*MACHINES, *TIED][seed % 11]
    trace = instances.tiny_trace(seed, num_experts=8, num_layers=3, num_tokens=400)
    cap = LoadCap(1.5, relative=True) if seed % 4 == 0 else None
    machine = topology.nodes_by_devices(nodes, 4)
    if seed % 3 == 1 and objective != "moetuner":
        machine = dataclasses.replace(machine, device_flops=(4e14, 2e14, 3e14, 4e14))
    problem = Problem(trace, machine, objective, dispatch, load_cap=cap)
    free_LE = solve.constructed(problem)
    before = from_random(problem, seed, 0).previous.placement.device_LE
    values, refused = [], []
    for moves in (0, 1, 3, 6, 12, EVERYTHING):
        one = from_random(problem, seed, moves)
        try:
            device_LE = within(one, free_LE)
        except Refused as error:
            refused.append(error.field)
            continue
        assert int((device_LE != before).sum()) <= moves
        assert problem.all_allowed(device_LE)
        values.append(problem.value(device_LE))
    assert values == sorted(values, reverse=True)
    assert set(refused) <= ({"move_budget"} if not problem.all_allowed(before) else set())
    if problem.all_allowed(before):
        assert values[0] == pytest.approx(problem.value(before), rel=1e-12)
    assert values[-1] <= problem.value(free_LE) * (1 + 1e-12)


@pytest.mark.parametrize("objective", ["rows", "exflow"])
def test_the_solver_reports_what_it_found_and_what_other_budgets_bring(objective):
    problem = Problem(instances.tiny_trace(1, num_experts=8), topology.flat(4), objective)
    one = from_random(problem, 1, 5)
    placement, report = solve.solve_problem(one, 0, time_limit=3)
    assert one.previous.moved(placement) <= 5
    assert report.objective == pytest.approx(problem.value(placement.device_LE), rel=1e-12)
    assert report.bound <= report.objective <= report.greedy
    assert report.greedy == pytest.approx(problem.value(one.previous.placement.device_LE))
    moves, values = zip(*report.tradeoff, strict=True)
    assert moves[0] == 0
    assert values[0] == pytest.approx(report.greedy)
    assert list(moves) == sorted(set(moves))
    assert list(values) == sorted(set(values), reverse=True)
    assert report.objective <= min(v for m, v in report.tradeoff if m <= 5) * (1 + 1e-12)
    free = solve.solve_problem(problem, 0, time_limit=3).report.objective
    everything = solve.solve_problem(from_random(problem, 1, EVERYTHING), 0, time_limit=3)
    assert everything.report.objective <= free * (1 + 1e-12)


@pytest.mark.parametrize(("dispatch", "seed"), [("exchange", 0), ("exchange", 2), ("shuffled", 1)])
def test_a_cap_hides_no_plan_and_the_table_promises_none(dispatch, seed):
    """Where a cap forbids every swap with as many moves, nothing is filed under them."""
    trace = synthetic.realistic(
        num_tokens=800, num_layers=3, num_experts=16, top_k=2, seed=seed, num_sequences=8
    )
    problem = Problem(
        trace,
        topology.flat(4),
        "rows",
        dispatch,
        load_cap=LoadCap(1.1, relative=True),
        previous=Previous(Placement.contiguous(3, 16, 4), 10),
    )
    found = solve.solve_problem(problem, 0, 1.5)
    start_LE = limits_search.start(problem)
    assert found.report.objective < problem.value(start_LE)
    best = min(value for moves, value in found.report.tradeoff if moves <= 10)
    assert best == pytest.approx(found.report.objective, rel=1e-9)
    assert found.report.tradeoff[0][0] >= problem.previous.moves - problem.previous.left(start_LE)


@pytest.mark.parametrize("limit", ["pins", "previous"])
@pytest.mark.parametrize(
    ("objective", "dispatch"), [("rows", "shuffled"), ("seconds", "shuffled"), ("rows", "coherent")]
)
def test_one_layer_is_planned_within_limits(objective, dispatch, limit):
    """There is no neighbour whose ways could be counted."""
    trace = synthetic.realistic(
        num_tokens=300, num_layers=1, num_experts=6, top_k=2, seed=5, num_sequences=8
    )
    device_E = np.array([0, 1, 1, 0, 1, 0])
    if limit == "pins":
        held_LEM = np.zeros((1, 6, 2), bool)
        held_LEM[0, 0, 1] = True
        restricted = {"pins": Pins(held_LEM)}
    else:
        restricted = {"previous": Previous(Placement.from_device_LE(device_E[None], 2), 2)}
    problem = Problem(trace, topology.flat(2), objective, dispatch, **restricted)
    found = solve.solve_problem(problem, 0, 2.0)
    values = [
        problem.value(np.array(row)[None])
        for row in set(itertools.permutations([0, 0, 0, 1, 1, 1]))
        if problem.all_allowed(np.array(row)[None])
    ]
    assert found.report.objective == pytest.approx(min(values), rel=1e-9)


def test_no_budget_gives_the_plan_in_use_slot_by_slot():
    problem = Problem(instances.tiny_trace(0), topology.flat(3), "rows")
    slots_LP = np.array([[5, 0, 3, 1, 2, 4], [1, 0, 4, 2, 3, 5]])
    old = Placement(slots_LP, 6, 3)
    one = dataclasses.replace(problem, previous=Previous(old, 0))
    assert solve.solve_problem(one, 0, time_limit=5).placement == old
    some = dataclasses.replace(problem, previous=Previous(old, 2))
    placement = solve.solve_problem(some, 0, time_limit=5).placement
    changed_LP = placement.physical_to_logical_LP != slots_LP
    assert changed_LP.sum() == some.previous.moved(placement) == 2


def test_a_cap_that_the_plan_in_use_breaks_costs_the_fewest_moves_or_is_refused():
    problem = Problem(
        instances.tiny_trace(4), topology.flat(3), "rows", load_cap=LoadCap(1.05, True)
    )
    one = from_random(problem, 4, 0)
    old_LE = one.previous.placement.device_LE
    needed = sum(
        min(int((row_E != old_E).sum()) for row_E in labels(6, 3) if problem.allowed(layer, row_E))
        for layer, old_E in enumerate(old_LE)
    )
    assert needed > 0
    with pytest.raises(Refused, match=f"alone move {needed} experts"):
        solve.solve_problem(from_random(problem, 4, needed - 1), 0, time_limit=5)
    placement = solve.solve_problem(from_random(problem, 4, needed), 0, time_limit=5).placement
    assert (placement.device_LE != old_LE).sum() == needed
    assert problem.all_allowed(placement.device_LE)


@pytest.mark.parametrize(
    ("objective", "dispatch"),
    [("rows", "exchange"), ("exflow", "exchange"), ("rows", "coherent"), ("moetuner", "exchange")],
)
def test_the_time_limit_is_kept_and_none_still_answers(objective, dispatch):
    trace = instances.tiny_trace(0, num_experts=64, num_layers=8, num_tokens=1000)
    problem = Problem(trace, topology.flat(8), objective, dispatch)
    one = from_random(problem, 0, 40)
    for limit in (0.0, 1.0):
        started = time.process_time()
        placement = solve.solve_problem(one, 0, limit).placement
        assert time.process_time() - started < limit + 2.0
        assert one.previous.moved(placement) <= 40


def test_a_sample_of_tokens_chooses_and_the_whole_trace_judges(monkeypatch):
    trace = instances.tiny_trace(0, num_experts=8, num_layers=3, num_tokens=2000)
    problem = Problem(trace, topology.flat(4), "rows", "coherent")
    one, free_LE = from_random(problem, 0, 6), solve.constructed(problem)
    exact = one.value(within(one, free_LE))
    monkeypatch.setattr(chained, "TOKENS", 300)
    rows = [row_E[None] for row_E in free_LE]
    edges = chained.counted_edges(problem, rows, np.inf)
    total = chained.counted_first(problem, rows[0])[0] + sum(edge[0, 0] for edge in edges)
    assert total / 3 == pytest.approx(problem.value(free_LE), rel=0.1)
    sampled = one.value(within(one, free_LE))
    assert exact <= sampled <= one.value(limits_search.start(one))


@pytest.mark.parametrize("where", ["without limits", "within limits"])
def test_ctrl_c_leaves_a_plan_within_the_budget(where, monkeypatch):
    problem = from_random(Problem(instances.tiny_trace(0), topology.flat(3), "rows"), 0, 3)
    search = limits_search.search

    def stopped(*arguments):
        yield next(iter(search(*arguments)))
        raise KeyboardInterrupt

    def tell(progress) -> None:
        if progress.stage.startswith(where):
            raise KeyboardInterrupt

    monkeypatch.setattr(limits_search, "search", stopped)
    with pytest.raises(Interrupted) as stop:
        solve.solve_problem(problem, 0, 5.0, tell if where == "without limits" else None)
    placement, report = stop.value.solution
    assert problem.previous.moved(placement) <= 3
    assert report.interrupted
    assert report.objective == pytest.approx(problem.value(placement.device_LE), rel=1e-12)


def test_bytes_of_a_budget():
    assert MoveBudget.parse("2GB").bytes(10**12) == 2 * 10**9
    assert MoveBudget.parse("1.5mb").bytes(10**12) == 1_500_000
    assert MoveBudget.parse("7").bytes(10**12) == 7
    assert MoveBudget.parse("25%").bytes(1000) == 250
    assert [MoveBudget.parse(f"{n}%").bytes(100) for n in range(101)] == list(range(101))
    plan = Placement.contiguous(2, 4, 2)
    assert Previous.of(plan, MoveBudget.parse("29"), 10).moves == 2
    assert Previous.of(plan, MoveBudget.parse("50%"), 10).moves == 4
    assert Previous.of(plan, None, 10).moves == 8
    for text in ("-1", "nan", "inf", "101%", "10GiB", "", "%", "GB", "1e400"):
        with pytest.raises(Refused, match="move_budget"):
            MoveBudget.parse(text)


def test_copies_that_appear_are_counted_and_those_that_go_are_not():
    before = Placement(np.array([[0, 1, 2, 3, 0, 1]]), 4, 2)  # device 0: 0 1 2, device 1: 3 0 1
    after = Placement(np.array([[2, 1, 3, 3, 0, 2]]), 4, 2)  # device 0: 2 1 3, device 1: 3 0 2
    assert arrivals_L(before, after).tolist() == [2]
    assert arrivals_L(before, before).tolist() == [0]


# The command


@pytest.fixture
def trace_path(tmp_path):
    path = tmp_path / "t.npz"
    trace_lib.save(instances.tiny_trace(0, num_experts=8, num_layers=3, num_tokens=600), path)
    return path


def run(*words) -> int:
    return command_line.main([str(word) for word in words])


def test_the_command_moves_what_it_may_and_says_what_more_would_bring(trace_path, tmp_path, capsys):
    old, out = tmp_path / "old.json", tmp_path / "new.json"
    assert run("solve", trace_path, "--devices=4", "--objective=load", f"--out={old}") == 0
    capsys.readouterr()
    words = ("--devices=4", "--objective=rows", f"--previous={old}", "--expert-bytes=1000")
    assert run("solve", trace_path, *words, "--move-budget=4500", f"--out={out}", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    moved = int((Plan.read(old).placement.device_LE != Plan.read(out).placement.device_LE).sum())
    assert answer["move"]["experts"] == moved <= 4
    assert answer["move"]["bytes"] == 1000 * moved
    assert answer["move"]["budget_bytes"] == 4000
    assert answer["tradeoff"][0][0] == 0
    assert answer["objective"] <= answer["greedy"]
    origin = Plan.read(out).provenance
    assert origin["previous_digest"] == Plan.read(old).digest
    assert origin["moves_allowed"] == 4
    page = tmp_path / "p.html"
    assert run("solve", trace_path, *words, f"--out={out}", f"--report={page}") == 0
    text = capsys.readouterr().out
    assert "What other budgets would bring" in text
    assert "From old.json:" in text
    assert "Before: old.json." in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--move-budget=1GB",), "move_budget"),
        (("--expert-bytes=5",), "expert_bytes"),
        (("--previous=OLD", "--move-budget=lots"), "move_budget"),
        (("--previous=OLD", "--expert-bytes=0"), "expert_bytes"),
        (("--previous=OLD", "--devices=2"), "previous num_devices"),
        (("--previous=missing.json",), "does not exist"),
        (("--previous=OLD", "--report=OLD"), "is the previous as well"),
        (("--previous=OLD", "--move-budget=10%%"), "move_budget"),
        (("--pin=0:0",), "neither a triple nor a file"),
    ],
)
def test_what_cannot_be_counted_is_refused(words, message, trace_path, tmp_path, capsys):
    old, out = tmp_path / "old.json", tmp_path / "new.json"
    Plan(Placement.contiguous(3, 8, 4)).write(old)
    words = [word.replace("OLD", str(old)) for word in words]
    assert run("solve", trace_path, "--devices=4", *words, f"--out={out}") == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "words",
    ["--previous=OLD", "--pin=0:0:0", "--move-budget=10%", "--expert-bytes=5", "--steady=0.1"],
)
def test_counts_refuse_what_they_cannot_keep(words, tmp_path, capsys):
    counts, old, out = tmp_path / "logical_count.npz", tmp_path / "old.json", tmp_path / "new.json"
    np.savez(counts, logical_count=np.ones((4, 3, 8), np.int64))
    Plan(Placement.contiguous(3, 8, 4)).write(old)
    more = ("--devices=4", "--objective=load", f"--out={out}")
    assert run("solve", counts, *more) == 0
    out.unlink()
    capsys.readouterr()
    assert run("solve", counts, *more, words.replace("OLD", str(old))) == 1
    assert words.split("=")[0][2:].replace("-", "_") in capsys.readouterr().err
    assert not out.exists()


def test_a_plan_of_other_layers_is_refused(trace_path, tmp_path, capsys):
    old, out = tmp_path / "old.json", tmp_path / "new.json"
    Plan(Placement.contiguous(3, 8, 4), (5, 6, 7)).write(old)
    words = ("--devices=4", f"--previous={old}", f"--out={out}")
    assert run("solve", trace_path, *words) == 1
    assert "5 to 7" in capsys.readouterr().err
