"""`apply`: moves the experts of a checkpoint; the one command that needs JAX."""

import argparse

from moe_jax.errors import Refused
from moe_jax.placement.commands import options as options_lib


def add(commands) -> None:
    """The sub-command and its options."""
    command = options_lib.command(commands, "apply", "move the experts of a checkpoint (needs JAX)")
    command.add_argument("plan", metavar="PLAN", help="plan file")
    command.add_argument("before", metavar="CHECKPOINT_IN", help="a step, or a work directory")
    command.add_argument("after", metavar="CHECKPOINT_OUT", help="what to make")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> str:
    """Hands over to moe_jax.permute, the one command that needs JAX."""
    try:
        from moe_jax import permute
    except ModuleNotFoundError as error:
        rule = f"moves arrays, for which {error.name} is not installed"
        fix = "install moe_jax with its dependencies; planning needs none of them"
        raise Refused("apply", error.name, rule, fix) from None

    return str(permute.apply_to_checkpoint(options.plan, options.before, options.after))
