"""Command line: python -m moe_jax.placement solve, evaluate, compare, verdict, apply, convert
(also `moe-place`).

Exit codes: 0 done, 1 refused (one line on stderr, nothing written), 2 usage, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

# Before NumPy is imported: the matrices are small, threads would only wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from moe_jax.errors import Refused
from moe_jax.placement import commands
from moe_jax.placement.cost import DISPATCHES
from moe_jax.placement.formats.convert import FORMATS
from moe_jax.placement.problem import OBJECTIVES
from moe_jax.placement.seconds import Work
from moe_jax.placement.verdict import Settings
from moe_jax.placement.windows import SPLITS

DESCRIPTION = """\
Decides which device holds which expert of a Mixture-of-Experts model, from a routing trace.
Needs no accelerator and no JAX."""

EXAMPLES = """\
examples:
  # plan for 8 devices: which experts together so that fewer rows travel and nobody waits
  python -m moe_jax.placement solve trace.npz --devices=8 --out=plan.json
  # two nodes; no device above 1.1 times the mean load
  python -m moe_jax.placement solve trace.npz --devices=16 --nodes=2 --dispatch=hierarchical \\
      --load-cap=1.1 --out=plan.json
  # one spare slot on every device, for copies of experts
  python -m moe_jax.placement solve trace.npz --devices=8 --slots=40 --out=plan.json
  # what would it bring, against what everybody else does?
  python -m moe_jax.placement compare trace.npz --devices=8
  # is that worth moving for? planned on one half, judged on the other, the move counted
  python -m moe_jax.placement verdict trace.npz --devices=8 --before=old_plan.json
  # figures of plans that exist, on any trace of the same model
  python -m moe_jax.placement evaluate other_trace.npz plan.json old_plan.json
  # move the experts of a checkpoint
  python -m moe_jax.placement apply plan.json runs/x/checkpoints/9 runs/y/checkpoints/9
  # hand a plan to another program, or read its trace
  python -m moe_jax.placement convert plan.json sglang.json --format=sglang
  python -m moe_jax.placement convert dump.npz trace.npz
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        print(options.run(options))
    except Refused as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"refused: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing written", file=sys.stderr)
        return 130
    return 0


def apply_command(options: argparse.Namespace) -> str:
    """Hands over to moe_jax.permute, the one command that needs JAX."""
    from moe_jax import permute

    return str(permute.apply_to_checkpoint(options.plan, options.before, options.after))


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = argparse.ArgumentParser(
        prog="python -m moe_jax.placement",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands_ = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    solve = _command(commands_, "solve", "plan on half of the sequences, judge on the other half")
    _trace(solve)
    solve.add_argument("--out", required=True, metavar="PLAN.json", help="where the plan goes")
    _machine(solve)
    _objective(solve)
    solve.set_defaults(run=commands.solve_command)

    evaluate = _command(commands_, "evaluate", "true rows, locality, load, seconds of plans")
    _trace(evaluate)
    evaluate.add_argument("plans", nargs="+", metavar="PLAN", help="plan files")
    _machine(evaluate)
    evaluate.set_defaults(run=commands.evaluate_command)

    compare = _command(commands_, "compare", "baselines, greedy and planner, held-out")
    _trace(compare)
    _machine(compare)
    _objective(compare)
    compare.add_argument("--out-plans", metavar="DIR", help="write every method's plan there")
    compare.set_defaults(run=commands.compare_command)

    verdict = _command(commands_, "verdict", "is a better placement worth it? the move counted")
    _trace(verdict)
    _machine(verdict)
    _objective(verdict)
    _judging(verdict)
    verdict.set_defaults(run=commands.verdict_command)

    apply = _command(commands_, "apply", "move the experts of a checkpoint (needs JAX)")
    apply.add_argument("plan", metavar="PLAN", help="plan file")
    apply.add_argument("before", metavar="CHECKPOINT_IN", help="a step, or a work directory")
    apply.add_argument("after", metavar="CHECKPOINT_OUT", help="what to make")
    apply.set_defaults(run=apply_command)

    convert = _command(commands_, "convert", "plans, traces and counts of other programs")
    convert.add_argument("source", metavar="IN", help="file, or a folder of Megatron-LM traces")
    convert.add_argument("target", metavar="OUT", help=".json .yaml .csv .npy .npz .safetensors")
    convert.add_argument(
        "--format", choices=FORMATS, help="of OUT, where .json has several (default own)"
    )
    convert.add_argument("--devices", type=int, help="of a plan whose file does not say it")
    convert.add_argument("--num-experts", type=int, help="of a layer, likewise")
    convert.add_argument(
        "--layer-ids",
        metavar="3-60",
        help="the model's numbers of the layers: picks rows where IN numbers them, else names them",
    )
    convert.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    convert.set_defaults(run=commands.convert_command)
    return top


def _command(commands_, name: str, text: str) -> argparse.ArgumentParser:
    return commands_.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )


def _trace(command: argparse.ArgumentParser) -> None:
    command.add_argument("trace", metavar="TRACE", help="routing trace (.npz)")
    command.add_argument(
        "--num-experts", type=int, help="experts per layer, for traces that do not say it"
    )
    command.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )


def _machine(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("machine and model sizes")
    group.add_argument("--devices", type=int, help="expert-parallel devices, all nodes together")
    group.add_argument("--nodes", type=int, default=1, help="equal nodes (default 1)")
    group.add_argument("--topology", metavar="NAME", help="configs/topology/NAME.json, or a path")
    sizes = Work()
    for name, text in (
        ("d_model", "values of a row"),
        ("d_ff", "hidden size of an expert"),
        ("value_bytes", "bytes of a value on the wire"),
        ("kv_values", "key and value entries per token and layer, for coherent dispatch"),
        ("batch_tokens", "tokens of a step over all devices"),
    ):
        default = getattr(sizes, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=default,
            help=f"{text} (default {default})",
        )


def _objective(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("what to minimise")
    group.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="seconds",
        help="seconds of a layer (default), rows on the wire, ExFlow's transitions, largest load",
    )
    group.add_argument(
        "--dispatch",
        choices=DISPATCHES,
        default="exchange",
        help="how rows travel: what a placement can save depends on it (default exchange)",
    )
    group.add_argument(
        "--load-cap",
        metavar="C",
        help="largest device load of a layer: 1.1 (over the mean), 1.1x (over what is reachable)",
    )
    group.add_argument(
        "--slots",
        type=int,
        metavar="P",
        help="expert slots of a layer, a multiple of the devices; above the number of experts the "
        "spare ones hold replicas (default: one slot per expert)",
    )
    group.add_argument(
        "--time-limit", type=float, default=60.0, help="seconds; 0 is greedy only (default 60)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the halves and of the search")


def _judging(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("how it is judged")
    group.add_argument(
        "--split",
        choices=SPLITS,
        default="sequence",
        help="planned on and judged on: random halves of the sequences (default), the first and "
        "the second half, or every group of names by a plan from the others",
    )
    group.add_argument("--before", metavar="PLAN.json", help="what is in use (default contiguous)")
    group.add_argument("--out", metavar="PLAN.json", help="write the plan that was judged there")
    settings = Settings()
    group.add_argument(
        "--steps",
        type=int,
        default=settings.steps,
        help=f"within which the move has to pay for itself (default {settings.steps})",
    )
    group.add_argument(
        "--expert-bytes",
        type=int,
        help="that move with one expert of one layer (default: 3 x d_model x d_ff values)",
    )


if __name__ == "__main__":
    sys.exit(main())
