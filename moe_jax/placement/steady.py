"""Loads that stay even on sequences that were not planned on, for a small share of the objective.

Axes: L MoE layers, E experts, M devices, S sequences, B resamples of the sequences, P swaps.

The most even plan is even by fitting its sequences: on others its fullest device is fuller. What
others may look like is told by resampling the sequences (the bootstrap). So, layer by layer, swaps
lower the expected value: the exact one, with the largest load replaced by its mean over resamples.
A layer may lose at most `Problem.steady` times the time (or load) of a device of mean load, so what
is given up on the planning sequences is known and small; README.md has what that brings on others.
"""

import numpy as np

from moe_jax.placement import clock, coherent_seconds, swaps
from moe_jax.placement.problem import Problem

RESAMPLES = 24
ENTRIES = 2**22  # loads of devices, resamples and swaps at once
OBJECTIVES = ("seconds", "load")  # that loads enter; the others have nothing to give up
SEED = 1  # beside that of the search


def steadied(
    problem: Problem, device_LE: np.ndarray, seed: int, deadline: float
) -> np.ndarray | None:
    """int64 [L, E]: the placement after its swaps; None where nothing is to be done."""
    model = None
    if problem.objective not in OBJECTIVES or problem.trace.num_sequences < 2:
        return None
    if not problem.separable:
        if problem.dispatch == "shuffled" or not coherent_seconds.quick(problem):
            return None
        model = coherent_seconds.model(problem)
    rng = np.random.default_rng((seed, SEED))
    sequences = problem.trace.num_sequences
    weight_BS = rng.multinomial(sequences, np.full(sequences, 1 / sequences), size=RESAMPLES)
    device_LE = device_LE.copy()
    for layer in range(problem.trace.num_layers):
        sample_BE = resampled(problem, layer, weight_BS.astype(float))
        one = _Layer(problem, model, device_LE, layer, sample_BE)
        while not clock.late(deadline) and one.improve():
            pass
    return device_LE


def resampled(problem: Problem, layer: int, weight_BS: np.ndarray) -> np.ndarray:
    """float64 [B, E]: loads of the resamples, each with as many rows as the trace."""
    trace, experts = problem.trace, problem.trace.num_experts
    sequence_T = np.repeat(np.arange(trace.num_sequences), trace.seq_len)
    ids_TK = np.minimum(trace.expert_ids_TLK[:, layer].astype(np.int64), experts)
    bins = (sequence_T[:, None] * (experts + 1) + ids_TK).ravel()
    counts = np.bincount(bins, minlength=trace.num_sequences * (experts + 1))
    load_SE = counts.reshape(trace.num_sequences, experts + 1)[:, :experts]
    sample_BE = weight_BS @ load_SE
    total = load_SE.sum()
    return sample_BE * (total / np.maximum(sample_BE.sum(axis=1, keepdims=True), 1e-300))


class _Layer:
    """One layer and the swaps that it may make, in place."""

    def __init__(self, problem, model, device_LE: np.ndarray, layer: int, sample_BE: np.ndarray):
        self._problem, self._model = problem, model
        self._device_LE, self._layer, self._sample_BE = device_LE, layer, sample_BE
        self._load_E = problem.load_LE[layer]
        mean = max(float(self._load_E.sum()) / problem.num_devices, 1e-300)
        work = problem.work
        scale = work.batch_tokens / problem.trace.num_tokens
        per_row = scale * work.row_flops / problem.topology.mean_flops
        self._unit = 1 / mean if problem.objective == "load" else per_row
        now = self._value()
        self._limit = now + problem.steady * self._unit * mean
        self._expected = now + self._more(device_LE[layer])

    def improve(self) -> bool:
        """Makes the swap of least expected value among those within the limit; False if none."""
        own_E = self._device_LE[self._layer]
        e_P, f_P = np.nonzero(np.triu(own_E[:, None] != own_E[None, :]))
        if not e_P.size:
            return False
        value_P = self._values_P(e_P, f_P)
        near_P = np.flatnonzero(value_P <= self._limit)
        expected_P = value_P[near_P] + self._more_P(own_E, e_P[near_P], f_P[near_P])
        if not near_P.size or not expected_P.min() < self._expected - 1e-6 * abs(self._limit):
            return False
        self._expected = float(expected_P.min())
        p = near_P[int(expected_P.argmin())]
        e, f = e_P[p], f_P[p]
        own_E[e], own_E[f] = own_E[f], own_E[e]
        return True

    def _value(self) -> float:
        if self._model is not None:
            return self._model.value(self._device_LE, self._layer)
        return self._problem.layer_value(self._layer, self._device_LE[self._layer])

    def _values_P(self, e_P: np.ndarray, f_P: np.ndarray) -> np.ndarray:
        """float64 [P]: the exact values after each swap, as `_value`; inf above a load cap."""
        if self._model is not None:
            return self._model.swaps(self._device_LE, self._layer, e_P, f_P)
        return swaps.values_P(self._problem, self._layer, self._device_LE[self._layer], e_P, f_P)

    def _more(self, own_E: np.ndarray) -> float:
        """What the largest load is expected to be above the planned one, in the objective."""
        load_BM = self._sample_BE @ np.eye(self._problem.num_devices)[own_E]
        load_M = np.bincount(own_E, weights=self._load_E, minlength=load_BM.shape[1])
        return self._unit * float(self._largest(load_BM).mean() - self._largest(load_M))

    def _more_P(self, own_E: np.ndarray, e_P: np.ndarray, f_P: np.ndarray) -> np.ndarray:
        """The same after each swap."""
        devices, more_P = self._problem.num_devices, np.empty(len(e_P))
        load_XE = np.concatenate([self._sample_BE, self._load_E[None]])
        load_XM = load_XE @ np.eye(devices)[own_E]
        each = max(1, ENTRIES // load_XM.size)
        for start in range(0, len(e_P), each):
            e, f = e_P[start : start + each], f_P[start : start + each]
            pair, gain_XP = np.arange(len(e)), load_XE[:, f] - load_XE[:, e]
            after_XPM = np.repeat(load_XM[:, None, :], len(e), axis=1)
            after_XPM[:, pair, own_E[e]] += gain_XP
            after_XPM[:, pair, own_E[f]] -= gain_XP
            largest_XP = self._largest(after_XPM)
            more_P[start : start + each] = largest_XP[:-1].mean(axis=0) - largest_XP[-1]
        return self._unit * more_P

    def _largest(self, load):
        problem = self._problem
        shared = problem.shared_load if problem.objective == "seconds" else 0.0
        return ((load + shared) / problem.topology.speed_M).max(axis=-1)
