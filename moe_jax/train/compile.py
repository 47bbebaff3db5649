"""Compiles the training step of a config for a TPU pod that is not there: does it fit, what moves?

    python -m moe_jax.train.compile --config=configs/mixtral_8x7b.py --topology=v5p:4x4x4

Needs the libtpu package (Linux, x86-64) and no TPU. Prints the bytes of one chip's memory (HBM)
that the step takes, what its collectives carry, and how often a MoE layer exchanges rows. A step
that does not fit is refused: exit code 1. Nothing is run, so nothing here is a speed.
"""

import dataclasses
import json
import os
import pathlib
import re
import tempfile
import time
from typing import Any

from absl import flags

from moe_jax import auto, entry, tpu
from moe_jax import config as config_lib
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.train import hlo

GIB = 2**30
HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # of one chip, by its maker


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of one training step.

    Attributes:
      seconds: that it took to compile.
      hbm_bytes: of one chip: the state, the batch, and what the step needs in between.
      hbm_limit: what the chip has.
      argument_bytes, temporary_bytes: its parts (state and batch; the rest).
      collectives: kind -> (operations, bytes of their results on one chip), a step. A ragged
        exchange counts its buffers, which hold the worst case: real rows depend on the routing.
      exchanges_forward: all-to-alls of rows in one MoE layer, on its way forward.
      kernels: Pallas kernels in the program as written (a scanned layer counts once).
      move_hbm_bytes: of one chip, while experts move to a new plan; where the config asks for new
        plans (replan.every), else 0.
    """

    config: str
    topology: str
    mesh: str
    parameters: int
    seconds: float
    hbm_bytes: int
    hbm_limit: int
    argument_bytes: int
    temporary_bytes: int
    collectives: dict[str, tuple[int, int]]
    exchanges_forward: int
    kernels: int
    move_hbm_bytes: int


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


def compile_step(config: Config, topology: str) -> Report:
    """Compiles; raises `Refused` if a chip's memory is too small.

    `tpu.ENVIRONMENT` must have been set before JAX was imported.
    """
    check_topology(config, topology)
    limit = HBM_GIB[topology.split(":")[0]] * GIB
    # The text of the compiled program is read from XLA's dump: some versions cannot print one
    # with a ragged exchange after the fact.
    with tempfile.TemporaryDirectory(prefix="moe_jax-hlo-") as folder:
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text=true"
        import jax

        from moe_jax.model import transformer

        step, forward, move, arguments = _programs(config, topology)
        lowered = step.lower(*arguments)
        start = time.perf_counter()
        try:
            used, memory = _hbm_bytes(lowered)
            move_used = _hbm_bytes(move)[0] if move else 0
        except jax.errors.JaxRuntimeError as error:
            raise _too_large(str(error), limit) from None
        seconds = time.perf_counter() - start
        (text,) = pathlib.Path(folder).glob("*jit_step*.after_optimizations.txt")
        collectives = hlo.collectives(text.read_text(encoding="utf-8"))
        forward_text = forward.lower(arguments[0].model, *arguments[1:]).as_text()
    report = Report(
        config=config.name,
        topology=topology,
        mesh=str(config.mesh),
        parameters=transformer.num_parameters(config.model),
        seconds=round(seconds, 1),
        hbm_bytes=used,
        hbm_limit=limit,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        collectives=collectives,
        exchanges_forward=forward_text.count("@ragged_all_to_all"),
        kernels=lowered.as_text().count("@tpu_custom_call"),
        move_hbm_bytes=move_used,
    )
    if max(used, move_used) > limit:
        most = max(used, move_used) / GIB
        raise _too_large(f"Used {most:.2f}G of {limit / GIB:.2f}G hbm", limit)
    return report


def _hbm_bytes(lowered: Any) -> tuple[int, Any]:
    """Compiles; bytes of one chip, and what they are made of."""
    memory = lowered.compile().memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return used + memory.output_size_in_bytes - memory.alias_size_in_bytes, memory


def _programs(config: Config, topology: str) -> tuple[Any, Any, Any, tuple[Any, ...]]:
    """(training step, forward pass, move or None, abstract arguments of the step)."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from moe_jax import mesh as mesh_lib
    from moe_jax import migrate
    from moe_jax.model.dispatch.table import Table
    from moe_jax.placement.plan import Placement
    from moe_jax.train import step as step_lib

    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = mesh_lib.of_config(config.mesh, devices)
    replicated = mesh_lib.sharding(mesh)
    shape_LE = (config.model.num_plan_layers, config.model.num_experts)
    table = Table(
        jax.ShapeDtypeStruct((*shape_LE, 1), jnp.int32, sharding=replicated),
        jax.ShapeDtypeStruct(shape_LE, jnp.int32, sharding=replicated),
    )
    window_BS1 = jax.ShapeDtypeStruct(
        (config.data.global_batch, config.data.seq_len + 1),
        jnp.int32,
        sharding=mesh_lib.sharding(mesh, "batch", None),
    )
    state = step_lib.abstract_state(config, mesh)
    step, forward = step_lib.build_step(config, mesh), step_lib.build_eval(config, mesh)
    move = None
    if config.replan.every:
        here = Placement.contiguous(*shape_LE, config.mesh.expert_devices)
        move = migrate.Mover(mesh, state).lower(migrate.route(here, here))
    return step, forward, move, (state, window_BS1, table)


def _too_large(message: str, limit: int) -> Exception:
    """The refusal of a step that needs more memory than a chip has; other errors as they are."""
    found = re.search(r"[Uu]sed ([\d.]+)([MGT]) of ([\d.]+)([MGT])", message)
    if not found:
        return RuntimeError(message)
    return Refused(
        "HBM of one chip",
        f"{found[1]} {found[2]}iB",
        f"must be at most {found[3]} {found[4]}iB (of {limit / GIB:.0f} GiB)",
        "set train.remat = 'layer', raise mesh.fsdp, or lower data.global_batch or data.seq_len",
    )


def as_table(report: Report) -> str:
    """For people."""
    lines = [
        f"{report.config} ({report.parameters / 1e9:.2f} G parameters) on {report.topology} "
        f"({report.mesh}), compiled in {report.seconds:.0f} s, nothing run",
        f"  HBM a chip      {report.hbm_bytes / GIB:7.2f} of {report.hbm_limit / GIB:.0f} GiB  "
        f"(state and batch {report.argument_bytes / GIB:.2f}, the rest "
        f"{report.temporary_bytes / GIB:.2f})",
        f"  all-to-alls of rows in a MoE layer, forward: {report.exchanges_forward}",
    ]
    if report.move_hbm_bytes:
        size = report.move_hbm_bytes / GIB
        lines.append(f"  HBM a chip while experts move to a new plan: {size:.2f} GiB")
    lines.append("  collectives a step            operations   MiB a chip")
    for kind, (operations, size) in sorted(report.collectives.items()):
        lines.append(f"    {kind:26}{operations:12,}{size / 2**20:13,.1f}")
    return "\n".join(lines)


def main() -> None:
    plain = entry.required("--config", CONFIG.value)
    topology = entry.required("--topology", TOPOLOGY.value)
    config, note = auto.resolve_unplanned(config_lib.from_config_dict(plain))
    check_topology(config, topology)
    if note and not JSON.value:
        print(note, flush=True)
    os.environ.update(tpu.ENVIRONMENT)
    report = compile_step(config, topology)
    print(json.dumps(dataclasses.asdict(report)) if JSON.value else as_table(report), flush=True)


if __name__ == "__main__":
    # here, so that a program that imports this module may have flags of its own
    CONFIG = entry.define_config("As for train.py.")
    TOPOLOGY = flags.DEFINE_string(
        "topology", None, "A TPU generation and the shape of the pod, as v5e:4x4 or v5p:4x4x4."
    )
    JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of the table.")
    entry.run(main, __doc__)
