"""What a placement costs beside its rows: seconds, evenness under every name, and the move to it.

Axes: L MoE layers, M devices. Every figure is the mean over the layers and the worst layer.
"""

import dataclasses
from typing import Any

import numpy as np

from moe_jax.placement import cost, evidence, move
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.placement.uneven import Uneven


@dataclasses.dataclass(frozen=True)
class Costs:
    """Figures of one placement.

    Attributes:
      seconds, seconds_worst: of a layer and step, in the dispatch of the problem.
      balance, balance_worst: mean / max device load (vLLM, SGLang: balancedness).
      imbalance, imbalance_worst: (max - mean) / mean (TensorRT-LLM's ratio).
      cv, cv_worst: standard deviation over mean of the device loads.
      moved: experts that arrive on a device that did not hold them, from contiguous.
      moved_bytes: what they weigh.
    """

    seconds: float
    seconds_worst: float
    balance: float
    balance_worst: float
    imbalance: float
    imbalance_worst: float
    cv: float
    cv_worst: float
    moved: float
    moved_bytes: float

    def to_json(self) -> dict[str, Any]:
        """Every figure with its worst layer."""
        pair = {
            "seconds_per_layer": ("seconds", "seconds_worst"),
            "balancedness": ("balance", "balance_worst"),
            "imbalance_ratio": ("imbalance", "imbalance_worst"),
            "load_cv": ("cv", "cv_worst"),
        }
        fields: dict[str, Any] = {
            name: {"mean": getattr(self, mean), "worst": getattr(self, worst)}
            for name, (mean, worst) in pair.items()
        }
        return {**fields, "move": {"experts": self.moved, "bytes": self.moved_bytes}}


def costs(judge: Problem, placement: Placement) -> Costs:
    """The figures of a placement on the trace of `judge`, whatever its objective is."""
    timed = judge
    if judge.objective != "seconds":
        timed = dataclasses.replace(judge, objective="seconds")
    if placement.has_replicas:
        seconds_L = timed.counted_L(placement)
    else:
        seconds_L = timed.values_L(placement.device_LE)
    load_LM = cost.computed_LM(
        judge.trace.expert_ids_TLK,
        placement,
        judge.dispatch,
        None,
        judge.topology.devices_per_node,
        step_tokens=judge.work.batch_tokens,
    )
    over_L = evidence.over_mean(load_LM, judge.topology.speed_M)
    cv_L = evidence.variation(load_LM, judge.topology.speed_M)
    moved = arrivals(placement)
    return Costs(
        seconds=float(seconds_L.mean()),
        seconds_worst=float(seconds_L.max()),
        balance=float((1 / over_L).mean()),
        balance_worst=float(1 / over_L.max()),
        imbalance=float((over_L - 1).mean()),
        imbalance_worst=float(over_L.max() - 1),
        cv=float(cv_L.mean()),
        cv_worst=float(cv_L.max()),
        moved=float(moved),
        moved_bytes=float(moved * judge.work.expert_bytes),
    )


def numbered(problem: Problem, placement: Placement) -> Placement:
    """Equal groups on the devices where least moves from contiguous, in all layers alike.

    No figure changes but rows of shuffled dispatch, where numbers decide between homes of equal
    worth: plans for it stay as they are numbered, as do copies and uneven groups.
    """
    if placement.has_replicas or isinstance(placement, Uneven):
        return placement
    if problem.dispatch != "shuffled":  # hierarchical rows are counted for any plan
        problem = dataclasses.replace(problem, dispatch="hierarchical")
    sizes = (placement.num_layers, placement.num_experts, placement.num_devices)
    return move.relabelled(problem, Placement.contiguous(*sizes), placement, alike=True)


def arrivals(after: Placement) -> int:
    """(device, expert) pairs, over all layers, that contiguous does not hold."""
    layers, experts, devices = after.num_layers, after.num_experts, after.num_devices
    each = -(-experts // devices)  # with copies the devices need not divide the experts
    total = 0
    for held_MS in after.physical_to_logical_LP.reshape(layers, devices, -1):
        for device, held_S in enumerate(held_MS):
            total += int((np.unique(held_S[held_S >= 0]) // each != device).sum())
    return total
