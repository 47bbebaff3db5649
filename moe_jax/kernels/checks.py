"""What the grouped operations refuse while they are traced, in words that name the fix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.errors import Refused
from moe_jax.kernels import scaled

_DTYPES = ("float32", "bfloat16", "float16")


class Stored(NamedTuple):
    """How weights lie in memory."""

    transposed: bool
    first_group: Any  # an integer or None, once it is checked

    def width(self, w_GDF: Array) -> int:
        """F of [G, D, F]."""
        return w_GDF.shape[1 if self.transposed else 2]


def arrays(
    x_ND: Any,
    weights: dict[str, tuple[Any, str]],
    group_sizes_G: Any,
    stored: Stored,
    scales: dict[str, Array | None],
) -> None:
    """`weights` maps each argument's name to the array and the name of its second axis, `scales`
    to the array of its scales."""
    _rank("x_ND", x_ND, 2)
    _rank("group_sizes_G", group_sizes_G, 1)
    dtype("x_ND", x_ND.dtype)
    first_name, (first, _) = next(iter(weights.items()))
    for name, (w, second_axis) in weights.items():
        _rank(name, w, 3)
        _scale(name, w, scales[name], stored)
        if scales[name] is None and w.dtype != x_ND.dtype:
            raise Refused(
                f"{name}.dtype",
                str(w.dtype),
                f"must equal the dtype of x_ND, {x_ND.dtype}",
                "Cast one of them",
            )
        groups_of = "group_sizes_G" if stored.first_group is None else first_name
        num_groups = (group_sizes_G if stored.first_group is None else first).shape[0]
        num_rows, num_cols = x_ND.shape[1], stored.width(first)
        of_width = f"{first_name}.shape[{1 if stored.transposed else 2}]"
        sources = [f"{groups_of}.shape[0]", "x_ND.shape[1]", of_width]
        expected = [num_groups, num_rows, num_cols]
        if (second_axis == "F") != stored.transposed:
            expected[1:], sources[1:] = expected[:0:-1], sources[:0:-1]
        for axis, (want, source) in enumerate(zip(expected, sources, strict=True)):
            if w.shape[axis] != want:
                raise Refused(
                    f"{name}.shape",
                    w.shape,
                    f"axis {axis} must be {want}, as {source} is",
                    f"Pass {name} of shape {tuple(expected)}",
                )
    _group_sizes(group_sizes_G, x_ND.shape[0])
    _first_group(stored.first_group, first.shape[0], group_sizes_G.shape[0])


def _scale(name: str, w: Array, scale: Array | None, stored: Stored) -> None:
    label = f"{name.rsplit('_', 1)[0]}_scale_G{name[-1]}"
    narrow = w.dtype.name in scaled.DTYPES
    if scale is None:
        if narrow:
            rule = f"weights in {w.dtype.name} need {label}, a scale for each group and column"
            raise Refused(label, None, rule, "Pass the scales, ones if there are none")
        return
    if not narrow:
        rule = f"must be one of {', '.join(scaled.DTYPES)} where {label} is given"
        raise Refused(f"{name}.dtype", w.dtype.name, rule, f"Leave out {label}")
    _rank(label, scale, 2)
    dtype(f"{label}.dtype", scale.dtype)
    expected = (w.shape[0], stored.width(w))
    if scale.shape != expected:
        rule = f"must be {expected}, one scale for each group and column of {name}"
        raise Refused(f"{label}.shape", scale.shape, rule, f"Pass {label} of that shape")


def _first_group(value: Any, stored: int, num_groups: int) -> None:
    if value is None:
        return
    if num_groups > stored:
        raise Refused(
            "group_sizes_G.shape",
            (num_groups,),
            f"must be at most {stored}, the groups of the weights",
            "Pass the sizes of some of them",
        )
    if np.ndim(value) or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise Refused("first_group", value, "must be one integer", "Pass a layer's first group")
    if not isinstance(value, jax.core.Tracer) and not 0 <= int(value) <= stored - num_groups:
        rule = f"must lie in 0 .. {stored - num_groups}: {num_groups} of {stored} groups from it on"
        raise Refused("first_group", int(value), rule, "Pass the index of a layer's first group")


def _rank(name: str, array: Any, rank: int) -> None:
    axes = ", ".join(name.rsplit("_", 1)[1])
    if not hasattr(array, "ndim"):
        raise Refused(name, array, "must be an array", f"Pass an array [{axes}]")
    if array.ndim != rank:
        raise Refused(
            f"{name}.shape", array.shape, f"must have {rank} axes", f"Pass an array [{axes}]"
        )


def dtype(name: str, dtype: np.dtype) -> None:
    if dtype.name not in _DTYPES:
        raise Refused(
            f"{name}.dtype" if name.endswith(("_ND", "_N")) else name,
            dtype.name,
            f"must be one of {', '.join(_DTYPES)}",
            "Cast it first",
        )


def result_dtype(value: Any) -> np.dtype:
    """Of `preferred_element_type`."""
    try:
        found = jnp.dtype(value)
    except TypeError:
        rule = f"must be one of {', '.join(_DTYPES)}"
        raise Refused("preferred_element_type", value, rule, "Pass one of these") from None
    dtype("preferred_element_type", found)
    return found


def biases(biases: dict[str, Array | None], sizes: dict[str, int], num_groups: int) -> None:
    """A bias may be wider than x: it is added in float32. `sizes` are those of F and D."""
    for name, bias in biases.items():
        if bias is None:
            continue
        _rank(name, bias, 2)
        dtype(f"{name}.dtype", bias.dtype)
        expected = (num_groups, sizes[name[-1]])
        if bias.shape != expected:
            rule = f"must be {expected}, one bias for each group and column"
            raise Refused(f"{name}.shape", bias.shape, rule, f"Pass {name} of that shape")


def row_weight(row_weight_N: Array, num_rows: int) -> None:
    _rank("row_weight_N", row_weight_N, 1)
    dtype("row_weight_N", row_weight_N.dtype)
    if row_weight_N.shape[0] != num_rows:
        raise Refused(
            "row_weight_N.shape",
            row_weight_N.shape,
            f"must be ({num_rows},), one weight for each row of x_ND",
            "Pass the weight of every row, in the order of the rows",
        )


def _group_sizes(group_sizes_G: Array, num_rows: int) -> None:
    if not jnp.issubdtype(group_sizes_G.dtype, jnp.integer):
        raise Refused(
            "group_sizes_G.dtype",
            str(group_sizes_G.dtype),
            "must be an integer type",
            "Pass counts of rows, for example from jnp.bincount",
        )
    if isinstance(group_sizes_G, jax.core.Tracer):
        return  # values are unknown while tracing; sizes past N are cut off there
    sizes = np.asarray(group_sizes_G)
    if (sizes < 0).any():
        raise Refused(
            "group_sizes_G",
            sizes.tolist(),
            f"no size may be negative (entry {int(np.argmax(sizes < 0))} is)",
            "Pass counts of rows",
        )
    if sizes.sum() > num_rows:
        raise Refused(
            "group_sizes_G",
            sizes.tolist(),
            f"must sum to at most N = {num_rows}, the rows of x_ND, and sums to {sizes.sum()}",
            "Pass all rows, or count only those that are there",
        )
