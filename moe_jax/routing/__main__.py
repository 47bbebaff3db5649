"""What a routing trace says, and how long it takes to find out.

    python -m moe_jax.routing TRACE.npz [--num-experts=32]

Reads the trace, counts loads, co-activation and transitions, and prints a line for each with its
processor time. Exit codes: 0 done, 1 refused, 2 usage, 3 done, but stdout took no answer.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from moe_jax import errors
from moe_jax.errors import Refused
from moe_jax.routing import affinity
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the statistics of a trace; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_jax.routing",
        description="What a routing trace says.",
        allow_abbrev=False,
    )
    parser.add_argument("trace", metavar="TRACE", help="routing trace (.npz)")
    parser.add_argument("--num-experts", type=int, help="where the trace does not say it")
    options = parser.parse_args(arguments)
    started = time.process_time()
    try:
        trace = trace_lib.load(options.trace, options.num_experts)
    except Refused as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    code = errors.say(
        f"{trace.num_tokens:,} tokens in {trace.num_sequences} sequences, "
        f"{trace.num_layers} layers x {trace.num_experts} experts, top-{trace.top_k}"
    )
    code |= _line("read and checked", f"digest {trace.digest[:16]}", started)
    for name, count, say in STATISTICS:
        begun = time.process_time()
        counts = count(trace)
        code |= _line(name, say(counts), begun)
    code |= _line("all", "", started)
    return code


def _line(name: str, text: str, begun: float) -> int:
    return errors.say(f"{name:32} {time.process_time() - begun:6.2f} s  {text}".rstrip())


def _load(load_LE: np.ndarray) -> str:
    over_L = load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-300)
    over_L = np.where(load_LE.any(axis=1), over_L, 1.0)
    return f"hottest expert over the mean: {over_L.mean():.3f}, worst layer {over_L.max():.3f}"


def _pairs(count_LEE: np.ndarray, entries: int = 1) -> str:
    """How much of a pair's counts knowing one end tells, over what chance would.

    Args:
      count_LEE: [L, one end, the other].
      entries: where each pair is counted.
    """
    if not count_LEE.size or not count_LEE.sum():
        return "none"
    p_LEE = count_LEE / np.maximum(count_LEE.sum(axis=(1, 2), keepdims=True), 1)
    chance_LEE = p_LEE.sum(axis=2, keepdims=True) * p_LEE.sum(axis=1, keepdims=True)
    ratio_LEE = np.where(p_LEE > 0, p_LEE / np.maximum(chance_LEE, 1e-300), 1.0)
    bits = float((p_LEE * np.log2(ratio_LEE)).sum(axis=(1, 2)).mean())
    return (
        f"{count_LEE.sum() // entries:,} counted; {bits:.3f} bits that one end tells of the other"
    )


def _unordered(count_LEE: np.ndarray) -> str:
    """`_pairs` of symmetric counts, which hold each pair both ways round."""
    return _pairs(count_LEE, entries=2)


Count = Callable[[Trace], np.ndarray]
STATISTICS: tuple[tuple[str, Count, Callable[[np.ndarray], str]], ...] = (
    ("load", affinity.load_LE, _load),
    ("co-activation", affinity.coactivation_LEE, _unordered),
    ("transitions, best to best", affinity.transitions_top1_LEE, _pairs),
    ("transitions, best to all", affinity.transitions_best_to_all_LEE, _pairs),
    ("transitions, all to all", affinity.transitions_all_LEE, _pairs),
)

if __name__ == "__main__":
    sys.exit(main())
