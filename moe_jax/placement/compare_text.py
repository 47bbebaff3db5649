"""`compare` in words: three tables of all methods, and what their columns mean."""

from collections.abc import Sequence

from moe_jax.placement import tables
from moe_jax.placement.baselines import registry
from moe_jax.placement.compare import Method
from moe_jax.placement.problem import Problem

_MEANS = dict(tables.COLUMNS)
ROWS = (
    *tables.COLUMNS[: len(tables.DISPATCHES)],
    ("worst", "the same, worst layer of the dispatch that was planned for"),
)
SPREAD = (  # name, which figure of the evidence it is
    ("devices", "distinct_devices"),
    ("worst", "distinct_devices_worst"),
    ("nodes", "distinct_nodes"),
    ("top1", "top1"),
    ("pairs", "all_pairs"),
    ("load", "load_mean"),
    ("worst", "load_worst"),
)
WITHIN = "wider side of the 95 % interval over sequences (both ends: --json)"
COSTS = (
    ("us", "microseconds of a layer and step in this dispatch, mean of the layers"),
    ("worst", "the same, worst layer"),
    ("mean/max", "balancedness (vLLM, SGLang): mean device load over the largest, mean of layers"),
    ("imbal.", "imbalance ratio (TensorRT-LLM): (largest - mean) / mean, mean of layers"),
    ("worst", "the same, worst layer"),
    ("CV", "standard deviation of the device loads over their mean, mean of layers"),
    ("worst", "the same, worst layer"),
    (
        "moved",
        "experts, over all layers, that arrive on a device that contiguous keeps them off; without "
        "copies devices are numbered so that fewest do, in all layers alike, as in --out-plans",
    ),
    ("GB", "what these weigh"),
    ("solve s", "seconds to make the plan; cut: its time ended it, or a part of it"),
)


def text(made: Sequence[Method], judge: Problem) -> str:
    """The tables; `judge` is the problem on the held-out half."""
    rows = [
        [
            name_of(method),
            tables.number(method.held_out_objective, 5),
            *(tables.spread(method.held_out.rows[name]) for name in tables.DISPATCHES),
            tables.spread(method.held_out.rows_worst[judge.dispatch]),
        ]
        for method in made
    ]
    spread = _spread_columns(judge)
    places = [
        [name_of(method), *(tables.spread(getattr(method.held_out, key)) for _, key in spread)]
        for method in made
    ]
    costs = [[name_of(method), *_cost_cells(method)] for method in made]
    return "\n\n".join(
        [
            tables.table(["held out: rows", "objective", *(name for name, _ in ROWS)], rows),
            tables.table(["devices, transitions, load", *(name for name, _ in spread)], places),
            tables.table(["time, load, move", *(name for name, _ in COSTS)], costs),
        ]
    )


def legend(made: Sequence[Method], judge: Problem) -> str:
    """What the columns mean, table by table, and what the methods do."""
    spread = [(name, _MEANS[name]) for name, _ in _spread_columns(judge)]
    lines = []
    for columns in (ROWS, (*spread, ("±", WITHIN)), COSTS):
        lines += [*(f"  {name:9} {what}" for name, what in columns), ""]
    keys = {method.key for method in made}
    lines.append("Methods (all but the planner by --methods=NAME,NAME):")
    lines += [f"  {one.key:17} {one.text}" for one in registry.ALL if one.key in keys]
    return "\n".join(lines + [f"  {line}" for line in notes(made)])


def _spread_columns(judge: Problem) -> list[tuple[str, str]]:
    """Without nodes where there is one."""
    return [one for one in SPREAD if one[0] != "nodes" or judge.topology.num_nodes > 1]


def name_of(method: Method) -> str:
    """The name, and what is not right with its slots or pins."""
    if method.broken_pins:
        return f"{method.name} ({method.broken_pins} off pin)"
    if method.duplicates:
        return f"{method.name} ({method.duplicates} doubled)"
    if method.padding:
        return f"{method.name} ({method.padding} empty)"
    return method.name


def notes(made: Sequence[Method]) -> list[str]:
    """What the tables need explained, where slots are not one per expert."""
    lines = []
    if any(method.broken_pins for method in made):
        lines.append("off pin: pins that a plan breaks; of baselines, which know none, and of")
        lines[-1] += " greedy where there are copies"
    if any(method.padding for method in made):
        lines.append("empty: slots of a layer that uneven groups leave empty; no plan file")
    last = made[-1].placement
    if last.has_replicas:
        lines += [
            f"replicas: EPLB, balanced slots and the last row have {last.num_slots} slots per "
            f"layer, the others {last.num_experts}",
            "doubled: slots, of all layers, whose expert is on their device already (wasted)",
        ]
    return lines


def _cost_cells(method: Method) -> list[str]:
    costs = method.costs
    return [
        f"{1e6 * costs.seconds:.0f}",
        f"{1e6 * costs.seconds_worst:.0f}",
        f"{costs.balance:.3f}",
        f"{costs.imbalance:.3f}",
        f"{costs.imbalance_worst:.3f}",
        f"{costs.cv:.3f}",
        f"{costs.cv_worst:.3f}",
        f"{costs.moved:.0f}",
        f"{1e-9 * costs.moved_bytes:.2f}",
        f"{method.seconds:.2f}" + (" cut" if method.made.cut else ""),
    ]
