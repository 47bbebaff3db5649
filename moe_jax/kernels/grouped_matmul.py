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
from collections.abc import Callable
from types import ModuleType
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from moe_jax.errors import Refused
from moe_jax.kernels import checks, gpu
from moe_jax.kernels.activation import ACTIVATIONS, Activation
from moe_jax.kernels.scaled import Scaled

IMPLEMENTATIONS = (
    "reference",
    "cpu",
    "pallas_tpu",
    "pallas_tpu_interpret",
    "pallas_gpu",
    "pallas_gpu_interpret",
    "hopper",
)
# "cpu" is plain JAX: it runs on a GPU as well, correct but not fast.
_BY_PLATFORM = {"cpu": "cpu", "gpu": "cpu", "tpu": "pallas_tpu"}
# They read transposed weights where they lie, and those of one layer among several; for the others
# such weights are transposed and cut out first.
_TRANSPOSED_IN_PLACE = tuple(name for name in IMPLEMENTATIONS if name != "reference")
_LAYERS_IN_PLACE = ("cpu",)
# They can keep pre-activations for the backward pass.
STORING = tuple(name for name in IMPLEMENTATIONS if name.startswith(("pallas", "hopper")))


@no_type_check  # `checks` refuses the same in words that name the fix
def grouped_matmul(
    x_ND: Float[Array, "N D"],
    w_GDF: Float[Array, "G D F"],
    group_sizes_G: Int[Array, "G"],
    *,
    w_scale_GF: Float[Array, "G F"] | None = None,
    transpose_w: bool = False,
    first_group: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
    preferred_element_type: DTypeLike | None = None,
) -> Float[Array, "N F"]:
    """y[n] = x[n] @ w[group of n]; the result has `preferred_element_type`, by default x's.

    Args:
      w_scale_GF: w is in 8 bits (`scaled.DTYPES`) and stands for w[g, d, f] scale[g, f]; forward
        passes only.
      transpose_w: w is stored [G, F, D], and each group's is used transposed.
      first_group: w holds more groups than there are sizes (say, of all layers), and this is the
        index of the first of them; None = w has the groups of the sizes. Its gradient is zero in
        all the others. Beyond the end it is refused where its value is known; under `jit` the
        weights are then any.
    """
    stored = checks.Stored(transpose_w, first_group)
    scales = {"w_GDF": w_scale_GF}
    checks.arrays(x_ND, {"w_GDF": (w_GDF, "D")}, group_sizes_G, stored, scales)
    group_sizes_G = _summable(group_sizes_G, x_ND.shape[0])
    out_dtype = checks.result_dtype(preferred_element_type or x_ND.dtype)
    module = _choose(implementation, x_ND, group_sizes_G)
    (w_GDF,), how = _as_read(module, stored, group_sizes_G, *_scaled([w_GDF], scales))
    arrays, how = _aligned(how, x_ND, w_GDF, group_sizes_G)
    return _run(lambda *a: module.matmul(*a, out_dtype, **how), scales, *arrays)


@no_type_check  # `checks` refuses the same in words that name the fix
def grouped_swiglu(
    x_ND: Float[Array, "N D"],
    w_gate_GDF: Float[Array, "G D F"],
    w_up_GDF: Float[Array, "G D F"],
    group_sizes_G: Int[Array, "G"],
    *,
    bias_gate_GF: Float[Array, "G F"] | None = None,
    bias_up_GF: Float[Array, "G F"] | None = None,
    w_gate_scale_GF: Float[Array, "G F"] | None = None,
    w_up_scale_GF: Float[Array, "G F"] | None = None,
    activation: str = "swiglu",
    transpose_w: bool = False,
    first_group: Int[Array, ""] | int | None = None,
    pre_activations: str = "recompute",
    implementation: str | None = None,
) -> Float[Array, "N F"]:
    """h[n] = silu(gate) * up with gate = x[n] @ w_gate[g] + bias_gate[g], up alike, g n's group.

    Args:
      bias_gate_GF, bias_up_GF: added in float32; differentiable; None = there is none.
      w_gate_scale_GF, w_up_scale_GF: as w_scale_GF of `grouped_matmul`.
      activation: a name in `activation.ACTIVATIONS`: what is made of gate and up.
      transpose_w, first_group: as of `grouped_matmul`; biases are those of the same groups.
      pre_activations: what the backward pass knows of gate and up: "recompute" keeps nothing but
        the inputs, "store" keeps 2 N F values of x's dtype and saves two of its matmuls.
    """
    weights = {"w_gate_GDF": (w_gate_GDF, "D"), "w_up_GDF": (w_up_GDF, "D")}
    stored = checks.Stored(transpose_w, first_group)
    scales = {"w_gate_GDF": w_gate_scale_GF, "w_up_GDF": w_up_scale_GF}
    checks.arrays(x_ND, weights, group_sizes_G, stored, scales)
    group_sizes_G = _summable(group_sizes_G, x_ND.shape[0])
    biases = {"bias_gate_GF": bias_gate_GF, "bias_up_GF": bias_up_GF}
    checks.biases(biases, {"F": stored.width(w_gate_GDF)}, w_gate_GDF.shape[0])
    module = _choose(implementation, x_ND, group_sizes_G)
    matrices = _scaled([w_gate_GDF, w_up_GDF], scales)
    args, how = _as_read(module, stored, group_sizes_G, *matrices, *biases.values())
    how |= _store(pre_activations, module)
    (x_ND, group_sizes_G, *args), how = _aligned(how, x_ND, group_sizes_G, *args)
    arrays, act = (x_ND, *args[:2], group_sizes_G), _activation(activation)

    def run(x_ND, w_gate_GDF, w_up_GDF, group_sizes_G, *biases):
        return module.swiglu(x_ND, w_gate_GDF, w_up_GDF, group_sizes_G, act, *biases, **how)

    return _run(run, scales, *arrays, *args[2:])


@no_type_check  # `checks` refuses the same in words that name the fix
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
    w_gate_scale_GF: Float[Array, "G F"] | None = None,
    w_up_scale_GF: Float[Array, "G F"] | None = None,
    w_down_scale_GD: Float[Array, "G D"] | None = None,
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
      w_gate_scale_GF, w_up_scale_GF, w_down_scale_GD: as w_scale_GF of `grouped_matmul`.
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
    stored = checks.Stored(transpose_w, first_group)
    scales = {
        "w_gate_GDF": w_gate_scale_GF,
        "w_up_GDF": w_up_scale_GF,
        "w_down_GFD": w_down_scale_GD,
    }
    checks.arrays(x_ND, weights, group_sizes_G, stored, scales)
    group_sizes_G = _summable(group_sizes_G, x_ND.shape[0])
    biases = {
        "bias_gate_GF": bias_gate_GF,
        "bias_up_GF": bias_up_GF,
        "bias_down_GD": bias_down_GD,
    }
    sizes = {"F": stored.width(w_gate_GDF), "D": x_ND.shape[1]}
    checks.biases(biases, sizes, w_gate_GDF.shape[0])
    if row_weight_N is not None:
        checks.row_weight(row_weight_N, x_ND.shape[0])
    module = _choose(implementation, x_ND, group_sizes_G)
    matrices = _scaled([w_gate_GDF, w_up_GDF, w_down_GFD], scales)
    args, how = _as_read(module, stored, group_sizes_G, *matrices, *biases.values())
    how |= _store(pre_activations, module)
    args = x_ND, group_sizes_G, *args, row_weight_N
    (x_ND, group_sizes_G, *args), how = _aligned(how, *args)
    arrays, act = (x_ND, *args[:3], group_sizes_G), _activation(activation)

    def run(*a):
        return module.ffn(*a[:5], act, *a[5:], **how)

    return _run(run, scales, *arrays, *args[3:])


def default_implementation(device: Any = None) -> str:
    """What `implementation=None` means on a device. The only place that decides it.

    Args:
      device: a `jax.Device`; None = the first of those that JAX runs on.
    """
    device = jax.devices()[0] if device is None else device
    if device.platform not in _BY_PLATFORM:
        raise Refused(
            "implementation",
            None,
            f"no implementation is chosen by default on platform {device.platform!r}",
            f"Pass one of {', '.join(IMPLEMENTATIONS)}",
        )
    hopper = getattr(device, "compute_capability", "") == gpu.COMPUTE_CAPABILITY
    if hopper and jax.__version_info__ >= gpu.OLDEST_JAX:
        return "hopper"
    return _BY_PLATFORM[device.platform]


def check_platform(implementation: str, platform: str, field: str = "model.kernels") -> None:
    """Raises `Refused` where a program would be built that its devices cannot run."""
    needed = {"pallas_tpu": "tpu", "pallas_gpu": "gpu", "hopper": "gpu"}.get(
        implementation, platform
    )
    if needed != platform:
        rule = f"runs on platform {needed!r}, and the devices are of {platform!r}"
        fix = "set model.kernels = '', which chooses by platform (for infer.py in config.json)"
        if field != "model.kernels":
            fix = f"Leave out {field}, which chooses by platform"
        raise Refused(field, implementation, rule, fix)


def _choose(implementation: str | None, x_ND: Any, group_sizes_G: Array) -> ModuleType:
    name = default_implementation() if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise Refused(
            "implementation",
            name,
            f"must be one of {', '.join(IMPLEMENTATIONS)}",
            "Pass one of these, or None to choose by platform",
        )
    if not x_ND.shape[0] or not group_sizes_G.shape[0]:
        name = "reference"  # zeros at no cost; others have no tile to begin with
    return importlib.import_module(f"moe_jax.kernels.{name}")


def _name(module: ModuleType) -> str:
    return module.__name__.rsplit(".", 1)[1]


def _summable(group_sizes_G: Array, num_rows: int) -> Array:
    """Ends of groups are sums, which neither a narrow type nor sizes beyond the buffer may wrap."""
    return jnp.clip(group_sizes_G.astype(jnp.int32), 0, num_rows)


def _as_read(
    module: ModuleType, stored: checks.Stored, group_sizes_G: Array, *weights: Array | Scaled | None
) -> tuple[list[Any], dict[str, Any]]:
    """Weights as an implementation reads them, and what it is told about them."""
    transposed, first = stored
    name = _name(module)
    how: dict[str, Any] = {}
    if name in _TRANSPOSED_IN_PLACE:
        transposed, how["transposed"] = False, transposed
    if name in _LAYERS_IN_PLACE:
        first, how["first_group"] = None, None if first is None else jnp.asarray(first, jnp.int32)

    def plain(w: Array) -> Array:
        if first is not None:
            w = lax.dynamic_slice_in_dim(w, first, group_sizes_G.shape[0])
        return w if w.ndim < 3 or not transposed else w.swapaxes(1, 2)

    return jax.tree.map(plain, list(weights)), how


def _scaled(weights: list[Array], scales: dict[str, Array | None]) -> list[Array | Scaled]:
    """With their scales, where they have some."""
    return [
        w if scale is None else Scaled(w, scale)
        for w, scale in zip(weights, scales.values(), strict=True)
    ]


def _run(f: Callable[..., Array], scales: dict[str, Array | None], *args: Any) -> Array:
    """f(*args), which cannot be differentiated where weights have scales."""
    names = [name for name, scale in scales.items() if scale is not None]
    if not names:
        return f(*args)

    def refuse(*_):
        rule = "weights in 8 bits are for forward passes: there is no gradient through them"
        fix = "Widen the weights to differentiate, or stop_gradient x and the rows' weights"
        raise Refused(names[0], "differentiated", rule, fix)

    forward_only = jax.custom_vjp(f)
    forward_only.defvjp(refuse, refuse)
    return forward_only(*args)


def _store(pre_activations: str, module: ModuleType) -> dict[str, bool]:
    """What an implementation is told of it: nothing where it is not to store them."""
    if pre_activations not in ("recompute", "store"):
        rule = "must be one of recompute, store"
        raise Refused("pre_activations", pre_activations, rule, "Pass one of these")
    name = _name(module)
    if pre_activations == "recompute" or name == "reference":  # JAX decides what that keeps
        return {}
    check_storing(name, "pre_activations")
    return {"store": True}


def check_storing(implementation: str, field: str) -> None:
    """Raises `Refused` where it cannot keep pre-activations; `field` asked for it."""
    if implementation not in (*STORING, "reference"):
        rule = f"the {implementation} implementation only recomputes"
        fix = f"Set 'recompute', or take one of {', '.join(STORING)}, which store as well"
        raise Refused(field, "store", rule, fix)


def _activation(name: Any) -> Activation:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        rule = f"must be one of {', '.join(ACTIVATIONS)}"
        raise Refused("activation", name, rule, "Pass one of these")
    return ACTIVATIONS[name]


def _aligned(how: dict[str, Any], *arrays: Any) -> tuple[list[Any], dict[str, Any]]:
    """All arrays varying over the union of their mesh axes, that in `how` too; None stays None.

    Done outside the custom derivatives, so that JAX sums the gradient of a weight that was the
    same on several devices by itself.
    """
    of = lambda a: jax.typeof(a).manual_axis_type.varying  # noqa: E731
    given = list(arrays), {"first_group": how["first_group"]} if "first_group" in how else {}
    union = frozenset().union(*(of(a) for a in jax.tree.leaves(given)))

    def varying(a: Any) -> Array:
        missing = tuple(union - of(a))
        return lax.pcast(a, missing, to="varying") if missing else jnp.asarray(a)

    aligned, of_how = jax.tree.map(varying, given)
    return aligned, how | of_how
