"""Compiles the TPU kernels for a topology that need not be there, and says what came of it.

Runs in a process of its own (see test_pallas_tpu.py): libtpu reads its environment once.

    python tests/kernels/compile_for_tpu.py v5e:2x4

prints one JSON object: per shape, the numbers of kernels and of transposes of floats in the program
for the forward and backward passes of an FFN on every device of the topology.
"""

import functools
import json
import os
import re
import sys

from moe_jax import tpu

os.environ.update(tpu.ENVIRONMENT)

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.kernels import grouped_matmul as gm

# rows, d_model, d_ff and groups per device, weights stored transposed; the second has axes that are
# no multiple of a tile
SHAPES = [
    ("bfloat16", 1024, 1024, 768, 8, False),
    ("float32", 200, 96, 640, 3, False),
    ("bfloat16", 1024, 1024, 768, 8, True),
]


def main(topology: str) -> None:
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = Mesh(np.array(devices), ("expert",), axis_types=(AxisType.Auto,))
    sharding, num_devices = NamedSharding(mesh, P("expert")), len(devices)

    def shape(dtype, *dims):
        return jax.ShapeDtypeStruct((num_devices * dims[0], *dims[1:]), dtype, sharding=sharding)

    def local(transposed, x_ND, weights, sizes_G, dy_ND):
        named = {"transpose_w": transposed, "implementation": "pallas_tpu"}
        y_ND, vjp = jax.vjp(lambda x, w: gm.grouped_ffn(x, *w, sizes_G, **named), x_ND, weights)
        return y_ND, vjp(dy_ND)

    report = {}
    for dtype, n, d, f, g, transposed in SHAPES:
        sides = [(f, d), (f, d), (d, f)] if transposed else [(d, f), (d, f), (f, d)]
        weights = [shape(dtype, g, *lengths) for lengths in sides]
        x_ND = shape(dtype, n, d)
        one = functools.partial(local, transposed)
        run = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
        program = run.lower(x_ND, weights, shape("int32", g), x_ND).compile().as_text()
        report[f"{dtype} N={n} D={d} F={f} G={g}{' transposed' * transposed}"] = {
            "kernels": program.count('custom_call_target="tpu_custom_call"'),
            "transposes": len(re.findall(r"= (?:bf16|f32)\S* transpose\(", program)),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
