"""The grouped operations of an MoE layer: one matmul per expert over rows sorted by expert.

Promise: row n of group g meets the weights of g; rows past sum(group_sizes) are exactly zero in
the output and in dx, whatever they held; dw of an empty group is exactly zero. Differentiable in x
and the weights, under jit, grad, checkpoint, scan and shard_map with check_vma=True. Accumulation
is in float32. Wrong arguments are refused when the program is traced.

Axes: N rows, D d_model, F d_ff, G groups (the experts on this device).

This file checks the arguments, makes them vary over the same mesh axes, and chooses the
implementation; each implementation is a module with differentiable `matmul`, `swiglu` and `ffn`.
"""

import importlib
from types import ModuleType
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from moe_jax.errors import Refused
from moe_jax.kernels.activation import ACTIVATIONS, Activation

IMPLEMENTATIONS = ("reference", "cpu", "pallas_tpu", "pallas_tpu_interpret")
_DTYPES = ("float32", "bfloat16", "float16")
# "cpu" is plain JAX: it runs on a GPU as well, correct but not fast.
_BY_PLATFORM = {"cpu": "cpu", "gpu": "cpu", "tpu": "pallas_tpu"}
# They read transposed weights and those of one layer among several where they lie; for the others
# such weights are transposed and cut out first.
_IN_PLACE = ("cpu",)
# They can keep pre-activations for the backward pass.
_STORING = ("pallas_tpu", "pallas_tpu_interpret")


@no_type_check  # `_check` refuses the same in words that name the fix
def grouped_matmul(
    x_ND: Float[Array, "N D"],
    w_GDF: Float[Array, "G D F"],
    group_sizes_G: Int[Array, "G"],
    *,
    transpose_w: bool = False,
    first_group: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "N F"]:
    """y[n] = x[n] @ w[group of n]; the result has `preferred_element_type`, by default x's.

    Args:
      transpose_w: w is stored [G, F, D], and each group's is used transposed.
      first_group: w holds more groups than there are sizes (say, of all layers), and this is the
        index of the first of them; None = w has the groups of the sizes. Its gradient is zero in
        all the others.
    """
    stored = _Stored(transpose_w, first_group)
    _check(x_ND, {"w_GDF": (w_GDF, "D")}, group_sizes_G, stored)
    out_dtype = jnp.dtype(preferred_element_type or x_ND.dtype)
    _check_dtype("preferred_element_type", out_dtype)
    module = _choose(implementation)
    (w_GDF,), how = _as_read(module, stored, group_sizes_G, w_GDF)
    return module.matmul(*_aligned(x_ND, w_GDF, group_sizes_G), out_dtype, **how)


@no_type_check  # `_check` refuses the same in words that name the fix
def grouped_swiglu(
    x_ND: Float[Array, "N D"],
    w_gate_GDF: Float[Array, "G D F"],
    w_up_GDF: Float[Array, "G D F"],
    group_sizes_G: Int[Array, "G"],
    *,
    bias_gate_GF: Float[Array, "G F"] | None = None,
    bias_up_GF: Float[Array, "G F"] | None = None,
    activation: str = "swiglu",
    transpose_w: bool = False,
    first_group: Int[Array, ""] | int | None = None,
    pre_activations: str = "recompute",
    implementation: str | None = None,
) -> Float[Array, "N F"]:
    """h[n] = silu(gate) * up with gate = x[n] @ w_gate[g] + bias_gate[g], up alike, g n's group.

    Args:
      bias_gate_GF, bias_up_GF: added in float32; differentiable; None = there is none.
      activation: a name in `activation.ACTIVATIONS`: what is made of gate and up.
      transpose_w, first_group: as of `grouped_matmul`; biases are those of the same groups.
      pre_activations: what the backward pass knows of gate and up: "recompute" keeps nothing but
        the inputs, "store" keeps 2 N F values of x's dtype and saves two of its matmuls.
    """
    weights = {"w_gate_GDF": (w_gate_GDF, "D"), "w_up_GDF": (w_up_GDF, "D")}
    stored = _Stored(transpose_w, first_group)
    _check(x_ND, weights, group_sizes_G, stored)
    biases = {"bias_gate_GF": bias_gate_GF, "bias_up_GF": bias_up_GF}
    _check_biases(biases, {"F": stored.width(w_gate_GDF)}, w_gate_GDF.shape[0])
    module = _choose(implementation)
    args, how = _as_read(module, stored, group_sizes_G, w_gate_GDF, w_up_GDF, *biases.values())
    how |= _store(pre_activations, implementation)
    x_ND, group_sizes_G, w_gate_GDF, w_up_GDF, *aligned = _aligned(x_ND, group_sizes_G, *args)
    arrays = x_ND, w_gate_GDF, w_up_GDF, group_sizes_G
    return module.swiglu(*arrays, _activation(activation), *aligned, **how)


@no_type_check  # `_check` refuses the same in words that name the fix
def grouped_ffn(
    x_ND: Float[Array, "N D"],
    w_gate_GDF: Float[Array, "G D F"],
    w_up_GDF: Float[Array, "G D F"],
    w_down_GFD: Float[Array, "G F D"],
    group_sizes_G: Int[Array, "G"],
    *,
    bias_gate_GF: Float[Array, "G F"] | None = None,
    bias_up_GF: Float[Array, "G F"] | None = None,
    bias_down_GD: Float[Array, "G D"] | None = None,
    activation: str = "swiglu",
    row_weight_N: Float[Array, "N"] | None = None,
    transpose_w: bool = False,
    first_group: Int[Array, ""] | int | None = None,
    pre_activations: str = "recompute",
    implementation: str | None = None,
) -> Float[Array, "N D"]:
    """A whole expert: y[n] = (swiglu(x[n]) @ w_down[g] + bias_down[g]) * row_weight[n].

    Args:
      bias_gate_GF, bias_up_GF, bias_down_GD, activation, pre_activations: as of `grouped_swiglu`.
      row_weight_N: what the router gave each row, by default 1; multiplied in float32 before the
        result is rounded. Differentiable; it may hold anything in unused rows.
      transpose_w: gate and up are stored [G, F, D] and down [G, D, F].
      first_group: as of `grouped_matmul`; biases are those of the same groups.
    """
    weights = {
        "w_gate_GDF": (w_gate_GDF, "D"),
        "w_up_GDF": (w_up_GDF, "D"),
        "w_down_GFD": (w_down_GFD, "F"),
    }
    stored = _Stored(transpose_w, first_group)
    _check(x_ND, weights, group_sizes_G, stored)
    biases = {
        "bias_gate_GF": bias_gate_GF,
        "bias_up_GF": bias_up_GF,
        "bias_down_GD": bias_down_GD,
    }
    sizes = {"F": stored.width(w_gate_GDF), "D": x_ND.shape[1]}
    _check_biases(biases, sizes, w_gate_GDF.shape[0])
    if row_weight_N is not None:
        _check_row_weight(row_weight_N, x_ND.shape[0])
    module, matrices = _choose(implementation), (w_gate_GDF, w_up_GDF, w_down_GFD)
    args, how = _as_read(module, stored, group_sizes_G, *matrices, *biases.values())
    how |= _store(pre_activations, implementation)
    x_ND, group_sizes_G, *args, row_weight_N = _aligned(x_ND, group_sizes_G, *args, row_weight_N)
    arrays = x_ND, *args[:3], group_sizes_G
    return module.ffn(*arrays, _activation(activation), *args[3:], row_weight_N, **how)


class _Stored(NamedTuple):
    """How weights lie in memory."""

    transposed: bool
    first_group: Array | int | None

    def width(self, w_GDF: Array) -> int:
        """F of [G, D, F]."""
        return w_GDF.shape[1 if self.transposed else 2]


def default_implementation(platform: str | None = None) -> str:
    """What `implementation=None` means on a platform. The only place that decides it.

    Args:
      platform: as in `jax.Device.platform`; None = the one that JAX runs on.
    """
    platform = platform or jax.default_backend()
    if platform not in _BY_PLATFORM:
        raise Refused(
            "implementation",
            None,
            f"no implementation is chosen by default on platform {platform!r}",
            f"Pass one of {', '.join(IMPLEMENTATIONS)}",
        )
    return _BY_PLATFORM[platform]


def _choose(implementation: str | None) -> ModuleType:
    name = default_implementation() if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise Refused(
            "implementation",
            name,
            f"must be one of {', '.join(IMPLEMENTATIONS)}",
            "Pass one of these, or None to choose by platform",
        )
    return importlib.import_module(f"moe_jax.kernels.{name}")


def _as_read(
    module: ModuleType, stored: _Stored, group_sizes_G: Array, *weights: Array | None
) -> tuple[list[Array | None], dict[str, Any]]:
    """Weights as an implementation reads them, and what it is told about them."""
    transposed, first = stored
    if module.__name__.rsplit(".", 1)[1] in _IN_PLACE:
        first = None if first is None else jnp.asarray(first, jnp.int32)
        return list(weights), {"transposed": transposed, "first_group": first}

    def plain(w: Array | None) -> Array | None:
        if w is not None and first is not None:
            w = lax.dynamic_slice_in_dim(w, first, group_sizes_G.shape[0])
        return w if w is None or w.ndim < 3 or not transposed else w.swapaxes(1, 2)

    return [plain(w) for w in weights], {}


def _store(pre_activations: str, implementation: str | None) -> dict[str, bool]:
    """What an implementation is told of it: nothing where it is not to store them."""
    if pre_activations not in ("recompute", "store"):
        rule = "must be one of recompute, store"
        raise Refused("pre_activations", pre_activations, rule, "Pass one of these")
    name = implementation or default_implementation()
    if pre_activations == "recompute" or name == "reference":  # JAX decides what that keeps
        return {}
    if name not in _STORING:
        rule = f"the {name} implementation only recomputes"
        fix = f"Pass 'recompute', or implementation={_STORING[0]!r}, which stores as well"
        raise Refused("pre_activations", pre_activations, rule, fix)
    return {"store": True}


def _activation(name: str) -> Activation:
    if name not in ACTIVATIONS:
        rule = f"must be one of {', '.join(ACTIVATIONS)}"
        raise Refused("activation", name, rule, "Pass one of these")
    return ACTIVATIONS[name]


def _aligned(*arrays: Array | None) -> list[Any]:
    """All arrays varying over the union of their mesh axes; None stays None.

    Done outside the custom derivatives, so that JAX sums the gradient of a weight that was the
    same on several devices by itself.
    """
    of = lambda a: jax.typeof(a).manual_axis_type.varying  # noqa: E731
    union = frozenset().union(*(of(a) for a in arrays if a is not None))
    return [
        a if a is None or not union - of(a) else lax.pcast(a, tuple(union - of(a)), to="varying")
        for a in arrays
    ]


# --- refusals --------------------------------------------------------------------------------


def _check(
    x_ND: Array, weights: dict[str, tuple[Array, str]], group_sizes_G: Array, stored: _Stored
) -> None:
    """`weights` maps each argument's name to the array and the name of its second axis."""
    _check_rank("x_ND", x_ND, 2)
    _check_rank("group_sizes_G", group_sizes_G, 1)
    _check_dtype("x_ND", x_ND.dtype)
    first_name, (first, _) = next(iter(weights.items()))
    for name, (w, second_axis) in weights.items():
        _check_rank(name, w, 3)
        if w.dtype != x_ND.dtype:
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
    _check_group_sizes(group_sizes_G, x_ND.shape[0])
    _check_first_group(stored.first_group, first.shape[0], group_sizes_G.shape[0])


def _check_first_group(value: Array | int | None, stored: int, num_groups: int) -> None:
    if value is None:
        return
    if num_groups > stored:
        raise Refused(
            "group_sizes_G.shape",
            (num_groups,),
            f"must be at most {stored}, the groups of the weights",
            "Pass the sizes of some of them",
        )
    if not isinstance(value, jax.core.Tracer) and not 0 <= int(value) <= stored - num_groups:
        rule = f"must lie in 0 .. {stored - num_groups}: {num_groups} of {stored} groups from it on"
        raise Refused("first_group", int(value), rule, "Pass the index of a layer's first group")


def _check_rank(name: str, array: Array, rank: int) -> None:
    if array.ndim != rank:
        axes = ", ".join(name.rsplit("_", 1)[1])
        raise Refused(
            f"{name}.shape", array.shape, f"must have {rank} axes", f"Pass an array [{axes}]"
        )


def _check_dtype(name: str, dtype: np.dtype) -> None:
    if dtype.name not in _DTYPES:
        raise Refused(
            f"{name}.dtype" if name.endswith(("_ND", "_N")) else name,
            dtype.name,
            f"must be one of {', '.join(_DTYPES)}",
            "Cast it first",
        )


def _check_biases(biases: dict[str, Array | None], sizes: dict[str, int], num_groups: int) -> None:
    """A bias may be wider than x: it is added in float32. `sizes` are those of F and D."""
    for name, bias in biases.items():
        if bias is None:
            continue
        _check_rank(name, bias, 2)
        _check_dtype(f"{name}.dtype", bias.dtype)
        expected = (num_groups, sizes[name[-1]])
        if bias.shape != expected:
            rule = f"must be {expected}, one bias for each group and column"
            raise Refused(f"{name}.shape", bias.shape, rule, f"Pass {name} of that shape")


def _check_row_weight(row_weight_N: Array, num_rows: int) -> None:
    _check_rank("row_weight_N", row_weight_N, 1)
    _check_dtype("row_weight_N", row_weight_N.dtype)
    if row_weight_N.shape[0] != num_rows:
        raise Refused(
            "row_weight_N.shape",
            row_weight_N.shape,
            f"must be ({num_rows},), one weight for each row of x_ND",
            "Pass the weight of every row, in the order of the rows",
        )


def _check_group_sizes(group_sizes_G: Array, num_rows: int) -> None:
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
