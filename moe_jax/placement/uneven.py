"""Placements whose devices hold unequal numbers of experts: for counting, never for files.

Axes: L MoE layers, E experts, P slots, M devices.

Programs with static shapes give every device as many slots as the largest group of any layer needs;
the others stay empty (-1). What that costs in memory is `num_slots`, beside figures that are those
of the uneven groups themselves.
"""

import functools

import numpy as np

from moe_jax.placement.plan import Placement

EMPTY = -1


class Uneven(Placement):
    """A Placement without copies in which some slots are empty."""

    def __post_init__(self):
        pass  # not a valid plan: slots are empty

    @property
    def has_replicas(self) -> bool:
        return False

    @functools.cached_property
    def device_LE(self) -> np.ndarray:
        """int64 [L, E]: the device of every expert."""
        device_LE = np.empty((self.num_layers, self.num_experts), np.int64)
        layer, slot = np.nonzero(self.physical_to_logical_LP != EMPTY)
        expert = self.physical_to_logical_LP[layer, slot]
        device_LE[layer, expert] = slot // self.slots_per_device
        return device_LE

    @property
    def padding(self) -> int:
        """Empty slots of a layer."""
        return self.num_slots - self.num_experts


def of_devices(device_LE: np.ndarray, num_devices: int) -> Placement:
    """A Placement where all groups are equal, else an Uneven one."""
    layers, experts = device_LE.shape
    size_LM = np.stack([np.bincount(row, minlength=num_devices) for row in device_LE])
    if (size_LM == experts // num_devices).all() and experts % num_devices == 0:
        return Placement.from_device_LE(device_LE, num_devices)
    most = int(size_LM.max())
    slots_LMS = np.full((layers, num_devices, most), EMPTY, np.int32)
    for layer, device_E in enumerate(device_LE):
        order_E = np.argsort(device_E, kind="stable")
        first_M = np.cumsum(size_LM[layer]) - size_LM[layer]
        device = device_E[order_E]
        slots_LMS[layer, device, np.arange(experts) - first_M[device]] = order_E
    return Uneven(slots_LMS.reshape(layers, -1), experts, num_devices)
