"""What an expert makes of its gate and up projections, and the derivative as kernels compute it.

An activation is chosen by name when a program is built. Elementwise on any shape, in the dtype of
its arguments (float32 inside kernels).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

# of gpt-oss (arXiv 2508.10925)
ALPHA, LIMIT = 1.702, 7.0


class Activation(NamedTuple):
    """Attributes:
    value: (gate, up) -> h.
    gradient: (gate, up, dh) -> (dgate, dup).
    """

    value: Callable[[Array, Array], Array]
    gradient: Callable[[Array, Array, Array], tuple[Array, Array]]


def _swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) up (Shazeer, arXiv 2002.05202)."""
    return gate * lax.logistic(gate) * up


def _swiglu_gradient(gate: Array, up: Array, dh: Array) -> tuple[Array, Array]:
    sigmoid = lax.logistic(gate)
    silu = gate * sigmoid
    return dh * up * (sigmoid + silu * (1.0 - sigmoid)), dh * silu


def _clamped_swiglu(gate: Array, up: Array) -> Array:
    """(up + 1) gate sigmoid(alpha gate); gate cut off above the limit, up on both sides."""
    gate, up = _above(gate), _above(-_above(-up))
    return (up + 1.0) * gate * lax.logistic(ALPHA * gate)


def _above(value: Array) -> Array:
    """Cut off above the limit; on the limit itself the derivative is 1, as torch's clamp has it."""
    return jnp.where(value > LIMIT, LIMIT, value)


def _clamped_swiglu_gradient(gate: Array, up: Array, dh: Array) -> tuple[Array, Array]:
    cut_gate, cut_up = gate > LIMIT, jnp.abs(up) > LIMIT  # a NaN is not cut off
    gate, up = _above(gate), _above(-_above(-up))
    sigmoid = lax.logistic(ALPHA * gate)
    dgate = dh * (up + 1.0) * sigmoid * (1.0 + ALPHA * gate * (1.0 - sigmoid))
    return jnp.where(cut_gate, 0.0, dgate), jnp.where(cut_up, 0.0, dh * gate * sigmoid)


ACTIVATIONS = {
    "swiglu": Activation(_swiglu, _swiglu_gradient),
    "clamped_swiglu": Activation(_clamped_swiglu, _clamped_swiglu_gradient),
}
