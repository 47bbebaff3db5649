"""Compiling for one chip of a TPU slice that is not there, and what commands that do so share."""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax import tpu
from moe_jax.errors import Refused
from moe_jax.kernels import bench
from moe_jax.kernels.tpu import chips

SHAPES = ("mixtral", "olmoe", "qwen3", "deepseek_v3", "quickstart")


class Arrays(NamedTuple):
    """Shapes on one chip, all bfloat16 but the rows' weights (float32) and sizes (int32)."""

    x_ND: jax.ShapeDtypeStruct
    y_NF: jax.ShapeDtypeStruct
    w_GDF: jax.ShapeDtypeStruct
    w_GFD: jax.ShapeDtypeStruct
    weight_N: jax.ShapeDtypeStruct
    sizes_G: jax.ShapeDtypeStruct


def arrays(chip: str, shape: bench.Shape) -> Arrays:
    """Arguments of a shape's operations, on one chip of the kind."""
    topology = chips.CHIPS[chip].topology
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = Mesh(np.array(devices[:1]), ("one",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())

    def array(*dims, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    n, d, f, g = shape.num_rows, shape.d_model, shape.d_ff, shape.num_groups
    return Arrays(
        *(array(n, d), array(n, f), array(g, d, f), array(g, f, d)),
        weight_N=array(n, dtype="float32"),
        sizes_G=array(g, dtype="int32"),
    )


def compiled(chip: str, program: Callable[..., Any], *args: Any) -> jax.stages.Compiled:
    with chips.assume(chip):
        # a program of its own: what JAX traced for another chip or rule must not be used again
        return jax.jit(functools.partial(program)).lower(*args).compile()


# --- commands --------------------------------------------------------------------------------


def parser(module: str) -> argparse.ArgumentParser:
    """The options that all commands have."""
    parser = argparse.ArgumentParser(prog=f"python -m moe_jax.kernels.tpu.{module}")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of kernels.bench")
    parser.add_argument("--chips", default=",".join(chips.CHIPS))
    parser.add_argument("--json", action="store_true")
    return parser


def run(
    args: argparse.Namespace,
    make: Callable[[list[str], list[str]], Iterable[dict[str, Any]]],
    as_table: Callable[[list[dict[str, Any]]], str],
    source: str,
) -> int:
    """Prints the rows that `make(shapes, chips)` gives; `source` says what they come from."""
    try:
        shapes = bench.named("--shapes", args.shapes, SHAPES)
        of_chips = bench.named("--chips", args.chips, chips.CHIPS)
    except Refused as error:
        print(error, file=sys.stderr)
        return 1
    # before `arrays` loads the compiler
    os.environ.update(tpu.ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    rows = list(make(shapes, of_chips))
    if args.json:
        print(json.dumps({"jax": jax.__version__, "rows": rows}))
    else:
        print(f"{source} (jax {jax.__version__}, bfloat16).\n\n{as_table(rows)}")
    return 0


def pairs(shapes: list[str], of_chips: list[str]) -> Iterator[tuple[str, str]]:
    """(shape, chip), each said when it is its turn."""
    for shape in shapes:
        for chip in of_chips:
            print(f"  compiling {shape} for {chip}", file=sys.stderr, flush=True)
            yield shape, chip
