"""Numbers of an engine in Prometheus' text format (version 0.0.4)."""

from collections.abc import Iterable
from typing import Any

from moe_jax.infer.serving.engine import Engine
from moe_jax.infer.serving.placing import STATES, Placing, Report
from moe_jax.infer.serving.stats import BOUNDS, Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "moe_jax_"


class _Page:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(
        self, name: str, kind: str, text: str, values: Iterable[tuple[dict[str, Any], float]]
    ) -> None:
        """One metric: its lines are (labels, value)."""
        name = _PREFIX + name
        self.lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        self.lines += [f"{name}{_labels(labels)} {value:.17g}" for labels, value in values]

    def one(self, name: str, kind: str, text: str, value: float) -> None:
        self.add(name, kind, text, [({}, value)])

    def histogram(self, name: str, text: str, histogram: Histogram) -> None:
        name = _PREFIX + name
        self.lines += [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
        total = 0
        for bound, count in zip((*BOUNDS, "+Inf"), histogram.counts, strict=True):
            total += count
            self.lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        self.lines += [f"{name}_sum {histogram.total:.17g}", f"{name}_count {total}"]


def _labels(labels: dict[str, Any]) -> str:
    if not labels:
        return ""
    shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return f"{{{shown}}}"


def page(engine: Engine, placing: Placing | None, waiting: int, draining: bool, rate: float) -> str:
    """All metrics; call it between two steps.

    Args:
      placing: moves its experts, or None.
      waiting: requests that were taken and do not run yet, in the inbox or the queue.
      rate: new tokens a second, lately.
    """
    engine.read_counters()
    stats, out = engine.stats, _Page()
    out.add("requests_total", "counter", "Requests by how they ended.",
            [({"finish": finish}, n) for finish, n in sorted(stats.requests.items())])  # fmt: skip
    out.one("requests_arrived_total", "counter", "Requests taken.", stats.num_arrived)
    running = len(engine.scheduler.running)
    out.one("requests_running", "gauge", "Requests that hold a seat.", running)
    out.one("requests_waiting", "gauge", "Requests taken that hold none.", waiting)
    out.one("preempted_total", "counter", "Times that a request lost its seat.", stats.preempted)
    out.one("prompt_tokens_total", "counter", "Tokens of prompts.", stats.prompt_tokens)
    text = "Tokens of prompts that were found in the cache and not computed."
    out.one("found_tokens_total", "counter", text, engine.scheduler.found)
    out.one("new_tokens_total", "counter", "Tokens made.", stats.new_tokens)
    out.one("tokens_per_second", "gauge", "Tokens made a second, lately.", rate)
    out.one("steps_total", "counter", "Steps of the engine.", stats.steps)
    out.one("host_seconds_total", "counter", "Planning, packing, delivering.", stats.host_seconds)
    out.one("device_seconds_total", "counter", "Waiting for programs.", stats.device_seconds)
    pools = list(enumerate(engine.scheduler.blocks))
    out.add("cache_blocks_used", "gauge", "Blocks that requests hold, by shard.",
            [({"shard": shard}, pool.num_held) for shard, pool in pools])  # fmt: skip
    out.add("cache_blocks", "gauge", "Blocks, by shard.",
            [({"shard": shard}, pool.num_blocks) for shard, pool in pools])  # fmt: skip
    out.histogram("time_to_first_token_seconds", "From arrival to the first token.",
                  stats.first_token)  # fmt: skip
    out.histogram("time_between_tokens_seconds", "Between tokens of one answer.", stats.next_token)
    out.one("draining", "gauge", "1 = no more requests are taken.", draining)
    out.add(
        "plan_info", "gauge", "The placement of experts.", [({"digest": engine.plan_digest}, 1)]
    )
    if placing:
        _placing(out, placing.report, stats.plan_tokens if stats.mark else 0)
        scheduler = engine.scheduler
        text = "Requests that got a shard while homes were known."
        out.one("admitted_with_homes_total", "counter", text, scheduler.admitted)
        text = "Of those, that got the shard that was best then."
        out.one("admitted_at_home_total", "counter", text, scheduler.at_home)
    if stats.computed_LP is not None:
        _rows(out, engine)
    return "\n".join(out.lines) + "\n"


def _placing(out: _Page, report: Report, age: int) -> None:
    states = [({"state": state}, state == report.state) for state in STATES]
    out.add("placing_state", "gauge", "1 = what placement in the loop is at.", states)
    for name, text in (
        ("plans", "Plans made from traffic."),
        ("adopted", "Plans that experts moved to."),
        ("proven", "Plans whose counted rows were as predicted."),
        ("withdrawn", "Plans whose counted rows were more, and that were taken back."),
        ("moved_experts", "Experts that crossed from a device to another."),
        ("moved_bytes", "What they weigh."),
        ("homes", "Times that homes of requests were learned."),
    ):
        out.one(f"placing_{name}_total", "counter", text, getattr(report, name))
    for name, text in (
        ("rows_before", "Counted before the newest plan, per token and layer."),
        ("rows_predicted", "Predicted for it."),
        ("rows_counted", "Counted under it; 0 = not yet."),
    ):
        out.one(f"placing_{name}", "gauge", text, getattr(report, name))
    pause = "Seconds that the longest group of layers held up a step."
    out.one("placing_longest_pause_seconds", "gauge", pause, report.pause)
    out.one("placing_pause_seconds_total", "counter", "All groups.", report.total_pause)
    text = "Served since the plan in use came into use; 0 = none has."
    out.one("placing_plan_age_tokens", "gauge", text, age)


def _rows(out: _Page, engine: Engine) -> None:
    stats, devices = engine.stats, engine.config.mesh.expert_devices
    assert stats.computed_LP is not None  # all three are read together
    assert stats.dispatch_LMM is not None
    assert stats.combine_LMM is not None
    ids = engine.config.model.moe_layer_ids  # none where no layer has experts
    load_LM = stats.computed_LP.reshape(len(stats.computed_LP), devices, -1).sum(axis=2)
    out.add("computed_rows_total", "counter", "Rows computed, by layer and device.",
            [({"layer": layer, "device": m}, int(load_LM[n, m]))
             for n, layer in enumerate(ids) for m in range(devices)])  # fmt: skip
    even_L = stats.load_LM(devices).max(axis=1)
    out.add("load_max_over_mean", "gauge", "Rows of the busiest device over the mean, since the "
            "plan in use came into use; 0 = none yet.",
            [({"layer": layer}, float(even_L[n])) for n, layer in enumerate(ids)])  # fmt: skip
    for name, rows_LMM in (("out", stats.dispatch_LMM), ("home", stats.combine_LMM)):
        rows_MM = rows_LMM.sum(axis=0)
        out.add(f"rows_{name}_total", "counter", f"Rows moved {name}, by pair of devices.",
                [({"source": a, "destination": b}, int(rows_MM[a, b]))
                 for a in range(devices) for b in range(devices) if a != b])  # fmt: skip
