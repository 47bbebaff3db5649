"""Sums and maxima of short rows whose bits, on CPU, do not depend on how many rows there are.

XLA for CPUs reduces arrays of 4,096 numbers and more in another way than smaller ones: sums have
another order, and what is computed beside them has other instructions (JAX 0.10.2, 0.12.0.1).
Serving has steps of 64 rows and steps of hundreds. So the numbers of a row (experts, choices) are
folded here, halves upon halves. Of longer rows (what is normed) there are always so many that
their numbers reach the mark (`rows`), and fewer than 4,096, with which their sums would.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_MARK = 4096


def rows(width: int) -> int:
    """How many rows so wide reach the mark, so that their bits do not depend on any more."""
    return -(-_MARK // width)


def total(x: jax.Array) -> jax.Array:
    """The sum over the last axis, [..., 1]."""
    return _fold(jnp.add, x)


def largest(x: jax.Array) -> jax.Array:
    """The maximum over the last axis, [..., 1]."""
    return _fold(jnp.maximum, x)


def _fold(join: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    while (width := x.shape[-1]) > 1:
        half = width // 2
        folded = join(x[..., :half], x[..., half : 2 * half])
        x = jnp.concatenate([folded, x[..., 2 * half :]], axis=-1) if width % 2 else folded
    return x
