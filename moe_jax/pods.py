"""Programs compiled for a TPU pod that is not there: memory of a chip, what collectives carry.

Needs the libtpu package (Linux, x86-64) and no TPU. Nothing is run, so nothing here is a speed.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from moe_jax import hlo, tpu
from moe_jax.config import Config
from moe_jax.errors import Refused

GIB = 2**30
HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # of one chip, by its maker


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program.

    Attributes:
      seconds: that it took to compile.
      hbm_bytes: of one chip: what goes in, what comes out, and what is needed in between.
      argument_bytes, temporary_bytes: parts of it.
      collectives: kind -> (operations, bytes of their results on one chip), a run. A ragged
        exchange counts its buffers, which hold the worst case: real rows depend on the routing.
      kernels: Pallas kernels in the program as written (a scanned layer counts once).
    """

    seconds: float
    hbm_bytes: int
    argument_bytes: int
    temporary_bytes: int
    collectives: dict[str, tuple[int, int]]
    kernels: int


Compile = Callable[[Any], Compiled]


def check_topology(config: Config, topology: str) -> int:
    """Refuses words that name no pod, and pods of another size than the mesh. Returns its chips."""
    match = re.fullmatch(r"(v\d+[a-z]*):(\d+(?:x\d+)+)", topology)
    if not match or match[1] not in HBM_GIB:
        raise Refused(
            "--topology",
            topology,
            f"must be one of {', '.join(HBM_GIB)}, a colon, and the shape of the pod",
            "write v5e:4x4 or v5p:4x4x4",
        )
    chips = 1
    for side in match[2].split("x"):
        chips *= int(side)
    if chips != config.mesh.num_devices:
        raise Refused(
            "mesh",
            str(config.mesh),
            f"has {config.mesh.num_devices} devices, and {topology} has {chips} chips",
            f"set mesh.data, mesh.fsdp and mesh.expert so that the product is {chips}",
        )
    return chips


def hbm_limit(topology: str) -> int:
    """Bytes of one chip."""
    return HBM_GIB[topology.partition(":")[0]] * GIB


@contextlib.contextmanager
def compiler(topology: str, fix: str) -> Iterator[Compile]:
    """Gives a function of a lowered program. Enter before JAX is imported: it reads what is set.

    The function raises `Refused`, with `fix`, where the memory of a chip is too small.
    """
    os.environ.update(tpu.ENVIRONMENT)
    # The text of a compiled program is read from XLA's dump: some versions cannot print one with a
    # ragged exchange after the fact.
    with tempfile.TemporaryDirectory(prefix="moe_jax-hlo-") as folder:
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text=true"
        yield lambda lowered: _compiled(lowered, pathlib.Path(folder), topology, fix)


def _compiled(lowered: Any, dumps: pathlib.Path, topology: str, fix: str) -> Compiled:
    import jax

    before, start = set(dumps.iterdir()), time.perf_counter()
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        raise refusal(str(error), topology, fix) from None
    seconds = time.perf_counter() - start
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    if used > (limit := hbm_limit(topology)):
        said = f"Used {used / GIB:.2f}G of {limit / GIB:.2f}G hbm"
        raise refusal(said, topology, fix)
    new = [path for path in dumps.glob("*.after_optimizations.txt") if path not in before]
    (text,) = new
    return Compiled(
        seconds=round(seconds, 1),
        hbm_bytes=used,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        collectives=hlo.collectives(text.read_text(encoding="utf-8")),
        kernels=lowered.as_text().count("@tpu_custom_call"),
    )


def refusal(message: str, topology: str, fix: str) -> Exception:
    """What the compiler's error says of memory or links, for people; other errors as they are."""
    if "limited ICI routing" in message:
        return Refused(
            "--topology",
            topology,
            "has links over which this compiler knows no ragged all-to-all",
            "take another shape (v5e:4x4 and not v5e:4x8), or model.dispatch = 'gathered'",
        )
    found = re.search(r"[Uu]sed ([\d.]+)([MGT]) of ([\d.]+)([MGT])", message)
    if not found:
        return RuntimeError(message)
    return Refused(
        "HBM of one chip",
        f"{found[1]} {found[2]}iB",
        f"must be at most {found[3]} {found[4]}iB (of {hbm_limit(topology) / GIB:.0f} GiB)",
        fix,
    )


def mesh_and_table(config: Config, topology: str) -> tuple[Any, Any]:
    """The mesh of the pod, and the abstract table of a model that was never placed."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from moe_jax import mesh as mesh_lib
    from moe_jax.model.dispatch.table import Table

    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = mesh_lib.of_config(config.mesh, devices)
    shape_LE = (config.model.num_plan_layers, config.model.num_experts)
    replicated = mesh_lib.sharding(mesh)
    table = Table(
        jax.ShapeDtypeStruct((*shape_LE, 1), jnp.int32, sharding=replicated),
        jax.ShapeDtypeStruct(shape_LE, jnp.int32, sharding=replicated),
    )
    return mesh, table


def exchanges(lowered: Any) -> int:
    """All-to-alls of rows in a program as written: in a forward pass, those of one layer."""
    return lowered.as_text().count("@ragged_all_to_all")


def as_lines(title: str, program: Compiled, topology: str) -> list[str]:
    """A program for people."""
    memory = program.argument_bytes / GIB, program.temporary_bytes / GIB
    lines = [
        f"  {title}: compiled in {program.seconds:.0f} s, nothing run",
        f"    HBM a chip {program.hbm_bytes / GIB:7.2f} of {hbm_limit(topology) / GIB:.0f} GiB  "
        f"(what goes in {memory[0]:.2f}, in between {memory[1]:.2f})",
        "    collectives                operations   MiB a chip",
    ]
    for kind, (operations, size) in sorted(program.collectives.items()):
        lines.append(f"      {kind:22}{operations:13,}{size / 2**20:13,.1f}")
    return lines
