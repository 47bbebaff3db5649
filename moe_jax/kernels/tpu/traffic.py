"""HBM traffic and memory of an expert's FFN on a TPU, fused and not, without a TPU.

    python -m moe_jax.kernels.tpu.traffic [--chips=v5e,v5p,v6e] [--shapes=mixtral,...] [--json]

compiles each way ahead of time and prints what the compiled program says of itself: bytes accessed
(XLA's own count for its fusions, `cost.py` for our kernels: every block as often as its
index changes) and temporaries. Ways: `unfused`, three grouped matmuls with the activation and the
rows' weights left to XLA; `recompute` and `store`, `grouped_ffn` with these `pre_activations`. The
last columns name the way with the fewest bytes and the one with the least memory.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.kernels import bench
from moe_jax.kernels import grouped_matmul as gm
from moe_jax.kernels.activation import ACTIVATIONS
from moe_jax.kernels.tpu import ahead

_KERNELS = "pallas_tpu"


def unfused(x_ND, w_gate_GDF, w_up_GDF, w_down_GFD, weight_N, sizes_G):
    dot = functools.partial(gm.grouped_matmul, group_sizes_G=sizes_G, implementation=_KERNELS)
    h_NF = ACTIVATIONS["swiglu"].value(dot(x_ND, w_gate_GDF), dot(x_ND, w_up_GDF))
    y_ND = dot(h_NF, w_down_GFD, preferred_element_type=jnp.float32)
    return (y_ND * weight_N[:, None]).astype(x_ND.dtype)


def fused(x_ND, w_gate_GDF, w_up_GDF, w_down_GFD, weight_N, sizes_G, kept="recompute"):
    named = {"row_weight_N": weight_N, "pre_activations": kept, "implementation": _KERNELS}
    return gm.grouped_ffn(x_ND, w_gate_GDF, w_up_GDF, w_down_GFD, sizes_G, **named)


WAYS: dict[str, Callable[..., Any]] = {
    "unfused": unfused,
    "recompute": fused,
    "store": functools.partial(fused, kept="store"),
}


def measure(chip: str, shape: bench.Shape) -> dict[str, dict[str, dict[str, float]]]:
    """way -> "forward" or "forward+backward" -> gigabytes accessed and megabytes of temporaries."""
    a = ahead.arrays(chip, shape)
    args, dy_ND = [a.x_ND, a.w_GDF, a.w_GDF, a.w_GFD, a.weight_N], a.x_ND
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, way in WAYS.items():
        found[name] = {}
        if name != "store":  # what is stored is stored for the backward pass
            found[name]["forward"] = _compiled(chip, way, *args, a.sizes_G)
        both = functools.partial(_with_gradients, way)
        found[name]["forward+backward"] = _compiled(chip, both, args, a.sizes_G, dy_ND)
    return found


def _with_gradients(way, args, sizes_G, dy_ND):
    y_ND, vjp = jax.vjp(lambda *a: way(*a, sizes_G), *args)
    return y_ND, vjp(dy_ND)


def _compiled(chip: str, program: Callable[..., Any], *args: Any) -> dict[str, float]:
    compiled = ahead.compiled(chip, program, *args)
    cost: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    return {
        "gigabytes": cost["bytes accessed"] / 1e9,
        "temporary_megabytes": memory.temp_size_in_bytes / 1e6,
    }


def fewest(ways: dict[str, dict[str, dict[str, float]]], direction: str, quantity: str) -> str:
    """The way that is to be taken where this quantity is what is short."""
    there = {way: found[direction][quantity] for way, found in ways.items() if direction in found}
    return min(there, key=lambda way: there[way])


def as_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| shape | chip | pass | GB unfused | recompute | store | MB of temporaries unfused |"
        " recompute | store | fewest GB | fewest MB |",
        "|---" * 11 + "|",
    ]
    for r in rows:
        for way in ("forward", "forward+backward"):
            cells = [r["shape"], r["chip"], way]
            for quantity, digits in (("gigabytes", 2), ("temporary_megabytes", 1)):
                values = [r["ways"][name].get(way, {}).get(quantity) for name in WAYS]
                cells += ["" if v is None else f"{v:.{digits}f}" for v in values]
            cells += [fewest(r["ways"], way, q) for q in ("gigabytes", "temporary_megabytes")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    def rows(shapes: list[str], of_chips: list[str]) -> Iterator[dict[str, Any]]:
        for name, chip in ahead.pairs(shapes, of_chips):
            yield {"shape": name, "chip": chip, "ways": measure(chip, bench.SHAPES[name])}

    args = ahead.parser("traffic").parse_args(argv)
    return ahead.run(args, rows, as_table, "From compiled programs, nothing was run")


if __name__ == "__main__":
    sys.exit(main())
