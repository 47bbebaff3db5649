"""`compare` in words: two tables of all methods, and what their columns mean."""

from collections.abc import Sequence

from moe_jax.placement import tables
from moe_jax.placement.baselines import registry
from moe_jax.placement.compare import Method

COSTS = (
    ("us", "microseconds of a layer and step in this dispatch, mean of the layers"),
    ("worst", "the same, worst layer"),
    ("mean/max", "balancedness (vLLM, SGLang): mean device load over the largest, mean of layers"),
    ("imbal.", "imbalance ratio (TensorRT-LLM): (largest - mean) / mean, mean of layers"),
    ("worst", "the same, worst layer"),
    ("CV", "standard deviation of the device loads over their mean, mean of layers"),
    ("worst", "the same, worst layer"),
    ("moved", "experts, over all layers, that arrive on a device that contiguous keeps them off"),
    ("GB", "what these weigh"),
    ("solve s", "seconds to make the plan; cut: the time limit ended it"),
)


def text(made: Sequence[Method]) -> str:
    """Both tables and their legends."""
    rows = [
        [
            name_of(method),
            f"{method.held_out_objective:.5g}",
            *tables.evidence_cells(method.held_out),
        ]
        for method in made
    ]
    heads = ["held-out half", "objective", *(name for name, _ in tables.COLUMNS)]
    costs = [[name_of(method), *_cost_cells(method)] for method in made]
    return "\n".join(
        [
            tables.table(heads, rows),
            "",
            tables.table(["time, load, move", *(name for name, _ in COSTS)], costs),
        ]
    )


def legend(made: Sequence[Method]) -> str:
    """What the second table's columns mean, and what the methods do."""
    lines = [f"  {name:9} {what}" for name, what in COSTS]
    keys = {method.key for method in made}
    lines += ["", "Methods (all but the planner by --methods=NAME,NAME):"]
    lines += [f"  {one.key:17} {one.text}" for one in registry.ALL if one.key in keys]
    return "\n".join(lines + [f"  {line}" for line in notes(made)])


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
