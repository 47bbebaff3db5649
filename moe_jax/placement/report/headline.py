"""The result in words, and the table of the main figures with their intervals.

An interval of what is saved is that of the difference on the same resampled sequences (paired.py).
Where there is none (plans with replicas, transitions) the intervals of before and after have to lie
apart before anything is called better or worse.
"""

import dataclasses

from moe_jax.placement.evidence import Figure
from moe_jax.placement.paired import Gain
from moe_jax.placement.problem import BY_TIER, UNITS
from moe_jax.placement.report import parts
from moe_jax.placement.report.markup import Markup, element, joined, text
from moe_jax.placement.report.parts import Section, percent
from moe_jax.placement.report.view import View

LESS = {
    "seconds": "A layer takes {} {} time",
    "rows": "{} {} rows travel",
    "exflow": "{} {} transitions leave their device",
    "moetuner": "MoETuner's sum of uneven work and slowest pairs is {} {}",
    "hops": "{} {} hops from tokens to experts and back",
    "load": "The fullest device computes {} {}",
}
FEWER = ("rows", "exflow", "hops")
ASK_VERDICT = (
    "Whether moving the experts pays for itself is another question, which "
    "python -m moe_jax.placement verdict answers."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """Before and after on the judging sequences.

    Attributes:
      before, after: the two views.
      objective, dispatch: what was minimised, and how rows travel.
      gains: of seconds, rows and load; empty where they are not known (replicas).
      held_out: the judging sequences were not planned on.
      weighted: the objective counts what goes between nodes more than the figures with intervals.
    """

    before: View
    after: View
    objective: str
    dispatch: str
    gains: dict[str, Gain]
    held_out: bool
    weighted: bool

    @property
    def share(self) -> float:
        """What of the objective is saved."""
        if self.before.objective == 0:
            return 0.0
        return 1 - self.after.objective / self.before.objective

    @property
    def gain(self) -> Gain | None:
        """Of the objective, with its interval; here rows count alike in all tiers."""
        return self.gains.get(self.objective)


def headline(result: Result) -> str:
    share, reached = result.share, result.after.objective
    if result.before.objective == 0 < reached:  # of nothing there is no share
        what = f"From 0 to {parts.quantity(reached, UNITS[result.objective])}"
    elif abs(share) < 5e-4:
        what = "Nothing changes"
    else:
        less = ("fewer" if result.objective in FEWER else "less") if share > 0 else "more"
        what = LESS[result.objective].format(percent(abs(share)), less)
    if result.weighted:
        what += f" ({BY_TIER})"
    seen = "that the plan has not seen" if result.held_out else "that it was planned on"
    return f"{what} on sequences {seen}"


def answer(result: Result) -> tuple[str, str]:
    """A sentence and its tone (page.TONES)."""
    if not result.held_out:
        return "Nothing was held out, so nothing is shown about other text.", "open"
    alike = ", everything counted alike," if result.weighted else ""
    if (gain := result.gain) is not None and gain.before > 0:
        share = gain.share
        interval = f"between {percent(share.low)} and {percent(share.high)} (95 % interval)"
        if share.low > 0:
            return f"Better: what is saved{alike} lies {interval}.", "good"
        if share.high < 0:
            return f"Worse: what is saved{alike} lies {interval}.", "bad"
        return f"No difference is shown: what is saved{alike} lies {interval}.", "open"
    before, after = (_figure(one, result) for one in (result.before, result.after))
    if before is None or after is None:
        return "There is no interval for this figure, so take it with care.", "open"
    ends = f"{_ends(before)} before, {_ends(after)} after{alike.rstrip(',')}"
    if after.high < before.low:
        return f"Better: the 95 % intervals lie apart ({ends}).", "good"
    if after.low > before.high:
        return f"Worse: the 95 % intervals lie apart ({ends}).", "bad"
    return f"No difference is shown: the 95 % intervals overlap ({ends}).", "open"


def beside(result: Result) -> str:
    """What becomes of the time of a layer, where something else was minimised."""
    gain = result.gains.get("seconds")
    if gain is None or result.objective == "seconds":
        return ""
    share = gain.share
    ends = f"95 % interval {percent(share.low)} to {percent(share.high)}"
    if share.value >= 0:
        return f"The time of a layer, modelled, falls by {percent(share.value)} ({ends})."
    return (
        f"But the time of a layer, modelled, grows by {percent(-share.value)} (saved: {ends}): "
        "see where it goes below, and think of a load cap or of planning for seconds."
    )


def section(result: Result, nodes: int) -> Section:
    """The main figures, with intervals."""
    heads = ["95 % interval over sequences", "before", "after", "saved"]
    rows: list[list[str]] = []
    if (gain := result.gains.get("seconds")) is not None:
        saved = _cell(_scaled(gain.difference, 1e6), percent(gain.share.value))
        values = (f"{1e6 * gain.before:,.4g}", f"{1e6 * gain.after:,.4g}")
        rows.append([_name("µs per layer and step", "modelled from the counts"), *values, saved])
    for name, note, key, low_is_good in (
        ("rows per token and layer", f"{result.dispatch}, both ways", "rows", True),
        ("distinct devices", "of a token's experts", "distinct_devices", True),
        ("distinct nodes", "of a token's experts", "distinct_nodes", True),
        ("best expert stays", "on its device, to the next layer", "top1", False),
        ("largest load over mean", "mean of the layers", "load_mean", True),
        ("largest load over mean", "worst layer", "load_worst", True),
    ):
        if key == "distinct_nodes" and nodes == 1:
            continue
        both = [_value(one, key, result.dispatch) for one in (result.before, result.after)]
        paired = result.gains.get({"rows": "rows", "load_mean": "load"}.get(key, ""))
        difference = both[0].value - both[1].value
        if paired is not None:
            share = percent(paired.share.value) if paired.before > 0 else ""
            saved = _cell(paired.difference, share)
        else:
            saved = text(f"{difference if low_is_good else -difference:.4g}")
        rows.append([_name(name, note), *(_cell(figure) for figure in both), saved])
    return Section("figures", "Before and after", parts.table("", heads, rows))


def _value(one: View, key: str, dispatch: str) -> Figure:
    return one.figures.rows[dispatch] if key == "rows" else getattr(one.figures, key)


def _figure(one: View, result: Result) -> Figure | None:
    """The objective with an interval, where there is one."""
    if result.objective in ("seconds", "moetuner", "hops"):
        return None
    key = {"exflow": "hops", "load": "load_mean"}.get(result.objective, "rows")
    return _value(one, key, result.dispatch)


def _scaled(figure: Figure, factor: float) -> Figure:
    return Figure(*(factor * end for end in dataclasses.astuple(figure)))


def _ends(figure: Figure) -> str:
    return f"{figure.low:.4g} to {figure.high:.4g}"


def _cell(figure: Figure, more: str = "") -> Markup:
    """A value, its interval below it."""
    value = f"{figure.value:.4g}" + (f" ({more})" if more else "")
    ends = element("span", f"[{figure.low:.4g}, {figure.high:.4g}]", class_="soft")
    return joined([value, element("br"), ends])


def _name(name: str, note: str) -> Markup:
    return joined([name, element("br"), element("span", note, class_="soft")])
