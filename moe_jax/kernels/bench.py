"""How fast the grouped operations are on this machine, next to a dense matmul of the same FLOPs.

    python -m moe_jax.kernels.bench [--shapes=g16,g64,quickstart,decode] [--implementation=cpu]
                                    [--seconds=4] [--no-ragged] [--json]

All contenders of a row run interleaved in one process. Milliseconds are the best of many rounds; a
ratio is dense time / time within one round, the median over rounds: 1.00 is dense speed, more is
faster, and what else the machine does slows both sides of a ratio alike. The ratio of CPU times is
that of the process's time over all its threads: it says nothing of threads that wait for one
another, but hardly moves when the machine is busy; leave it aside where an accelerator computes.
Dense means one matrix (or FFN) over the rows that are really used, whatever the buffer's length.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import Refused
from moe_jax.kernels import grouped_matmul as gm


class Shape(NamedTuple):
    op: str  # matmul or ffn
    num_rows: int  # of the buffer
    used_rows: int
    d_model: int
    d_ff: int
    num_groups: int
    patterns: tuple[str, ...]
    directions: int = 2  # 1: nobody trains on it


_ALL = ("uniform", "multinomial", "zipf", "half-empty", "one-group")
SHAPES = {
    "g16": Shape("matmul", 4096, 4096, 512, 1024, 16, _ALL),
    "g64": Shape("matmul", 4096, 4096, 512, 1024, 64, _ALL),
    "quickstart": Shape("ffn", 8192, 1500, 128, 256, 4, ("uniform", "multinomial", "zipf")),
    "decode": Shape("ffn", 64, 2, 128, 256, 4, ("half-empty",), directions=1),
}


def group_sizes(pattern: str, num_rows: int, num_groups: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if pattern == "uniform":
        share = np.full(num_groups, num_rows // num_groups)
        share[: num_rows % num_groups] += 1
        return share
    weight = np.ones(num_groups)
    if pattern == "zipf":
        weight = 1.0 / np.arange(1, num_groups + 1)
        rng.shuffle(weight)
    elif pattern == "half-empty":
        weight[rng.permutation(num_groups)[: num_groups // 2]] = 0.0
    elif pattern == "one-group":
        weight = np.eye(num_groups)[num_groups // 2]
    return rng.multinomial(num_rows, weight / weight.sum())


def contenders(
    shape: Shape, pattern: str, implementation: str, ragged: bool
) -> dict[str, dict[str, Callable[[], Any]]]:
    """direction -> name -> a call that starts the computation."""
    rng = np.random.default_rng(0)

    def normal(*dims):
        return jnp.asarray(rng.normal(size=dims) / dims[-2] ** 0.5, jnp.float32)

    def with_gradients(f, *args):
        *inputs, dy = args
        y, vjp = jax.vjp(f, *inputs)
        return y, vjp(dy)

    def backward_only(f, *args):
        return with_gradients(f, *args)[1]

    def pair(f, backward, *args):
        *inputs, dy = args
        run_forward, run_backward = jax.jit(f), jax.jit(functools.partial(backward, f))
        return (lambda: run_forward(*inputs)), (lambda: run_backward(*inputs, dy))

    _, n, used, d, ff, g, *_ = shape
    sizes = jnp.asarray(group_sizes(pattern, used, g), jnp.int32)
    x = normal(n, d)
    if shape.op == "matmul":
        w, dy = normal(g, d, ff), normal(n, ff)
        # a linear map: the forward pass is dead code in the second program
        backward, names = backward_only, ("forward", "dx+dw")
        calls = {"dense": pair(jnp.dot, backward, x[:used], w[0], dy[:used])}
        ours = functools.partial(
            gm.grouped_matmul, group_sizes_G=sizes, implementation=implementation
        )
        calls[implementation] = pair(ours, backward, x, w, dy)
        if ragged:
            ragged_dot = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
            calls["ragged_dot"] = pair(ragged_dot, backward, x, w, dy)
    else:
        weights, dy = (normal(g, d, ff), normal(g, d, ff), normal(g, ff, d)), normal(n, d)
        backward, names = with_gradients, ("forward", "forward+backward")
        local = [w[0] for w in weights]
        calls = {"dense": pair(dense_ffn, backward, x[:used], *local, dy[:used])}
        ours = functools.partial(gm.grouped_ffn, group_sizes_G=sizes, implementation=implementation)
        calls[implementation] = pair(ours, backward, x, *weights, dy)
        if ragged:
            ffn = functools.partial(ragged_ffn, sizes)
            calls["ragged_dot"] = pair(ffn, backward, x, *weights, dy)
    return {
        name: {who: c[i] for who, c in calls.items()}
        for i, name in enumerate(names[: shape.directions])
    }


def dense_ffn(x, w_gate, w_up, w_down):
    return jnp.dot(jax.nn.silu(x @ w_gate) * (x @ w_up), w_down)


def ragged_ffn(sizes, x, w_gate, w_up, w_down):
    dot = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
    return dot(jax.nn.silu(dot(x, w_gate)) * dot(x, w_up), w_down)


def time_rounds(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, np.ndarray]:
    """[rounds, 2] of each call: seconds on the wall and of the CPU, for at least three rounds.

    A call 20 times slower than the fastest would eat the time of the others: it runs once more, and
    that time stands for all rounds.
    """
    first = {}
    for name, call in calls.items():
        jax.block_until_ready(call())  # compiles
        first[name] = _time(call)
    shortest, _ = min(first.values())
    slow = {name for name, (wall, _) in first.items() if wall > 20 * shortest}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls if name not in slow}
    end = time.perf_counter() + seconds
    while len(times["dense"]) < 3 or time.perf_counter() < end:
        for name, column in times.items():
            column.append(_time(calls[name]))
    once = {name: [min(first[name], _time(calls[name]))] for name in slow}
    return {name: np.asarray((times | once)[name]) for name in calls}


def _time(call: Callable[[], Any]) -> tuple[float, float]:
    start, start_cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - start, time.process_time() - start_cpu


def measure(names: list[str], implementation: str, seconds: float, ragged: bool):
    total, done, start = sum(len(SHAPES[name].patterns) for name in names), 0, time.perf_counter()
    for name in names:
        shape = SHAPES[name]
        for pattern in shape.patterns:
            for direction, calls in contenders(shape, pattern, implementation, ragged).items():
                times = time_rounds(calls, seconds)
                best = {who: t.min(axis=0) for who, t in times.items()}
                ratio = {
                    who: np.median(times["dense"] / t, axis=0)
                    for who, t in times.items()
                    if who != "dense"
                }
                yield {
                    "shape": name,
                    "pattern": pattern,
                    "direction": direction,
                    "milliseconds": {who: 1e3 * float(wall) for who, (wall, _) in best.items()},
                    "ratio": {who: float(wall) for who, (wall, _) in ratio.items()},
                    "cpu_ratio": {who: float(cpu) for who, (_, cpu) in ratio.items()},
                }
            done += 1
            left = (time.perf_counter() - start) / done * (total - done)
            print(f"  {done}/{total} done, about {left:.0f} s left", file=sys.stderr)


def table(rows: list[dict[str, Any]]) -> str:
    who = list(rows[0]["ratio"])
    lines = [
        "| shape | groups | pass | dense ms | "
        + " | ".join(f"{w} ms | ratio | CPU ratio" for w in who)
        + " |",
        "|---" * (4 + 3 * len(who)) + "|",
    ]
    for r in rows:
        cells = [
            f"{r['milliseconds'][w]:.2f} | {r['ratio'][w]:.2f} | {r['cpu_ratio'][w]:.2f}"
            for w in who
        ]
        dense = f"{r['milliseconds']['dense']:.2f}"
        left = [r["shape"], r["pattern"], r["direction"], dense]
        lines.append(f"| {' | '.join(left + cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_jax.kernels.bench")
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--implementation", default=None, help="default: by platform")
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time of a row")
    parser.add_argument("--no-ragged", action="store_true", help="leave out jax.lax.ragged_dot")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        names = args.shapes.split(",")
        for name in names:
            if name not in SHAPES:
                rule = f"must be among {', '.join(SHAPES)}"
                raise Refused("--shapes", name, rule, "Name some of these, with commas")
        implementation = args.implementation or gm.default_implementation()
        rows = list(measure(names, implementation, args.seconds, not args.no_ragged))
    except Refused as error:
        print(error, file=sys.stderr)
        return 1
    machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    if args.json:
        shapes = {name: SHAPES[name]._asdict() for name in names}
        print(json.dumps({**machine, "shapes": shapes, "rows": rows}))
    else:
        for name in names:
            op, n, used, d, ff, g, *_ = SHAPES[name]
            print(f"{name}: {op}, {used} of {n} rows used, D={d}, F={ff}, G={g}, float32")
        print(f"device {machine['device']}, jax {machine['jax']}\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
