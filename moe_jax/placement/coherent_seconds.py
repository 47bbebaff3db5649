"""Seconds of coherent dispatch after every swap of a layer, exactly, and the search by them.

Axes: L MoE layers, E experts, M devices, Q distinct sets of a layer, P swaps.

A token waits on the device of its best expert of the layer before, rows go from there to the
devices that its set touches, and answers come to the device of its best expert of this layer. So a
layer's seconds depend on its own labels and on those of the layer before: on the traffic out
(waiting device x touched device), the traffic back (best device x touched device) and the loads.

Swapping e on a with f on b changes in both tables the columns of a and b, by what contacts.py says
of a swap, here weighed by where tokens wait, or go on; and in the table back, and in the next
layer's table out, the rows of a and b, as tokens whose best expert is e or f go on elsewhere. All
that is counted once per layer; then every swap is a few columns and rows of small tables.

Exact where every token has an expert in every layer; what is kept in the end is decided by the true
objective in any case.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from scipy import sparse

from moe_jax.placement import clock, coherent
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.coherent import WaitingSets
from moe_jax.placement.problem import Problem

TRIED = 24  # best swaps of a pass that are tried one after the other
ENTRIES = 2**21  # of the tables of all swaps at once
MOST = 2**26  # sets x devices^2 x experts of a set up to which a pass is quick enough
LADDER_SHARE = 0.4  # of what time is left after the first descent
SHAKES, SWAPPED = 60, 3  # descents from a shaken placement, and swaps of a shake
TELL = 2.0  # seconds between placements that are told


@dataclasses.dataclass(frozen=True, eq=False)
class Counted:
    """What a swap does to a table [weight device, touched device] of one layer.

    Attributes:
      base_MM: the table now, own device included.
      alone_EM: lost in the column of e's device if e leaves, by weight device.
      new_EMM: [f, a, weight device], won in the column of a if f comes.
      both_EEM: [e, f, weight device], not lost if f takes e's place.
    """

    base_MM: np.ndarray
    alone_EM: np.ndarray
    new_EMM: np.ndarray
    both_EEM: np.ndarray

    def swapped_PMM(self, device_E: np.ndarray, e_P: np.ndarray, f_P: np.ndarray) -> np.ndarray:
        """float64 [P, M, M]: the table after each swap, weights as they are."""
        table_PMM = np.repeat(self.base_MM[None], len(e_P), axis=0)
        pair = np.arange(len(e_P))
        for e, f in ((e_P, f_P), (f_P, e_P)):
            a = device_E[e]
            column_PM = self.base_MM.T[a] - self.alone_EM[e] + self.new_EMM[f, a]
            table_PMM[pair, :, a] = column_PM + self.both_EEM[e, f]
        return table_PMM


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """The sets of a layer, where their tokens wait and which expert is their best.

    Attributes:
      sets: with the best experts of the layer before.
      member_QE: 1 where a set has the expert.
      best_QE: tokens of a set whose best expert it is.
      load_E: rows that an expert computes.
    """

    sets: WaitingSets
    member_QE: sparse.csr_matrix
    best_QE: sparse.csr_matrix
    load_E: np.ndarray

    def there_QM(self, device_E: np.ndarray, devices: int) -> np.ndarray:
        """float64 [Q, M]: experts of a set on each device."""
        return self.member_QE @ np.eye(devices)[device_E]

    def waiting_QM(self, before_E: np.ndarray, devices: int) -> np.ndarray:
        wait_QM = self.sets.waiting(before_E, devices).wait_QM
        assert wait_QM is not None
        return wait_QM

    def counted(self, weight_QM, device_E: np.ndarray, there_QM: np.ndarray) -> Counted:
        """The tables of all swaps for tokens that are weighed by a device."""
        devices, experts = there_QM.shape[1], len(device_E)
        alone_QE = self.alone_QE(device_E, there_QM)
        new_EMM = np.empty((experts, devices, devices))
        both_EEM = np.empty((experts, experts, devices))
        for m in range(devices):
            new_EMM[:, m] = self.member_QE.T @ ((there_QM[:, m : m + 1] == 0) * weight_QM)
            weighed_QE = self.member_QE.multiply(weight_QM[:, m : m + 1]).tocsr()
            both_EEM[:, :, m] = (alone_QE.T @ weighed_QE).toarray()
        both_EEM[np.arange(experts), np.arange(experts)] = 0.0
        base_MM = weight_QM.T @ (there_QM > 0)
        return Counted(base_MM, alone_QE.T @ weight_QM, new_EMM, both_EEM)

    def alone_QE(self, device_E: np.ndarray, there_QM: np.ndarray) -> sparse.csr_matrix:
        """1 where an expert of the set has its device for itself."""
        alone_QE = self.member_QE.copy()
        row, column = alone_QE.nonzero()
        alone_QE.data = (there_QM[row, device_E[column]] == 1).astype(float)
        return alone_QE


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A coherent problem, layer by layer."""

    problem: Problem
    layers: list[Layer]

    exact: ClassVar[bool] = True  # `swaps` are values; else in about their order

    @property
    def devices(self) -> int:
        return self.problem.num_devices

    @property
    def whole(self) -> bool:
        """Every token has an expert in every layer: what descends here, the objective does."""
        trace = self.problem.trace
        return bool((trace.expert_ids_TLK[:, :, 0] != trace.no_expert).all())

    def total(self, device_LE: np.ndarray) -> float:
        """Seconds of all layers, but for the keys and values that are gathered."""
        layers = range(len(self.layers))
        return sum(self.value(device_LE, layer, ahead=False) for layer in layers)

    def value(self, device_LE: np.ndarray, layer: int, ahead: bool = True) -> float:
        """Seconds of a layer, and `ahead` of it the way out of the next: what its labels decide."""
        one, own_E = self.layers[layer], device_LE[layer]
        touch_QM = one.there_QM(own_E, self.devices) > 0
        out_MM = one.waiting_QM(device_LE[layer - 1], self.devices).T @ touch_QM
        back_MM = (one.best_QE @ np.eye(self.devices)[own_E]).T @ touch_QM
        load_M = np.bincount(own_E, weights=one.load_E, minlength=self.devices)
        tables = [out_MM[None], back_MM[None]]
        if ahead and layer + 1 < len(self.layers):
            ahead_EM = self.layers[layer + 1].sets.ahead_EM(device_LE[layer + 1], self.devices)
            tables.append((np.eye(self.devices)[own_E].T @ ahead_EM)[None])
        return float(self.seconds_P(tables, load_M[None])[0])

    def seconds_P(self, tables: list[np.ndarray], load_PM: np.ndarray) -> np.ndarray:
        """float64 [P]: of tables of rows [P, M, M] (own device not sent), and loads."""
        problem, work = self.problem, self.problem.work
        tokens = problem.trace.num_tokens
        to_bytes = work.batch_tokens / tokens * work.row_bytes
        compute_PM = seconds_lib.compute_seconds(load_PM, problem.topology, work, tokens)
        total_P = compute_PM.max(axis=1)
        own = np.arange(self.devices)
        for table_PMM in tables:
            sent_PMM = table_PMM * to_bytes
            sent_PMM[:, own, own] = 0.0
            total_P = total_P + seconds_lib.exchange_seconds(sent_PMM, problem.topology, False)
        return total_P

    def swaps(self, device_LE: np.ndarray, layer: int, e_P, f_P) -> np.ndarray:
        """float64 [P]: `value` after each swap, all of them; inf where a load cap breaks."""
        one, own_E = self.layers[layer], device_LE[layer]
        there_QM = one.there_QM(own_E, self.devices)
        out = one.counted(one.waiting_QM(device_LE[layer - 1], self.devices), own_E, there_QM)
        goes_QM = one.best_QE @ np.eye(self.devices)[own_E]
        back = one.counted(goes_QM, own_E, there_QM)
        after = _Best(one, own_E, there_QM)
        next_MM, ahead_EM = None, np.zeros((len(own_E), self.devices))
        if layer + 1 < len(self.layers):
            ahead_EM = self.layers[layer + 1].sets.ahead_EM(device_LE[layer + 1], self.devices)
            next_MM = np.eye(self.devices)[own_E].T @ ahead_EM
        load_M = np.bincount(own_E, weights=one.load_E, minlength=self.devices)
        value_P, each = np.empty(len(e_P)), max(1, ENTRIES // self.devices**2)
        for start in range(0, len(e_P), each):
            e, f = e_P[start : start + each], f_P[start : start + each]
            back_PMM = after.moved(back.swapped_PMM(own_E, e, f), own_E, e, f)
            tables = [out.swapped_PMM(own_E, e, f), back_PMM]
            if next_MM is not None:
                tables.append(followed(next_MM, ahead_EM, own_E, e, f))
            load_PM = swapped_loads(load_M, one.load_E, own_E, e, f)
            value = self.seconds_P(tables, load_PM)
            value[self.problem.over(layer, load_PM)] = np.inf
            value_P[start : start + each] = value
        return value_P


def followed(next_MM: np.ndarray, ahead_EM: np.ndarray, device_E: np.ndarray, e_P, f_P):
    """float64 [P, M, M]: the next layer's way out after swaps, tokens following their best experts.

    Args:
      next_MM: as it is, by waiting device and touched device.
      ahead_EM: tokens that wait on an expert and touch a device.
      device_E: before the swap.
    """
    next_PMM, pair = np.repeat(next_MM[None], len(e_P), axis=0), np.arange(len(e_P))
    for e, f in ((e_P, f_P), (f_P, e_P)):
        next_PMM[pair, device_E[e]] += ahead_EM[f] - ahead_EM[e]
    return next_PMM


def swapped_loads(load_M: np.ndarray, load_E: np.ndarray, device_E: np.ndarray, e_P, f_P):
    """float64 [P, M]: loads of devices after swaps."""
    load_PM, pair = np.repeat(load_M[None], len(e_P), axis=0), np.arange(len(e_P))
    for e, f in ((e_P, f_P), (f_P, e_P)):
        load_PM[pair, device_E[e]] += load_E[f] - load_E[e]
    return load_PM


class _Best:
    """Tokens go on from where their best expert is: rows of the table back that move with it."""

    def __init__(self, layer: Layer, device_E: np.ndarray, there_QM: np.ndarray):
        alone_QE = layer.best_QE.multiply(layer.alone_QE(device_E, there_QM)).tocsr()
        self._all_E = np.asarray(layer.best_QE.sum(axis=0)).ravel()
        self._stays_E = self._all_E - np.asarray(alone_QE.sum(axis=0)).ravel()
        self._pair_EE = (alone_QE.T @ layer.member_QE).toarray()
        self._touch_EM = layer.best_QE.T @ (there_QM > 0)

    def moved(self, table_PMM: np.ndarray, device_E: np.ndarray, e_P, f_P) -> np.ndarray:
        """The table, whose columns are swapped already, with its rows moved."""
        pair = np.arange(len(e_P))
        for e, f in ((e_P, f_P), (f_P, e_P)):
            a, b = device_E[e], device_E[f]
            row_PM = self._touch_EM[e]
            row_PM[pair, b] = self._all_E[e]
            row_PM[pair, a] = self._stays_E[e] + self._pair_EE[e, f]
            table_PMM[pair, a] -= row_PM
            table_PMM[pair, b] += row_PM
        return table_PMM


@functools.lru_cache(maxsize=1)
def model(problem: Problem) -> Model:
    """The layers of a problem of coherent (or shuffled) dispatch, counted once."""
    return Model(problem, [_layer(problem, n) for n in range(problem.trace.num_layers)])


def in_time(problem: Problem, deadline: float) -> bool:
    """Counting the layers should end before the deadline, by what the first one takes."""
    before = time.monotonic()
    _layer(problem, 0)
    needed = problem.trace.num_layers * (time.monotonic() - before)
    return not clock.late(deadline - needed)


def quick(problem: Problem) -> bool:
    """A pass over the swaps of a layer is fast enough to be worth it."""
    most = max(len(one.count_Q) for one in problem.sets)
    return most * problem.num_devices**2 * problem.trace.top_k <= MOST


def begun(problem: Problem, start_LE: np.ndarray, deadline: float) -> Iterator[np.ndarray]:
    """What comes before everything else, the bound included: descent from the start."""
    if problem.objective == "seconds" and problem.dispatch == "coherent" and quick(problem):
        yield from descended(model(problem), start_LE, deadline)


def search(
    problem: Problem, start_LE: np.ndarray, rng: np.random.Generator, deadline: float
) -> Iterator[np.ndarray]:
    """Yields placements; the caller keeps what is better.

    Descent from the start goes on, then there is one from the best of the search by rows under a
    ladder of load caps, and then from the best so far with a layer or two shaken.
    """
    if not quick(problem):
        yield from coherent.search(problem, start_LE, rng, deadline)
        return
    one = model(problem)
    ended = []
    for device_LE in descended(one, start_LE, deadline):
        ended = [device_LE]
        yield device_LE
    best_LE, best = None, np.inf
    share = clock.share(deadline, LADDER_SHARE)
    for device_LE in coherent.search(problem, start_LE, rng, share):
        if problem.all_allowed(device_LE) and (value := one.total(device_LE)) < best:
            best_LE, best = device_LE, value
    if best_LE is not None:
        yield best_LE
        for device_LE in descended(one, best_LE, deadline):
            ended = [*ended[:1], device_LE]
            yield device_LE
    if ended:
        yield from shaken(one, min(ended, key=one.total), rng, deadline)


def shaken(
    one: Model, best_LE: np.ndarray, rng: np.random.Generator, deadline: float
) -> Iterator[np.ndarray]:
    """Descent again and again from the best, some swaps or labels of it changed at random.

    The labels of two devices change places in one layer or in all from there on; what lies behind a
    swap that no single one leads to is found like that.
    """
    best, devices, layers = one.total(best_LE), one.devices, len(best_LE)
    for shake in range(SHAKES):
        if clock.late(deadline):
            return
        device_LE, layer = best_LE.copy(), int(rng.integers(layers))
        if shake % 3:
            a, b = rng.choice(devices, 2, replace=False) if devices > 1 else (0, 0)
            to_M = np.arange(devices)
            to_M[[a, b]] = b, a
            last = layer + 1 if shake % 3 == 1 else layers
            device_LE[layer:last] = to_M[device_LE[layer:last]]
        else:
            for _ in range(SWAPPED):
                at = int(rng.integers(layers))
                e, f = rng.integers(device_LE.shape[1], size=2)
                device_LE[at, [e, f]] = device_LE[at, [f, e]]
        if not one.problem.all_allowed(device_LE):
            continue
        near = range(max(layer - 1, 0), min(layer + 2, layers)) if shake % 3 else range(layers)
        *_, found_LE = descended(one, device_LE, deadline, near)
        if (value := one.total(found_LE)) < best * (1 - 1e-9):
            best, best_LE = value, found_LE
            yield found_LE


def descended(
    one: Model, device_LE: np.ndarray, deadline: float, first: Sequence[int] | None = None
) -> Iterator[np.ndarray]:
    """Yields better and better placements: best swaps of one layer after another.

    Args:
      first: layers to begin with; all if None.
    """
    device_LE, told, changed = device_LE.copy(), time.monotonic(), False
    waiting = dict.fromkeys(range(len(one.layers)) if first is None else first)
    while waiting and not clock.late(deadline):
        layer = next(iter(waiting))
        del waiting[layer]
        if _improved(one, device_LE, layer, deadline):
            changed = True
            beside = (layer, layer - 1, layer + 1)
            waiting |= dict.fromkeys(n for n in beside if 0 <= n < len(one.layers))
        if changed and time.monotonic() > told + TELL:
            if not one.whole:  # what is told at a moment may stay the best
                clock.cut()
            yield device_LE.copy()
            told, changed = time.monotonic(), False
    yield device_LE.copy()


def _improved(one: Model, device_LE: np.ndarray, layer: int, deadline: float) -> bool:
    """Tries the most promising swaps in turn, in place; did any help?"""
    own_E = device_LE[layer]
    now = one.value(device_LE, layer)
    e_P, f_P = np.nonzero(np.triu(own_E[:, None] != own_E[None, :]))
    if not e_P.size:
        return False
    value_P, helped = one.swaps(device_LE, layer, e_P, f_P), False
    for p in np.argsort(value_P, kind="stable")[:TRIED]:
        if one.exact and not value_P[p] < now * (1 - 1e-7) and not helped:
            return False
        if clock.late(deadline):
            return helped
        e, f = e_P[p], f_P[p]
        own_E[e], own_E[f] = own_E[f], own_E[e]
        value = one.value(device_LE, layer)
        if value < now * (1 - 1e-7) and one.problem.allowed(layer, own_E):
            now, helped = value, True
        else:
            own_E[e], own_E[f] = own_E[f], own_E[e]
    return helped


def _layer(problem: Problem, layer: int) -> Layer:
    sets, experts = coherent.sets_of(problem, layer), problem.trace.num_experts
    set_Q1 = np.repeat(np.arange(len(sets.count_Q)), sets.expert_QK.shape[1])
    real = sets.expert_QK.ravel() < experts
    shape = (len(sets.count_Q), experts)
    where = (set_Q1[real], sets.expert_QK.ravel()[real])
    member_QE = sparse.csr_matrix((np.ones(int(real.sum())), where), shape=shape)
    ids_TK = np.minimum(problem.trace.expert_ids_TLK[:, layer].astype(np.int64), experts)
    best_T = ids_TK[:, 0]
    sorted_TK = np.sort(ids_TK, axis=1)
    has_T = sorted_TK[:, 0] < experts
    set_T = coherent.set_of_tokens(sets, sorted_TK[has_T])
    known_T = best_T[has_T] < experts
    pairs = (set_T[known_T], best_T[has_T][known_T])
    best_QE = sparse.csr_matrix((np.ones(int(known_T.sum())), pairs), shape=shape)
    return Layer(sets, member_QE, best_QE, problem.load_LE[layer])
