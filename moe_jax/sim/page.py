"""The comparison as one HTML page that needs nothing else: no script, no font, no other file.

The page's own content policy forbids every outside resource, images travel inside it, tables turn
sideways within their own frame on narrow screens, and colours follow the reader's light or dark
setting. Plots come in two shapes; the reader's width chooses.
"""

import base64
import dataclasses
from html import escape

from moe_jax.errors import plain
from moe_jax.sim import summary as words
from moe_jax.sim.comparison import Table
from moe_jax.sim.figures import change_text
from moe_jax.sim.summary import Summary

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_NARROW = "(max-width: 760px)"

_STYLE = """
:root { color-scheme: light dark; --page: #fafaf8; --card: #fff; --text: #1c1c1c; --soft: #5c5c5c;
  --line: #d9d9d4; --good: #00664b; --bad: #b03a00; }
@media (prefers-color-scheme: dark) { :root { --page: #161719; --card: #1f2124; --text: #e8e8e6;
  --soft: #a8a8a6; --line: #3a3d41; --good: #4fd1a5; --bad: #ff9a5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 1100px; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, li { max-width: 75ch; }
.soft, figcaption, dt { color: var(--soft); font-size: .9rem; }
.verdict { border-left: .3rem solid var(--good); background: var(--card); padding: .6rem 1rem;
  margin: 1rem 0; }
.verdict.bad { border-color: var(--bad); }
.bad { color: var(--bad); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .4rem .6rem; text-align: right; border-top: 1px solid var(--line);
  vertical-align: top; }
thead th { border-top: 0; } thead th, tbody th { font-weight: 600; }
tbody th { font-weight: 400; }
td { white-space: nowrap; }
th:first-child { text-align: left; min-width: 8.5rem; }
table.checks td { white-space: normal; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; padding: .4rem;
  border: 1px solid var(--line); border-radius: .4rem; }
dl { margin: 0; } dd { margin: 0 0 .5rem; }
"""


@dataclasses.dataclass(frozen=True)
class Picture:
    """One plot for the page, in both shapes."""

    title: str
    alt: str
    wide_png: bytes
    narrow_png: bytes


def render(summary: Summary, pictures: list[Picture]) -> str:
    """The whole page as text."""
    parts = [
        _verdict(summary),
        _section("What moved", _figures_table(summary)),
        *(_section(picture.title, _picture(picture)) for picture in pictures),
        _comparison(summary.comparison),
        _section("What was compared", _checks_table(summary)),
        _section("What these figures do not say", _list(words.notes(summary))),
        _section("Where this comes from", _provenance(summary)),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>moe_jax: before and after a placement</title>\n<style>{_STYLE}</style>\n"
        f"</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _verdict(summary: Summary) -> str:
    lines = [*words.verdicts(summary)]
    loss = words.training(summary)
    if loss:
        lines.append(loss)
    kind = "verdict" if summary.holds else "verdict bad"
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return (
        f'<p class="soft">{escape(words.setting(summary))}</p>\n'
        f"<h1>{escape(words.headline(summary))}</h1>\n"
        f'<div class="{kind}">{paragraphs}</div>'
    )


def _figures_table(summary: Summary) -> str:
    rows = [(f.label, f"{f.before:.3f}", f"{f.after:.3f}", change_text(f)) for f in summary.figures]
    intro = "<p>Rows are per token and layer; a row is one token's activation.</p>"
    return intro + _table(("", "before", "after", "change"), rows)


def _comparison(table: Table | None) -> str:
    if table is None:
        return ""
    intro = "".join(f"<p>{escape(line)}</p>" for line in table.notes)
    rows = _table(table.head, table.rows) if table.rows else ""
    return _section("Other placements, on held-out text", intro + rows)


def _checks_table(summary: Summary) -> str:
    rows = [
        (check.name, f"{check.entries:,}", "equal" if check.holds else f"NOT: {check.problem}")
        for check in summary.checks
    ]
    return _table(("", "entries", "result"), rows, kind="checks")


def _provenance(summary: Summary) -> str:
    before, after, plan = summary.before, summary.after, summary.plan
    entries = {
        "machine before": before.meta.machine,
        "machine after": after.meta.machine,
        "plan before": before.meta.plan_digest,
        "plan after": after.meta.plan_digest,
        **{f"plan: {key}": value for key, value in plan.provenance.items()},
    }
    texts = ((escape(plain(k)), escape(plain(str(v)))) for k, v in entries.items())
    items = (f"<dt>{name}</dt><dd>{value}</dd>" for name, value in texts)
    return f"<dl>{''.join(items)}</dl>"


def _picture(picture: Picture) -> str:
    return (
        f'<figure><picture><source media="{_NARROW}" srcset="{_data(picture.narrow_png)}">'
        f'<img alt="{escape(picture.alt)}" src="{_data(picture.wide_png)}"></picture></figure>'
    )


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _list(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _table(head, rows, kind: str = "") -> str:
    heads = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    lines = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}">\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )
