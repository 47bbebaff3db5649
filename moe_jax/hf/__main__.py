"""python -m moe_jax.hf counts | check | export | from-gguf | make: published models, not run.

    counts CONFIG...            parameters of configs/*.py, beside the published figures
    check DIR                   is every tensor of a published model where it should be?
    export WORKDIR OUT --like=DIR   a run's newest step as a published model's folder
    from-gguf FILE OUT          a Llama in a GGUF file as a published model's folder
    make SHAPE OUT              a folder of random weights in a published shape, 50 M parameters

Exit codes: 0 done, 1 refused, 2 usage, 3 done but not printed, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Callable

from moe_jax import errors

# (total, active) as published, in G: Mixtral 8x7B: arXiv 2401.04088 and its announcement; OLMoE:
# arXiv 2409.02060, table 1; Qwen3: arXiv 2505.09388 and its model card; Qwen1.5-MoE: its card.
# DeepSeek-V2: arXiv 2405.04434; V3: arXiv 2412.19437. gpt-oss: arXiv 2508.10925, table 1.
PUBLISHED = {
    "mixtral_8x7b": (46.7, 12.9),
    "olmoe_1b_7b": (6.9, 1.3),
    "qwen3_30b_a3b": (30.5, 3.3),
    "qwen1_5_moe_a2_7b": (14.3, 2.7),
    "deepseek_v2_lite": (15.7, 2.4),
    "deepseek_v2": (236.0, 21.0),
    "deepseek_v3": (671.0, 37.0),
    "gpt_oss_20b": (20.91, 3.61),
    "gpt_oss_120b": (116.83, 5.13),
    "granite_3_0_3b_a800m": (3.3, 0.8),
    "phi_3_5_moe": (41.9, 6.6),
}
# Of which the active ones are published without the embedding, of which a token meets one row.
WITHOUT_EMBEDDING = (
    *("gpt_oss_20b", "gpt_oss_120b", "granite_3_0_3b_a800m"),
    *("deepseek_v2_lite", "deepseek_v2", "deepseek_v3"),
)


def counts(paths: list[str]) -> str:
    """A line for each config. Raises `Refused` for a file that is none."""
    from moe_jax import config as config_lib
    from moe_jax import entry
    from moe_jax.model import transformer

    lines = [f"{'config':20} {'total':>16} {'active':>15}   published, G"]
    for path in paths:
        config = config_lib.from_config_dict(entry.read_config(path))
        total = transformer.num_parameters(config.model)
        active = transformer.num_active_parameters(config.model)
        known = PUBLISHED.get(config.name)
        said = "-"
        if known:
            compared, way = active, "active"
            if config.name in WITHOUT_EMBEDDING:
                compared -= config.model.vocab_size * config.model.d_model
                way = f"active of {compared:,} without the embedding"
            off = [
                100 * (ours / 1e9 / theirs - 1)
                for ours, theirs in zip((total, compared), known, strict=True)
            ]
            said = f"{known[0]} ({off[0]:+.2f} %), {known[1]} {way} ({off[1]:+.2f} %)"
        lines.append(f"{config.name:20} {total:16,} {active:15,}   {said}")
    return "\n".join(lines)


def check(folder: str) -> str:
    """Reads headers only. Raises `Refused` for a tensor that is missing, left over or wrong."""
    from moe_jax.hf import config_json, layout
    from moe_jax.hf import folder as folder_lib

    published = config_json.read(folder)
    tensors = folder_lib.tensors(folder)
    found = layout.find(published.family, published.config.model, tensors)
    dtypes = sorted({tensors.dtype(name) for name in found.shapes})
    beside = f"; {len(found.beside):,} more of a part that is not run" if found.beside else ""
    return (
        f"{folder}: {published.family.model_type}, {len(found.shapes):,} tensors ({found.name}), "
        f"{tensors.num_bytes:,} bytes of {', '.join(dtypes)}: all there, none left over{beside}"
    )


def export(workdir: str, out: str, like: str) -> str:
    """Writes a folder like another: its names, its dtypes, its config.json and tokenizer.

    The whole step is read, optimizer state and all: three times the parameters on the host.

    Raises:
      Refused: no run, no good step, a folder of other sizes, or OUT that is there already.
    """
    from moe_jax.hf import config_json, layout, run, save
    from moe_jax.hf import folder as folder_lib

    folder_lib.check_new(out)
    config = run.config(workdir)
    published = config_json.read(like)
    run.check_same(config, published.config, "--like", like)
    step, arrays = run.arrays(workdir)
    tensors = folder_lib.tensors(like)
    written = save.export(
        arrays,
        layout.find(published.family, published.config.model, tensors),
        step.plan.placement,
        out,
        dtypes={name: tensors.dtype(name) for name in tensors.file_of},
        like=like,
    )
    return f"{out}: step {step.step}, {len(written)} file(s) of tensors"


def from_gguf(file: str, out: str) -> str:
    """Converts a Llama. Raises `Refused`: see `gguf_llama.convert`."""
    from moe_jax.hf import gguf_llama

    gguf_llama.convert(file, out)
    return f"{out}: try python infer.py --hf={out} --prompt=..."


def make(shape: str, out: str, seed: int) -> str:
    """Writes a folder of random weights. Raises `Refused`: see `synthetic.make`."""
    from moe_jax.hf import synthetic

    return f"{out}: {shape}, {synthetic.make(shape, out, seed):,} parameters, random"


_COMMANDS: dict[str, Callable[..., str]] = {
    "counts": counts,
    "check": check,
    "export": export,
    "from-gguf": from_gguf,
    "make": make,
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="moe_jax.hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    counts_parser = commands.add_parser("counts", help="parameters, total and active")
    counts_parser.add_argument("paths", nargs="+", metavar="config")
    check_parser = commands.add_parser("check", help="every tensor accounted for")
    check_parser.add_argument("folder")
    export_parser = commands.add_parser("export", help="a run as a published model's folder")
    export_parser.add_argument("workdir")
    export_parser.add_argument("out")
    export_parser.add_argument("--like", required=True, help="folder of that family and size")
    gguf_parser = commands.add_parser("from-gguf", help="a GGUF file as a folder")
    gguf_parser.add_argument("file")
    gguf_parser.add_argument("out")
    make_parser = commands.add_parser("make", help="random weights in a published shape")
    make_parser.add_argument("shape", help="mixtral, olmoe or deepseek_v3")
    make_parser.add_argument("out")
    make_parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args(argv))
    run = _COMMANDS[given.pop("command")]
    return errors.exit_code(lambda: run(**given))


if __name__ == "__main__":
    sys.exit(main())
