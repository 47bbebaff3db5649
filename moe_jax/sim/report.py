"""Before and after a plan: measured rows against predicted rows, and the same answers in every bit.

    python -m moe_jax.sim.report --before=A.npz --after=B.npz --plan=PLAN.json
        --metrics=metrics.jsonl --out=DIR [--compare=COMPARE.json] [--plan-before=PLAN.json]
        [--json]

Reads two measurements of one model on one text (measurement.py), replays their routing through the
planner's cost module (replay.py) and requires equality, not likeness: of every count as an integer,
of every logit as bits, of every text and expert id. Prints one table and writes three plots and one
HTML page into DIR, also where a check fails, so that people can look; then the exit code is 1.

Exit codes: 0 everything equal, 1 refused or not equal (message on stderr), 2 usage, 3 equal,
but stdout took no answer.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import textwrap
from collections.abc import Callable, Iterable

from moe_jax import errors, files
from moe_jax.errors import Refused
from moe_jax.placement.plan import Placement, Plan, check_fits
from moe_jax.sim import comparison, curves, measurement, page, plots, replay
from moe_jax.sim import figures as table
from moe_jax.sim import summary as words
from moe_jax.sim.measurement import Measurement
from moe_jax.sim.summary import Summary


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    flags = _flags(arguments)
    try:
        summary = compare(flags)
        paths = write(summary, pathlib.Path(flags.out))
    except Refused as refused:
        print(f"refused: {refused}", file=sys.stderr)
        return 1
    if flags.json:
        code = errors.say(json.dumps(as_json(summary, paths), allow_nan=False))
    else:
        code = errors.say(as_text(summary, paths))
    if not summary.holds:
        print(_failure(summary), file=sys.stderr)
        return 1
    return code


def compare(flags: argparse.Namespace) -> Summary:
    """Reads everything, then replays and compares; nothing is written."""
    before, after = measurement.read(flags.before), measurement.read(flags.after)
    _check_same_model(before, after)
    plan = Plan.read(flags.plan)
    placements = (
        _placement("--plan-before", before, _placement_before(flags.plan_before, before)),
        _placement("--plan", after, plan),
    )
    loss = curves.read(flags.metrics)
    others = comparison.read(flags.compare) if flags.compare else None
    predicted = (
        replay.predict(before, placements[0]),
        replay.predict(after, placements[1]),
    )
    return Summary(
        before=before,
        after=after,
        plan=plan,
        answers=replay.check_answers(before, after, plan.layer_ids),
        counts=[
            *replay.check_counts("before", before, predicted[0], plan.layer_ids),
            *replay.check_counts("after", after, predicted[1], plan.layer_ids),
        ],
        figures=table.figures(before, after, predicted),
        curves=loss,
        comparison=others,
    )


def write(summary: Summary, out: pathlib.Path) -> dict[str, str]:
    """Writes the plots and the page; returns what was written, name -> path."""
    before, after = (
        plots.Side(name, side.dispatch_LMM, side.combine_LMM, side.load_LM)
        for name, side in (("before", summary.before), ("after", summary.after))
    )
    draw: dict[str, tuple[str, str, Callable[[plots.Width], bytes]]] = {
        "loss": (
            "Training",
            "Loss over training steps, with the loss of a unigram model",
            lambda width: plots.loss(summary.curves, width),
        ),
        "traffic": (
            "Rows between devices",
            "Rows from each source device to each destination device, before and after",
            lambda width: plots.traffic(before, after, width),
        ),
        "load": (
            "Load of the devices",
            "Rows computed by each device in each layer over the layer's mean, before and after",
            lambda width: plots.load(before, after, summary.plan.layer_ids, width),
        ),
    }
    pictures = {
        name: page.Picture(title, alt, paint("wide"), paint("narrow"))
        for name, (title, alt, paint) in draw.items()
    }
    html = page.render(summary, list(pictures.values())).encode()  # before anything is written
    paths = {name: out / "plots" / f"{name}.png" for name in pictures}
    try:
        for name, picture in pictures.items():
            with files.atomic_write(paths[name]) as file:
                file.write(picture.wide_png)
        paths["page"] = out / "report.html"
        with files.atomic_write(paths["page"]) as file:
            file.write(html)
    except OSError as error:
        raise Refused(
            "--out", str(out), f"cannot be written ({error})", "Choose a folder"
        ) from None
    return {name: str(path) for name, path in paths.items()}


def as_text(summary: Summary, paths: dict[str, str]) -> str:
    """What people read in the terminal."""
    lines = [*_wrapped([words.setting(summary)]), ""]
    head = ("per token and layer", "before", "after", "change")
    rows = [
        (f.label, f"{f.before:.3f}", f"{f.after:.3f}", table.change_text(f))
        for f in summary.figures
    ]
    lines += [*_columns([head, *rows]), ""]
    if summary.comparison is not None:
        held_out = summary.comparison
        if held_out.rows:
            lines += _columns([("on held-out text", *held_out.head[1:]), *held_out.rows])
        lines += [*_wrapped(held_out.notes), ""]
    lines += [words.headline(summary), *words.verdicts(summary)]
    training = words.training(summary)
    lines += [training] if training else []
    lines += ["", *_wrapped([f"Note: {note}" for note in words.notes(summary)]), ""]
    lines += [f"{name:8}{path}" for name, path in paths.items()]
    return "\n".join(lines)


def as_json(summary: Summary, paths: dict[str, str]) -> dict:
    """The same as one JSON object."""
    return {
        "ok": summary.holds,
        "bit_identical": all(check.holds for check in summary.answers),
        "measured_equals_predicted": all(check.holds for check in summary.counts),
        "checks": [{**dataclasses.asdict(c), "holds": c.holds} for c in summary.checks],
        "figures": {
            f.key: {"before": f.before, "after": f.after, "change": f.change}
            for f in summary.figures
        },
        "headline": words.headline(summary),
        "notes": words.notes(summary),
        "files": paths,
    }


def _flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moe_jax.sim.report",
        description="Before and after a plan: rows measured and predicted, answers bit by bit.",
        allow_abbrev=False,
    )
    parser.add_argument("--before", required=True, help="measurement (.npz) before the plan")
    parser.add_argument("--after", required=True, help="measurement (.npz) after the plan")
    parser.add_argument("--plan", required=True, help="the plan that was applied in between")
    parser.add_argument("--plan-before", help="the plan before; contiguous if left out")
    parser.add_argument("--compare", help="what `moe_jax.placement compare --json` printed")
    parser.add_argument("--metrics", required=True, help="metrics.jsonl of the training run")
    parser.add_argument("--out", required=True, help="folder for plots/ and report.html")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    return parser.parse_args(arguments)


def _check_same_model(before: Measurement, after: Measurement) -> None:
    same = ("model", "num_experts", "top_k", "num_devices", "num_nodes", "dispatch", "combine")
    pairs = [(f"meta.{n}", getattr(before.meta, n), getattr(after.meta, n)) for n in same]
    pairs.append(("layers", before.expert_ids_TLK.shape[1], after.expert_ids_TLK.shape[1]))
    for name, left, right in pairs:
        if left != right:
            rule = f"must be the same before and after, and before it is {left!r}"
            raise Refused(f"--after: {name}", right, rule, "Measure both runs alike")


def _placement_before(path: str | None, before: Measurement) -> Plan:
    if path is not None:
        return Plan.read(path)
    num_layers = before.expert_ids_TLK.shape[1]
    meta = before.meta
    return Plan(Placement.contiguous(num_layers, meta.num_experts, meta.num_devices))


def _placement(flag: str, measured: Measurement, plan: Plan) -> Placement:
    """The placement of a plan, if it is the one that the model ran with."""
    num_layers = measured.expert_ids_TLK.shape[1]
    meta = measured.meta
    check_fits(
        plan,
        num_layers=num_layers,
        num_experts=meta.num_experts,
        num_devices=meta.num_devices,
    )
    if plan.digest != meta.plan_digest:
        rule = f"{measured.path} ran with the plan {meta.plan_digest}"
        raise Refused(f"{flag}: digest", plan.digest, rule, f"Give that plan as {flag}=PLAN.json")
    return plan.placement


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Aligned columns: the first to the left, figures to the right."""
    first, *rest = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(first), *map(str.rjust, row[1:], rest)]).rstrip() for row in rows
    ]


def _wrapped(texts: Iterable[str]) -> list[str]:
    return [line for text in texts for line in textwrap.wrap(text, 100, subsequent_indent="  ")]


def _failure(summary: Summary) -> str:
    failed = [check for check in summary.checks if not check.holds]
    return "\n".join(
        [words.headline(summary), *(f"  {check.name}: {check.problem}" for check in failed)]
    )


if __name__ == "__main__":
    sys.exit(main())
