"""TRACE and PLAN arguments: all that `convert` reads, told apart by content; counts where they do.

What was inferred about a file of another program is said on stderr, a line a note.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator

from moe_jax.errors import Refused
from moe_jax.placement.formats import convert as convert_lib
from moe_jax.placement.formats.counts import Counts
from moe_jax.placement.formats.hints import Hints
from moe_jax.placement.plan import Plan
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace


def trace(options: argparse.Namespace) -> Trace:
    """The trace of `options.trace`; counts are refused."""
    found = trace_or_counts(options)
    if isinstance(found, Counts):
        raise Refused(
            "trace",
            options.trace,
            f"it holds counts; {options.command} needs to know which experts a token chose "
            "together, and in which order of layers",
            "Record every token (SGLang: --expert-distribution-recorder-mode=per_token), or plan "
            "for balance alone: solve --objective=load",
        )
    return found


def trace_or_counts(options: argparse.Namespace) -> Trace | Counts:
    """What `options.trace` holds, of whatever program; a trace without experts is refused."""
    found = _read(options)
    if isinstance(found, Trace):
        trace_lib.check_routed(found, "the trace")
    return found


def plan(path: str, trace: Trace, devices: int | None) -> Plan:
    """A plan of whatever program, of the trace's layers.

    Args:
      devices: for a file that does not say them; None: nobody did.

    Raises:
      Refused: a file that is no plan, contradicts these or says too little. Whether our own file
        fits the trace is for the caller to check (plan.check_fits).
    """
    hints = Hints(devices, trace.num_experts, tuple(trace.layer_ids))
    with _named("plan"):
        found = convert_lib.read_plan(path, hints)
    _tell(hints)
    return found


def _read(options: argparse.Namespace) -> Trace | Counts:
    hints = Hints(num_experts=options.num_experts)
    with _named("trace"):
        found = convert_lib.read(options.trace, hints, wants_trace=True)
    if isinstance(found.value, Plan):
        raise Refused("trace", options.trace, "is a plan", "Give a trace")
    _tell(hints)
    return found.value


@contextlib.contextmanager
def _named(argument: str) -> Iterator[None]:
    """Calls the file by the name of its argument, which is `in` in `convert`."""
    try:
        yield
    except Refused as refused:
        if refused.field != "in":
            raise
        raise Refused(argument, refused.value, refused.rule, refused.fix) from refused


def _tell(hints: Hints) -> None:
    for note in hints.notes:
        print(f"note: {note}", file=sys.stderr)
