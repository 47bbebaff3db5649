"""What the compiler says of the Hopper kernels, without a GPU: registers, spills, shared memory.

    python -m moe_jax.kernels.gpu.static [--shapes=mixtral,...] [--json]

compiles `grouped_ffn`, forward and backward, at published shapes for an H100 that is not there, and
prints a row for each kernel. There is no estimate of time; nothing was run. Needs Linux, CUDA 13's
ptxas, and JAX's CUDA plugin (pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt, of the JAX
version at hand; the driver and the other CUDA packages are not needed).
"""

import argparse
import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from moe_jax.errors import Refused
from moe_jax.kernels import bench, fused, pallas_gpu
from moe_jax.kernels.activation import ACTIVATIONS
from moe_jax.kernels.gpu import columns, rows, tiles
from moe_jax.kernels.operands import Kernels, Operands, Weight

SHAPES = ("mixtral", "olmoe", "qwen3", "deepseek_v3")
# what XLA has to know of an H100 (SXM, 80 GB) to compile for it
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


class Row(NamedTuple):
    """Attributes:
    kernel: its kind, as `fused` names it.
    tile: columns of a tile of results; its rows are 128.
    stages: steps of copies in flight.
    registers: of a thread when a block starts; the warpgroups then share them out unevenly.
    spilled: bytes that a thread stores because registers do not suffice.
    """

    shape: str
    kernel: str
    tile: int
    stages: int
    registers: int
    spilled: int


def for_h100() -> SingleDeviceSharding:
    """On one H100 that is not there."""
    # else the plugin looks for every library that running would need
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    try:
        topology = topologies.get_topology_desc(
            "", platform="cuda", target_config=H100, topology="1x1x1"
        )
    except (NotImplementedError, RuntimeError) as error:
        rule = f"needs JAX's CUDA plugin ({' '.join(str(error).split())[:100]})"
        fix = f"pip install --no-deps jax-cuda13-plugin=={jax.__version__} and jax-cuda13-pjrt"
        raise Refused("static", "H100", rule, fix) from None
    return SingleDeviceSharding(topology.devices[0])


def kernels_of(shape: bench.Shape) -> Iterator[tuple[str, tuple[int, int], Callable, list]]:
    """(kind, tile and stages, program, its arguments) of each kernel of an FFN, both passes.

    Those of pre-activations that are computed again come first, then what differs where they are
    stored.
    """
    seen: list[tuple[str, tuple[int, int], Callable, list]] = []
    num_rows, d, f, groups = shape.num_rows, shape.d_model, shape.d_ff, shape.num_groups
    blocks = pallas_gpu.MULTIPROCESSORS

    def record_rows(kind, operands: Operands, sizes, epilogue, results):
        width = operands.weights[0].array.shape[1 if operands.weights[0].transposed else 2]
        flags = [weight.transposed for weight in operands.weights]

        def program(lhs, weights, by_group, by_row, by_both, sizes):
            weights = [Weight(w, flag) for w, flag in zip(weights, flags, strict=True)]
            whole = Operands(lhs, weights, operands.products, by_group, by_row, by_both)
            return rows.grouped_rows(
                kind, whole, sizes, epilogue, results, blocks=blocks, interpret=None
            )

        weights = [weight.array for weight in operands.weights]
        others = operands.by_group, operands.by_row, operands.by_both
        args = [operands.lhs, weights, *others, sizes]
        seen.append((kind, tiles.for_rows(operands, results, width), program, args))
        return [jnp.zeros(num_rows if r.row_sum else (num_rows, width), r.dtype) for r in results]

    def record_columns(kind, x_ND, dys, sizes, dtype):
        itemsizes = x_ND.dtype.itemsize, jnp.dtype(dtype).itemsize
        program = functools.partial(
            columns.grouped_columns, kind, dtype=dtype, blocks=blocks, interpret=None
        )

        def one(x_ND, dy, sizes):
            return program(x_ND, [dy], sizes)

        width = dys[0].shape[1]
        seen.append((kind, tiles.for_columns(width, *itemsizes), one, [x_ND, dys[0], sizes]))
        return [jnp.zeros((groups, x_ND.shape[1], width), dtype) for _ in dys]

    recorded = Kernels(record_rows, record_columns, tiles.padding)

    def ffn(store, x_ND, w_gate, w_up, w_down, weight_N, sizes):
        act = ACTIVATIONS["swiglu"]
        args = x_ND, w_gate, w_up, w_down, sizes, act
        y_ND = fused.ffn(*args, row_weight_N=weight_N, store=store, kernels=recorded)
        return y_ND.astype(jnp.float32).sum()

    def array(*dims, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(dims, dtype)

    up, down = array(groups, d, f), array(groups, f, d)
    others = array(num_rows, dtype="float32"), array(groups, dtype="int32")
    given = array(num_rows, d), up, up, down, *others
    for store in (False, True):
        jax.eval_shape(jax.grad(functools.partial(ffn, store), argnums=range(5)), *given)
    kinds = [kind for kind, *_ in seen]
    yield from (one for i, one in enumerate(seen) if kinds.index(one[0]) == i)


def rows_of(name: str) -> Iterator[Row]:
    """What ptxas says of each kernel of a shape."""
    sharding = for_h100()
    for kind, (tile, stages), program, args in kernels_of(bench.SHAPES[name]):
        given = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args
        )
        with tempfile.TemporaryFile() as said:
            _compile(program, given, said.fileno())
            said.seek(0)
            text = said.read().decode(errors="replace")
        registers, spills = _REGISTERS.findall(text), _SPILLS.findall(text)
        if not registers or not spills:
            raise SystemExit(f"ptxas said nothing of {kind}:\n{text[-2000:]}")
        spilled = max(int(stores) for stores, _ in spills)
        yield Row(name, kind, tile, stages, max(map(int, registers)), spilled)


def _compile(program: Callable, args: list[Any], said: int) -> None:
    """What the compiler prints goes to the file `said`: it writes to the process's own output."""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    kept = os.dup(1), os.dup(2)
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        jax.jit(program).lower(*args).compile()
    finally:
        for place, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, place)
            os.close(descriptor)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    names = options.shapes.split(",")
    for name in names:
        if name not in SHAPES:
            raise Refused("--shapes", name, f"must be of {', '.join(SHAPES)}", "name some")
    if not options.json:
        print(f"{'shape':<12} {'kernel':<12} {'tile':>9} {'stages':>7} {'registers':>10} spilled")
    for name in names:
        for row in rows_of(name):
            line = f"{row.shape:<12} {row.kernel:<12} {f'128 x {row.tile}':>9} {row.stages:7d} "
            told = f"{line}{row.registers:10d} {row.spilled:7d}"
            print(json.dumps(row._asdict()) if options.json else told, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refused as error:
        sys.exit(str(error))
