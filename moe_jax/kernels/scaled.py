"""Weights in 8 bits, a scale for each group and column: w[g, d, f] = values[g, d, f] scale[g, f].

A column's scale is a factor of the whole sum, so implementations multiply products by it and never
hold the widened weights.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")


class Scaled(NamedTuple):
    """Attributes:
    values: [G, D, F] in one of `DTYPES`, or [G, F, D] where weights are stored transposed.
    scale: [G, F].
    """

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def quantised(w_GDF: Array, dtype: str) -> Scaled:
    """The nearest weights with each column's largest value at the end of the type's range."""
    narrow = jnp.dtype(dtype)
    integer = jnp.issubdtype(narrow, jnp.integer)
    most = float(jnp.iinfo(narrow).max if integer else jnp.finfo(narrow).max)
    w_GDF = w_GDF.astype(jnp.float32)
    largest_GF = jnp.max(jnp.abs(w_GDF), axis=1)
    scale_GF = largest_GF / most
    # A scale that is no normal number is read as 0: so small a column is zeros.
    scale_GF = jnp.where(scale_GF < jnp.finfo(jnp.float32).tiny, 1.0, scale_GF)
    values_GDF = w_GDF / scale_GF[:, None]
    values_GDF = jnp.round(values_GDF) if integer else values_GDF
    return Scaled(values_GDF.astype(narrow), scale_GF)


def widened(w_GDF: Array | Scaled) -> Array:
    """float32 [G, D, F]"""
    if not isinstance(w_GDF, Scaled):
        return w_GDF.astype(jnp.float32)
    return w_GDF.values.astype(jnp.float32) * w_GDF.scale.astype(jnp.float32)[:, None]
