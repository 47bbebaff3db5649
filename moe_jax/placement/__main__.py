"""Command line: python -m moe_jax.placement solve, evaluate, compare, verdict, homes, apply,
convert (also `moe-place`).

Exit codes: 0 done, 1 refused (one line on stderr, nothing written), 2 usage, 130 interrupted
(`solve` has then written the best plan so far, if there was one; stderr says which), 3 done and
written, but stdout took no answer.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from moe_jax.placement import start

if __name__ == "__main__":  # Ctrl-C while NumPy and SciPy are imported
    start.guard()
# Before NumPy is imported: the matrices are small, threads would only wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from moe_jax import errors
from moe_jax.errors import Refused
from moe_jax.placement.commands import (
    apply,
    compare,
    convert,
    evaluate,
    homes,
    interrupt,
    solve,
    verdict,
)
from moe_jax.placement.commands import options as options_lib

COMMANDS = (solve, evaluate, compare, verdict, homes, apply, convert)
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
  # start from the plan in use, move a tenth of the experts at most, keep one where it is
  python -m moe_jax.placement solve trace.npz --devices=8 --previous=old_plan.json \\
      --move-budget=10% --pin='*:0:0' --out=plan.json
  # what would it bring, against what everybody else does? with a page to look at
  python -m moe_jax.placement compare trace.npz --devices=8 --report=page.html
  # is the planner better than every baseline in every dispatch, on these machines?
  python -m moe_jax.placement compare trace.npz --every --machines=flat8,2x4 --time-limit=10
  # is that worth moving for? planned on one half, judged on the other, the move counted
  python -m moe_jax.placement verdict trace.npz --devices=8 --before=old_plan.json
  # which device should hold which sequence? the rules that a server can follow, judged
  python -m moe_jax.placement homes trace.npz --devices=8 --out=homes.json --out-plan=plan.json
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
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        start.ready()
        options = parser().parse_args(arguments)
        options.arguments = list(arguments)
        options_lib.check_seed(options)
        with interrupt.Watch():
            answer = options.run(options)
        return errors.say(answer)
    except Refused as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"refused: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except interrupt.Stopped as stop:
        if stop.answer:
            errors.say(stop.answer)
        print(f"interrupted: {stop.left}", file=sys.stderr)
        return interrupt.EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted: nothing written", file=sys.stderr)
        return interrupt.EXIT_CODE


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = argparse.ArgumentParser(
        prog="python -m moe_jax.placement",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())
