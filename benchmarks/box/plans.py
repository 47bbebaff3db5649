"""The placements that are compared, and what the cost module says of them.

Plans see the trace of held-out prompts that are not among those judged. `ours` is what
`moe_jax.placement.solve` finds for the dispatch that is measured, in seconds on this box; a
dispatch that the planner does not know is planned as `exchange`.
"""

import dataclasses

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.placement import cost
from moe_jax.placement.baselines import registry
from moe_jax.placement.limits.caps import LoadCap
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.placement.seconds import Work
from moe_jax.placement.solve import solve_problem
from moe_jax.placement.topology import Tier, Topology
from moe_jax.routing.trace import Trace

BASELINES = {"contiguous": "contiguous", "random": "random", "EPLB": "eplb-hierarchical"}
OURS = "ours"
NAMES = (*BASELINES, OURS)
# Seconds of devices that share two cores; between devices of a process, loopback.
DEVICE_FLOPS = 1.5e10
LOOPBACK = Tier(bandwidth=1e9, latency=1e-4)
LINK_LATENCY = 1e-3
# A device's load may move a little for the sake of text that was not planned on (placement.steady).
STEADY = 0.003


@dataclasses.dataclass(frozen=True)
class Box:
    """The machine as the planner sees it. The devices of a host share its link."""

    hosts: int
    devices_per_host: int

    @property
    def devices(self) -> int:
        return self.hosts * self.devices_per_host

    def topology(self, mbit: float) -> Topology:
        bandwidth = mbit * 1e6 / 8 / self.devices_per_host
        return Topology(
            name=f"box{self.hosts}x{self.devices_per_host}",
            num_nodes=self.hosts,
            devices_per_node=self.devices_per_host,
            fast=LOOPBACK,
            slow=Tier(bandwidth=bandwidth, latency=LINK_LATENCY),
            device_flops=DEVICE_FLOPS,
        )


def work(model: ModelConfig, batch_tokens: int) -> Work:
    """Sizes of a step of this model."""
    return Work(
        d_model=model.d_model,
        d_ff=model.d_ff,
        value_bytes=row_bytes(model) // model.d_model,
        kv_values=model.kv_values,
        batch_tokens=batch_tokens,
    )


def row_bytes(model: ModelConfig) -> int:
    """Bytes of one row on the wire."""
    return model.d_model * (2 if model.dtype == "bfloat16" else 4)


def baselines(trace: Trace, box: Box) -> dict[str, Placement]:
    """The plans that do not depend on dispatch or bandwidth."""
    problem = Problem(trace, box.topology(200), "rows")
    return {
        name: registry.by_key(key).make(problem, 0, 10.0).placement
        for name, key in BASELINES.items()
    }


def ours(
    trace: Trace, box: Box, model: ModelConfig, dispatch: str, batch_tokens: int, mbit: float,
    seconds: float,
) -> Placement:  # fmt: skip
    """Our plan for a dispatch at a bandwidth, searched for so many seconds.

    The planner's seconds give every device a link of its own; here the devices of a host share
    one, so piling rows on one device of a host costs less. Hence plans for rows are made as well,
    with and without a cap on loads, and `box_seconds` chooses, on the planning trace.
    """
    known = planned_as(dispatch)
    searches: list[tuple[str, LoadCap | None]] = [("seconds", None)]
    if known != "gathered":
        searches += [("rows", None), ("rows", LoadCap(1.5, relative=True))]
    made = []
    for objective, cap in searches:
        steady = STEADY if objective == "seconds" else 0.0
        sizes = work(model, batch_tokens)
        problem = Problem(
            trace, box.topology(mbit), objective, known, sizes, load_cap=cap, steady=steady
        )
        made.append(solve_problem(problem, 0, seconds / len(searches)).placement)
    return min(made, key=lambda plan: box_seconds(trace, plan, box, model, known, mbit))


def box_seconds(
    trace: Trace, plan: Placement, box: Box, model: ModelConfig, dispatch: str, mbit: float
) -> float:
    """Seconds of all layers for the trace: the busiest end of a host's link, the fullest device.

    One row per device back; homes drawn uniformly.
    """
    rows = cost.rows(trace.expert_ids_TLK, plan, dispatch, devices_per_node=box.devices_per_host)
    each = (rows.dispatch_LMM, rows.combine_LMM)
    between = [between_hosts(way_MM, box) for way_LMM in each for way_MM in way_LMM]
    link = sum(max(rows_HH.sum(axis=0).max(), rows_HH.sum(axis=1).max()) for rows_HH in between)
    slowest_L = cost.computed_LM(trace.expert_ids_TLK, plan).max(axis=1)
    compute = slowest_L.sum() * work(model, 1).row_flops / DEVICE_FLOPS
    return float(link * row_bytes(model) * 8 / (mbit * 1e6) + compute)


def planned_as(dispatch: str) -> str:
    return dispatch if dispatch in cost.DISPATCHES else "exchange"


def predicted_between_hosts(
    expert_TLK: np.ndarray,
    home_T: np.ndarray,
    placement: Placement,
    box: Box,
    dispatch: str,
    combine: str,
) -> np.ndarray | None:
    """Rows from each host to each, all layers, both ways; None where the cost module has no count.

    A combine mode that it does not list moves the rows of `partial`.
    """
    if dispatch not in cost.DISPATCHES:
        return None
    known = combine if combine in cost.COMBINES else "partial"
    rows = cost.rows(
        expert_TLK, placement, dispatch, home_T, known, devices_per_node=box.devices_per_host
    )
    return between_hosts(rows.total_LMM.sum(0), box)


def integer_bytes(way: str, box: Box, tokens: int, layers: int, top_k: int) -> int:
    """Bytes that all hosts together send to others besides rows, in all layers.

    4 for the slot of each assignment, which is all-gathered, and for its weight where sums are made
    on the way; the exponents of `reproducible` are left out. Gloo's all-gather is a ring, in which
    every device hands on what all but the next one have, and which leaves every host once. 0 for
    ways whose gathers are not counted here.

    Args:
      way: DISPATCH or DISPATCH:COMBINE.
      tokens: of all devices.
    """
    dispatch, _, combine = way.partition(":")
    if dispatch not in ("exchange", "hierarchical"):
        return 0
    numbers = tokens // box.devices * top_k * layers
    return box.hosts * (box.devices - 1) * 4 * numbers * (1 if combine in ("", "exact") else 2)


def between_hosts(rows_MM: np.ndarray, box: Box) -> np.ndarray:
    """[hosts, hosts] sums of a [devices, devices] table, without what stays on a host."""
    each = (box.hosts, box.devices_per_host) * 2
    rows_HH = rows_MM.reshape(each).sum(axis=(1, 3))
    np.fill_diagonal(rows_HH, 0)
    return rows_HH
