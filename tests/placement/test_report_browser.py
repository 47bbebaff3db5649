"""The page in a real browser: nothing on the console, nothing wider than a phone, readable text.

Skipped where no Chromium is installed (Debian package `chromium`).
"""

import dataclasses
import html
import json
import re
import shutil
import struct
import subprocess

import pytest

from moe_jax.placement import __main__ as command_line
from moe_jax.placement import baselines, topology
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem
from moe_jax.placement.report import build, markup, page
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)} is installed"
)
SMALLEST = 11.0  # pixels of text

# Measures the page and leaves the answer as text; only in a copy, since the page runs no script.
MEASURE = """
<script>
addEventListener("load", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const root = document.documentElement, sizes = {}, outside = [];
  for (const element of document.querySelectorAll("p, li, td, th, dt, dd, h1, h2, text, figcaption, summary, .soft")) {
    let size = parseFloat(getComputedStyle(element).fontSize);
    if (element.ownerSVGElement) size *= element.getScreenCTM().a;
    const name = element.tagName.toLowerCase();
    sizes[name] = Math.min(size, sizes[name] ?? 1e9);
  }
  for (const text of document.querySelectorAll("svg text")) {
    const inner = text.getBoundingClientRect();
    const outer = text.ownerSVGElement.getBoundingClientRect();
    if (inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1)
      outside.push(text.textContent);
  }
  const found = {inner: innerWidth, scroll: root.scrollWidth, sizes, outside,
    pictures: [...document.querySelectorAll("image")].length, dark: matchMedia("(prefers-color-scheme: dark)").matches,
    background: getComputedStyle(document.body).backgroundColor};
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""  # noqa: E501
# A browser's own window is never narrower than 500 pixels, a frame may be.
FRAME = """<!doctype html><title>frame</title><pre id="measured"></pre>
<script>
addEventListener("message", event => {
  document.getElementById("measured").textContent = event.data;
});
</script>
<iframe src="copy.html" style="width: WIDTHpx; height: 900px; border: 0"></iframe>
"""


NAME = "<script>console.error('in')</script>" + "x" * 300


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """As `compare` makes it."""
    path = tmp_path_factory.mktemp("small") / "page.html"
    trace = synthetic.realistic(
        num_tokens=400, num_layers=4, num_experts=8, top_k=2, seed=0, num_sequences=8
    )
    trace_lib.save(dataclasses.replace(trace, model=NAME), path.parent / "t.npz")
    words = ["compare", str(path.parent / "t.npz"), "--devices=4", "--time-limit=1", "--json"]
    assert command_line.main([*words, f"--report={path}"]) == 0
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Many layers, nodes and devices; nothing is searched."""
    path = tmp_path_factory.mktemp("large") / "page.html"
    trace = synthetic.realistic(
        num_tokens=100, num_layers=94, num_experts=64, top_k=8, seed=0, num_sequences=8
    )
    trace = dataclasses.replace(trace, model=NAME, layer_ids=tuple(range(1003, 1097)))
    sizes = (94, 64, 64)
    done = build.Done(
        trace=trace,
        judge=Problem(trace, topology.nodes_by_devices(8, 64), "seconds", "hierarchical"),
        held_out=True,
        planned=trace,
        before=Placement.contiguous(*sizes),
        after=Placement.from_device_LE(baselines.random(*sizes, seed=0), 64),
        before_name="contiguous",
        seed=0,
        command="python -m " + "moe_jax" * 200,
    )
    page.write(build.page(done), path)
    return path


def browse(path, folder, width: int, *more: str) -> subprocess.CompletedProcess:
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
        f"--window-size={width},900",
        *more,
        path.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def measured(path, folder, width: int, *more: str) -> dict:
    text = path.read_text(encoding="utf-8")
    policy = str(markup.text(page.POLICY))
    assert policy in text
    copy = text.replace(policy, "").replace("</head>", MEASURE + "</head>")
    (folder / "copy.html").write_text(copy, "utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)), "utf-8")
    done = browse(frame, folder, 1500, "--dump-dom", "--virtual-time-budget=5000", *more)
    answer = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert answer, done.stderr
    assert answer[1], "the page did not answer"
    return json.loads(html.unescape(answer[1]))


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", ["small", "large"])
def test_it_fits_and_can_be_read(name, request, tmp_path, width):
    found = measured(request.getfixturevalue(name), tmp_path, width)
    assert found["inner"] == width
    assert found["scroll"] <= found["inner"]
    assert min(found["sizes"].values()) >= SMALLEST, found["sizes"]
    assert {"p", "td", "text", "h2", "summary"} <= set(found["sizes"])
    assert found["outside"] == []
    assert found["pictures"] == 2


def test_it_follows_light_and_dark(small, tmp_path):
    light = measured(small, tmp_path, 400, "--blink-settings=preferredColorScheme=1")
    dark = measured(small, tmp_path, 400, "--blink-settings=preferredColorScheme=0")
    assert (light["dark"], dark["dark"]) == (False, True)
    assert light["background"] != dark["background"]


@pytest.mark.parametrize("width", [400, 1400])
def test_the_console_stays_empty_and_something_is_drawn(small, tmp_path, width):
    picture = tmp_path / "page.png"
    done = browse(small, tmp_path, width, f"--screenshot={picture}")
    assert "CONSOLE" not in done.stderr
    assert struct.unpack(">I", picture.read_bytes()[16:20]) == (width,)
    assert len(picture.read_bytes()) > 20_000


def test_the_console_would_be_seen(small, tmp_path):
    path = tmp_path / "loud.html"
    path.write_text("<script>console.error('loud')</script>", "utf-8")
    assert "CONSOLE" in browse(path, tmp_path, 400, "--dump-dom").stderr
