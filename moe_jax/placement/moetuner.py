"""MoETuner's objective (arXiv 2502.06643): evenness of devices, and the slowest pair of devices.

Axes: L MoE layers, E experts, M devices.

The paper has two stages. The first makes clusters and minimises sum over devices of
abs(T[m, l] - mean T[l]), T being the tokens of a device. The second puts clusters on devices and
minimises sum over l of the max over pairs g != h of C[g, h, l] / B[g, h]: C counts the pairs
(an expert of a token on g in layer l, one of its experts on h in layer l + 1), all K x K of them,
and B is the bandwidth between the two. Here both are seconds of a step, so they add up without a
weight of our own: a token of T takes a device's time, a pair of C one row over the link. The value
is the mean over layers of their sum.

What it is not: time. Rows that go to one device are counted once per pair of experts, links of a
device are taken to be independent, and the deviation of all devices adds up. `seconds` is ours.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from moe_jax.placement.seconds import Work
from moe_jax.placement.topology import Topology


@dataclasses.dataclass(frozen=True, eq=False)
class Stages:
    """Both quantities by layer, in seconds of a step.

    Attributes:
      deviation_L: sum over devices of the deviation from the mean.
      slowest_l: slowest pair between a layer and the next, L - 1 of them.
    """

    deviation_L: Float[np.ndarray, " L"]
    slowest_l: Float[np.ndarray, " l"]

    @property
    def value(self) -> float:
        layers = len(self.deviation_L)
        return float((self.deviation_L.sum() + self.slowest_l.sum()) / layers)


@dataclasses.dataclass(frozen=True, eq=False)
class Tuner:
    """The objective of one trace on one machine.

    Attributes:
      work_LE: seconds of a step that an expert keeps a device busy.
      flow_lEE: bytes of a step from an expert of a layer to one of the next, L - 1 of them.
      bandwidth_MM: bytes per second between devices; inf within one.
      cap_L: largest work of a device; inf where there is no load cap.
    """

    work_LE: Float[np.ndarray, "L E"]
    flow_lEE: Float[np.ndarray, "l E E"]
    bandwidth_MM: Float[np.ndarray, "M M"]
    cap_L: Float[np.ndarray, " L"]

    @property
    def num_layers(self) -> int:
        return len(self.work_LE)

    @property
    def num_devices(self) -> int:
        return len(self.bandwidth_MM)

    def stages(self, device_LE: np.ndarray) -> Stages:
        """Both quantities of a placement; groups may be uneven."""
        onehot_LEM = np.eye(self.num_devices)[device_LE]
        work_LM = np.einsum("le,lem->lm", self.work_LE, onehot_LEM)
        deviation_L = np.abs(work_LM - work_LM.mean(axis=1, keepdims=True)).sum(axis=1)
        bytes_lMM = onehot_LEM[:-1].transpose(0, 2, 1) @ self.flow_lEE @ onehot_LEM[1:]
        return Stages(deviation_L, (bytes_lMM / self.bandwidth_MM).max(axis=(1, 2)))

    def value(self, device_LE: np.ndarray) -> float:
        return self.stages(device_LE).value

    def allowed(self, device_LE: np.ndarray) -> bool:
        """Every layer keeps its load cap."""
        onehot_LEM = np.eye(self.num_devices)[device_LE]
        work_LM = np.einsum("le,lem->lm", self.work_LE, onehot_LEM)
        return bool((work_LM.max(axis=1) <= self.cap_L * (1 + 1e-9)).all())


def tuner(
    load_LE: np.ndarray,
    pairs_lEE: np.ndarray,
    cap_L: np.ndarray,
    topology: Topology,
    work: Work,
    num_tokens: int,
) -> Tuner:
    """From counts of `num_tokens` tokens: loads, caps in tokens, all K x K transitions."""
    scale = work.batch_tokens / num_tokens
    token_seconds = scale * work.row_flops / topology.mean_flops
    return Tuner(
        load_LE * token_seconds,
        pairs_lEE * (scale * work.row_bytes),
        bandwidth_MM(topology),
        cap_L * token_seconds,
    )


def bandwidth_MM(topology: Topology) -> np.ndarray:
    """float64 [M, M]: bytes per second from a device to another; inf to itself."""
    node_M = topology.node_M
    same_MM = node_M[:, None] == node_M[None, :]
    between_MM = np.where(same_MM, topology.fast.bandwidth, topology.slow.bandwidth)
    np.fill_diagonal(between_MM, np.inf)
    return between_MM
