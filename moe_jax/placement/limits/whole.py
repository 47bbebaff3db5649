"""Few experts and a plan in use: all placements of a layer are options, joined for every budget.

Axes: L MoE layers, E experts, C placements of a layer, S all of them, B moves so far.

Devices are those of the plan in use, so that no two may change places: every placement that keeps
pins and load cap is looked at by itself (enumerated.py), every pair of neighbouring layers too, and
knapsack.py joins them for every number of moves. So the best plan within a budget is proven. Where
all numbers of moves are too many, those of the budget may fit; where layers are not tied, only the
cheapest placement of every number of moves is an option.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.placement import clock, enumerated
from moe_jax.placement.limits import knapsack
from moe_jax.placement.problem import Problem

SLOWER = 3  # a step of the dynamic program, in numbers looked at


class Whole(NamedTuple):
    """The best plan within the budget; it has the fewest moves of all that are as good.

    Attributes:
      device_LE: int64.
      bound: its value.
      value_B: the least values with at most so many moves.
      complete: more moves than that are never needed.
    """

    device_LE: np.ndarray
    bound: float
    value_B: np.ndarray
    complete: bool


class _Options(NamedTuple):
    """Of one layer: placements [C, E], what they cost by themselves, and their moves."""

    device_CE: np.ndarray
    own_C: np.ndarray
    moves_C: np.ndarray

    def chosen(self, which: np.ndarray) -> "_Options":
        return _Options(self.device_CE[which], self.own_C[which], self.moves_C[which])


def solved(problem: Problem, time_limit: float, deadline: float) -> Whole | None:
    """The optimum within the budget; None where there are too many placements.

    Args:
      problem: with a plan in use.
      time_limit: in seconds: what is expected to take longer is not begun.
      deadline: of time.monotonic(), for what was expected wrongly.
    """
    assert problem.previous is not None
    count, budget = enumerated.number_of(problem), problem.previous.moves
    if count > enumerated.MOST_STATES or problem.num_devices > enumerated.MOST_DEVICES:
        return None
    costs, numbers = enumerated.costs_of(problem), time_limit * enumerated.SPEED
    if costs is None:
        return None
    if enumerated.numbers_alone(problem, count) > numbers:
        clock.cut()
        return None
    options = _options(problem, costs, deadline)
    if options is None:
        return None
    full = most = int(sum(one.moves_C.max() for one in options))
    if _numbers(costs, options, most) > numbers:
        clock.cut()
        most = min(budget, full)
        options = [one.chosen(one.moves_C <= most) for one in options]
    if _numbers(costs, options, most) > numbers or not all(len(one.own_C) for one in options):
        return None
    own, moves = [one.own_C for one in options], [one.moves_C for one in options]
    if costs.tied:
        try:
            table = knapsack.chained(own[0], _edges(costs, options, deadline), moves, most)
        except TimeoutError:
            return None
    else:
        table = knapsack.apart(own, moves, most)
    value_B = table.value_B / len(options)
    bound = float(value_B[min(budget, most)])
    choice = table.choice(int(np.argmax(value_B <= bound * (1 + 1e-12))))
    if choice is None:
        return None
    rows = [one.device_CE[c] for one, c in zip(options, choice, strict=True)]
    return Whole(np.stack(rows).astype(np.int64), bound, value_B, most == full)


def _options(
    problem: Problem, costs: enumerated.Costs, deadline: float
) -> Sequence[_Options] | None:
    """Of every layer; None if time ran out or a layer has none."""
    assert problem.previous is not None
    every_SE = enumerated.arranged(problem.trace.num_experts, problem.num_devices)
    found = []
    for layer, old_E in enumerate(problem.previous.placement.device_LE):
        own_S = enumerated.alone(problem, costs, layer, every_SE)
        kept = np.flatnonzero(np.isfinite(own_S))
        if not kept.size or clock.late(deadline):
            return None
        one = _Options(every_SE, own_S, (every_SE != old_E).sum(axis=1)).chosen(kept)
        found.append(one if costs.tied else _cheapest(one))
    return found


def _cheapest(one: _Options) -> _Options:
    """Of all with equally many moves the one that costs least."""
    sorted_ = one.chosen(np.lexsort((one.own_C, one.moves_C)))
    return sorted_.chosen(np.unique(sorted_.moves_C, return_index=True)[1])


def _numbers(costs: enumerated.Costs, options: Sequence[_Options], most: int) -> int:
    """About how many numbers are looked at to join them."""
    if not costs.tied:
        return 0
    size = [len(one.own_C) for one in options]
    pairs = sum(before * after for before, after in itertools.pairwise(size))
    return pairs * (costs.each + SLOWER * (most + 1))


def _edges(
    costs: enumerated.Costs, options: Sequence[_Options], deadline: float
) -> Iterator[np.ndarray]:
    """Yields what options of a layer cost, [C, D], after those of the layer before."""
    for layer in range(1, len(options)):
        before, after = options[layer - 1], options[layer]
        edge_CD = np.empty((len(before.own_C), len(after.own_C)))
        for c, before_E in enumerate(before.device_CE):
            if clock.late(deadline):
                raise TimeoutError
            edge_CD[c] = costs.pair(layer, before_E, after.device_CE) + after.own_C
        yield edge_CD
