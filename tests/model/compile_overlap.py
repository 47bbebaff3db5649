"""Compiles one MoE layer in chunks for a TPU slice that is not there, and reads its schedule.

    python tests/model/compile_overlap.py v5e:2x4 DEGREE...

prints one JSON object for each degree: how many exchanges of rows there are, how many of them are
asynchronous (a start and a done), and how many of these have kernels of the experts in between.
"""

import json
import os
import re
import sys

from moe_jax import tpu

os.environ.update(tpu.ENVIRONMENT)

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from moe_jax import mesh as mesh_lib
from moe_jax.model import moe
from moe_jax.model.dispatch.table import Table

T, D, F, E, K = 8 * 1024, 1024, 512, 64, 4


def compiled_text(topology: str, degree: int) -> str:
    """The compiled program of the layer's forward pass, in the order in which it runs."""
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = mesh_lib.make(1, len(devices), devices)
    compute = moe.build_dispatch(
        mesh, dispatch="exchange", combine="partial", overlap_degree=degree
    )
    tokens = mesh_lib.sharding(mesh, "batch", None)
    experts = mesh_lib.sharding(mesh, "expert", None, None)
    replicated = mesh_lib.sharding(mesh)

    def array(shape, dtype, placed):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    table = Table(array((E, 1), jnp.int32, replicated), array((E,), jnp.int32, replicated))
    args = (
        array((T, D), jnp.bfloat16, tokens),
        array((T, K), jnp.int32, tokens),
        array((T, K), jnp.float32, tokens),
        table,
        moe.Experts(tuple(array((E, *s), jnp.bfloat16, experts) for s in ((D, F), (D, F), (F, D)))),
    )
    return jax.jit(compute).lower(*args).compile().as_text()


def overlaps(text: str) -> dict[str, int]:
    """Reads the scheduled program line by line: what runs between the start and the done of each.

    Kernels are those of the experts: custom calls to a TPU program.
    """
    kernels_since: dict[str, int] = {}  # by name of the start
    counts = {"exchanges": 0, "asynchronous": 0, "around_kernels": 0, "kernels": 0}
    for line in text.splitlines():
        name, _, right = line.strip().removeprefix("ROOT ").partition(" = ")
        if 'custom_call_target="tpu_custom_call"' in right:
            counts["kernels"] += 1
            kernels_since = {start: number + 1 for start, number in kernels_since.items()}
        elif " ragged-all-to-all-start(" in right:
            kernels_since[name] = 0
        elif done := re.search(r" ragged-all-to-all-done\((%[\w.-]+)\)", right):
            counts["exchanges"] += 1
            counts["asynchronous"] += 1
            counts["around_kernels"] += kernels_since.pop(done[1]) > 0
        elif " ragged-all-to-all(" in right:
            counts["exchanges"] += 1
    return counts


def main(topology: str, degrees: list[int]) -> None:
    for degree in degrees:
        found = overlaps(compiled_text(topology, degree))
        print(json.dumps({"topology": topology, "degree": degree, **found}))


if __name__ == "__main__":
    main(sys.argv[1], [int(degree) for degree in sys.argv[2:]])
