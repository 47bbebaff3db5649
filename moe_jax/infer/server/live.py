"""The page at `/`: traffic, load and placement of a server as they are, made anew every time.

It is a page of placement/report: one HTML text without a script, which asks for itself again.
"""

import numpy as np

from moe_jax.config import Config
from moe_jax.infer.serving.engine import Engine
from moe_jax.infer.serving.placing import Placing
from moe_jax.infer.serving.stats import Histogram, Stats
from moe_jax.placement.report import heat, page, parts
from moe_jax.placement.report.markup import Markup, joined
from moe_jax.placement.report.parts import Groups, Section

EVERY = 3  # seconds


def html(engine: Engine, placing: Placing | None, name: str, waiting: int, rate: float) -> str:
    """The page; call it between two steps.

    Args:
      name: of the model.
      waiting: requests that were taken and do not run yet.
      rate: new tokens a second, lately.
    """
    engine.read_counters()
    stats, config = engine.stats, engine.config
    running = len(engine.scheduler.running)
    sections = [_numbers(engine, waiting, rate)]
    devices = config.mesh.expert_devices
    if stats.computed_LP is not None and (load_LM := stats.load_LM(devices)).any():
        if devices > 1:
            sections.append(_traffic(stats.moved_LMM, _since(stats)))
        sections.append(_load(load_LM, config, _since(stats)))
    tone, answer = _answer(placing, stats.plan_tokens)
    return page.html(
        page.Page(
            setting=f"{name}, {config.model.dispatch}, {config.mesh}; made anew every {EVERY} s",
            headline=f"{rate:,.0f} tokens/s, {running} running, {waiting} waiting",
            answer=answer,
            tone=tone,
            sections=tuple(sections),
            origin=(("plan", engine.plan_digest or "none"), ("numbers", "/metrics")),
            again=EVERY,
        )
    )


def _answer(placing: Placing | None, age: int) -> tuple[str, tuple[str, ...]]:
    if placing is None:
        return "open", ("Experts stay where they are (start with --replan_tokens to have plans).",)
    report = placing.report
    lines = [
        f"Placement in the loop is {report.state}: {report.plans} plans made, {report.adopted} "
        f"adopted, {report.proven} proven, {report.withdrawn} withdrawn."
    ]
    if report.said:
        lines.append(report.said[0].upper() + report.said[1:] + ".")
    if report.adopted:
        lines.append(
            f"{report.moved_experts} experts ({report.moved_bytes / 1e6:.1f} MB) have moved; no "
            f"step waited longer than {1e3 * report.pause:.0f} ms for it. The plan in use came "
            f"into use {age:,} tokens ago."
        )
    good = report.proven > 0 and report.proven >= report.withdrawn
    tone = "good" if good else "bad" if report.withdrawn else "open"
    return tone, tuple(lines)


def _numbers(engine: Engine, waiting: int, rate: float) -> Section:
    stats, pools = engine.stats, engine.scheduler.blocks
    held, blocks = sum(p.num_held for p in pools), sum(p.num_blocks for p in pools)
    ends = ", ".join(f"{n} {finish}" for finish, n in sorted(stats.requests.items())) or "none"
    rows = [
        ("requests taken", f"{stats.num_arrived:,}"),
        ("ended", ends),
        ("waiting", f"{waiting:,}"),
        ("tokens made", f"{stats.new_tokens:,} ({rate:,.1f} a second, lately)"),
        ("cache", f"{held:,} of {blocks:,} blocks"),
        ("to the first token, mean", _mean(stats.first_token)),
        ("between tokens, mean", _mean(stats.next_token)),
        ("times that a request lost its seat", f"{stats.preempted:,}"),
    ]
    return Section("numbers", "Requests", parts.table("Since the start", ("", ""), rows))


def _mean(histogram: Histogram) -> str:
    count = sum(histogram.counts)
    return f"{1e3 * histogram.total / count:,.1f} ms" if count else "nothing yet"


def _since(stats: Stats) -> str:
    """From where rows are counted here."""
    if stats.mark is None:
        return "since the start"
    digest = stats.mark.digest[:12]
    return f"since plan {digest} came into use, {stats.plan_tokens:,} tokens ago"


def _traffic(rows_LMM: np.ndarray, since: str) -> Section:
    groups = Groups.of(rows_LMM.shape[1])
    rows_GG = groups.sums(rows_LMM.sum(axis=0).astype(float))
    most = max(float(rows_GG.max()), 1.0)

    def tip(source: int, destination: int) -> str:
        rows = rows_GG[source, destination]
        return f"{groups.names[source]} to {groups.names[destination]}: {rows:,.0f} rows"

    figure = joined(
        [
            parts.caption(
                f"Rows from device to device, out and home, all layers, {since}.", groups.note
            ),
            heat.scale("rows:", [(s, f"{s * most:,.0f}") for s in (0.0, 0.5, 1.0)]),
            heat.heat_map(
                "rows between devices",
                rows_GG / most,
                tip,
                ("from", groups.names),
                ("to", groups.names),
            ),
        ]
    )
    table = parts.matrix("Rows", "from \\ to", groups.names, groups.names, rows_GG)
    return Section("traffic", "Traffic", figure, (table,))


def _load(load_LM: np.ndarray, config: Config, since: str) -> Section:
    layers, groups = [str(n) for n in config.model.moe_layer_ids], Groups.of(load_LM.shape[1])
    load_LG = groups.largest(load_LM)
    reach = max(float(np.abs(load_LG - 1).max()), 0.05)

    def tip(layer: int, device: int) -> str:
        return f"layer {layers[layer]}, device {groups.names[device]}: {load_LG[layer, device]:.3f}"

    picture: Markup = heat.heat_map(
        "load of layers and devices",
        (load_LG - 1) / reach,
        tip,
        ("layer", layers),
        ("device", groups.names),
        load_LG.argmax(axis=1).tolist(),
        [f"{value:.2f}" for value in load_LG.max(axis=1)],
    )
    steps = [(-1.0, f"{max(1 - reach, 0):.2f}"), (0.0, "1"), (1.0, f"{1 + reach:.2f}")]
    text = parts.caption(
        f"Rows that a device computed, {since}, over the mean of its layer; 1 is even."
    )
    figure = joined([text, heat.scale("load over the mean:", steps), picture])
    table = parts.matrix("Load over the mean", "layer \\ device", layers, groups.names, load_LG)
    return Section("load", "Load", figure, (table,))
