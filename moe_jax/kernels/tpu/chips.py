"""TPU generations as the kernels' sizes and predictions need them."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax

from moe_jax.errors import Refused


class Chip(NamedTuple):
    """Attributes:
    vmem: bytes on chip of one core.
    cores: of a chip that compilers see as one device; each has the vmem and part of the rest.
    flops: of bfloat16 a second, of the chip.
    bandwidth: bytes a second between HBM and the chip.
    clock: of a core, in Hz.
    multiplier: columns of one: 2 * 128^2 or 2 * 256^2 operations a cycle.
    topology: the smallest slice that the compiler knows, for compiling ahead of time.
    kind: as `jax.Device.device_kind` spells it, which differs between versions.
    """

    vmem: int
    cores: int
    flops: float
    bandwidth: float
    clock: float
    multiplier: int
    topology: str
    kind: tuple[str, ...]


_MIB = 2**20
# Peaks as Google Cloud publishes them for each generation.
CHIPS = {
    "v5e": Chip(128 * _MIB, 1, 197e12, 819e9, 1.5e9, 128, "v5e:2x4", ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(64 * _MIB, 2, 459e12, 2765e9, 1.75e9, 128, "v5p:2x2x1", ("TPU v5", "TPU v5p")),
    "v6e": Chip(128 * _MIB, 1, 918e12, 1640e9, 1.75e9, 256, "v6e:2x4", ("TPU v6 lite", "TPU v6e")),
}
# What fits on this chip fits on all of them.
_SMALLEST = "v5p"
_assumed: contextvars.ContextVar[str | None] = contextvars.ContextVar("chip", default=None)


@contextlib.contextmanager
def assume(name: str) -> Iterator[None]:
    """Programs traced inside are made for this chip, whatever is there (to compile ahead)."""
    if name not in CHIPS:
        raise Refused("chip", name, f"must be one of {', '.join(CHIPS)}", "Name one of these")
    token = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(token)


def current() -> str:
    """The chip that programs are made for; one with the least memory where it is not known."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    if jax.default_backend() == "tpu":
        kind = jax.devices()[0].device_kind
        for name, chip in CHIPS.items():
            if kind in chip.kind:
                return name
    return _SMALLEST
