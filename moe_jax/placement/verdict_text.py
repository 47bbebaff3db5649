"""The verdict as people read it: plain text, figures of window B, the answer last."""

from collections.abc import Sequence

from moe_jax.errors import plain
from moe_jax.placement import tables
from moe_jax.placement.paired import Gain
from moe_jax.placement.solution import Report
from moe_jax.placement.verdict import SHARE_LIMIT, Named, Verdict, percent, steps_of


def text(found: Verdict, now: str) -> str:
    """The report; `now` names what is in use."""
    lines = [
        f"Planned on {found.planned} sequences, judged on {found.judged} others "
        f"(split {found.settings.split}, seed {found.settings.seed}).",
        _search_text(found.search),
        "",
        _gains_table(found.gains, now),
        "",
        "Null test: the same with the affinity shuffled away. What it still saves is popularity, "
        "the rest is affinity:",
        _null_table(found),
        "",
        _move_text(found),
    ]
    if found.parts:
        lines += ["", "Saving on each part:", _named_table(found.parts, "judged on")]
    lines += [
        "",
        "Would more recording help? Saving on the same judging sequences of plans from fewer "
        f"(time limit {SHARE_LIMIT * found.settings.time_limit:g} s each):",
        _named_table(found.evidence, "planned on"),
        *(f"\nNote: {note}." for note in found.notes),
        "",
        f"Verdict: {found.answer}. {found.reason[0].upper()}{found.reason[1:]}.",
    ]
    return "\n".join(lines)


def _search_text(search: Report) -> str:
    return (
        f"Where it was planned: {search.objective:.6g} {search.unit}, proven bound "
        f"{search.bound:.6g}, gap {100 * search.gap:.2f} %."
    )


def _gains_table(gains: dict[str, Gain], now: str) -> str:
    names = {
        "seconds": ("microseconds per layer and step", 1e6),
        "rows": ("rows per token and layer", 1.0),
        "load": ("largest load over the mean", 1.0),
    }
    rows = []
    for name, (title, scale) in names.items():
        gain = gains[name]
        cells = [f"{scale * value:.4g}" for value in (gain.before, gain.after)]
        difference = gain.difference
        ends = f"[{scale * difference.low:.4g}, {scale * difference.high:.4g}]"
        rows.append(
            [title, *cells, f"{scale * difference.value:.4g}", ends, percent(gain.share.value)]
        )
    heads = ["held out", now, "planned", "saved", "95 % interval", "of it"]
    return tables.table(heads, rows)


def _named_table(parts: Sequence[Named], what: str) -> str:
    rows = []
    for part in parts:
        if part.gain is None:
            rows.append([plain(part.name), str(part.sequences), "load cap out of reach"])
        else:
            rows.append([plain(part.name), str(part.sequences), _percent_interval(part.gain)])
    return tables.table([what, "sequences", "saved [95 % interval]"], rows)


def _move_text(found: Verdict) -> str:
    move, raw = found.move, found.before_relabelling
    paid, low = (
        "never paid for" if steps is None else f"paid for after {steps_of(steps)}"
        for steps in (found.steps, found.steps_low)
    )
    return (
        f"The move: {move.experts} of {move.of_experts} experts change device "
        f"({raw.experts} before devices were renumbered), {move.bytes / 1e9:.3g} GB, "
        f"{1e3 * move.seconds:.3g} ms over the links.\n"
        f"  It is {paid}; at the lower end of the interval {low}."
    )


def _null_table(found: Verdict) -> str:
    rows = []
    for name, gain in found.gains.items():
        cells = [_percent_interval(one) for one in (gain, found.null[name])]
        rows.append([name, *cells])
    return tables.table(["saved of", "true trace", "without affinity"], rows)


def _percent_interval(gain: Gain) -> str:
    share = gain.share
    return f"{percent(share.value)} [{percent(share.low)}, {percent(share.high)}]"
