"""Copies exchanged after the slots are filled: two experts change what holds them, while it helps.

Axes: n sampled tokens, E experts, M devices, X alternatives of single experts, p pairs of them.

An alternative of an expert is one copy more, one less (never its last), or one on another device.
Two alternatives of two experts make an exchange if every device holds as many as before: a copy of
one in place of a copy of the other, or both change places. What alternatives change is counted for
each of them alone (sampled.py); of two together the sum, which is wrong only for tokens with both.
The best pairs by that are then tried, counted together, and kept if the layer's value falls.

Where homes follow the layer before, the next layer's rows count as well. In shuffled dispatch homes
follow first copies, all tokens of a step at once: exchanges that move a first copy are left out.
Where devices are many, a few of them at a time.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.placement import clock, sampled
from moe_jax.placement.limits.previous import holds_LEM, placement_of
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem

OBJECTIVES = ("rows", "seconds")  # others have searches of their own
GROUP = 8  # devices that are looked at at once
TRIED = 16  # exchanges of a pass that are counted together
ENTRIES = 2**22  # rows between devices that are held at once, for all exchanges that are valued
NONE = -1  # in place of a device
SHARPNESS, SOFT_SHARE = 16.0, 0.6  # of the slowest device, for this share of the time


def exchanged(
    problem: Problem, plan: Placement, cap_L: Float[np.ndarray, " L"], seed: int, deadline: float
) -> Placement:
    """The plan after exchanges in all its layers, in turn, until none helps or the deadline.

    Where the slowest device and link decide, few exchanges help by themselves. So for a share of
    the time all devices count, the slow ones more (seconds.largest).
    """
    held_LEM, rng = holds_LEM(plan), np.random.default_rng(seed)
    layers = _layers(problem, held_LEM, cap_L, seed)
    phases = [(math.inf, deadline)]
    if problem.objective == "seconds":
        phases = [(SHARPNESS, clock.share(deadline, SOFT_SHARE)), *phases]
    for sharpness, end in phases:
        for layer in layers:
            layer.sharpness = sharpness
        _descended(problem, layers, rng, end)
    return placement_of(np.stack([layer.holds_EM for layer in layers]))


def _descended(
    problem: Problem, layers: list[sampled.Layer], rng: np.random.Generator, deadline: float
) -> None:
    """In place: exchanges in all layers, in turn, until none helps or the deadline."""
    cap_L = np.array([layer.cap for layer in layers])
    ahead = problem.dispatch == "coherent"
    open_L = np.ones(len(layers), bool)
    while open_L.any() and not clock.late(deadline):
        speed_M = problem.topology.speed_M
        over_L = np.array([(layer.loads() / speed_M).max() for layer in layers]) / cap_L
        first_L = np.where(over_L > 1, -over_L, 0.0)  # what is above its cap, then all in order
        for layer in [n for n in np.argsort(first_L, kind="stable").tolist() if open_L[n]]:
            if clock.late(deadline):
                break
            changed = _improved(problem, layers[layer], rng, deadline)
            open_L[layer] = changed
            if changed and ahead:
                _follow(layers[layer:])
                open_L[max(layer - 1, 0) : layer + 2] = True


def _layers(problem: Problem, held_LEM, cap_L, seed: int) -> list[sampled.Layer]:
    token_n, home_n = sampled.drawn(problem, seed)
    layers: list[sampled.Layer] = []
    for layer, held_EM in enumerate(held_LEM):
        one = sampled.Layer(problem, layer, token_n, home_n, held_EM.copy(), float(cap_L[layer]))
        if problem.dispatch == "coherent" and layers:
            layers[-1].following = one
        layers.append(one)
        home_n = one.homes_after()
    return layers


def _follow(layers: Sequence[sampled.Layer]) -> None:
    """Tokens begin a layer where the one before leaves them."""
    for before, after in itertools.pairwise(layers):
        home_n = before.next_n
        if np.array_equal(home_n, after.home_n):
            return
        after.begin_at(home_n)


class _Alternatives(NamedTuple):
    """Other ways to hold single experts.

    Attributes:
      expert_X: which one.
      from_X, to_X: the device that loses and the one that gets a copy, or NONE.
      changes: what is different then.
    """

    expert_X: Int[np.ndarray, " X"]
    from_X: Int[np.ndarray, " X"]
    to_X: Int[np.ndarray, " X"]
    changes: sampled.Changes


def _improved(problem: Problem, layer: sampled.Layer, rng, deadline: float) -> bool:
    """Exchanges in one layer; True if there was one."""
    devices = problem.num_devices
    order_M = rng.permutation(devices)
    groups = max(-(-devices // GROUP), 1)
    changed = False
    for group in np.array_split(order_M, groups):
        among_M = np.isin(np.arange(devices), group)
        while not clock.late(deadline):
            found = _alternatives(problem, layer, among_M)
            if found is None or not _tried(layer, found):
                break
            changed = True
    return changed


def _tried(layer: sampled.Layer, found: _Alternatives) -> bool:
    """Takes the best exchanges that still are exchanges; True if one helped."""
    best, changed = _value(layer), False
    for pair in _promising(layer, found, best):
        after = [
            (int(found.expert_X[x]), row_M)
            for x in pair
            if (row_M := _after(layer, found, x)) is not None
        ]
        if len(after) < len(pair):
            continue  # an exchange before took that place
        before = [(expert, layer.holds_EM[expert].copy()) for expert, _ in after]
        for expert, row_M in after:
            layer.hold(expert, row_M)
        if (value := _value(layer)) < best * (1 - 1e-12):
            best, changed = value, True
            continue
        for expert, row_M in before:
            layer.hold(expert, row_M)
    return changed


def _after(layer: sampled.Layer, found: _Alternatives, x: int) -> Bool[np.ndarray, " M"] | None:
    """The devices of an expert after an alternative; None if it is none any more."""
    row_M = layer.holds_EM[found.expert_X[x]].copy()
    leaves, comes = int(found.from_X[x]), int(found.to_X[x])
    if (leaves != NONE and not row_M[leaves]) or (comes != NONE and row_M[comes]):
        return None
    _change(row_M, leaves, comes)
    return row_M if row_M.any() else None


def _change(row_M: np.ndarray, leaves: int, comes: int) -> None:
    """In place: a copy leaves a device, or NONE, and one comes."""
    if leaves != NONE:
        row_M[leaves] = False
    if comes != NONE:
        row_M[comes] = True


def _value(layer: sampled.Layer) -> float:
    """Of a layer, and of the next one where homes follow this one."""
    value = float(layer.value(layer.rows()[None], layer.loads()[None])[0])
    after = layer.following
    if after is None:
        return value
    home_n = after.home_n
    after.begin_at(layer.next_n)
    value += float(after.value(after.rows()[None], after.loads()[None])[0])
    after.begin_at(home_n)
    return value


def _alternatives(
    problem: Problem, layer: sampled.Layer, among_M: Bool[np.ndarray, " M"]
) -> _Alternatives | None:
    """Of every expert, with devices among these only."""
    keep_first = problem.dispatch == "shuffled"
    experts, leaves, comes, changes = [], [], [], []
    for expert, row_M in enumerate(layer.holds_EM):
        from_m = np.flatnonzero(row_M & among_M).tolist()
        to_m = np.flatnonzero(~row_M & among_M).tolist()
        ways = [(a, b) for a in from_m for b in to_m] + [(NONE, b) for b in to_m]
        ways += [(a, NONE) for a in from_m if row_M.sum() > 1]
        rows = np.tile(row_M, (len(ways), 1))
        for other_M, way in zip(rows, ways, strict=True):
            _change(other_M, *way)
        if keep_first:
            same = rows.argmax(axis=1) == row_M.argmax()
            rows, ways = rows[same], [way for way, kept in zip(ways, same, strict=True) if kept]
        if ways:
            experts += [expert] * len(ways)
            leaves += [a for a, _ in ways]
            comes += [b for _, b in ways]
            changes.append(layer.changes(expert, rows))
    if not experts:
        return None
    both = sampled.Changes(*(np.concatenate(parts) for parts in zip(*changes, strict=True)))
    return _Alternatives(np.array(experts), np.array(leaves), np.array(comes), both)


def _promising(layer: sampled.Layer, found: _Alternatives, best: float) -> list[tuple[int, int]]:
    """The best exchanges by the sum of what both change, if that is less than now."""
    one_p, other_p = _pairs(found)
    rows_2MM, load_M = layer.rows(), layer.loads()
    after = layer.following
    value_p = np.empty(len(one_p))
    each = max(1, ENTRIES // rows_2MM.size)
    for start in range(0, len(one_p), each):
        one, other = one_p[start : start + each], other_p[start : start + each]
        part = [array_X[one] + array_X[other] for array_X in found.changes]
        value = layer.value(rows_2MM + part[0], load_M + part[1])
        if after is not None:
            load_XM = np.tile(after.loads(), (len(one), 1))
            value = value + after.value(after.rows() + part[2], load_XM)
        value_p[start : start + each] = value
    order_p = np.argsort(value_p, kind="stable")[:TRIED]
    return [(int(one_p[p]), int(other_p[p])) for p in order_p if value_p[p] < best]


def _pairs(found: _Alternatives) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    """Pairs of alternatives of two experts after which devices hold as many as before."""
    ways = np.stack([found.from_X, found.to_X], axis=1)
    by_way: dict[tuple[int, int], list[int]] = {}
    for x, (a, b) in enumerate(ways.tolist()):
        by_way.setdefault((a, b), []).append(x)
    ones, others = [], []
    for (a, b), mine in by_way.items():
        theirs = by_way.get((b, a), []) if a < b else []
        if theirs:
            ones.append(np.repeat(mine, len(theirs)))
            others.append(np.tile(theirs, len(mine)))
    if not ones:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    one_p, other_p = np.concatenate(ones), np.concatenate(others)
    apart_p = found.expert_X[one_p] != found.expert_X[other_p]
    return one_p[apart_p], other_p[apart_p]
