"""How fast the grouped operations are on this machine, next to a dense matmul of the same FLOPs.

    python -m moe_jax.kernels.bench [--shapes=g16,g64,quickstart,decode,decode16]
                                    [--patterns=zipf,...] [--implementation=cpu]
                                    [--seconds=4] [--json]
                                    [--opponents=ragged_dot,batched,megablox,tokamax]
                                    [--passes=forward,dx,dw]

Shapes that nobody trains on are measured with transposed weights, too: as inference keeps them.
`mixtral`, `olmoe`, `qwen3` and `deepseek_v3` (256 experts over 8 devices, the part of one), whole
layers (`mixtral_layer`, `qwen3_layer`) and so many tokens to decode at once (`mixtral_16`) are made
for accelerators: left out by default, bfloat16 there and float32 on CPU, where a call takes seconds
to minutes.

All contenders of a row run interleaved in one process. Milliseconds are the best of many rounds; a
ratio is dense time / time within one round, the median over rounds: 1.00 is dense speed, more is
faster, and what else the machine does slows both sides of a ratio alike. The ratio of CPU times is
that of the process's time over all its threads: it says nothing of threads that wait for one
another, but hardly moves when the machine is busy. On an accelerator, where it says nothing, there
is the speed as a share of a dense product of two 8192 x 8192 matrices in the same rounds instead.
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
PASSES = ("forward", "dx+dw", "dx", "dw", "forward+backward")
_SOME = ("uniform", "multinomial", "zipf")
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
    "mixtral_layer": Shape("ffn", 8192, 8192, 4096, 14336, 8, _SOME, by_default=False),
    "qwen3_layer": Shape("ffn", 131072, 131072, 2048, 768, 128, _SOME, by_default=False),
    **{
        f"{name}_{tokens}": Shape("ffn", rows, rows, *dims, ("multinomial",), 1, by_default=False)
        for tokens in (16, 64, 512)
        for name, rows, dims in (
            ("mixtral", 2 * tokens, (4096, 14336, 8)),
            ("qwen3", 8 * tokens, (2048, 768, 128)),
        )
    },
}
_SQUARE = 8192
_AT_ONCE = 0.02  # seconds


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
    shape: Shape,
    implementation: str,
    opponents: dict[str, Dot],
    passes: Iterable[str] = PASSES,
) -> tuple[dict[str, dict[str, Call]], Callable[[str], None]]:
    """direction -> name -> the compiled call, and what sets the pattern of the calls to come."""
    keys, dtype = iter(jax.random.split(jax.random.key(0), 8)), default_dtype()
    _, n, used, d, ff, g, *_ = shape
    sizes = [jnp.zeros(g, jnp.int32)]  # of the pattern at hand

    def normal(*dims):
        return jax.random.normal(next(keys), dims, dtype) / dims[-2] ** 0.5

    def compiled(f, *args):
        program = jax.jit(f).lower(sizes[0], *args).compile()
        memory = program.memory_analysis()
        used = memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else np.nan
        return Call(lambda: program(sizes[0], *args), used / 1e6)

    def each_way(f, ways, *args):
        """f(sizes, x, weights)"""
        x, weights, dy = args
        programs = {
            "forward": lambda s, x, w, dy: f(s, x, w),
            "forward+backward": lambda s, x, w, dy: _with_gradients(f, s, x, w, dy),
            # a linear map: the forward pass is dead code in these
            "dx+dw": lambda s, x, w, dy: _with_gradients(f, s, x, w, dy)[1],
            "dx": lambda s, x, w, dy: _with_gradients(f, s, x, w, dy)[1][0],
            "dw": lambda s, x, w, dy: _with_gradients(f, s, x, w, dy)[1][1],
        }
        return {way: compiled(programs[way], x, weights, dy) for way in ways}

    x = normal(n, d)
    ours = functools.partial(_ours, shape.op, implementation=implementation)
    if shape.op == "matmul":
        weights, dy = [normal(g, d, ff)], normal(n, ff)
        ways = ["forward", "dx+dw", *(["dx", "dw"] if on_accelerator() else [])]
        dense = lambda s, x, w: jnp.dot(x, *w)  # noqa: E731
    else:
        weights, dy = [normal(g, d, ff), normal(g, d, ff), normal(g, ff, d)], normal(n, d)
        ways = ["forward", "forward+backward"][: shape.directions]
        dense = lambda s, x, w: dense_ffn(x, *w)  # noqa: E731
    ways = [way for way in ways if way in passes]
    calls = {"dense": each_way(dense, ways, x[:used], [w[0] for w in weights], dy[:used])}
    calls[implementation] = each_way(ours, ways, x, weights, dy)
    if shape.op == "ffn" and shape.directions == 1:
        turned = [w.swapaxes(1, 2) for w in weights]
        transposed = functools.partial(ours, transpose_w=True)
        calls[f"{implementation}, transposed"] = each_way(transposed, ways, x, turned, dy)
    elif shape.op == "ffn" and on_accelerator() and implementation in gm.STORING:
        stored = functools.partial(ours, pre_activations="store")
        calls[f"{implementation}, stored"] = each_way(stored, ways, x, weights, dy)
    for name, dot in opponents.items():
        of_op = _one_dot if shape.op == "matmul" else _ffn_of
        calls[name] = each_way(functools.partial(of_op, dot), ways, x, weights, dy)

    def set_pattern(pattern: str) -> None:
        sizes[0] = jnp.asarray(group_sizes(pattern, used, g), jnp.int32)

    return {way: {who: c[way] for who, c in calls.items()} for way in ways}, set_pattern


def _with_gradients(f, sizes_G, x_ND, weights, dy):
    y, vjp = jax.vjp(functools.partial(f, sizes_G), x_ND, weights)
    return y, vjp(dy)


def _ours(op, sizes_G, x_ND, weights, **how):
    grouped = gm.grouped_matmul if op == "matmul" else gm.grouped_ffn
    return grouped(x_ND, *weights, group_sizes_G=sizes_G, **how)


def on_accelerator() -> bool:
    return jax.default_backend() != "cpu"


def default_dtype() -> str:
    return "bfloat16" if on_accelerator() else "float32"


def dense_ffn(x, w_gate, w_up, w_down):
    return jnp.dot(jax.nn.silu(x @ w_gate) * (x @ w_up), w_down)


def _one_dot(dot, sizes_G, x_ND, weights):
    return dot(x_ND, *weights, sizes_G)


def _ffn_of(dot, sizes_G, x_ND, weights):
    gate, up, down = (functools.partial(lambda w, x: dot(x, w, sizes_G), w) for w in weights)
    return down(jax.nn.silu(gate(x_ND)) * up(x_ND))


def square() -> Call:
    """A dense product of two 8192 x 8192 matrices, the speed that an accelerator can reach."""
    a, b = (
        jax.random.normal(key, (_SQUARE, _SQUARE), default_dtype())
        for key in jax.random.split(jax.random.key(1))
    )
    return Call(functools.partial(jax.jit(jnp.dot), a, b), np.nan)


def time_rounds(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, np.ndarray]:
    """[rounds, 2] of each call: seconds on the wall and of the CPU, for at least three rounds.

    A call 20 times slower than the fastest would eat the time of the others: it runs once more, and
    that time stands for all rounds. An accelerator is given so many calls at once that it does not
    wait for this process: `_AT_ONCE` seconds of them.
    """
    first = {}
    for name, call in calls.items():
        jax.block_until_ready(call())  # compiles
        first[name] = _time(call)
    shortest, _ = min(first.values())
    slow = {name for name, (wall, _) in first.items() if wall > 20 * shortest} - {"dense"}
    many = {
        name: min(max(1, int(_AT_ONCE / wall)), 50) if on_accelerator() else 1
        for name, (wall, _) in first.items()
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls if name not in slow}
    end = time.perf_counter() + seconds
    while len(times["dense"]) < 3 or time.perf_counter() < end:
        for name, column in times.items():
            column.append(_time(calls[name], many[name]))
    once = {name: [min(first[name], _time(calls[name]))] for name in slow}
    return {name: np.asarray((times | once)[name]) for name in calls}


def _time(call: Callable[[], Any], count: int = 1) -> tuple[float, float]:
    """Of a call, where so many follow one another."""
    start, start_cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        found = call()
    jax.block_until_ready(found)
    return (time.perf_counter() - start) / count, (time.process_time() - start_cpu) / count


def _able(
    names: Iterable[str], shape: Shape, patterns: set[str]
) -> tuple[dict[str, Dot], dict[str, str]]:
    """Opponents that run here, and why the others do not."""
    full = shape.used_rows == shape.num_rows and shape.num_rows % shape.num_groups == 0
    equal_groups = full and patterns == {"uniform"}
    able, left_out = {}, {}
    for name in names:
        try:
            able[name] = opponent(name, jax.default_backend(), shape.num_rows, equal_groups)
        except Refused as error:
            left_out[name] = error.rule
    return able, left_out


def _flops(shape: Shape, direction: str) -> float:
    sizes = shape.used_rows, shape.d_model, shape.d_ff, shape.num_groups
    return roofline.least(shape.op, direction, *sizes, 2)[0]


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
    passes: Iterable[str] = PASSES,
) -> Iterator[dict[str, Any]]:
    """A row of the table for each direction of each (shape, pattern)."""
    begin = time.perf_counter()
    largest = {"square": square()} if on_accelerator() else {}
    built: tuple[str, Any] = "", None
    for done, (name, pattern) in enumerate(cases, start=1):
        shape = SHAPES[name]
        able, left_out = _able(opponents, shape, {p for other, p in cases if other == name})
        if built[0] != name:
            for who, why in left_out.items():
                print(f"  {name}: {who} left out: {why}", file=sys.stderr)
            built = "", None  # lets go of the arrays of the last shape
            built = name, contenders(shape, implementation, able, passes)
        ways, set_pattern = built[1]
        set_pattern(pattern)
        for direction, calls in ways.items():
            contending = {who: call.start for who, call in (calls | largest).items()}
            times = time_rounds(contending, seconds)
            best = {who: t.min(axis=0) for who, t in times.items()}
            of_square = times.pop("square", None)
            ratio = {
                who: np.median(times["dense"] / t, axis=0)
                for who, t in times.items()
                if who != "dense"
            }
            row = {
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
                    if who in ratio
                },
                "left_out": left_out,
            }
            if of_square is not None:
                flops = _flops(shape, direction) / (2.0 * _SQUARE**3)
                row["of_square"] = {
                    who: flops * float(np.median(of_square[:, 0] / t[:, 0]))
                    for who, t in times.items()
                }
                del row["milliseconds"]["square"]
                row["square_tflops"] = 2.0 * _SQUARE**3 / float(best["square"][0]) / 1e12
            said = ", ".join(f"{who} {x:.2f}" for who, x in row["ratio"].items())
            print(f"  {name} {pattern} {direction}, of dense: {said}", file=sys.stderr)
            yield row
        left = (time.perf_counter() - begin) / done * (len(cases) - done)
        print(f"  {done}/{len(cases)} done, about {left:.0f} s left", file=sys.stderr)


def table(rows: list[dict[str, Any]]) -> str:
    """Columns for everybody who ran somewhere; empty where one did not."""
    who = list(dict.fromkeys(name for r in rows for name in r["ratio"]))
    accelerator = "of_square" in rows[0]
    second = f"of {_SQUARE}^3" if accelerator else "CPU ratio"
    heads = " | ".join(f"{w} ms | ratio | {second} | MB | roofline" for w in who)
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
            other = r["of_square" if accelerator else "cpu_ratio"][w]
            cells += [f"{times[w]:.2f}", f"{r['ratio'][w]:.2f}", f"{other:.2f}"]
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
    parser.add_argument("--passes", default=",".join(PASSES), help="those that a shape has")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        names = named("--shapes", args.shapes, SHAPES)
        patterns = named("--patterns", args.patterns, _ALL)
        cases = [(name, p) for name in names for p in SHAPES[name].patterns if p in patterns]
        if not cases:
            rule = f"none is measured for {args.shapes}"
            raise Refused("--patterns", args.patterns, rule, "Leave it out to see those that are")
        passes = named("--passes", args.passes, PASSES)
        if not 0 <= args.seconds < float("inf"):
            raise Refused("--seconds", args.seconds, "seconds, at least 0", "Use 4")
        implementation = args.implementation or gm.default_implementation()
        gm.check_platform(implementation, jax.default_backend(), "--implementation")
        opponents = named("--opponents", args.opponents, NAMES) if args.opponents else []
        rows = list(measure(cases, implementation, args.seconds, opponents, passes))
        if not rows:
            rule = f"{args.shapes} have none of these"
            raise Refused("--passes", args.passes, rule, "Leave it out to see those that they have")
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
        print(f"device {device}, jax {jax.__version__}, {dtype}")
        if "square_tflops" in rows[0]:
            speeds = [row["square_tflops"] for row in rows]
            print(f"dense {_SQUARE}^3: {min(speeds):.0f} to {max(speeds):.0f} TFLOP/s")
        print(f"\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
