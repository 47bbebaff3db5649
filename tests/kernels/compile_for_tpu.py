"""Compiles the TPU kernels for a topology that need not be there, and says what came of it.

Runs in a process of its own (see test_pallas_tpu.py): libtpu reads its environment once.

    python tests/kernels/compile_for_tpu.py v5e:2x4 both
    python tests/kernels/compile_for_tpu.py v5e:2x4 narrow

prints one JSON object: per shape, what is in the program for the forward and backward passes of an
FFN on every device of the topology (`both`), or for the forward pass with weights in 8 bits.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from moe_jax import tpu

os.environ.update(tpu.ENVIRONMENT)

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.kernels import grouped_matmul as gm
from moe_jax.kernels import scaled
from moe_jax.kernels.tpu import chips


class Case(NamedTuple):
    """Lengths are those on each device; `weights` is the dtype of the weights."""

    dtype: str
    num_rows: int
    d_model: int
    d_ff: int
    num_groups: int
    transposed: bool = False
    weights: str = ""

    def shapes(self) -> list[tuple[int, int, int]]:
        """Of the weights of gate, up and down."""
        g, d, f = self.num_groups, self.d_model, self.d_ff
        return (
            [(g, f, d), (g, f, d), (g, d, f)] if self.transposed else [(g, d, f)] * 2 + [(g, f, d)]
        )


# the second has axes that are no multiple of a tile
BOTH = [
    Case("bfloat16", 1024, 1024, 768, 8),
    Case("float32", 200, 96, 640, 3),
    Case("bfloat16", 1024, 1024, 768, 8, transposed=True),
]
# the last are the experts of gpt-oss, whose widths 128 does not divide, and of Mixtral
NARROW = [
    *(Case("bfloat16", 1024, 1024, 768, 8, False, narrow) for narrow in scaled.DTYPES),
    Case("bfloat16", 1024, 1024, 768, 8, True, "int8"),
    Case("float32", 200, 96, 640, 3, False, "float8_e4m3fn"),
    Case("bfloat16", 1024, 2880, 2880, 4, True, "float8_e4m3fn"),
    Case("bfloat16", 1024, 4096, 14336, 1, False, "int8"),
]


class Compiler:
    """`program(f, *arrays)`: f on every device of the topology, each with its part of arrays."""

    def __init__(self, topology: str):
        devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
        self.num_devices = len(devices)
        self.mesh = Mesh(np.array(devices), ("expert",), axis_types=(AxisType.Auto,))
        self.sharding = NamedSharding(self.mesh, P("expert"))

    def array(self, dtype: str, *dims: int) -> jax.ShapeDtypeStruct:
        whole = self.num_devices * dims[0], *dims[1:]
        return jax.ShapeDtypeStruct(whole, dtype, sharding=self.sharding)

    def program(self, f: Callable[..., Any], *arrays: Any) -> jax.stages.Compiled:
        part = P("expert")
        run = jax.shard_map(f, mesh=self.mesh, in_specs=part, out_specs=part)
        return jax.jit(run).lower(*arrays).compile()


def both_passes(compiler: Compiler, case: Case) -> dict[str, int]:
    """Numbers of kernels and of transposes of floats."""

    def local(x_ND, weights, sizes_G, dy_ND):
        named = {"transpose_w": case.transposed, "implementation": "pallas_tpu"}
        y_ND, vjp = jax.vjp(lambda x, w: gm.grouped_ffn(x, *w, sizes_G, **named), x_ND, weights)
        return y_ND, vjp(dy_ND)

    x_ND = compiler.array(case.dtype, case.num_rows, case.d_model)
    weights = [compiler.array(case.dtype, *shape) for shape in case.shapes()]
    sizes_G = compiler.array("int32", case.num_groups)
    text = compiler.program(local, x_ND, weights, sizes_G, x_ND).as_text()
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "transposes": len(re.findall(r"= (?:bf16|f32)\S* transpose\(", text)),
    }


def forward_narrow(compiler: Compiler, case: Case) -> dict[str, int]:
    """Number of kernels; weights that are wider than 8 bits anywhere in the program."""

    def local(x_ND, weights, scales, sizes_G):
        names = "w_gate_scale_GF", "w_up_scale_GF", "w_down_scale_GD"
        named = {"transpose_w": case.transposed, "implementation": "pallas_tpu"}
        named |= dict(zip(names, scales, strict=True))
        return gm.grouped_ffn(x_ND, *weights, sizes_G, **named)

    g, d, f = case.num_groups, case.d_model, case.d_ff
    x_ND = compiler.array(case.dtype, case.num_rows, d)
    weights = [compiler.array(case.weights, *shape) for shape in case.shapes()]
    scales = [compiler.array("float32", g, width) for width in (f, f, d)]
    sizes_G = compiler.array("int32", g)
    text = compiler.program(local, x_ND, weights, scales, sizes_G).as_text()
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "widened": len(re.findall(rf"\b(?:bf16|f16|f32)\[{g},(?:{d},{f}|{f},{d})\]", text)),
    }


def main(topology: str, what: str) -> None:
    cases, report = {"both": (BOTH, both_passes), "narrow": (NARROW, forward_narrow)}[what]
    compiler = Compiler(topology)
    with chips.assume(topology.partition(":")[0]):
        print(json.dumps({str(case): report(compiler, case) for case in cases}))


if __name__ == "__main__":
    main(*sys.argv[1:])
