"""Sums that do not know their order: rows as integers on a grid that all their terms share.

A float32 sum depends on the order of its terms, an integer sum does not. So the devices that hold
terms of a row first agree on the row's greatest exponent; each rounds its terms to one common grid
below that exponent; the rounded terms are added in any order, on any device, and every order gives
the same bits. This is the pre-rounding of Demmel and Nguyen (Fast Reproducible Floating-Point
Summation, ARITH 2013) with one fold. They keep the rounded terms as floating-point numbers, whose
24 bits must also hold the carries; a 32-bit integer costs the same on the wire and holds 7 more.

With K terms, b = ceil(log2 K), e the exponent of the greatest value of the row over all terms
(2^e <= max < 2^(e + 1)): the grid is 2^(e - 30 + b), so a term is below 2^(31 - b) and no sum of K
leaves 32 bits. The grid is never below 2^-126, so no denormal number arises.

Error of a sum: K / 2 * grid for the rounding of terms, at most K * 2^(b - 31) of the row's greatest
value (K = 8: 2^-25), and half a unit in the last place of the result. Values far below the greatest
of their row keep fewer bits than in a float32 sum. A row with a value that is not finite becomes
NaN as a whole.

Axes: N rows, D values a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_NOT_FINITE = 255  # the exponent field of infinities and NaN
_BIAS = 127


def exponent_of(rows_ND: Float[Array, "N D"]) -> Int[Array, " N"]:
    """The exponent field (biased, 0 to 255) of each row's greatest magnitude, int32."""
    bits_ND = jax.lax.bitcast_convert_type(rows_ND.astype(jnp.float32), jnp.int32)
    # As integers, magnitudes have the order of the numbers; infinities and NaN lie above them all.
    return (bits_ND & 0x7FFFFFFF).max(axis=1) >> 23


def to_grid(
    rows_ND: Float[Array, "N D"], exponent_N: Int[Array, " N"], *, num_terms: int
) -> Int[Array, "N D"]:
    """Rows in units of their grid, int32; a sum of `num_terms` rows stays in range.

    Args:
      exponent_N: at least `exponent_of` every row that this one is added to; 255: zeros come out.
    """
    unit_N = _unit(exponent_N, num_terms)
    scaled_ND = rows_ND.astype(jnp.float32) * _power_of_two(-unit_N)[:, None]
    finite_N1 = (exponent_N < _NOT_FINITE)[:, None]
    return jnp.round(jnp.where(finite_N1, scaled_ND, 0)).astype(jnp.int32)


def from_grid(
    sums_ND: Int[Array, "N D"], exponent_N: Int[Array, " N"], *, num_terms: int
) -> Float[Array, "N D"]:
    """Inverse of `to_grid`, for sums: float32, rounded once."""
    values_ND = sums_ND.astype(jnp.float32) * _power_of_two(_unit(exponent_N, num_terms))[:, None]
    return jnp.where((exponent_N < _NOT_FINITE)[:, None], values_ND, jnp.nan)


def _unit(exponent_N: jax.Array, num_terms: int) -> jax.Array:
    """log2 of the grid."""
    carries = (num_terms - 1).bit_length()
    finite_N = jnp.minimum(exponent_N, _NOT_FINITE - 1)
    return jnp.maximum(finite_N - _BIAS - 30 + carries, 1 - _BIAS)


def _power_of_two(power_N: jax.Array) -> jax.Array:
    """2^power in float32, exactly; -126 <= power <= 127."""
    return jax.lax.bitcast_convert_type((power_N + _BIAS) << 23, jnp.float32)
