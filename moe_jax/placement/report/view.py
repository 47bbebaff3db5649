"""What the page draws, as plain data: one placement seen on the trace that judges it.

Axes: L MoE layers, E experts, M devices. Everything is counted by the oracles (cost.py, seconds.py,
evidence.py) on the judging trace, token by token, with homes drawn uniformly.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Num

from moe_jax.placement import cost, evidence
from moe_jax.placement.evidence import Evidence
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.placement.report import clock as clock_lib
from moe_jax.placement.report.clock import Clock

PER = 1000.0  # tokens that rows are stated for


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """One placement on one trace.

    Attributes:
      name: as readers know it.
      digest: of the placement.
      objective: what the plan minimises, on this trace.
      traffic_MM: rows from device to device, both ways, per PER tokens and layer.
      load_LM: rows computed.
      speed_M: of the devices, 1 on average.
      clock: where the time goes.
      flow_JMM: share of the tokens whose best expert lies on device s in one layer and on device d
        in the next, for each of the L - 1 pairs of adjacent layers; with replicas in coherent
        dispatch.
      first_LE: the device of every expert (with replicas: of its first copy).
      figures: locality, rows, load, with intervals.
    """

    name: str
    digest: str
    objective: float
    traffic_MM: Float[np.ndarray, "M M"]
    load_LM: Num[np.ndarray, "L M"]
    speed_M: Float[np.ndarray, " M"]
    clock: Clock
    flow_JMM: Float[np.ndarray, "J M M"]
    first_LE: Int[np.ndarray, "L E"]
    figures: Evidence

    @property
    def load_over_mean_LM(self) -> Float[np.ndarray, "L M"]:
        """Loads over speeds, over the mean load of the layer; 1 where there is none."""
        mean_L1 = self.load_LM.mean(axis=1, keepdims=True)
        over_LM = self.load_LM / self.speed_M / np.maximum(mean_L1, 1e-300)
        return np.where(mean_L1 > 0, over_LM, 1.0)

    @property
    def order_LE(self) -> Int[np.ndarray, "L E"]:
        """Experts by device, then by id."""
        return np.argsort(self.first_LE, axis=1, kind="stable").astype(np.int64)

    @property
    def stays_J(self) -> Float[np.ndarray, " J"]:
        """Share of the transitions that stay on their device."""
        return np.trace(self.flow_JMM, axis1=1, axis2=2)


def view(name: str, judge: Problem, placement: Placement) -> View:
    """Looks at a placement on the trace of `judge`."""
    ids_TLK, each = judge.trace.expert_ids_TLK, judge.topology.devices_per_node
    step = judge.work.batch_tokens
    rows = cost.rows(ids_TLK, placement, judge.dispatch, devices_per_node=each, step_tokens=step)
    load_LM = cost.computed_LM(ids_TLK, placement, judge.dispatch, None, each, None, step)
    tokens = judge.trace.num_tokens
    return View(
        name=name,
        digest=placement.digest,
        objective=judge.value_of(placement),
        traffic_MM=rows.total_LMM.sum(axis=0) * (PER / max(judge.token_layers, 1)),
        load_LM=load_LM,
        speed_M=judge.topology.speed_M,
        clock=clock_lib.clock(rows, load_LM, judge.topology, judge.work, judge.dispatch, tokens),
        flow_JMM=flow_JMM(judge, placement),
        first_LE=first_LE(placement),
        figures=evidence.judge(
            judge.trace, placement, judge.topology, step_tokens=step, dispatch=judge.dispatch
        ),
    )


def flow_JMM(judge: Problem, placement: Placement) -> Float[np.ndarray, "J M M"]:
    """See View; J = L - 1."""
    devices, layers = placement.num_devices, placement.num_layers
    flow_JMM = np.zeros((layers - 1, devices, devices))
    best_TL1, each = judge.trace.expert_ids_TLK[:, :, :1], judge.topology.devices_per_node
    for home_T in cost.homes(placement, judge.trace.num_tokens):
        before_T = np.full(judge.trace.num_tokens, cost.UNKNOWN)
        steps = cost.walk(best_TL1, placement, "coherent", home_T, each)
        for layer, step in enumerate(steps):
            device_T = step.device_TK[:, 0]
            real_T = (before_T >= 0) & (device_T >= 0)
            if layer:
                np.add.at(flow_JMM[layer - 1], (before_T[real_T], device_T[real_T]), 1.0)
            before_T = device_T
    return flow_JMM / np.maximum(flow_JMM.sum(axis=(1, 2), keepdims=True), 1.0)


def first_LE(placement: Placement) -> Int[np.ndarray, "L E"]:
    """See View."""
    if placement.has_replicas:
        return placement.logical_to_physical_LER[:, :, 0] // placement.slots_per_device
    return placement.device_LE  # of groups that are uneven, too


def typical_pair(after: View) -> int:
    """The pair of layers whose share of staying transitions is the median one, after."""
    order = np.argsort(after.stays_J, kind="stable")
    return int(order[(len(order) - 1) // 2])
