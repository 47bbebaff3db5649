"""What a comparison found, in words that a newcomer understands and that promise nothing more.

`Summary` is all that the console, the JSON and the page show; they differ only in form.
"""

import dataclasses

import numpy as np

from moe_jax.placement.plan import Plan
from moe_jax.sim.comparison import Table
from moe_jax.sim.curves import Curves
from moe_jax.sim.figures import Figure, change_text
from moe_jax.sim.measurement import Measurement
from moe_jax.sim.replay import Check


@dataclasses.dataclass(frozen=True)
class Summary:
    """Two measured runs of one model, before and after a plan was applied."""

    before: Measurement
    after: Measurement
    plan: Plan
    answers: list[Check]
    counts: list[Check]
    figures: list[Figure]
    curves: Curves
    comparison: Table | None

    @property
    def checks(self) -> list[Check]:
        return self.answers + self.counts

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    def figure(self, key: str) -> Figure:
        return next(figure for figure in self.figures if figure.key == key)


def headline(summary: Summary) -> str:
    """The result in one sentence."""
    failed = [check for check in summary.checks if not check.holds]
    if failed:
        return f"FAILED: {len(failed)} of {len(summary.checks)} checks do not hold."
    same = "The same answers in every bit"
    if summary.before.meta.dispatch == "gathered":
        load = summary.figure("load_worst")
        return (
            f"{same}, the same rows moved (this dispatch always moves all of them); the busiest "
            f"device's load over the mean went from {load.before:.3f} to {load.after:.3f}."
        )
    ways = ("rows", "rows_out", "rows_back")
    both, out, back = (summary.figure(key) for key in ways)
    each = f"(out {change_text(out)}, back {change_text(back)})"
    if both.after < both.before:
        return f"{same}, and {-100 * (both.change or 0):.1f} % fewer rows both ways {each}."
    return f"{same}, but no fewer rows both ways {each}: this plan saves no traffic."


def verdicts(summary: Summary) -> list[str]:
    """Bit-identity and measured = predicted, each with how much was compared."""
    return [
        _verdict("Bit-identical answers", summary.answers),
        _verdict("Measured = predicted rows", summary.counts),
    ]


def _verdict(what: str, checks: list[Check]) -> str:
    failed = [check for check in checks if not check.holds]
    if not failed:
        entries = sum(check.entries for check in checks)
        return f"{what}: yes, in all {entries:,} entries."
    return f"{what}: NO. First difference in {failed[0].name}: {failed[0].problem}."


def setting(summary: Summary) -> str:
    """What ran, in one line."""
    meta, measured = summary.before.meta, summary.before
    num_tokens, num_layers, _ = measured.expert_ids_TLK.shape
    return (
        f"{meta.model}: {num_layers} MoE layers of {meta.num_experts} experts, top_k {meta.top_k}, "
        f"{meta.num_devices} devices, dispatch {meta.dispatch}, combine {meta.combine}; "
        f"{num_tokens:,} tokens; {meta.machine}"
    )


def training(summary: Summary) -> str | None:
    """Held-out loss beside the unigram model, where both were recorded."""
    heldout, unigram = summary.curves.last_heldout, summary.curves.unigram
    if heldout is None:
        return None
    beside = "" if unigram is None else f"; a unigram model has {unigram:.3f}"
    return f"Held-out loss after training: {heldout:.3f} nats per token{beside}."


def notes(summary: Summary) -> list[str]:
    """What the figures do not say by themselves."""
    before, after = summary.before, summary.after
    texts = [*_dispatch_notes(summary)]
    padded = summary.figure("padding")
    if padded.before or padded.after:
        rows = summary.figure("rows")
        total = [getattr(rows, s) + getattr(padded, s) for s in _SIDES]
        hides = rows.after < rows.before and total[1] >= total[0]
        texts.append(
            "Padding is counted apart: where ragged exchanges are missing, rows travel in buckets "
            f"of equal size. With padding, {total[0]:.3f} rows per token and layer were on the "
            f"wire before and {total[1]:.3f} after"
            + (": padding hides the saving." if hides else ".")
        )
    load = summary.figure("load_worst")
    if load.after > load.before:
        texts.append(
            "The busiest device computes more than before in the worst layer "
            f"({load.before:.3f} to {load.after:.3f} times the mean); the others wait for it."
        )
    if not np.array_equal(before.home_T, after.home_T):
        texts.append("The tokens were held by other devices after than before.")
    texts.append("Rows are counted, not timed: this says nothing about seconds.")
    return texts


_SIDES = ("before", "after")


def _dispatch_notes(summary: Summary) -> list[str]:
    if summary.before.meta.dispatch == "gathered":
        return [
            "The gathered dispatch moves every token to every device, whatever the placement: a "
            "plan can only change the load."
        ]
    out, back = summary.figure("rows_out"), summary.figure("rows_back")
    if summary.before.meta.dispatch == "coherent":
        return [
            "In coherent dispatch a token goes on from the device of its best expert: rows back "
            "are those of its other experts to that device (out "
            f"{change_text(out)}, back {change_text(back)}). Not counted here: keys and values of "
            "every token to every device, which no plan can change, and a row home at the end."
        ]
    if summary.before.meta.dispatch == "hierarchical":
        return _hierarchical_notes(summary)
    partial = summary.figure("rows_deduplicated")
    if summary.before.meta.combine == "reproducible":
        return [
            "Rows back are one per device that a token was sent to: the reproducible combine, "
            "which sums where the experts are, on a grid that keeps every bit whatever the order "
            f"(out {change_text(out)}, back {change_text(back)})."
        ]
    return [
        "Rows back are one per assignment: the exact combine, which sums at home in a fixed order "
        "and so keeps every bit. Experts that live together cannot share a row on the way back; "
        "only the outward rows can shrink that way "
        f"(out {change_text(out)}, back {change_text(back)}: an expert on the token's own device "
        "needs no row at all).",
        "'One row per device out and back' is what an exchange that adds partial results on the "
        f"expert's device would move ({change_text(partial)}). It was not run: its outputs are "
        "equal within rounding, not bit for bit.",
    ]


def _hierarchical_notes(summary: Summary) -> list[str]:
    keys = ("rows_out", "rows_back", "rows_deduplicated")
    out, back, direct = (change_text(summary.figure(key)) for key in keys)
    home = (
        "Rows back are one per assignment on every hop: the exact combine, which sums at home in a "
        "fixed order and so keeps every bit."
    )
    if summary.before.meta.combine == "reproducible":
        home = (
            "Rows back are as many as rows out, each a sum: the reproducible combine, on a grid "
            "that keeps every bit whatever the order."
        )
    return [
        "In hierarchical dispatch rows between nodes pass a relay, the device of the other node "
        "with the place of the token's own: a token goes out once to each node, and from the relay "
        "once to each further device. A row that passes a relay counts once a hop, out and back "
        f"(out {out}, back {back}). {home}",
        "'One row per device out and back' is what an exchange without relays would move that sums "
        f"where the experts are ({direct}). It was not run.",
    ]
