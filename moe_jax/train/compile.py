"""Compiles the training step of a config for a TPU pod that is not there: does it fit, what moves?

    python -m moe_jax.train.compile --config=configs/mixtral_8x7b.py --topology=v5p:4x4x4

Needs the libtpu package (Linux, x86-64) and no TPU. Prints the bytes of one chip's memory (HBM)
that the step takes, what its collectives carry, and how often a MoE layer exchanges rows. A step
that does not fit is refused: exit code 1. Nothing is run, so nothing here is a speed. For serving:
`python -m moe_jax.infer.compile`.
"""

import dataclasses
import json
from typing import Any

from absl import flags

from moe_jax import auto, entry, pods
from moe_jax import config as config_lib
from moe_jax.config import Config

FIX = "set train.remat = 'layer', raise mesh.fsdp, or lower data.global_batch or data.seq_len"


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of one training step.

    Attributes:
      hbm_limit: bytes of one chip.
      exchanges_forward: all-to-alls of rows in one MoE layer, on its way forward.
      step: the program; state and batch go in.
      move_hbm_bytes: of one chip, while experts move to a new plan; where the config asks for new
        plans (replan.every), else 0.
    """

    config: str
    topology: str
    mesh: str
    parameters: int
    hbm_limit: int
    exchanges_forward: int
    step: pods.Compiled
    move_hbm_bytes: int


def compile_step(config: Config, topology: str) -> Report:
    """Compiles, in a process that has not imported JAX; raises `Refused` if memory is too small."""
    pods.check_topology(config, topology)
    with pods.compiler(topology, FIX) as compiled:
        from moe_jax.model import transformer

        step, forward, move, arguments = _programs(config, topology)
        return Report(
            config=config.name,
            topology=topology,
            mesh=str(config.mesh),
            parameters=transformer.num_parameters(config.model),
            hbm_limit=pods.hbm_limit(topology),
            exchanges_forward=pods.exchanges(forward.lower(arguments[0].model, *arguments[1:])),
            step=compiled(step.lower(*arguments)),
            move_hbm_bytes=compiled(move).hbm_bytes if move else 0,
        )


def _programs(config: Config, topology: str) -> tuple[Any, Any, Any, tuple[Any, ...]]:
    """(training step, forward pass, move or None, abstract arguments of the step)."""
    import jax
    import jax.numpy as jnp

    from moe_jax import mesh as mesh_lib
    from moe_jax import migrate
    from moe_jax.placement.plan import Placement
    from moe_jax.train import step as step_lib

    mesh, table = pods.mesh_and_table(config, topology)
    window_BS1 = jax.ShapeDtypeStruct(
        (config.data.global_batch, config.data.seq_len + 1),
        jnp.int32,
        sharding=mesh_lib.sharding(mesh, "batch", None),
    )
    state = step_lib.abstract_state(config, mesh)
    step, forward = step_lib.build_step(config, mesh), step_lib.build_eval(config, mesh)
    move = None
    if config.replan.every:
        model, devices = config.model, config.mesh.expert_devices
        here = Placement.contiguous(model.num_plan_layers, model.num_experts, devices)
        move = migrate.Mover(mesh, state).lower(migrate.route(here, here))
    return step, forward, move, (state, window_BS1, table)


def as_table(report: Report) -> str:
    """For people."""
    lines = [
        f"{report.config} ({report.parameters / 1e9:.2f} G parameters) on {report.topology} "
        f"({report.mesh})",
        *pods.as_lines("training step", report.step, report.topology),
        f"    all-to-alls of rows in a MoE layer, forward: {report.exchanges_forward}",
    ]
    if report.move_hbm_bytes:
        size = report.move_hbm_bytes / pods.GIB
        lines.append(f"    HBM a chip while experts move to a new plan: {size:.2f} GiB")
    return "\n".join(lines)


def main() -> None:
    plain = entry.required("--config", CONFIG.value)
    topology = entry.required("--topology", TOPOLOGY.value)
    config = config_lib.from_config_dict(plain)
    config, note = auto.resolve_unplanned(config, config_lib.check_trainable)
    config_lib.check_trainable(config)
    if note and not JSON.value:
        print(note, flush=True)
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
