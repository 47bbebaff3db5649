"""The plan in use, and how much of it may change.

A move is an expert that appears on a device which did not hold it: its parameters travel once.
What disappears costs nothing, and slots inside a device have no order. So with replicas a move is
a copy that appears; without them it is an expert that changes device. Device numbers are those of
the plan in use: they name machines, so nothing is renumbered behind the count.

A budget is in bytes, or a share of the bytes of all experts of all layers, once each.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool

from moe_jax.errors import Refused
from moe_jax.placement.plan import Placement, check_sizes

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
RULE = "bytes as 0, 500MB or 2GB, or a share of all experts as 10%"


@dataclasses.dataclass(frozen=True)
class MoveBudget:
    """How much may move: `amount` bytes, or `amount` of all experts where `is_share`."""

    amount: float
    is_share: bool = False

    def __post_init__(self):
        most = 1.0 if self.is_share else 2.0**62
        if not 0 <= self.amount <= most:
            raise Refused("move_budget", self.amount, RULE, "Use 10% if in doubt")

    @classmethod
    def parse(cls, text: str) -> "MoveBudget":
        """`2GB`, `500MB`, `123456` (bytes) or `10%`."""
        word = text.strip().upper()
        is_share = word.endswith("%")
        # the longest unit first, as every one of them ends in B
        unit = next((u for u in sorted(UNITS, key=len, reverse=True) if word.endswith(u)), "")
        number = word[:-1] if is_share else word.removesuffix(unit)
        try:
            amount = float(number) * (0.01 if is_share else UNITS.get(unit, 1))
        except ValueError:
            amount = float("nan")
        if not np.isfinite(amount) or amount < 0 or (is_share and amount > 1):
            raise Refused("move_budget", text, RULE, "Use 10% if in doubt")
        return cls(amount, is_share)

    def bytes(self, all_experts: int) -> int:
        """Whole bytes; `all_experts` is what all experts of all layers weigh."""
        if not self.is_share:
            return int(self.amount)
        return int(self.amount * all_experts * (1 + 1e-12))  # 29 % of 100 is 28.999...


@dataclasses.dataclass(frozen=True, eq=False)
class Previous:
    """The plan in use and what may move away from it.

    Attributes:
      placement: in use; device numbers name the same devices as in the new plan.
      moves: copies of experts that may appear on a device that does not hold them, over all layers.
    """

    placement: Placement
    moves: int

    @classmethod
    def of(cls, placement: Placement, budget: MoveBudget | None, expert_bytes: int) -> "Previous":
        """With as many moves as the bytes pay for; None: as many as one likes."""
        if expert_bytes < 1:
            raise Refused("expert_bytes", expert_bytes, "at least 1", "Correct it")
        if budget is None:
            return cls(placement, placement.num_layers * placement.num_slots)
        experts = placement.num_layers * placement.num_experts
        return cls(placement, budget.bytes(experts * expert_bytes) // expert_bytes)

    def moved(self, placement: Placement) -> int:
        """Moves from the plan in use to another one."""
        return int(arrivals_L(self.placement, placement).sum())

    def left(self, device_LE: np.ndarray) -> int:
        """Moves of the budget that labels without replicas leave over; below 0: too many."""
        held_LEM = holds_LEM(self.placement)
        held_LE = np.take_along_axis(held_LEM, device_LE[:, :, None].astype(np.int64), axis=2)
        return self.moves - int((~held_LE).sum())

    def check(self, layers: int, experts: int, devices: int, slots: int) -> None:
        """Refuses a plan in use that is for another model or machine, or for other slots.

        One without replicas may gain slots; they are filled, and that is counted.
        """
        plan = self.placement
        check_sizes(plan, "previous", layers, experts, devices)
        if plan.has_replicas and plan.num_slots != slots:
            rule = f"the plan in use has {plan.num_slots} slots, the new one would have {slots}"
            raise Refused("previous slots", plan.num_slots, rule, f"Give --slots={plan.num_slots}")

    def slotted(self, placement: Placement) -> Placement:
        """The same placement with everything that stays on a device in the slot it has there."""
        if placement.num_slots != self.placement.num_slots:
            return placement
        rows = [
            _slotted(old_P, new_P, placement.slots_per_device)
            for old_P, new_P in zip(
                self.placement.physical_to_logical_LP, placement.physical_to_logical_LP, strict=True
            )
        ]
        slots_LP = np.stack(rows)
        share_LNP = shares_moved(placement, slots_LP)
        return Placement(slots_LP, placement.num_experts, placement.num_devices, share_LNP)


def shares_moved(
    placement: Placement, slots_LP: np.ndarray, device_LM: np.ndarray | None = None
) -> np.ndarray | None:
    """int32 [L, N + 1, P]: every copy's shares in its new slot; None where there are none.

    A device holds an expert once: they name the slot.

    Args:
      placement: whose copies they are.
      slots_LP: the same copies in other slots.
      device_LM: int64, the number that every device of `placement` has there; None: its own.
    """
    share_LNP = placement.share_LNP
    if share_LNP is None:
        return None
    if device_LM is None:
        device_LM = np.tile(np.arange(placement.num_devices), (placement.num_layers, 1))
    moved_LNP = np.empty_like(share_LNP)
    at_P = np.arange(placement.num_slots) // placement.slots_per_device
    for layer, (old_P, new_P) in enumerate(
        zip(placement.physical_to_logical_LP, slots_LP, strict=True)
    ):
        key_P = device_LM[layer][at_P] * placement.num_experts + old_P
        order_P = np.argsort(key_P)
        from_P = order_P[np.searchsorted(key_P[order_P], at_P * placement.num_experts + new_P)]
        moved_LNP[layer] = share_LNP[layer][:, from_P]
    return moved_LNP


def arrivals_L(before: Placement, after: Placement) -> np.ndarray:
    """int64 [L]: copies of `after` on devices that do not hold their expert in `before`."""
    return (holds_LEM(after) & ~holds_LEM(before)).sum(axis=(1, 2))


def holds_LEM(placement: Placement) -> Bool[np.ndarray, "L E M"]:
    """Which device holds which expert."""
    layers, slots = placement.physical_to_logical_LP.shape
    held_LEM = np.zeros((layers, placement.num_experts, placement.num_devices), bool)
    device_P = np.arange(slots) // placement.slots_per_device
    layer, slot = np.nonzero(placement.physical_to_logical_LP >= 0)  # uneven groups: -1 is empty
    held_LEM[layer, placement.physical_to_logical_LP[layer, slot], device_P[slot]] = True
    return held_LEM


def placement_of(held_LEM: Bool[np.ndarray, "L E M"]) -> Placement:
    """From who holds what; slots of a device hold its experts in ascending id."""
    experts, devices = held_LEM.shape[1:]
    slots = [np.nonzero(held_EM.T)[1] for held_EM in held_LEM]
    return Placement(np.stack(slots), experts, devices)


def _slotted(old_P: np.ndarray, new_P: np.ndarray, each: int) -> np.ndarray:
    rows = []
    for old_s, new_s in zip(old_P.reshape(-1, each), new_P.reshape(-1, each), strict=True):
        stays_s = np.isin(old_s, new_s)
        row_s = old_s.copy()
        row_s[~stays_s] = new_s[~np.isin(new_s, old_s)]
        rows.append(row_s)
    return np.concatenate(rows)
