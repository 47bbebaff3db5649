"""The page stands alone: everything that it shows is inside it, and text stays text."""

import base64
import html.parser
import json
import re

import pytest


class Collector(html.parser.HTMLParser):
    """Tags, and every attribute through which a page can ask for something else."""

    def __init__(self):
        super().__init__()
        self.tags, self.resources, self.unlabelled = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.resources += [v for k, v in attrs if k in ("src", "srcset", "href", "data", "poster")]
        self.unlabelled += tag == "img" and not dict(attrs).get("alt")


COMPARISON = {
    "methods": [
        {"name": "contiguous", "held_out": {"rows": {"exchange": {"value": 2.5}}}},
        {"name": "<i>greedy</i>", "held_out": {"rows": {"exchange": {"value": 1.5}}}},
    ]
}


@pytest.fixture
def page(case):
    (case.folder / "compare.json").write_text(json.dumps(COMPARISON))
    assert case.run(f"--compare={case.folder}/compare.json") == 0
    return (case.folder / "out" / "report.html").read_text(encoding="utf-8")


def test_the_page_is_self_contained_and_complete(page, case):
    collector = Collector()
    collector.feed(page)
    assert len(collector.resources) == 6  # three plots, in two shapes
    for resource in collector.resources:
        kind, data = resource.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG\r\n")
    assert not {"script", "link", "iframe", "object"} & set(collector.tags)
    assert collector.unlabelled == 0
    assert not re.search(r"https?://|@import|url\(", page)
    assert "default-src 'none'" in page
    assert "width=device-width" in page
    assert "prefers-color-scheme: dark" in page
    plot = (case.folder / "out" / "plots" / "traffic.png").read_bytes()
    assert base64.b64encode(plot).decode() in page


def test_text_of_files_is_escaped(page):
    assert "made-up &lt;b&gt;model&lt;/b&gt;" in page
    assert "&lt;i&gt;greedy&lt;/i&gt;" in page
    assert "<b>" not in page
    assert "<i>" not in page


def test_the_page_says_what_the_figures_do_not(page):
    assert "Rows back are one per assignment: the exact combine" in page
    assert "Padding is counted apart" in page
    assert "Rows are counted, not timed" in page
