"""Rows on the wire in 8 bits: float8 values and one float32 scale a row, packed as bytes.

The scale maps the greatest magnitude of a row to the greatest float8 (448 in e4m3), so values keep
4 significant bits down to 2^-6 scales, and a step of 2^-9 scales below: rounding is at most 2^-4 of
the value or 2^-10 scales, whichever is more. A row is quantised where its token lives, by its own
values alone: the bits that arrive do not depend on where experts live.

Axes: N rows, D values a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

SCALE_BYTES = 4
DTYPES = {"float8_e4m3fn": jnp.float8_e4m3fn}


def pack(rows_ND: Float[Array, "N D"], wire_dtype: str) -> UInt8[Array, "N D_and_4"]:
    """Rows as bytes: the values in `wire_dtype` (a name in DTYPES), then the row's scale.

    A row that is not finite comes out of `unpack` as NaN or with NaN in it; zeros stay zeros.
    """
    dtype = DTYPES[wire_dtype]
    rows32_ND = rows_ND.astype(jnp.float32)
    greatest_N1 = jnp.abs(rows32_ND).max(axis=1, keepdims=True)
    scale_N1 = greatest_N1 / float(jnp.finfo(dtype).max)
    # Rows of zeros, and of values so small that their scale would be none.
    scale_N1 = jnp.where(scale_N1 < jnp.finfo(jnp.float32).tiny, 1.0, scale_N1)
    value_ND = (rows32_ND / scale_N1).astype(dtype)
    byte_ND = jax.lax.bitcast_convert_type(value_ND, jnp.uint8)
    scale_N4 = jax.lax.bitcast_convert_type(scale_N1[:, 0], jnp.uint8)
    return jnp.concatenate([byte_ND, scale_N4], axis=1)


def unpack(
    byte_NB: UInt8[Array, "N D_and_4"], wire_dtype: str, dtype: jax.typing.DTypeLike
) -> Float[Array, "N D"]:
    """Inverse of `pack`, up to rounding, in `dtype`."""
    value_ND = jax.lax.bitcast_convert_type(byte_NB[:, :-SCALE_BYTES], DTYPES[wire_dtype])
    scale_N = jax.lax.bitcast_convert_type(byte_NB[:, -SCALE_BYTES:], jnp.float32)
    return (value_ND.astype(jnp.float32) * scale_N[:, None]).astype(dtype)
