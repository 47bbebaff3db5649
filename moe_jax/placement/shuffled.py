"""Search for shuffled dispatch, where layers put rows near their experts of the layer before.

Axes: L MoE layers, E experts, M devices, Q distinct sets of a layer, P swaps.

First coherent.py, which takes a token to be where its best expert was: quick, blind to the pull of
its other experts and to homes being full. Then swaps on true homes (coherent_seconds.py has the
passes). The homes of a layer follow from the labels of the layer before (row_homes.py), so a swap
changes its own layer, known for all swaps at once from contacts weighed by true homes, and the next
one, whose homes are assigned anew for every swap that is tried; nothing further on. Swaps are tried
in the order of what they are worth if tokens of the next layer follow their best experts.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from moe_jax.placement import clock, coherent, coherent_seconds, cost, row_homes
from moe_jax.placement.problem import Problem

POLISHED = 0.4  # of the time, for swaps on true homes


@dataclasses.dataclass(frozen=True, eq=False)
class Model(coherent_seconds.Model):
    """A problem of shuffled dispatch, layer by layer, on true homes.

    Attributes:
      set_LT: the set of every token, -1 where it has no expert.
    """

    set_LT: np.ndarray

    exact: ClassVar[bool] = False

    @classmethod
    def of(cls, problem: Problem) -> "Model":
        trace, layers = problem.trace, coherent_seconds.model(problem).layers
        set_LT = np.full((trace.num_layers, trace.num_tokens), -1)
        for layer, set_T in enumerate(set_LT):
            ids_TK = trace.expert_ids_TLK[:, layer].astype(np.int64)
            ids_TK = np.sort(np.minimum(ids_TK, trace.num_experts), axis=1)
            has_T = ids_TK[:, 0] < trace.num_experts
            set_T[has_T] = coherent.set_of_tokens(layers[layer].sets, ids_TK[has_T])
        return cls(problem, layers, set_LT)

    def at_home_QM(self, layer: int, device_LE: np.ndarray) -> np.ndarray:
        """float64: tokens of each set by their home, which the layer before decides."""
        trace, devices = self.problem.trace, self.devices
        step_tokens = self.problem.work.batch_tokens
        if layer:
            ids_TK = trace.expert_ids_TLK[:, layer - 1].astype(np.int64)
            device_E = np.append(device_LE[layer - 1], cost.UNKNOWN)
            before_TK = device_E[np.minimum(ids_TK, trace.num_experts)]
            home_T = row_homes.balanced(before_TK, devices, step_tokens)
        else:
            home_T = row_homes.first(trace.num_tokens, devices, step_tokens)
        set_T, size = self.set_LT[layer], len(self.layers[layer].sets.count_Q) * devices
        has_T = set_T >= 0
        count_X = np.bincount(set_T[has_T] * devices + home_T[has_T], minlength=size)
        return count_X.reshape(-1, devices).astype(float)

    def value(self, device_LE: np.ndarray, layer: int, ahead: bool = True) -> float:
        """Of a layer, and `ahead` of the next: what its labels decide."""
        value = self._priced(self._table_MM(layer, device_LE), self._load_M(layer, device_LE))
        if ahead and layer + 1 < len(self.layers):
            value += self.value(device_LE, layer + 1, ahead=False)
        return value

    def swaps(self, device_LE: np.ndarray, layer: int, e_P, f_P) -> np.ndarray:
        """float64 [P]: about `value` after each swap (the next layer's homes are guessed)."""
        one, own_E = self.layers[layer], device_LE[layer]
        there_QM = one.there_QM(own_E, self.devices)
        out = one.counted(self.at_home_QM(layer, device_LE), own_E, there_QM)
        load_M = self._load_M(layer, device_LE)
        next_MM, next_M = np.zeros((2, self.devices, self.devices))
        ahead_EM = np.zeros((len(own_E), self.devices))
        if following := layer + 1 < len(self.layers):
            next_MM, next_M = (
                self._table_MM(layer + 1, device_LE),
                self._load_M(layer + 1, device_LE),
            )
            sets = self.layers[layer + 1].sets
            ahead_EM = sets.ahead_EM(device_LE[layer + 1], self.devices) / sets.saves
        value_P, each = np.empty(len(e_P)), max(1, coherent_seconds.ENTRIES // self.devices**2)
        for start in range(0, len(e_P), each):
            e, f = e_P[start : start + each], f_P[start : start + each]
            load_PM = coherent_seconds.swapped_loads(load_M, one.load_E, own_E, e, f)
            table_PMM = out.swapped_PMM(own_E, e, f)
            value = self._priced_P(table_PMM, load_PM)
            if following:
                next_PMM = coherent_seconds.followed(next_MM, ahead_EM, own_E, e, f)
                value = value + self._priced_P(next_PMM, np.broadcast_to(next_M, load_PM.shape))
            value[self.problem.over(layer, load_PM)] = np.inf
            value_P[start : start + each] = value
        return value_P

    def _table_MM(self, layer: int, device_LE: np.ndarray) -> np.ndarray:
        """Rows from homes to devices, own device included."""
        touch_QM = self.layers[layer].there_QM(device_LE[layer], self.devices) > 0
        return self.at_home_QM(layer, device_LE).T @ touch_QM

    def _load_M(self, layer: int, device_LE: np.ndarray) -> np.ndarray:
        load_E = self.layers[layer].load_E
        return np.bincount(device_LE[layer], weights=load_E, minlength=self.devices)

    def _priced(self, table_MM: np.ndarray, load_M: np.ndarray) -> float:
        return float(self._priced_P(table_MM[None], load_M[None])[0])

    def _priced_P(self, table_PMM: np.ndarray, load_PM: np.ndarray) -> np.ndarray:
        """float64 [P]: rows both ways, or seconds but for what attention sends."""
        if self.problem.objective == "rows":
            stay_P = np.trace(table_PMM, axis1=1, axis2=2)
            return 2 * (table_PMM.sum(axis=(1, 2)) - stay_P)
        return self.seconds_P([table_PMM, table_PMM.transpose(0, 2, 1)], load_PM)


def search(
    problem: Problem, device_LE: np.ndarray, rng: np.random.Generator, deadline: float
) -> Iterator[np.ndarray]:
    """Yields placements; the caller keeps what is better."""
    if not coherent_seconds.quick(problem):
        yield from coherent.search(problem, device_LE, rng, deadline)
        return
    share = clock.share(deadline, 1 - POLISHED)
    best_LE, best = device_LE, problem.value(device_LE)
    for found_LE in coherent.search(problem, device_LE, rng, share):
        if problem.all_allowed(found_LE) and (value := problem.value(found_LE)) < best:
            best_LE, best = found_LE, value
        yield found_LE
    if not coherent_seconds.in_time(problem, deadline):
        return
    model = Model.of(problem)
    for found_LE in coherent_seconds.descended(model, best_LE, deadline):
        best_LE = found_LE
        yield best_LE
    yield from coherent_seconds.shaken(model, best_LE, rng, deadline)
