"""Compiles prefill and a decode step for a TPU pod that is not there: does it fit, what moves?

    python -m moe_jax.infer.compile --config=configs/mixtral_8x7b.py --topology=v5e:4x4 \\
        --config.mesh.data=1 --config.mesh.fsdp=1 --config.mesh.expert=8 --config.mesh.tensor=2 \\
        --sequences=16 --prompt=512 --answer=128

The programs of `infer.py` without `--serve`, for a batch of that many sequences. Needs the libtpu
package (Linux, x86-64) and no TPU. A batch that does not fit is refused: exit code 1. Nothing is
run, so nothing here is a speed. For training: `python -m moe_jax.train.compile`.
"""

import dataclasses
import json

from absl import flags

from moe_jax import auto, entry, pods
from moe_jax import config as config_lib
from moe_jax.config import Config
from moe_jax.errors import Refused

FIX = "lower --sequences, --prompt or --answer, raise mesh.fsdp or mesh.tensor, or take more chips"


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of the programs that answer one batch.

    Attributes:
      hbm_limit: bytes of one chip.
      prefill, decode: model, tokens and cache go in.
      exchanges_decode: all-to-alls of rows in the decode step as written: a scanned layer counts
        once.
    """

    config: str
    topology: str
    mesh: str
    dispatch: str
    parameters: int
    hbm_limit: int
    prefill: pods.Compiled
    decode: pods.Compiled
    exchanges_decode: int


def compile_programs(
    config: Config, topology: str, sequences: int, prompt: int, answer: int
) -> Report:
    """Compiles, in a process that has not imported JAX; raises `Refused` if memory is too small.

    Args:
      sequences: of the batch, a multiple of the devices that share it.
      prompt, answer: tokens of each.
    """
    pods.check_topology(config, topology)
    check_sizes(config, sequences, prompt, answer)
    with pods.compiler(topology, FIX) as compiled:
        import jax
        import jax.numpy as jnp

        from moe_jax import mesh as mesh_lib
        from moe_jax.infer import engine, prepared
        from moe_jax.model import transformer

        mesh, table = pods.mesh_and_table(config, topology)
        programs = engine.Programs(config, mesh)
        model = prepared.abstract(config.model, mesh)
        cache = programs.abstract_cache(sequences, prompt + answer)

        def of_batch(*shape: int) -> jax.ShapeDtypeStruct:
            placed = mesh_lib.sharding(mesh, "batch", *[None] * (len(shape) - 1))
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed)

        tokens, number = of_batch(sequences, prompt), of_batch(sequences)
        prefill = programs.prefill.lower(model, table, tokens, number, cache, all_logits=False)
        decode = programs.decode.lower(model, table, number, number, cache)
        return Report(
            config=config.name,
            topology=topology,
            mesh=str(config.mesh),
            dispatch=config.model.dispatch,
            parameters=transformer.num_parameters(config.model),
            hbm_limit=pods.hbm_limit(topology),
            prefill=compiled(prefill),
            decode=compiled(decode),
            exchanges_decode=pods.exchanges(decode),
        )


def check_sizes(config: Config, sequences: int, prompt: int, answer: int) -> None:
    """Refuses a batch that the mesh cannot share, and texts that the model cannot hold."""
    for flag, value in (("--sequences", sequences), ("--prompt", prompt), ("--answer", answer)):
        if value < 1:
            raise Refused(flag, value, "must be at least 1", "give a positive number")
    mesh = config.mesh
    devices = mesh.num_devices // mesh.tensor
    if sequences % devices:
        nearest = -(-sequences // devices) * devices
        rule = f"must be a multiple of the {devices} devices that share the batch ({mesh})"
        raise Refused("--sequences", sequences, rule, f"use {nearest}")
    longest = config.model.max_seq_len
    if prompt + answer > longest:
        raise Refused(
            "--prompt",
            prompt,
            f"with --answer = {answer} must be at most model.max_seq_len = {longest}",
            f"use {max(longest - answer, 1)}, or raise model.max_seq_len",
        )


def as_table(report: Report) -> str:
    """For people."""
    lines = [
        f"{report.config} ({report.parameters / 1e9:.2f} G parameters) on {report.topology} "
        f"({report.mesh}), dispatch {report.dispatch}",
        *pods.as_lines("prefill", report.prefill, report.topology),
        *pods.as_lines("a decode step", report.decode, report.topology),
        f"    all-to-alls of rows in a MoE layer: {report.exchanges_decode}",
    ]
    return "\n".join(lines)


def main() -> None:
    plain = entry.required("--config", CONFIG.value)
    topology = entry.required("--topology", TOPOLOGY.value)
    config, note = auto.resolve_unplanned(config_lib.from_config_dict(plain))
    if note and not JSON.value:
        print(note, flush=True)
    sizes = SEQUENCES.value, PROMPT.value, ANSWER.value
    report = compile_programs(config, topology, *sizes)
    print(json.dumps(dataclasses.asdict(report)) if JSON.value else as_table(report), flush=True)


if __name__ == "__main__":
    # here, so that a program that imports this module may have flags of its own
    CONFIG = entry.define_config("As for train.py.")
    TOPOLOGY = flags.DEFINE_string(
        "topology", None, "A TPU generation and the shape of the pod, as v5e:4x4 or v5p:4x4x4."
    )
    SEQUENCES = flags.DEFINE_integer("sequences", 64, "Sequences of the batch.")
    PROMPT = flags.DEFINE_integer("prompt", 512, "Tokens of each prompt, padded.")
    ANSWER = flags.DEFINE_integer("answer", 128, "Tokens of each answer.")
    JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of the table.")
    entry.run(main, __doc__)
