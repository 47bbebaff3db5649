"""Load caps for sequences that were not planned on: what these are expected to add.

Axes: L MoE layers, M devices, S sequences, B resamples of the sequences.

A plan that is even on its own sequences is less even on others. By how much is told by resampling:
half as many sequences, drawn with repetition, differ from the trace by twice the variance that the
trace itself has, and so does another trace of as many sequences from the same source. The loads of
a greedy plan stand for those of the plan to come; devices are taken to be as full as the cap lets
them be, of which the fullest of every resample counts. What one split of a trace really adds is a
draw from that, and the split may be an unlucky one (README.md, "Replicas").
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement import evidence, steady
from moe_jax.placement.limits.caps import LoadCap
from moe_jax.placement.problem import Problem, loads

RESAMPLES = 100
SEED = 2  # one for all searches, so that the cap does not depend on theirs
SKETCH = LoadCap(1.1, relative=True)  # of the greedy plan: about as even as plans under a cap are


def resolved(problem: Problem, constructed: Callable[[Problem], np.ndarray]) -> Problem:
    """The problem, where its cap is one of unseen sequences with what those add.

    Args:
      constructed: a greedy plan, int64 [L, E].

    Raises:
      Refused: a single sequence, or a cap that even loads are not expected to keep.
    """
    cap = problem.load_cap
    if cap is None or not cap.held or cap.unseen is not None:
        return problem
    if problem.trace.num_sequences < 2:
        rule = "one sequence does not tell how others differ from it"
        raise Refused("load_cap", str(cap), rule, "Use 1.1x, or a trace of more sequences")
    if problem.needs_copies:
        rule = "what others add is told on plans without copies, and the devices do not divide the"
        rule = f"{rule} {problem.trace.num_experts} experts"
        raise Refused("load_cap", str(cap), rule, "Use 1.1x")
    sketch = dataclasses.replace(problem.unrestricted, num_slots=None, load_cap=SKETCH)
    added = expected(sketch, constructed(sketch))
    if cap.factor < 1 + added:
        load_LM = loads(sketch.load_LE, sketch.packed_LE, sketch.num_devices)
        reached = float(evidence.over_mean(load_LM, sketch.topology.speed_M).max())
        rule = f"loads that are even where they are planned become {1 + added:.4f} on others"
        fix = f"Use {np.ceil((reached + added) * 1e4) / 1e4:.4f}held or more"
        raise Refused("load_cap", str(cap), rule, fix)
    return dataclasses.replace(problem, load_cap=dataclasses.replace(cap, unseen=added))


def expected(problem: Problem, device_LE: np.ndarray) -> float:
    """What as many other sequences add to the fullest device's load, over the mean.

    The mean over layers; a layer that nobody uses is even on any sequences and adds 0.

    Args:
      problem: with two sequences at least.
      device_LE: int [L, E], the device of every expert, whatever the problem's cap.
    """
    sequences, devices = problem.trace.num_sequences, problem.num_devices
    drawn, speed_M = sequences // 2, problem.topology.speed_M
    rng = np.random.default_rng(SEED)
    share_S = np.full(sequences, 1 / sequences)
    weight_BS = rng.multinomial(drawn, share_S, size=RESAMPLES).astype(float)
    added = []
    for layer, device_E in enumerate(device_LE):
        on_EM = np.eye(devices)[device_E]
        load_M = problem.load_LE[layer] @ on_EM
        load_BM = steady.resampled(problem, layer, weight_BS) @ on_EM
        more_BM = (load_BM - load_M) / speed_M / max(load_M.mean(), 1e-300)
        added.append(more_BM.max(axis=1).mean())
    return float(np.mean(added))
