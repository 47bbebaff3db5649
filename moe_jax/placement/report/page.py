"""The page: one HTML file that needs nothing else. No script, no font, no other file.

Its own content policy forbids every outside resource and every script, so even markup that came
in by mistake could do nothing. Plain data in, text out; all of it is escaped (markup.py).
"""

import dataclasses
import os

from moe_jax import files
from moe_jax.placement.report.markup import Markup, element, joined, raw
from moe_jax.placement.report.parts import Section
from moe_jax.placement.report.style import STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
TONES = ("good", "bad", "open")


@dataclasses.dataclass(frozen=True)
class Page:
    """What is on it.

    Attributes:
      setting: what was planned, on how much, judged on what.
      headline: the result in a line.
      answer: what to make of it, in sentences.
      tone: one of TONES.
      sections: figures, in order.
      origin: where it comes from: names and values.
      again: seconds after which a browser asks for it again; 0 = never.
    """

    setting: str
    headline: str
    answer: tuple[str, ...]
    tone: str
    sections: tuple[Section, ...]
    origin: tuple[tuple[str, str], ...]
    again: int = 0


def html(page: Page) -> str:
    """The file's text."""
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        *([element("meta", http_equiv="refresh", content=page.again)] if page.again else []),
        element("title", f"Placement: {page.headline}"),
        element("style", STYLE),
    ]
    answer = element("div", *(element("p", line) for line in page.answer), class_=_kind(page.tone))
    body = [
        element("p", page.setting, class_="soft"),
        element("h1", page.headline),
        answer,
        *(section.markup() for section in page.sections),
        Section("origin", "Where this comes from", _origin(page.origin)).markup(),
    ]
    root = element(
        "html",
        element("head", joined(head, "\n")),
        element("body", element("main", joined(body, "\n"))),
        lang="en",
    )
    return joined([raw("<!doctype html>"), root, raw("")], "\n")


def write(page: Page, path: str | os.PathLike) -> None:
    """Writes the file whole or not at all."""
    with files.atomic_write(path, "w") as file:
        file.write(html(page))


def _kind(tone: str) -> str:
    assert tone in TONES, tone
    return f"answer {tone}"


def _origin(entries: tuple[tuple[str, str], ...]) -> Markup:
    items = [joined([element("dt", k), element("dd", element("code", v))]) for k, v in entries]
    return element("dl", *items)
