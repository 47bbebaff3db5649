"""The page: figures against the oracles, markup that parses, names that cannot become tags."""

import dataclasses
import html.parser
import json
import re
import struct
import zlib

import numpy as np
import pytest

from moe_jax.placement import __main__ as command_line
from moe_jax.placement import baselines, cost, seconds, topology
from moe_jax.placement.evidence import Figure
from moe_jax.placement.paired import Gain
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import UNITS, Problem
from moe_jax.placement.report import clock, dots, headline, markup, page, parts, png, svg, view
from moe_jax.placement.report.markup import element
from moe_jax.routing import affinity, synthetic
from moe_jax.routing import trace as trace_lib

SECTIONS = ["figures", "traffic", "load", "time", "transitions", "search", "origin"]
NASTY = "<script>alert('x')</script>\"&\ud800\u202e\x00" + "long " * 200
MACHINES = {
    "flat": topology.flat(4),
    "nodes": topology.nodes_by_devices(2, 4),
    "pairs": topology.nodes_by_devices(4, 8),
}


def made_trace(**changes):
    sizes = {"num_tokens": 500, "num_layers": 4, "num_experts": 8, "top_k": 3, "seed": 3}
    return synthetic.realistic(**(sizes | changes), num_sequences=12)


def random_placement(trace, devices: int, seed: int) -> Placement:
    sizes = (trace.num_layers, trace.num_experts, devices)
    return Placement.from_device_LE(baselines.random(*sizes, seed=seed), devices)


class Reader(html.parser.HTMLParser):
    """Checks the nesting while it reads; keeps what the tests ask for."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.tags, self.values, self.text = [], [], [], [], []
        self.pictures = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"twice the same attribute: {attrs}"
        self.tags.append(tag)
        self.values += [value for value in attributes.values() if value]
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "svg":
            self.pictures.append(attributes)
        if tag not in markup.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A page of `solve` about a trace with nasty names, the plan and what was printed."""
    folder = tmp_path_factory.mktemp("page")
    trace = dataclasses.replace(made_trace(), model=NASTY, corpus=NASTY, layer_ids=(3, 4, 5, 7))
    trace_lib.save(trace, folder / "t.npz")
    words = ["solve", folder / "t.npz", "--devices=4", "--nodes=2", "--dispatch=hierarchical"]
    files = [f"--out={folder / 'p.json'}", f"--report={folder / 'page.html'}", "--time-limit=1"]
    assert command_line.main([str(word) for word in (*words, *files, "--json")]) == 0
    return folder


@pytest.fixture(scope="module")
def text(solved) -> str:
    return (solved / "page.html").read_text(encoding="utf-8")


def test_the_page_parses_and_has_every_figure(text):
    reader = Reader(text)
    assert reader.ids == SECTIONS
    assert reader.open == []
    assert text.count("<details>") == 5  # numbers of every figure but the table itself
    labelled = [picture["aria-label"] for picture in reader.pictures]
    assert all(picture["role"] == "img" for picture in reader.pictures)
    assert len([label for label in labelled if label.startswith("Inside a node, ")]) == 2
    assert len([label for label in labelled if label.startswith("Between nodes, ")]) == 2
    assert text.count("<svg") == text.count("</svg>") == len(labelled)


def test_it_needs_nothing_else_and_runs_nothing(text):
    reader = Reader(text)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(reader.tags)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    assert not any(re.match(r"on[a-z]+", tag) for tag in re.findall(r" (on[a-z]+)=", text))
    for value in reader.values:
        assert (
            "data:" not in value
            or value.startswith("data:image/png;base64,")
            or (value == page.POLICY)
        )


def test_names_of_a_trace_stay_text(text):
    reader = Reader(text)
    assert "<script>alert('x')</script>\"&\ufffd\ufffd\ufffd" in "".join(reader.text)
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&quot;&amp;" in text
    assert "long " * 100 not in text  # cut where it is too long


def test_nothing_but_this_package_makes_markup():
    nasty = "\"><img src=x onerror='y'>"
    made = element("p", nasty, title=nasty, data_x=1.5, skipped=None)
    quoted = "&quot;&gt;&lt;img src=x onerror=&#x27;y&#x27;&gt;"
    assert made == f'<p title="{quoted}" data-x="1.5">{quoted}</p>'
    assert element("div", made, element("br")) == f"<div>{made}<br></div>"
    table = Reader(parts.table(nasty, [nasty], [[nasty, nasty]]))
    assert table.tags.count("img") == 0
    assert table.text.count(nasty) == 4


def test_the_plan_on_the_page_is_the_one_that_was_written(solved, text):
    plan = Plan.read(solved / "p.json")
    assert plan.digest in text
    assert trace_lib.load(solved / "t.npz").digest in text
    assert "python -m moe_jax.placement solve" in text
    for layer in (3, 4, 5, 7):  # the model's own numbers
        assert f">layer {layer}: compute" in text


@pytest.mark.parametrize("dispatch", cost.DISPATCHES)
@pytest.mark.parametrize("machine", MACHINES)
def test_phases_add_up_to_the_seconds_of_the_layer(dispatch, machine):
    trace, machine = made_trace(), MACHINES[machine]
    problem = Problem(trace, machine, "seconds", dispatch)
    placement = random_placement(trace, machine.num_devices, 5)
    each = machine.devices_per_node
    rows = cost.rows(trace.expert_ids_TLK, placement, dispatch, devices_per_node=each)
    load_LM = cost.computed_LM(trace.expert_ids_TLK, placement)
    rest = (machine, problem.work, dispatch, trace.num_tokens)
    parts_of = clock.clock(rows, load_LM, *rest)
    whole_L = seconds.seconds(rows, load_LM, *rest).total_L
    np.testing.assert_allclose(parts_of.total_L, whole_L, rtol=1e-12)
    assert (parts_of.waiting_L >= 0).all()
    assert parts_of.total_L.mean() == pytest.approx(problem.value_of(placement), rel=1e-12)
    # the slowest device is what the layer takes; in two hops each hop has its own slowest
    bytes_LMM = rows.dispatch_LMM * 3.0
    own_L = clock.own_seconds(bytes_LMM, machine, dispatch).max(axis=1)
    all_L = seconds.exchange_seconds(bytes_LMM, machine, dispatch == "hierarchical")
    if dispatch == "hierarchical":
        assert (own_L <= all_L * (1 + 1e-12)).all()
    else:
        np.testing.assert_allclose(own_L, all_L, rtol=1e-12)


@pytest.mark.parametrize("dispatch", ["exchange", "coherent"])
def test_devices_that_are_even_do_not_wait(dispatch):
    machine, work = MACHINES["flat"], seconds.Work()
    rows_LMM = np.where(np.eye(4, dtype=bool), 0, 7)[None]
    even = clock.clock(
        cost.Rows(rows_LMM, rows_LMM), np.full((1, 4), 30), machine, work, dispatch, 40
    )
    assert even.waiting_L == pytest.approx(0, abs=1e-18)
    # by hand: device 0 has twice the rows to compute, so the others wait half of its time
    load_LM = np.array([[20, 10, 10, 10]])
    uneven = clock.clock(
        cost.Rows(0 * rows_LMM, 0 * rows_LMM), load_LM, machine, work, "exchange", 50
    )
    full = seconds.compute_seconds(load_LM, machine, work, 50)[0, 0]
    assert uneven.exchange_L == 0
    assert uneven.waiting_L == pytest.approx(full * 3 / 8)
    assert uneven.compute_L == pytest.approx(full * 5 / 8)


@pytest.mark.parametrize("slots", [None, 12])
@pytest.mark.parametrize("dispatch", ["exchange", "coherent", "shuffled"])
def test_what_is_drawn_is_what_the_oracles_count(dispatch, slots):
    trace = made_trace()
    judge = Problem(trace, MACHINES["nodes"], "rows", dispatch)
    placement = random_placement(trace, 4, 1)
    if slots:
        more_LP = placement.physical_to_logical_LP.reshape(4, 4, 2)
        copies_LP = np.concatenate([more_LP, np.roll(more_LP[:, :, :1], 1, axis=1)], axis=2)
        placement = Placement(copies_LP.reshape(4, 12), 8, 4)
    seen = view.view("after", judge, placement)
    figures = seen.figures
    assert seen.traffic_MM.sum() / view.PER == pytest.approx(figures.rows[dispatch].value)
    over_L = seen.load_over_mean_LM.max(axis=1)
    assert over_L.mean() == pytest.approx(figures.load_mean.value)
    assert over_L.max() == pytest.approx(figures.load_worst.value)
    np.testing.assert_allclose(seen.flow_JMM.sum(axis=(1, 2)), 1.0)
    assert seen.stays_J.mean() == pytest.approx(figures.top1.value)
    if not slots:  # token by token
        device_LE, ids_TL = placement.device_LE, trace.expert_ids_TLK[:, :, 0]
        expected_MM = np.zeros((4, 4))
        for token in ids_TL:
            expected_MM[device_LE[1, token[1]], device_LE[2, token[2]]] += 1 / len(ids_TL)
        np.testing.assert_allclose(seen.flow_JMM[1], expected_MM)
        assert (np.diff(device_LE[2][seen.order_LE[2]]) >= 0).all()


def test_the_typical_pair_is_the_middle_one():
    seen = view.view("after", Problem(made_trace(), MACHINES["flat"], "rows"), random_placement(
        made_trace(), 4, 2
    ))  # fmt: skip
    pair = view.typical_pair(seen)
    assert seen.stays_J[pair] == np.median(seen.stays_J)


def test_dots_are_the_transitions_in_the_order_of_the_devices():
    trace = made_trace(num_experts=160, top_k=2)
    problem = Problem(trace, MACHINES["flat"], "rows")
    seen = view.view("after", problem, random_placement(trace, 4, 2))
    transition_EE = affinity.transitions_top1_LEE(trace)[1]
    pair = dots.Pair(1, ("1", "2"), transition_EE)
    assert pair.each == 2
    dots_PP = pair.dots(seen)
    assert dots_PP.shape == (80, 80)
    device = random_placement(trace, 4, 2).device_LE
    blocks = dots_PP.reshape(4, 20, 4, 20).sum(axis=(1, 3))
    np.testing.assert_allclose(blocks / transition_EE.sum(), seen.flow_JMM[1])
    first, second = seen.order_LE[1][:2], seen.order_LE[2][-2:]
    assert dots_PP[0, -1] == transition_EE[np.ix_(first, second)].sum()
    assert set(device[1][first]) == {0}


def drawn_borders(placement, **changes) -> list[set[str]]:
    """Of the dots of both layers, down and across: where lines stand."""
    trace, devices = made_trace(num_layers=2, top_k=2, **changes), placement.num_devices
    seen = view.view("after", Problem(trace, topology.flat(devices), "rows"), placement)
    pair = dots.Pair(0, ("0", "1"), affinity.transitions_top1_LEE(trace)[0])
    text = str(dots.figure(seen, seen, pair, parts.Groups.of(devices)))
    lines = [dict(re.findall(r'(\w+)="(\S+)"', line)) for line in re.findall("<line[^>]*>", text)]
    down = {line["y1"] for line in lines if line["y1"] == line["y2"]}
    return [down, {line["x1"] for line in lines if line["x1"] == line["x2"]}]


def test_lines_stand_where_the_experts_of_a_device_end():
    def at(begin, dots_of, borders):
        return {markup.number(begin + dots.SIDE * border / dots_of) for border in borders}

    copies_LP = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 3], [0, 1, 2, 0, 1, 3, 3, 4, 5]])
    down, across = drawn_borders(Placement(copies_LP, 6, 3), num_experts=6)
    assert down == at(dots.TOP, 6, [0, 3, 6])  # none of the third device's is a first copy
    assert across == at(dots.LEFT, 6, [0, 3, 4, 6])
    down, across = drawn_borders(Placement.contiguous(2, 129, 3), num_experts=129)
    assert down == at(dots.TOP, 65, [0, 21.5, 43, 65])  # two experts a dot, one in the last
    assert across == at(dots.LEFT, 65, [0, 21.5, 43, 65])


def test_from_nothing_to_something_is_no_standstill():
    ids_TLK = np.repeat(np.arange(80) % 8, 2).reshape(80, 2, 1).astype(np.uint8)
    trace = trace_lib.Trace(ids_TLK, 8, np.full(8, 10))  # a token's experts are the same one
    judge = Problem(trace, MACHINES["flat"], "exflow", "coherent")
    spread_LE = np.stack([np.arange(8) // 2, np.arange(8) % 4])
    plans = (Placement.contiguous(2, 8, 4), Placement.from_device_LE(spread_LE, 4))
    before, after = (view.view("one", judge, plan) for plan in plans)
    result = headline.Result(before, after, "exflow", "coherent", {}, True, judge.weighted)
    assert headline.headline(result).startswith("From 0 to 0.75 hops per token on sequences")
    gain = Gain(0.0, 0.5, Figure(-0.5, -0.6, -0.4))
    rows = dataclasses.replace(result, objective="rows", gains={"rows": gain})
    assert not headline.answer(rows)[0].startswith("No difference")
    assert headline.headline(dataclasses.replace(result, after=before)).startswith("Nothing")


def test_the_picture_is_a_png_that_others_read():
    strength = np.array([[0.0, 0.5, 1.0], [1.0, 0.25, 0.0]])
    data = png.opacity_png(strength, (1, 2, 3))
    assert data.startswith(png.SIGNATURE)
    chunks, at = {}, len(png.SIGNATURE)
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        (check,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert check == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + length
    assert list(chunks) == [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (3, 2)
    assert zlib.decompress(chunks[b"IDAT"]) == bytes([0, 0, 128, 255, 0, 255, 64, 0])
    assert chunks[b"PLTE"][:6] == bytes([1, 2, 3, 1, 2, 3])


@pytest.mark.parametrize(
    ("devices", "size", "first"), [(8, 1, "0"), (32, 1, "0"), (64, 2, "0-1"), (37, 37, "0-36")]
)
def test_many_devices_are_drawn_in_groups(devices, size, first):
    groups = parts.Groups.of(devices)
    assert (groups.size, groups.names[0]) == (size, first)
    assert len(groups.names) <= parts.MOST
    value_MM = np.arange(devices**2, dtype=float).reshape(devices, devices)
    sums_GG = groups.sums(value_MM)
    assert sums_GG.sum() == value_MM.sum()
    assert sums_GG[0, 0] == value_MM[:size, :size].sum()
    load_LM = value_MM[:2]
    assert groups.largest(load_LM)[1, 0] == load_LM[1, :size].max()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0, 2138, [0, 500, 1000, 1500, 2000]), (1.3, 1.5, None)],
)
def test_ticks_are_round(low, high, expected):
    found = svg.ticks(low, high, 5)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    if expected:
        assert found == pytest.approx(expected)


def words_for(folder, *more) -> list[str]:
    return [str(word) for word in ("solve", folder / "t.npz", "--devices=4", *more)]


CASES = {
    "replicas": (["--slots=12", "--objective=rows"], "what devices and homes hold of a token"),
    "gathered": (["--dispatch=gathered"], "moves the same rows whatever the plan"),
    "exflow": (["--objective=exflow", "--dispatch=coherent"], "transitions leave their device"),
    "load": (["--objective=load"], "The fullest device computes"),
    "greedy": (["--time-limit=0"], "Time limit 0"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_plan_has_a_page(case, tmp_path, capsys):
    trace_lib.save(made_trace(), tmp_path / "t.npz")
    options, said = CASES[case]
    files = [f"--out={tmp_path / 'p.json'}", f"--report={tmp_path / 'page.html'}"]
    assert command_line.main(words_for(tmp_path, *files, "--time-limit=1", *options)) == 0
    assert f"Wrote {tmp_path / 'page.html'}" in capsys.readouterr().out
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert Reader(written).ids == SECTIONS
    assert said in written
    assert "inf" not in re.sub(r"[a-z]*inf[a-z]+|[a-z]+inf", "", written)
    assert not re.search(r'="[^"]*nan[^"]*"', written)


def test_one_layer_and_one_sequence_still_make_a_page(tmp_path, capsys):
    trace = made_trace(num_layers=1).select(np.array([0]))
    trace_lib.save(trace, tmp_path / "t.npz")
    files = [f"--out={tmp_path / 'p.json'}", f"--report={tmp_path / 'page.html'}"]
    assert command_line.main(words_for(tmp_path, *files, "--time-limit=1")) == 0
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert Reader(written).ids == [key for key in SECTIONS if key != "transitions"]
    assert "Nothing was held out" in written
    capsys.readouterr()


def test_compare_adds_the_other_methods(tmp_path, capsys):
    trace_lib.save(made_trace(), tmp_path / "t.npz")
    words = ["compare", str(tmp_path / "t.npz"), "--devices=4", "--time-limit=1", "--json"]
    assert command_line.main([*words, f"--report={tmp_path / 'page.html'}"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["report"] == str(tmp_path / "page.html")
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert Reader(written).ids == ["figures", "methods", *SECTIONS[1:]]
    for method in answer["methods"]:
        assert method["name"] in written
        assert f"<td>{method['held_out_objective']:.6g}</td>" in written


def test_verdict_stands_on_its_page(tmp_path, capsys):
    trace_lib.save(made_trace(), tmp_path / "t.npz")
    Plan(random_placement(made_trace(), 4, 0)).write(tmp_path / "<b>.json")
    words = ["verdict", str(tmp_path / "t.npz"), "--devices=4", "--time-limit=1"]
    more = [f"--before={tmp_path / '<b>.json'}", f"--report={tmp_path / 'page.html'}"]
    assert command_line.main([*words, *more]) == 0
    answer = capsys.readouterr().out.split("Verdict: ")[1].split("\n")[0]
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    reader = Reader(written)
    assert reader.ids == SECTIONS
    assert f"Verdict: {answer}" in "".join(reader.text)
    assert "Before: &lt;b&gt;.json" in written
    assert command_line.main([*words, *more, "--split=name"]) == 1
    assert "report" in capsys.readouterr().err


def test_figures_that_are_weighted_say_so(tmp_path, capsys):
    trace_lib.save(made_trace(), tmp_path / "t.npz")
    words = ["compare", str(tmp_path / "t.npz"), "--devices=4", "--nodes=2", "--time-limit=1"]
    for objective, weighted in (("rows", True), ("exflow", True), ("seconds", False)):
        more = [f"--objective={objective}", "--dispatch=hierarchical"]
        assert command_line.main([*words, *more, f"--report={tmp_path / 'page.html'}"]) == 0
        written = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert ("(weighted by tier)" in written) == weighted
        assert ("everything counted alike" in written) == weighted
        assert ("The time of a layer, modelled" in written or "But the time" in written) == weighted
        unit = UNITS[objective] + (", weighted by tier" if weighted else "")
        assert f"objective {objective} ({unit}), dispatch" in capsys.readouterr().out


def test_objectives_are_weighted_where_something_goes_between_nodes_of_other_links():
    two = topology.nodes_by_devices(2, 4)
    alike = dataclasses.replace(two, slow=two.fast)
    for machine, objective, dispatch, weighted in (
        (two, "rows", "hierarchical", True),
        (two, "rows", "exchange", False),
        (alike, "rows", "hierarchical", False),
        (topology.flat(4), "exflow", "exchange", False),
    ):
        problem = Problem(made_trace(), machine, objective, dispatch)
        assert (problem.unit != UNITS[objective]) == weighted
        assert (problem.row_weight_MM.max() > 1) == weighted
    assert Problem(made_trace(), two, "exflow").unit.endswith(", weighted by tier")
    assert Problem(made_trace(), alike, "exflow").unit == UNITS["exflow"]


@pytest.mark.parametrize("page_path", ["t.npz", "p.json", ".", "t.npz/page.html"])
def test_pages_that_cannot_be_written_are_refused_before_work(page_path, tmp_path, capsys):
    trace_lib.save(made_trace(), tmp_path / "t.npz")
    files = [f"--out={tmp_path / 'p.json'}", f"--report={tmp_path / page_path}"]
    assert command_line.main(words_for(tmp_path, *files)) == 1
    assert capsys.readouterr().err.startswith("refused: report = ")
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]
