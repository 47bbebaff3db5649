"""What the compiler's schedule predicts for the TPU kernels, without a TPU; chooses their tiles.

    python -m moe_jax.kernels.tpu.static [--chips=v5e,v5p,v6e] [--shapes=mixtral,...] [--json]
                                         [--choose]

prints a row for each shape, chip and kernel: the tile, bundles of a whole tile's products, HBM
bytes, and the share of the chip's bfloat16 peak. **Predicted**: the longest of the bundles at one a
cycle, the multipliers' own time and the bytes at full bandwidth; nothing was run. `--choose` first
compiles the rule's tiles, the table's and a longer unrolling, and writes to table.py what is faster
than the rule.

Kernels: y, dx, dw of `grouped_matmul`; of `grouped_ffn` gate_up (fused SwiGLU), down,
dh_gate_up (backward with gate and up recomputed), dx2 and dw2 of gate and up, dw of down.
"""

import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.kernels import bench
from moe_jax.kernels import grouped_matmul as gm
from moe_jax.kernels.tpu import ahead, bundles, chips, table, tiles
from moe_jax.kernels.tpu.table import TABLE

PATTERNS = ("uniform", "multinomial", "zipf")
# What is tried beside the rule to fill the table.
OTHERS = [tiles.Rule(products=2**29)]
_KERNELS = "pallas_tpu"
COLUMNS = ("dw", "dw2", "dbias")  # kernels that sum over rows


class Prediction(NamedTuple):
    """Attributes:
    seconds: by pattern of group sizes.
    share: of the chip's peak, by pattern.
    bound: what takes longest for uniform groups: bundles, multipliers or bytes.
    """

    plan: tiles.Plan
    bundles: bundles.Bundles
    seconds: dict[str, float]
    share: dict[str, float]
    bound: str


def visits(sizes_G: np.ndarray, tile_rows: int) -> tuple[int, int, int]:
    """(tiles inside a group, work items at an edge, parts of these that a group touches)."""
    part = min(tiles.PART_ROWS, tile_rows)
    ends = np.cumsum(sizes_G)
    whole = edges = parts = 0
    for start, end in zip((ends - sizes_G).tolist(), ends.tolist(), strict=True):
        for tile in range(start // tile_rows, -(-end // tile_rows) if end > start else 0):
            first, last = max(start, tile * tile_rows), min(end, (tile + 1) * tile_rows)
            if last - first == tile_rows:
                whole += 1
            else:
                edges += 1
                parts += (last - 1) // part - first // part + 1
    return whole, edges, parts


def predict(plan: tiles.Plan, found: bundles.Bundles, chip: chips.Chip, used: int) -> Prediction:
    """`used`: rows that belong to a group, the rest of the buffer being empty."""
    seconds, share, bound = {}, {}, ""
    for pattern in PATTERNS:
        sizes_G = bench.group_sizes(pattern, used, plan.num_groups)
        moved = plan.bytes if pattern == "uniform" else plan.most_bytes
        times = _times(plan, found, chip, sizes_G) | {"bytes": moved / chip.bandwidth}
        seconds[pattern] = max(times.values())
        flops = 2.0 * used * plan.num_sum * plan.num_out * plan.num_products
        share[pattern] = flops / (seconds[pattern] * chip.flops)
        bound = bound or max(times, key=lambda name: times[name])
    return Prediction(plan, found, seconds, share, bound)


def _times(
    plan: tiles.Plan, found: bundles.Bundles, chip: chips.Chip, sizes_G: np.ndarray
) -> dict[str, float]:
    rows, tile_sum, tile_out, chunk = plan.tile
    whole, edges, parts = visits(sizes_G, rows)
    columns = plan.kind in COLUMNS
    outer = -(-plan.num_out // tile_out)
    steps = -(-plan.num_sum // tile_sum)
    num_chunks = (tile_sum if columns else tile_out) // chunk
    part_rows = min(tiles.PART_ROWS, rows)
    side, other = (tile_sum, tile_out) if columns else (tile_out, tile_sum)
    part_chunks = side // tiles.chunk(side, part_rows * other)
    cycles = (whole + edges) * found.step
    cycles += whole * num_chunks * found.whole + parts * part_chunks * found.part
    if columns:
        cycles += int(np.count_nonzero(sizes_G)) * found.group
    # the cores of a chip share the outermost axis of the grid
    turns = -(-(steps if columns else outer) // chip.cores) * (outer if columns else steps)
    computed = (whole * rows + parts * part_rows) * outer * tile_out * steps * tile_sum
    return {
        "bundles": float(cycles * turns / chip.clock),
        "multipliers": 2.0 * computed * plan.num_products / chip.flops,
    }


def kernels(
    folder: pathlib.Path, chip: str, shape: bench.Shape, rule: tiles.Rule
) -> Iterator[Prediction]:
    """Compiles the operations for a chip, with the table's tiles where it has some."""
    a = ahead.arrays(chip, shape)
    weights = [a.w_GDF, a.w_GDF, a.w_GFD]
    programs: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (_matmul, (a.x_ND, a.w_GDF, a.sizes_G, a.y_NF)),
        (_ffn, (a.x_ND, weights, a.weight_N, a.sizes_G, a.x_ND)),
    ]
    for program, args in programs:
        with tiles.traced(rule) as plans:
            ahead.compiled(chip, program, *args)
        found = bundles.read(folder)
        for plan in {p.kind: p for p in plans}.values():
            yield predict(plan, found[plan.kind], chips.CHIPS[chip], shape.used_rows)


def _matmul(x, w, sizes, dy):
    y, vjp = jax.vjp(lambda x, w: gm.grouped_matmul(x, w, sizes, implementation=_KERNELS), x, w)
    return y, vjp(dy)


def _ffn(x, weights, row_weight, sizes, dy):
    def f(x, weights, row_weight):
        named = {"row_weight_N": row_weight, "implementation": _KERNELS}
        return gm.grouped_ffn(x, *weights, sizes, **named)

    y, vjp = jax.vjp(f, x, weights, row_weight)
    return y, vjp(dy)


# --- the table -------------------------------------------------------------------------------


def row(shape: str, chip: str, found: Prediction) -> dict[str, Any]:
    plan = found.plan
    return {
        "shape": shape,
        "chip": chip,
        "kernel": plan.kind,
        "sum": plan.num_sum,
        "out": plan.num_out,
        "tile": list(plan.tile),
        "bundles": found.bundles._asdict(),
        "gigabytes": plan.bytes / 1e9,
        "milliseconds": 1e3 * found.seconds["uniform"],
        "bound": found.bound,
        "share": found.share,
        "measured": False,
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| shape | chip | kernel | sum x out | tile (rows, sum, out, chunk) | bundles a chunk |"
        " GB | ms | bound by | share of peak: uniform | multinomial | zipf | measured |",
        "|---" * 13 + "|",
    ]
    for r in rows:
        cells = [r["shape"], r["chip"], r["kernel"], f"{r['sum']} x {r['out']}"]
        cells += [" ".join(map(str, r["tile"])), str(r["bundles"]["whole"])]
        cells += [f"{r['gigabytes']:.2f}", f"{r['milliseconds']:.2f}", r["bound"]]
        cells += [f"{r['share'][p]:.2f}" for p in PATTERNS]
        lines.append(f"| {' | '.join(cells)} | no, predicted |")
    return "\n".join(lines)


def choose(folder: pathlib.Path, names: list[str], of_chips: list[str]) -> None:
    """Keeps a tile in the table where it is faster than the rule's by more than a hundredth, the
    patterns added up: one that stands there, or one of `OTHERS`.

    The table is written after every shape.
    """
    held = dict(TABLE)
    for chip in of_chips:
        for name in names:
            tried: dict[tuple[str, str, str, int, int], list[Prediction]] = {}
            for known, rule in [
                ({}, tiles.Rule()),
                (held, tiles.Rule()),
                *(({}, r) for r in OTHERS),
            ]:
                TABLE.clear()
                TABLE.update(known)
                for found in kernels(folder, chip, bench.SHAPES[name], rule):
                    plan = found.plan
                    key = chip, plan.kind, "bfloat16", plan.num_sum, plan.num_out
                    tried.setdefault(key, []).append(found)
            for key, (by_rule, *others) in tried.items():
                held.pop(key, None)
                fastest = min(others, key=_all_patterns)
                if _all_patterns(fastest) < 0.99 * _all_patterns(by_rule):
                    rows, part, out, width = fastest.plan.tile
                    held[key] = rows, part, out, width
            print(f"  {chip} {name}: {len(tried)} kernels", file=sys.stderr, flush=True)
            lines = "".join(f"    {key!r}: {tile!r},\n" for key, tile in sorted(held.items()))
            pathlib.Path(table.__file__).write_text(_HEAD + lines.replace("'", '"') + "}\n")
    TABLE.clear()
    TABLE.update(held)


def _all_patterns(prediction: Prediction) -> float:
    return sum(prediction.seconds.values())


_HEAD = '''"""Tiles (rows, sum, out, chunk) by chip, operation, dtype and widths; none is measured.

Only those whose compiled schedules beat the rule in tiles.py; what is not here is cut by the rule.
`python -m moe_jax.kernels.tpu.static --choose` writes this file; see ../README.md.
"""

TABLE: dict[tuple[str, str, str, int, int], tuple[int, int, int, int]] = {
'''


def main(argv: list[str] | None = None) -> int:
    parser = ahead.parser("static")
    parser.add_argument("--choose", action="store_true", help="write table.py first")
    args = parser.parse_args(argv)

    def rows(shapes: list[str], of_chips: list[str]) -> Iterator[dict[str, Any]]:
        with bundles.dumped() as folder:
            if args.choose:
                choose(folder, shapes, of_chips)
            for name, chip in ahead.pairs(shapes, of_chips):
                for found in kernels(folder, chip, bench.SHAPES[name], tiles.Rule()):
                    yield row(name, chip, found)

    return ahead.run(args, rows, as_table, "Predicted from compiled schedules, not measured")


if __name__ == "__main__":
    sys.exit(main())
