"""How fast the grouped operations are on this machine, next to a dense matmul of the same FLOPs.

    python -m moe_jax.kernels.bench [--shapes=g16,g64,quickstart,decode,decode16]
                                    [--patterns=zipf,...] [--implementation=cpu]
                                    [--seconds=4] [--json]
                                    [--opponents=ragged_dot,megablox,tokamax]

Shapes that nobody trains on are measured with transposed weights, too: as inference keeps them.
`mixtral`, `olmoe`, `qwen3` and `deepseek_v3` (256 experts over 8 devices, the part of one) are
made for accelerators: left out by default, bfloat16 there and float32 on CPU, where a call takes
seconds to minutes.

All contenders of a row run interleaved in one process. Milliseconds are the best of many rounds; a
ratio is dense time / time within one round, the median over rounds: 1.00 is dense speed, more is
faster, and what else the machine does slows both sides of a ratio alike. The ratio of CPU times is
that of the process's time over all its threads: it says nothing of threads that wait for one
another, but hardly moves when the machine is busy; leave it aside where an accelerator computes.
Dense means one matrix (or FFN) over the rows that are really used, whatever the buffer's length.
MB: temporaries and results of the compiled program, in 10^6 bytes, by the compiler's own account.
Roofline: the least time of `roofline.py` / ours, where the device's peaks are known. `--opponents=`
with nothing behind it measures none; those that cannot run a shape here are named, with the reason,
and left out. For TPUs that are not there, see
`python -m moe_jax.kernels.tpu.static` and `.traffic`.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import Refused
from moe_jax.kernels import grouped_matmul as gm
from moe_jax.kernels import roofline
from moe_jax.kernels.opponents import NAMES, Dot, opponent


class Shape(NamedTuple):
    op: str  # matmul or ffn
    num_rows: int  # of the buffer
    used_rows: int
    d_model: int
    d_ff: int
    num_groups: int
    patterns: tuple[str, ...]
    directions: int = 2  # 1: nobody trains on it
    by_default: bool = True


_ALL = ("uniform", "multinomial", "zipf", "half-empty", "one-group")
SHAPES = {
    "g16": Shape("matmul", 4096, 4096, 512, 1024, 16, _ALL),
    "g64": Shape("matmul", 4096, 4096, 512, 1024, 64, _ALL),
    "quickstart": Shape("ffn", 8192, 1500, 128, 256, 4, ("uniform", "multinomial", "zipf")),
    "decode": Shape("ffn", 64, 2, 128, 256, 4, ("half-empty",), directions=1),
    "decode16": Shape("ffn", 64, 32, 512, 1024, 8, ("multinomial",), directions=1),
    "mixtral": Shape("matmul", 8192, 8192, 4096, 14336, 8, _ALL, by_default=False),
    "olmoe": Shape("matmul", 65536, 65536, 2048, 1024, 64, _ALL, by_default=False),
    "qwen3": Shape("matmul", 131072, 131072, 2048, 768, 128, _ALL, by_default=False),
    "deepseek_v3": Shape("matmul", 16384, 16384, 7168, 2048, 32, _ALL, by_default=False),
}


class Call(NamedTuple):
    start: Callable[[], Any]
    megabytes: float


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
    shape: Shape, pattern: str, implementation: str, opponents: dict[str, Dot]
) -> dict[str, dict[str, Call]]:
    """direction -> name -> the compiled call."""
    keys, dtype = iter(jax.random.split(jax.random.key(0), 8)), default_dtype()

    def normal(*dims):
        return jax.random.normal(next(keys), dims, dtype) / dims[-2] ** 0.5

    def with_gradients(f, *args):
        *inputs, dy = args
        y, vjp = jax.vjp(f, *inputs)
        return y, vjp(dy)

    def backward_only(f, *args):
        return with_gradients(f, *args)[1]

    def compiled(f, *args):
        program = jax.jit(f).lower(*args).compile()
        memory = program.memory_analysis()
        used = memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else np.nan
        return Call(functools.partial(program, *args), used / 1e6)

    def pair(f, backward, *args):
        both = [(f, args[:-1]), (functools.partial(backward, f), args)]
        return [compiled(call, *inputs) for call, inputs in both[: shape.directions]]

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
        for name, dot in opponents.items():
            calls[name] = pair(lambda x, w, dot=dot: dot(x, w, sizes), backward, x, w, dy)
    else:
        weights, dy = (normal(g, d, ff), normal(g, d, ff), normal(g, ff, d)), normal(n, d)
        backward, names = with_gradients, ("forward", "forward+backward")
        local = [w[0] for w in weights]
        calls = {"dense": pair(dense_ffn, backward, x[:used], *local, dy[:used])}
        ours = functools.partial(gm.grouped_ffn, group_sizes_G=sizes, implementation=implementation)
        calls[implementation] = pair(ours, backward, x, *weights, dy)
        if shape.directions == 1:
            turned = [w.swapaxes(1, 2) for w in weights]
            transposed = functools.partial(ours, transpose_w=True)
            calls[f"{implementation}, transposed"] = pair(transposed, backward, x, *turned, dy)
        for name, dot in opponents.items():
            ffn = functools.partial(_ffn_of, lambda x, w, dot=dot: dot(x, w, sizes))
            calls[name] = pair(ffn, backward, x, *weights, dy)
    return {
        name: {who: c[i] for who, c in calls.items()}
        for i, name in enumerate(names[: shape.directions])
    }


def default_dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def dense_ffn(x, w_gate, w_up, w_down):
    return jnp.dot(jax.nn.silu(x @ w_gate) * (x @ w_up), w_down)


def _ffn_of(dot, x, w_gate, w_up, w_down):
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
    slow = {name for name, (wall, _) in first.items() if wall > 20 * shortest} - {"dense"}
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


def _able(names: Iterable[str], shape: Shape) -> tuple[dict[str, Dot], dict[str, str]]:
    """Opponents that run here, and why the others do not."""
    able, left_out = {}, {}
    for name in names:
        try:
            able[name] = opponent(name, jax.default_backend(), shape.num_rows)
        except Refused as error:
            left_out[name] = error.rule
    return able, left_out


def _roofline(shape: Shape, pattern: str, direction: str, milliseconds: float) -> float | None:
    """Least time / time; None where the device's peaks are not known."""
    peak = roofline.PEAKS.get(jax.devices()[0].device_kind)
    if peak is None or default_dtype() != "bfloat16":
        return None
    used, groups = shape.used_rows, shape.num_groups
    with_rows = int(np.count_nonzero(group_sizes(pattern, used, groups)))
    sizes = used, shape.d_model, shape.d_ff, with_rows
    return (
        1e3 * roofline.seconds(peak, *roofline.least(shape.op, direction, *sizes, 2)) / milliseconds
    )


def measure(
    cases: list[tuple[str, str]],
    implementation: str,
    seconds: float,
    opponents: Iterable[str] = ("ragged_dot",),
) -> Iterator[dict[str, Any]]:
    """A row of the table for each direction of each (shape, pattern)."""
    begin = time.perf_counter()
    for done, (name, pattern) in enumerate(cases, start=1):
        shape = SHAPES[name]
        able, left_out = _able(opponents, shape)
        for who, why in left_out.items():
            print(f"  {name}: {who} left out: {why}", file=sys.stderr)
        for direction, calls in contenders(shape, pattern, implementation, able).items():
            times = time_rounds({who: call.start for who, call in calls.items()}, seconds)
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
                "megabytes": {who: call.megabytes for who, call in calls.items()},
                "roofline": {
                    who: _roofline(shape, pattern, direction, 1e3 * float(wall))
                    for who, (wall, _) in best.items()
                },
                "left_out": left_out,
            }
        left = (time.perf_counter() - begin) / done * (len(cases) - done)
        print(f"  {done}/{len(cases)} done, about {left:.0f} s left", file=sys.stderr)


def table(rows: list[dict[str, Any]]) -> str:
    """Columns for everybody who ran somewhere; empty where one did not."""
    who = list(dict.fromkeys(name for r in rows for name in r["ratio"]))
    heads = " | ".join(f"{w} ms | ratio | CPU ratio | MB | roofline" for w in who)
    lines = [
        f"| shape | groups | pass | dense ms | MB | {heads} |",
        "|---" * (5 + 5 * len(who)) + "|",
    ]
    for r in rows:
        times, megabytes = r["milliseconds"], r["megabytes"]
        cells = [r["shape"], r["pattern"], r["direction"]]
        cells += [f"{times['dense']:.2f}", f"{megabytes['dense']:.1f}"]
        for w in who:
            if w not in times:
                cells += [""] * 5
                continue
            cells += [f"{times[w]:.2f}", f"{r['ratio'][w]:.2f}", f"{r['cpu_ratio'][w]:.2f}"]
            share = r["roofline"][w]
            cells += [f"{megabytes[w]:.1f}", "" if share is None else f"{share:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def named(option: str, text: str, known: Iterable[str]) -> list[str]:
    """The names of a list with commas; unknown ones are refused."""
    names, known = text.split(","), list(known)
    for name in names:
        if name not in known:
            rule = f"must be among {', '.join(known)}"
            raise Refused(option, name, rule, "Name some of these, with commas")
    return names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_jax.kernels.bench")
    default = ",".join(name for name, shape in SHAPES.items() if shape.by_default)
    parser.add_argument("--shapes", default=default, help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--patterns", default=",".join(_ALL), help="rows per group: of these")
    parser.add_argument("--implementation", default=None, help="default: by platform")
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time of a row")
    parser.add_argument(
        "--opponents", default="ragged_dot", help=f"of {', '.join(NAMES)}, or empty"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        names = named("--shapes", args.shapes, SHAPES)
        patterns = named("--patterns", args.patterns, _ALL)
        cases = [(name, p) for name in names for p in SHAPES[name].patterns if p in patterns]
        if not cases:
            rule = f"none is measured for {args.shapes}"
            raise Refused("--patterns", args.patterns, rule, "Leave it out to see those that are")
        implementation = args.implementation or gm.default_implementation()
        opponents = named("--opponents", args.opponents, NAMES) if args.opponents else []
        rows = list(measure(cases, implementation, args.seconds, opponents))
    except Refused as error:
        print(error, file=sys.stderr)
        return 1
    device, dtype = jax.devices()[0].device_kind, default_dtype()
    if args.json:
        shapes = {name: SHAPES[name]._asdict() for name in names}
        machine = {"device": device, "jax": jax.__version__, "dtype": dtype}
        print(json.dumps({**machine, "shapes": shapes, "rows": rows}))
    else:
        for name in names:
            op, n, used, d, ff, g, *_ = SHAPES[name]
            print(f"{name}: {op}, {used} of {n} rows used, D={d}, F={ff}, G={g}")
        print(f"device {device}, jax {jax.__version__}, {dtype}\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
