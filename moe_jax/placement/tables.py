"""Prints figures of placements side by side: one row per placement, plain text, fits a terminal."""

from collections.abc import Sequence

from moe_jax.placement.evidence import Evidence, Figure
from moe_jax.placement.plan import Placement

DISPATCHES = ("exchange", "hierarchical", "coherent", "shuffled")
COLUMNS = (
    ("exchange", "rows per token and layer, exchange dispatch (both ways, one per device)"),
    ("hierarch.", "the same, hierarchical dispatch"),
    ("coherent", "the same, coherent dispatch (keys and values not counted)"),
    ("shuffled", "the same, shuffled dispatch (what attention sends not counted)"),
    ("top1", "share of best-expert transitions that stay on their device"),
    ("pairs", "the same over all K x K transitions"),
    ("devices", "distinct devices per token and layer"),
    ("nodes", "distinct nodes per token and layer"),
    ("load", "largest device load over the mean, mean of the layers"),
    ("worst", "the same, worst layer"),
)


def evidence_cells(evidence: Evidence) -> list[str]:
    """One cell for each of COLUMNS."""
    return [
        *(f"{evidence.rows[name].value:.3f}" for name in DISPATCHES),
        *(f"{f.value:.3f}" for f in (evidence.top1, evidence.all_pairs)),
        *(f"{f.value:.3f}" for f in (evidence.distinct_devices, evidence.distinct_nodes)),
        *(f"{f.value:.3f}" for f in (evidence.load_mean, evidence.load_worst)),
    ]


def number(value: float, digits: int) -> str:
    """So many digits, zeros at the end too: a column is read from top to bottom."""
    return f"{value:#.{digits}g}".removesuffix(".")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text columns: the first one flush left, the others flush right."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = []
    for row in (heads, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def legend() -> str:
    """What the columns mean."""
    return "\n".join(f"  {name:9} {text}" for name, text in COLUMNS)


def intervals(evidence: Evidence) -> str:
    """The main figures with their 95 % intervals over sequences, one a line."""
    lines = [(f"rows, {name}", figure) for name, figure in evidence.rows.items()]
    lines += [
        ("distinct devices", evidence.distinct_devices),
        ("top-1 stays", evidence.top1),
        ("all pairs stay", evidence.all_pairs),
        ("load max/mean", evidence.load_mean),
        ("... worst layer", evidence.load_worst),
    ]
    return "\n".join(f"  {name:18} {interval(figure)}" for name, figure in lines)


def interval(figure: Figure) -> str:
    return f"{figure.value:.4f}  [{figure.low:.4f}, {figure.high:.4f}]"


def spread(figure: Figure) -> str:
    """`4.806 ±.021`: the wider side of the interval, whose ends are in `--json`."""
    side = max(abs(figure.low - figure.value), abs(figure.high - figure.value))
    return f"{figure.value:.3f} ±{f'{side:.3f}'.removeprefix('0')}"


def sizes(placement: Placement) -> str:
    return (
        f"{placement.num_layers} layers x {placement.num_experts} experts on "
        f"{placement.num_devices} devices, {placement.slots_per_device} slots each"
    )
