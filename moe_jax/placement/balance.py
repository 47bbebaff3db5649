"""Plans from counts alone: the objective `load`, which needs to know nothing else.

Axes: S steps, L MoE layers, E experts, P slots, M devices.

Counts say how often every expert was chosen, not which experts a token chose together. So rows,
transitions and seconds have no value here; the largest device load has. Without replicas it is
packing and swaps, and the integer program where they leave something to gain (layerwise.py does the
same for a trace); with replicas it is `replication.balanced_slots`, EPLB without doubled slots, the
copies of an expert sharing its load evenly.
"""

import dataclasses
import time

import numpy as np
from jaxtyping import Float, Int, Num

from moe_jax.placement import baselines, bounds, copies, greedy, ilp, replication
from moe_jax.placement.baselines import eplb
from moe_jax.placement.plan import Placement, check_divides

BALANCE_SECONDS = 0.4  # of the integer program that evens one layer's load
ROUNDS = 1000  # of swaps with replicas: until none helps


@dataclasses.dataclass(frozen=True)
class Spread:
    """Largest device load over the mean one: mean over layers, and the worst layer."""

    mean: float
    worst: float


@dataclasses.dataclass(frozen=True, eq=False)
class Balanced:
    """A plan from counts.

    Attributes:
      placement: the plan.
      objective: largest device load over the mean, mean over layers, on the counts planned on.
      bound: proven; no placement has less.
      seconds: to make it.
    """

    placement: Placement
    objective: float
    bound: float
    seconds: float

    @property
    def gap(self) -> float:
        return (self.objective - self.bound) / self.objective


def split(
    count_SLE: Num[np.ndarray, "S L E"], seed: int
) -> tuple[Num[np.ndarray, "L E"], Num[np.ndarray, "L E"] | None]:
    """Counts of a random half of the steps, and of the other half; all, None where there is one."""
    steps = len(count_SLE)
    if steps == 1:
        return count_SLE[0], None
    order = np.random.default_rng(seed).permutation(steps)
    cut = (steps + 1) // 2
    return count_SLE[order[:cut]].sum(axis=0), count_SLE[order[cut:]].sum(axis=0)


def solve(
    load_LE: Num[np.ndarray, "L E"],
    devices: int,
    num_slots: int | None = None,
    nodes: int = 1,
    time_limit: float = 60.0,
) -> Balanced:
    """The most even plan that was found.

    Args:
      load_LE: tokens per expert.
      devices: M, all nodes together.
      num_slots: P; above the experts there are replicas. None: one slot per expert.
      nodes: copies of an expert stay on one of them, where that is possible.
      time_limit: seconds of the integer programs; 0 is packing and swaps alone.
    """
    started = time.monotonic()
    experts = load_LE.shape[1]
    if num_slots is None or num_slots == experts:
        check_divides(experts, devices)
        placement = Placement.from_device_LE(_evened(load_LE, devices, time_limit), devices)
    else:
        copies.check_slots(num_slots, experts, devices)
        inside = experts % nodes == 0 and num_slots <= experts * (devices // nodes)
        nodes, groups = (nodes, experts) if inside else (1, 1)
        placement = replication.balanced_slots(
            load_LE, num_slots, devices, nodes, groups, rounds=ROUNDS
        )
    bound = 1.0 if placement.has_replicas else _bound(load_LE, devices)
    objective = spread(load_LE, placement).mean
    return Balanced(placement, objective, min(bound, objective), time.monotonic() - started)


def others(
    load_LE: Num[np.ndarray, "L E"], devices: int, num_slots: int | None
) -> dict[str, Placement]:
    """What a plan is compared with, by name."""
    layers, experts = load_LE.shape
    found = {}
    if experts % devices == 0:
        found = {
            "contiguous": baselines.contiguous(layers, experts, devices),
            "round-robin": baselines.round_robin(layers, experts, devices),
            "EPLB-style packing": baselines.lpt(load_LE, devices),
        }
    made = {name: Placement.from_device_LE(one_LE, devices) for name, one_LE in found.items()}
    if num_slots is not None and num_slots > experts:
        maps = eplb.rebalance_experts(load_LE, num_slots, 1, 1, devices)
        made["EPLB global"] = eplb.Published(maps.physical_to_logical_LR, experts, devices)
    return made


def spread(load_LE: Num[np.ndarray, "L E"], placement: Placement) -> Spread:
    """How even the loads are, the copies of an expert sharing its load evenly."""
    slots_LP = placement.physical_to_logical_LP.astype(np.int64)
    load_LM = replication.device_loads(load_LE, slots_LP, placement.num_devices)
    over_L = load_LM.max(axis=1) / np.maximum(load_LM.mean(axis=1), 1e-300)
    over_L = np.where(load_LM.any(axis=1), over_L, 1.0)
    return Spread(float(over_L.mean()), float(over_L.max()))


def _evened(
    load_LE: Num[np.ndarray, "L E"], devices: int, time_limit: float
) -> Int[np.ndarray, "L E"]:
    load_LE = load_LE.astype(np.float64)
    device_LE = greedy.balanced(load_LE, devices)
    deadline = time.monotonic() + time_limit
    for layer, load_E in enumerate(load_LE):
        left = deadline - time.monotonic()
        if left <= 0 or _largest(load_E, device_LE[layer], devices) <= (1 + 1e-4) * (
            bounds.load_lower(load_E, devices)
        ):
            continue
        found_E = ilp.balance(load_E, devices, min(left, BALANCE_SECONDS))
        if found_E is not None and _largest(load_E, found_E, devices) < _largest(
            load_E, device_LE[layer], devices
        ):
            device_LE[layer] = found_E
    return device_LE


def _largest(load_E: Float[np.ndarray, " E"], device_E: np.ndarray, devices: int) -> float:
    return float(np.bincount(device_E, weights=load_E, minlength=devices).max())


def _bound(load_LE: Num[np.ndarray, "L E"], devices: int) -> float:
    """Mean over layers of the smallest possible largest load over the mean, less rounding."""
    mean_L = load_LE.sum(axis=1) / devices
    least_L = [bounds.load_lower(load_E, devices) for load_E in load_LE]
    over_L = [
        least / mean if mean > 0 else 1.0 for least, mean in zip(least_L, mean_L, strict=True)
    ]
    return float(np.mean(over_L)) * (1 - 1e-12)
