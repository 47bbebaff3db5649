"""Plans with replicas that start from a plan in use, or keep pins: copy by copy to a better one.

Axes: L MoE layers, E experts, M devices. A layer is held_EM, bool: which device holds which expert;
all devices hold equally many, and every expert is somewhere.

`path` leads from one layer to another so that every stop is a valid layer, no copy arrives that
the end does not have, and the stop that is worth most comes next, as a sample of tokens says.
`search` walks from the plan in use to the free plan and to the even one, their devices numbered so
that least moves. The stops are options of a layer, and knapsack.py picks one per layer. Where
layers are tied (coherent dispatch, exflow) rows of exchange dispatch stand in for the values of
single layers, and blocks of whole layers are offered too; plans are judged by their true values.
Under a load cap what is above it, the plan in use too, is brought below it by few changes
(relieved.py); loads of exchange dispatch stand in there as well, and are held to less where the
counted ones pass the cap.

A slot that is added has to be filled, so its copy counts as a move.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from moe_jax.errors import Refused
from moe_jax.placement import clock, hops, hops_counts, spare
from moe_jax.placement import move as move_lib
from moe_jax.placement.limits import knapsack
from moe_jax.placement.limits.caps import SLACK
from moe_jax.placement.limits.previous import holds_LEM, placement_of
from moe_jax.placement.limits.relieved import relieved
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.placement.spare import Judged
from moe_jax.routing.trace import Trace

CHOOSING, JUDGING = 2048, 8192  # tokens that a next stop is chosen by, and valued by
NEXT = 6  # next stops that are looked at
STOPS = 10  # stops of a path that are valued
ROUNDS = 6  # of options under narrower caps, where a plan of them passed its own
MARGIN = 0.01  # of a load cap that was passed: by how much narrower the next one is besides


def start(problem: Problem, cap_L: np.ndarray, seed: int) -> Placement:
    """The plan in use, or the even one, changed as little as slots and pins need.

    Refuses a budget that does not pay for that.
    """
    previous = problem.previous
    if previous is None:
        plan = spare.balanced(problem)
    elif previous.placement.num_slots == problem.num_slots:
        plan = previous.placement
    else:
        device_LE = previous.placement.device_LE.astype(np.int64)
        plan = spare.filled(problem, device_LE, cap_L, seed, time.monotonic() + 3600.0)
    if problem.pins is not None:
        held = zip(holds_LEM(plan), problem.pins.held_LEM, strict=True)
        plan = placement_of(np.stack([pinned(held_EM, pin_EM) for held_EM, pin_EM in held]))
    if previous is not None and (needed := previous.moved(plan)) > previous.moves:
        raise Refused(
            "move_budget",
            f"{previous.moves} copies",
            f"pins, and slots that have to be filled, bring {needed} copies",
            f"Allow the bytes of {needed} experts",
        )
    return plan


def search(
    problem: Problem,
    first: Judged,
    free: Placement,
    cap_L: np.ndarray,
    deadline: float,
    judge: Callable[[Placement], Judged | None],
) -> Iterator[Judged]:
    """Yields plans within pins and budget, as judged; the caller keeps the best within the caps.

    Args:
      first: the plan in use, or the even one.
      free: a plan without limits, to walk to.
      cap_L: the largest load of each layer, over its device's speed.
      deadline: time.monotonic() after which no more options are looked for, once a plan fits.
      judge: counts a plan; None: there is no time for that, and the search ends.

    Raises:
      Refused: the budget does not pay for the least changes that were found to keep the caps.
    """
    begun, fits = first.placement, first.fits
    targets = [free, *(_numbered(problem, begun, one) for one in (free, spare.balanced(problem)))]
    if not problem.separable:
        targets += _blocks(problem, holds_LEM(begun), holds_LEM(targets[1]))
    for target in targets:
        if _keeps(problem, target):
            if (found := judge(target)) is None:
                return
            fits |= found.fits
            yield found
    layers = []
    for layer, held_EM in enumerate(holds_LEM(begun)):
        ends = [_mended(problem, layer, holds_LEM(target)[layer]) for target in targets[1:3]]
        share = clock.share(deadline, 1 / (problem.trace.num_layers - layer))
        layers.append(_Layer(problem, layer, held_EM, capped=bool(np.isfinite(cap_L[layer]))))
        layers[-1].look(ends, share)
    old_LEM = holds_LEM(begun if problem.previous is None else problem.previous.placement)
    for near in (True,) if clock.late(deadline) else (False, True):
        aim_L = cap_L
        for turn in range(ROUNDS):
            options = [
                one.within(aim, near, deadline, must=not fits)
                for one, aim in zip(layers, aim_L, strict=True)
            ]
            if (chosen := _chosen(problem, options, old_LEM)) is None:
                if near and not turn and not fits:
                    _check_budget(problem, options, old_LEM, cap_L)
                break
            if (found := judge(placement_of(np.stack([one.held_EM for one in chosen])))) is None:
                return
            yield found
            if found.fits:
                return
            # loads of exchange dispatch, with copies as near as can be, stood in for these
            over_L = found.reached_L / cap_L
            stood_L = np.array([one.largest for one in chosen])
            aim_L = np.where(over_L > 1 + SLACK, stood_L / (over_L + MARGIN), aim_L)


class _Option(NamedTuple):
    """What a layer may become.

    Attributes:
      held_EM: bool [E, M], which device holds which expert.
      worth: the layer's objective on a sample; 0 where there was no time to value it: then all of
        the layer's options have it, which is decided before there is one.
      largest: rows of the fullest device, over its speed, in exchange dispatch; 0 without a cap.
    """

    held_EM: np.ndarray
    worth: float
    largest: float


def _moves(options: list[list[_Option]], old_LEM: np.ndarray) -> list[np.ndarray]:
    """Copies that appear with every option of every layer."""
    return [
        np.array([(option.held_EM & ~old_EM).sum() for option in one])
        for one, old_EM in zip(options, old_LEM, strict=True)
    ]


def _check_budget(
    problem: Problem, options: list[list[_Option]], old_LEM: np.ndarray, cap_L: np.ndarray
) -> None:
    """Refuses the budget, with one that pays for these options, where they keep the caps for sure.

    So they do where loads of single layers are the counted ones.
    """
    least_L = np.array([one[0].largest for one in options])  # all others are no more above the cap
    if not problem.separable or (least_L > cap_L * (1 + SLACK)).any():
        return
    assert problem.previous is not None
    needed = int(sum(moves.min() for moves in _moves(options, old_LEM)))
    raise Refused(
        "move_budget",
        f"{problem.previous.moves} copies",
        f"to keep the load cap {needed} copies appear, by the least changes that were found",
        f"Allow the bytes of {needed} experts, or more load",
    )


def _chosen(
    problem: Problem, options: list[list[_Option]], old_LEM: np.ndarray
) -> list[_Option] | None:
    """The best one of every layer that the budget pays for; None if it pays for none."""
    moves = _moves(options, old_LEM)
    worths = [np.array([option.worth for option in one]) for one in options]
    most = int(sum(count.max() for count in moves))
    table = knapsack.apart(worths, moves, most)
    choice = table.choice(most if problem.previous is None else problem.previous.moves)
    if choice is None:
        return None
    return [one[c] for one, c in zip(options, choice, strict=True)]


def pinned(held_EM: Bool[np.ndarray, "E M"], pin_EM: Bool[np.ndarray, "E M"]) -> np.ndarray:
    """bool [E, M]: the layer with every pin held, by few changes."""
    held_EM = held_EM.copy()
    for expert, device in np.argwhere(pin_EM):
        if held_EM[expert, device]:
            continue
        loose_E = held_EM[:, device] & ~pin_EM[:, device]
        victim = int(np.where(loose_E, held_EM.sum(axis=1), -1).argmax())
        held_EM[victim, device], held_EM[expert, device] = False, True
        if held_EM[victim].any():
            continue
        # its last copy: it takes the slot of an expert that has others (Pins.check: there is one)
        spare_EM = held_EM & ~pin_EM & (held_EM.sum(axis=1, keepdims=True) > 1)
        other, where = np.argwhere(spare_EM)[0]
        held_EM[other, where], held_EM[victim, where] = False, True
    return held_EM


def path(
    held_EM: Bool[np.ndarray, "E M"], end_EM: Bool[np.ndarray, "E M"], prefer, rng
) -> Iterator[np.ndarray]:
    """The stops from one layer to another, both of them left out at the beginning only.

    Args:
      held_EM: where it begins; not yielded.
      end_EM: where it ends; the last stop.
      prefer: of several next stops, the number of the best one.
      rng: which next stops are looked at.
    """
    while not np.array_equal(held_EM, end_EM):
        arrives, leaves = end_EM & ~held_EM, held_EM & ~end_EM
        pairs = [
            (int(a), int(d), int(m))
            for m in np.flatnonzero(arrives.any(axis=0))
            for a in np.flatnonzero(arrives[:, m])
            for d in np.flatnonzero(leaves[:, m])
        ]
        chosen = rng.choice(len(pairs), size=min(NEXT, len(pairs)), replace=False)
        stops = [_replaced(held_EM, end_EM, *pairs[c]) for c in chosen]
        held_EM = stops[prefer(stops) if len(stops) > 1 else 0]
        yield held_EM


def _replaced(held_EM, end_EM, arriving: int, leaving: int, device: int) -> np.ndarray:
    """One copy for another; an expert that is nowhere then goes where the end has it, and so on."""
    held_EM = held_EM.copy()
    while True:
        held_EM[leaving, device], held_EM[arriving, device] = False, True
        if held_EM[leaving].any():
            return held_EM
        arriving = leaving
        device = int(np.flatnonzero(end_EM[arriving])[0])
        leaves_E = held_EM[:, device] & ~end_EM[:, device]
        leaving = int(np.where(leaves_E, held_EM.sum(axis=1), -1).argmax())


class _Layer:
    """One layer's options and what they are worth."""

    def __init__(self, problem: Problem, layer: int, held_EM: np.ndarray, *, capped: bool):
        self._problem, self._layer, self._held_EM, self._capped = problem, layer, held_EM, capped
        self._choosing = _alone(problem, layer, CHOOSING)
        self._judging = _alone(problem, layer, JUDGING)
        self._options: list[_Option] = []
        self._below: dict[tuple[int, float], list[_Option]] = {}
        self._ends = 0
        self._late = False

    def look(self, ends: list[np.ndarray], deadline: float) -> None:
        """Values the layer itself, the ends and stops on the ways to them.

        At the deadline those that are not valued yet are left out, all but the layer itself; past
        it nothing is valued.
        """
        self._late = clock.late(deadline)
        stops = [self._held_EM]
        if not self._late:
            stops, self._ends = self.stops(ends, clock.share(deadline, 1 / 2)), len(ends)
        for stop_EM in stops:
            if self._options and clock.late(deadline):
                break
            self._options.append(self._option(stop_EM))

    def stops(self, ends: list[np.ndarray], deadline: float) -> list[np.ndarray]:
        """The layer itself, the ends, and stops on the ways to the ends."""
        found, rng = [self._held_EM, *ends], np.random.default_rng(self._layer)
        for end_EM in ends:
            way = list(path(self._held_EM, end_EM, lambda s: self._best(s, deadline), rng))
            at = np.unique(np.linspace(0, max(len(way) - 2, 0), STOPS).round().astype(int))
            found += [way[n] for n in at if n < len(way) - 1]
        return found

    def within(self, cap: float, near: bool, deadline: float, *, must: bool) -> list[_Option]:
        """Options that keep the cap; few changes bring the layer itself, and the ends, below it.

        Where none keeps it, that with the least load.

        Args:
          cap: rows, of the fullest device.
          near: only the layer as it began, or what few changes make of it.
          deadline: time.monotonic() after which nothing is brought below the cap any more;
          must: but the layer itself.
        """
        if not np.isfinite(cap):
            return self._options
        options = self._options[:1] if near else self._options
        kept = [option for option in options if option.largest <= cap * (1 + SLACK)]
        for number, begun in enumerate(options[: 1 + self._ends]):
            if begun.largest <= cap * (1 + SLACK):
                continue
            if (number or not must) and clock.late(deadline):
                break
            if (number, cap) not in self._below:
                self._below[number, cap] = self._relieved(begun.held_EM, cap)
            kept += self._below[number, cap]
        return kept or [min(options, key=lambda option: option.largest)]

    def _option(self, held_EM: np.ndarray) -> _Option:
        worth = largest = 0.0
        if not self._late:
            worth = float(self._judging.counted_L(placement_of(held_EM[None]))[0])
        if self._capped:
            _, load_EM = self._served.priced(np.arange(len(held_EM)), held_EM)
            largest = float((load_EM.sum(axis=0) / self._problem.topology.speed_M).max())
        return _Option(held_EM, worth, largest)

    def _relieved(self, held_EM: np.ndarray, cap: float) -> list[_Option]:
        """The option that few changes make of a layer, if they do."""
        pins, speed_M = self._problem.pins, self._problem.topology.speed_M
        pin_EM = np.zeros(held_EM.shape, bool) if pins is None else pins.held_LEM[self._layer]
        below_EM = relieved(self._served, held_EM, pin_EM, speed_M, cap)
        return [] if below_EM is None else [self._option(below_EM)]

    @functools.cached_property
    def _served(self) -> hops_counts.Layer:
        """All tokens, counted once: what any copies of an expert compute."""
        problem, devices = self._problem, self._problem.num_devices
        ids_TK = problem.trace.expert_ids_TLK[:, self._layer]
        ways = hops.Ways(np.arange(devices), np.zeros((devices, devices)))
        if problem.objective == "hops":
            ways = problem.hop_ways[self._layer]
        return hops_counts.Layer(ids_TK, problem.trace.num_experts, ways, problem.topology.nodes)

    def _best(self, stops: list[np.ndarray], deadline: float) -> int:
        if clock.late(deadline):
            return 0
        values = [self._choosing.counted_L(placement_of(stop[None]))[0] for stop in stops]
        return int(np.argmin(values))


def _alone(problem: Problem, layer: int, tokens: int) -> Problem:
    """The problem of one layer on evenly spread tokens; see the head of this file for tied ones."""
    trace = problem.trace
    at = np.unique(np.linspace(0, trace.num_tokens - 1, min(tokens, trace.num_tokens)).astype(int))
    ids_TLK = trace.expert_ids_TLK[at][:, layer : layer + 1]
    one = Trace(ids_TLK, trace.num_experts, np.array([len(at)]))
    if not problem.separable:
        problem = dataclasses.replace(problem, dispatch="exchange", objective="rows")
    block = None
    if problem.dispatcher == "blocks":
        block = hops.block(layer, trace.num_layers, problem.num_devices)
    return dataclasses.replace(problem.unrestricted, trace=one, load_cap=None, block=block)


def _numbered(problem: Problem, first: Placement, plan: Placement) -> Placement:
    """A plan under the device numbers that keep most pins, and then most copies where they are."""
    return placement_of(move_lib.numbered(problem, holds_LEM(first), holds_LEM(plan)))


def _blocks(problem: Problem, first_LEM: np.ndarray, new_LEM: np.ndarray) -> list[Placement]:
    """As many layers of the new plan as the budget pays for, from either end of the model."""
    if problem.previous is None:
        return []
    old_LEM = holds_LEM(problem.previous.placement)
    counts = [(plan_LEM & ~old_LEM).sum(axis=(1, 2)) for plan_LEM in (first_LEM, new_LEM)]
    left, blocks = problem.previous.moves - int(counts[0].sum()), []
    more_L = counts[1] - counts[0]
    for turn in (slice(None), slice(None, None, -1)):
        taken_L = np.cumsum(more_L[turn]) <= left
        taken_L = np.logical_and.accumulate(taken_L)[turn]
        blocks.append(placement_of(np.where(taken_L[:, None, None], new_LEM, first_LEM)))
    return blocks


def _mended(problem: Problem, layer: int, held_EM: np.ndarray) -> np.ndarray:
    if problem.pins is None:
        return held_EM
    return pinned(held_EM, problem.pins.held_LEM[layer])


def _keeps(problem: Problem, plan: Placement) -> bool:
    """Within pins and budget."""
    if problem.pins is not None and problem.pins.broken(holds_LEM(plan)):
        return False
    return problem.previous is None or problem.previous.moved(plan) <= problem.previous.moves
