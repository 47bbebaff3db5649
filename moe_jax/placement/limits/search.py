"""Plans that keep pins and stay within a budget of moves: where to start, and the search.

Axes: L MoE layers, E experts, M devices.

`start` is the plan in use (or the most even one) with as few changes as pins and load cap need.
`search` takes the plan that was found without restrictions, numbers its devices so that least
moves, and looks for what lies between the two: options per layer, joined by an exact dynamic
program over layers and moves (knapsack.py). No option is made for one budget, so the values of all
budgets come out of one table, and more budget is never worse.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement import clock
from moe_jax.placement import move as move_lib
from moe_jax.placement.limits import chained, knapsack
from moe_jax.placement.limits.menu import Border, Menu, extended
from moe_jax.placement.limits.nearest import Nearest, nearest
from moe_jax.placement.problem import Problem

REPAIR_SECONDS = 2.0  # of the integer program of a layer that breaks a pin or the cap
REFINED = 16  # numbers of moves whose plans are refined
AGAIN = 8  # layers after which the choice is made anew


class Step(NamedTuple):
    """A plan, and the least values found for every number of moves, in values of the objective."""

    device_LE: np.ndarray
    value_B: np.ndarray


def start(problem: Problem) -> np.ndarray:
    """int64 [L, E]: the plan in use, changed as little as pins and load cap need.

    Refuses what no plan keeps, and a budget that does not pay for these changes.
    """
    near_LE = problem.balanced_LE
    if problem.previous is not None:
        near_LE = problem.previous.placement.device_LE.astype(np.int64)
    rows = []
    for layer, near_E in enumerate(near_LE):
        found = nearest(near_E, chained.within_of(problem, layer), REPAIR_SECONDS)
        if found.device_E is None:
            raise _unreachable(problem, layer, found)
        rows.append(found.device_E)
    start_LE = np.stack(rows)
    if problem.previous is not None:
        needed = int((start_LE != near_LE).sum())
        if needed > problem.previous.moves:
            raise Refused(
                "move_budget",
                f"{problem.previous.moves} experts",
                f"the pins and the load cap alone move {needed} experts",
                f"Allow {needed} experts' bytes, or a wider load cap",
            )
    return start_LE


def search(
    problem: Problem, start_LE: np.ndarray, free_LE: np.ndarray, deadline: float
) -> Iterator[Step]:
    """Yields plans within the budget, better and better ones as a rule; the caller keeps the best.

    Args:
      problem: with pins, a plan in use, or both.
      start_LE: of `start`.
      free_LE: the best plan without restrictions.
      deadline: time.monotonic() after which it ends.
    """
    old_LE = start_LE
    if problem.previous is not None:
        old_LE = problem.previous.placement.device_LE.astype(np.int64)
    free_LE = _fitted(problem, start_LE, free_LE, deadline)
    yield Step(free_LE, np.zeros(0))
    if problem.objective == "exflow":
        yield from _hops(problem, old_LE, start_LE, free_LE, deadline)
    elif problem.separable:
        borders = [Border(problem, layer, old_E) for layer, old_E in enumerate(old_LE)]
        for menus in _menus(borders, start_LE, free_LE, deadline):
            yield _mixed_apart(problem, menus)
    else:
        yield from _tied(problem, old_LE, start_LE, free_LE, deadline)


def corners(value_B: np.ndarray) -> tuple[tuple[int, float], ...]:
    """(moves, value) wherever one more move pays."""
    finite = np.flatnonzero(np.isfinite(value_B))
    if not finite.size:
        return ()
    falls = finite[1:][np.diff(value_B[finite]) < 0]
    return tuple((int(b), float(value_B[b])) for b in [finite[0], *falls])


def _hops(problem: Problem, old_LE, start_LE, free_LE, deadline: float) -> Iterator[Step]:
    half = clock.share(deadline, 1 / 2)
    plans = list(chained.plans(problem, old_LE, start_LE, free_LE, half))
    table, options = _hop_table(problem, old_LE, plans)
    yield _hop_step(problem, table, options)
    numbers = np.linspace(0, len(table.value_B) - 1, REFINED).round().astype(int)
    for moves in np.unique(numbers):
        if (choice := table.choice(int(moves))) is not None:
            plan_LE = _rows(options, choice)
            plans.append(chained.refined(problem, old_LE, plan_LE, int(moves), deadline))
    yield _hop_step(problem, *_hop_table(problem, old_LE, plans))


def _hop_table(problem: Problem, old_LE, plans) -> tuple[knapsack.Table, list[np.ndarray]]:
    options = [
        np.stack([row_E for row_E in option_CE if problem.allowed(layer, row_E)])
        for layer, option_CE in enumerate(chained.options(plans))
    ]
    edges = chained.hop_edges(problem.chain(problem.top1_LEE), options)
    moves = _moves(options, old_LE)
    return knapsack.chained(np.zeros(len(options[0])), edges, moves, _most(moves)), options


def _hop_step(problem: Problem, table: knapsack.Table, options: list[np.ndarray]) -> Step:
    moves = max(float(problem.top1_LEE.sum()), 1.0)
    value_B = problem.hops(0.0) * (1 + table.value_B / moves)  # what is kept is counted below 0
    return _chosen(problem, table, options, value_B)


def _tied(problem: Problem, old_LE, start_LE, free_LE, deadline: float) -> Iterator[Step]:
    likely = "seconds" if problem.objective == "moetuner" else problem.objective
    near = dataclasses.replace(problem, objective=likely, dispatch="exchange")
    borders = [Border(near, layer, old_E) for layer, old_E in enumerate(old_LE)]
    *_, menus = _menus(borders, start_LE, free_LE, clock.share(deadline, 1 / 3))
    for most in chained.PAIRED:
        options = [_thinned(menu, most) for menu in menus]
        edges = chained.counted_edges(problem, options, deadline)
        if edges is None:
            return
        first_C = chained.counted_first(problem, options[0])
        moves = _moves(options, old_LE)
        table = knapsack.chained(first_C, edges, moves, _most(moves))
        step = _chosen(problem, table, options, table.value_B / problem.trace.num_layers)
        yield step if chained.counted_whole(problem) else Step(step.device_LE, np.zeros(0))


def _menus(borders: list[Border], start_LE, free_LE, deadline: float) -> Iterator[list[Menu]]:
    """The menus of all layers: both ends first, then with more and more between them."""
    for border, start_E, free_E in zip(borders, start_LE, free_LE, strict=True):
        border.add(start_E)
        border.add(free_E)
    yield [border.menu() for border in borders]
    for layer, border in enumerate(borders):
        if clock.late(deadline):
            break
        share = clock.share(deadline, 1 / (len(borders) - layer))
        extended(border, start_LE[layer], free_LE[layer], share)
        if layer % AGAIN == AGAIN - 1 and layer < len(borders) - 1:
            yield [one.menu() for one in borders]
    yield [border.menu() for border in borders]


def _mixed_apart(problem: Problem, menus: list[Menu]) -> Step:
    values, moves = [menu.value_C for menu in menus], [menu.moves_C for menu in menus]
    table = knapsack.apart(values, moves, _most(moves))
    options = [menu.device_CE for menu in menus]
    return _chosen(problem, table, options, table.value_B / len(menus))


def _chosen(problem: Problem, table: knapsack.Table, options, value_B: np.ndarray) -> Step:
    most = len(table.value_B) - 1
    choice = table.choice(most if problem.previous is None else problem.previous.moves)
    assert choice is not None  # `start` is among the options
    return Step(_rows(options, choice), value_B)


def _rows(options: list[np.ndarray], choice: list[int]) -> np.ndarray:
    return np.stack([option_CE[c] for option_CE, c in zip(options, choice, strict=True)])


def _moves(options: list[np.ndarray], old_LE: np.ndarray) -> list[np.ndarray]:
    return [(row_CE != old_E).sum(axis=1) for row_CE, old_E in zip(options, old_LE, strict=True)]


def _most(moves: list[np.ndarray]) -> int:
    return int(sum(moves_C.max() for moves_C in moves))


def _thinned(menu: Menu, most: int) -> np.ndarray:
    """Both ends of a menu and some between them, [C, E]."""
    at = np.linspace(0, len(menu.moves_C) - 1, min(most, len(menu.moves_C)))
    return menu.device_CE[at.round().astype(int)]


def _fitted(problem: Problem, start_LE, free_LE, deadline: float) -> np.ndarray:
    """The free plan, numbered for most pins and then fewest moves, within pins and caps."""
    layers, devices = len(free_LE), problem.num_devices
    held_LEM = (start_LE[:, :, None] == np.arange(devices)).astype(float)
    if problem.pins is not None:  # a pin outweighs all else
        held_LEM += (free_LE.size + 1) * problem.pins.held_LEM
    worth_LMM = np.stack(
        [
            held_EM.T @ np.eye(devices)[row_E]
            for held_EM, row_E in zip(held_LEM, free_LE, strict=True)
        ]
    )
    if not problem.separable:  # one numbering for all layers
        worth_LMM = np.tile(worth_LMM.sum(axis=0), (layers, 1, 1))
    rows = []
    for layer, worth_MM in enumerate(worth_LMM):
        near_E = move_lib.numbering(problem, worth_MM)[free_LE[layer]]
        left = min(deadline - time.monotonic(), REPAIR_SECONDS)
        found = nearest(near_E, chained.within_of(problem, layer), max(left, 0.0))
        rows.append(start_LE[layer] if found.device_E is None else found.device_E)
    return np.stack(rows)


def _unreachable(problem: Problem, layer: int, found: Nearest) -> Refused:
    mean = problem.load_LE[layer].mean() * problem.trace.num_experts / problem.num_devices
    proof = "cannot be kept" if found.none_exist else "could not be kept"
    return Refused(
        "load_cap",
        f"{problem.cap_L[layer] / max(mean, 1e-300):.4g} times the mean",
        f"{proof} in layer {problem.trace.layer_ids[layer]} together with what is pinned there",
        "Allow more load, or pin less",
    )
