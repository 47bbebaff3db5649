"""Lower bounds that are proven: each by a named argument, none by a heuristic or a solver's word.

Axes: E experts, M devices, s = E / M slots per device, K experts per token.

How many transitions or pairs of experts can be kept together at most stands in semidefinite.py.

**Contacts from pairs.** A token with its K experts on devices in parts of sizes p_1, p_2, ... has
d = number of parts and sum C(p_i, 2) pairs together. For every slope b >= 0, d >= a(b) - b pairs,
where a(b) is the minimum of d + b pairs over all partitions of K into parts of at most s. Hence
contacts >= sum_t a(b) - b * (most pairs that can be kept), the latter by semidefinite.py.

**Load.** No placement has a largest device load below the mean, nor below the hottest expert with
the s - 1 coldest others, nor below what a pigeonhole forces: of the j M + 1 hottest experts, j + 1
share a device. Where devices differ in speed, a load counts over its device's speed, and the k
slowest devices hold at least the k s coldest experts.
"""

import functools
import math
from typing import NamedTuple

import numpy as np


def whole_number_bound(bound: float) -> float:
    """The smallest whole number that a minimum can have, given a solver's bound on it.

    A solver's tolerance may lift its bound by about 1e-6 of the value; a whole objective lets us
    give that back and round up again.
    """
    return float(math.ceil(bound - 1e-3 - 1e-6 * abs(bound)))


class Line(NamedTuple):
    """Contacts are at least level - slope * pairs."""

    level: float
    slope: float


@functools.lru_cache(maxsize=256)
def contact_lines(size: int, slots: int, devices: int) -> tuple[Line, ...]:
    """The lines under the contacts of a set of `size` experts, as a function of its pairs together.

    Args:
      size: experts of the set.
      slots: how many of them a device can hold.
      devices: M.
    """
    points = _shapes(size, slots, devices)
    slopes = {0.0} | {
        (d1 - d2) / (p2 - p1) for d1, p1 in points for d2, p2 in points if p2 > p1 and d1 > d2
    }
    lines = {Line(min(d + slope * p for d, p in points), slope) for slope in slopes}
    # those that are highest somewhere: of the others the bound never needs one
    used = {max(lines, key=lambda line: line.level - line.slope * p) for _, p in points}
    return tuple(sorted(used))


def level(size: int, slots: int, devices: int, slope: float) -> float:
    """a(b): the least of contacts + slope * pairs of a set of `size` experts."""
    return min(d + slope * p for d, p in _shapes(size, slots, devices))


def contacts_lower(
    coactivation_EE: np.ndarray, tokens_of_size: np.ndarray, devices: int, slots: int | None = None
) -> float:
    """Fewest (token, device) contacts of one layer, all its sets at once; cheap, and often weak.

    Args:
      coactivation_EE: tokens per pair of experts, symmetric, zero diagonal.
      tokens_of_size: [K + 1], tokens with that many experts in the layer.
      devices: M.
      slots: experts that a device holds at most; None: equal devices.
    """
    experts, sizes = len(coactivation_EE), len(tokens_of_size)
    slots = experts // devices if slots is None else slots
    off_EE = np.where(np.eye(experts, dtype=bool), -np.inf, coactivation_EE)
    companions_EK = np.sort(off_EE, axis=1)[:, experts - slots + 1 :]  # s - 1 of them
    pairs = float(companions_EK.sum()) / 2
    best = 0.0
    for slope in {
        line.slope for size in range(sizes) for line in contact_lines(size, slots, devices)
    }:
        least = sum(
            count * level(size, slots, devices, slope) for size, count in enumerate(tokens_of_size)
        )
        best = max(best, float(least - slope * pairs))
    return best


def most_stays(keep_LEE: np.ndarray, slots: int) -> float:
    """Most transitions that can stay if no group holds more than `slots` experts of a layer.

    Each expert keeps at most its `slots` likeliest companions, of the layer after or before; cheap.
    """
    top_LEE = np.sort(keep_LEE, axis=2)[:, :, -slots:]
    other_LEE = np.sort(keep_LEE, axis=1)[:, -slots:]
    return float(np.minimum(top_LEE.sum(axis=(1, 2)), other_LEE.sum(axis=(1, 2))).sum())


def load_lower(
    load_E: np.ndarray, devices: int, speed_M: np.ndarray | None = None, extra: float = 0.0
) -> float:
    """Smallest possible load of the most loaded device of one layer.

    Args:
      load_E: tokens per expert.
      devices: M.
      speed_M: a device's load counts over its speed; None: all are 1.
      extra: load that every device has besides.
    """
    slots = len(load_E) // devices
    descending_E = np.sort(load_E)[::-1].astype(float)
    best = max(float(load_E.sum()) / devices, 0.0)
    for together in range(1, slots + 1):
        hottest = (together - 1) * devices + 1  # so many experts: some device has `together`
        shared = descending_E[hottest - together : hottest].sum()
        rest = np.concatenate([descending_E[: hottest - together], descending_E[hottest:]])
        best = max(best, shared + np.sort(rest)[: slots - together].sum())
    if speed_M is None:
        return best + extra
    coldest_M = np.cumsum(descending_E[::-1])[slots - 1 :: slots]
    slowest_M = coldest_M + extra * np.arange(1, devices + 1)
    over_M = slowest_M / np.cumsum(np.sort(speed_M))
    return float(max((best + extra) / speed_M.max(), over_M.max()))


@functools.lru_cache(maxsize=256)
def _shapes(size: int, slots: int, devices: int) -> tuple[tuple[int, int], ...]:
    """(parts, pairs together) of all partitions of `size` into at most `devices` parts <= slots."""

    def parts(left: int, largest: int):
        if left == 0:
            yield (0, 0)
            return
        for part in range(min(left, largest), 0, -1):
            for count, pairs in parts(left - part, part):
                yield (count + 1, pairs + part * (part - 1) // 2)

    return tuple(sorted({shape for shape in parts(size, slots) if shape[0] <= devices}))


def kept_with_copies(keep_EE: np.ndarray, num_slots: int, groups: int) -> float:
    """Most transitions between two layers that can stay in a group, experts having copies.

    A token of expert d is served on one of d's r copies, and a group holds P / G slots of the next
    layer: so of d's transitions those to r P / G experts can stay, at best the most frequent ones.
    What another copy adds falls with r; so the copies that add most, one each and P in all, are
    more than any plan has. The same holds backwards; the smaller one counts.

    Args:
      keep_EE: transitions from experts (rows) to experts of the next layer.
      num_slots: P, of either layer, in groups of equal size.
      groups: G, devices, or nodes.
    """
    size = -(-num_slots // groups)
    return min(_best_copies(side_EE, num_slots, size, groups) for side_EE in (keep_EE, keep_EE.T))


def _best_copies(keep_EE: np.ndarray, num_slots: int, size: int, groups: int) -> float:
    experts = len(keep_EE)
    sorted_EE = -np.sort(-keep_EE, axis=1)
    wide_EE = np.zeros((experts, max(groups * size, experts)))
    wide_EE[:, :experts] = sorted_EE
    gain_EG = wide_EE[:, : groups * size].reshape(experts, groups, size).sum(axis=2)
    more = np.sort(gain_EG[:, 1:].ravel())[::-1][: max(num_slots - experts, 0)]
    return float(gain_EG[:, 0].sum() + more.sum())
