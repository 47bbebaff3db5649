"""metrics.jsonl and the output of `compare`: what is missing leaves a gap, nothing is made up."""

import json

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import __main__ as placement_command
from moe_jax.routing import trace
from moe_jax.sim import comparison, curves


def read_curves(tmp_path, *lines):
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    return curves.read(tmp_path / "metrics.jsonl")


def test_curves_keep_the_last_of_a_repeated_step_and_order_by_step(tmp_path):
    read = read_curves(
        tmp_path,
        '{"header": true, "unigram_loss": 3.5}',
        '{"step": 2, "loss": 2.0, "heldout_loss": 2.25}',
        '{"step": 1, "loss": 4.0, "heldout_loss": 4.25}',
        '{"step": 2, "loss": 1.5}',
        '{"step": 3, "loss": NaN}',
        '{"step": 4}',
        '{"step": 5, "lo',
    )
    assert list(read.train.items()) == [(1, 4.0), (2, 1.5)]
    assert read.heldout == {1: 4.25, 2: 2.25}
    assert read.last_heldout == 2.25
    assert read.unigram == 3.5


def test_whole_numbers_that_are_no_floats_are_gaps(tmp_path):
    digits = "9" * 500
    lines = ['{"step": 1, "loss": 4.0}', f'{{"step": 2, "loss": {digits}}}']
    assert read_curves(tmp_path, *lines, f'{{"step": {digits}, "loss": 3.0}}').train == {1: 4.0}
    printed = {"methods": [{"name": "a", "rows": {"exchange": 10**500}}]}
    (tmp_path / "compare.json").write_text(json.dumps(printed))
    assert comparison.read(tmp_path / "compare.json").rows == [("a", "-", "-", "-", "-", "-")]


def test_curves_without_header_or_heldout(tmp_path):
    read = read_curves(tmp_path, '{"step": 1, "loss": 4.0}', "")
    assert read.unigram is None
    assert read.last_heldout is None


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{}"], "no step in it has a loss"),
        (['{"step": 1, "lo', '{"step": 2, "loss": 1.0}'], "line 1"),
        (['{"step": 1, "loss": 1.0}', "[]", ""], "line 2"),
    ],
)
def test_bad_metrics_are_refused(tmp_path, lines, words):
    with pytest.raises(Refused, match=words):
        read_curves(tmp_path, *lines)


EVIDENCE = {
    "rows": {"exchange": {"value": 2.5, "low": 2.25, "high": 2.75}},
    "load_mean": {"value": 1.125},
}


@pytest.mark.parametrize(
    "printed",
    [
        {"methods": [{"name": "greedy", **EVIDENCE}]},
        {"seconds": 3, "placements": {"greedy": {"held_out": EVIDENCE}}},
        {"greedy": EVIDENCE},
        [{"method": "greedy", "held_out": EVIDENCE, "seconds": 1.0}],
    ],
)
def test_methods_are_found_where_they_are(tmp_path, printed):
    (tmp_path / "compare.json").write_text(json.dumps(printed))
    table = comparison.read(tmp_path / "compare.json")
    assert table.rows == [("greedy", "-", "2.500 [2.25, 2.75]", "+0.0 %", "1.125", "-")]
    assert len(table.head) == len(table.rows[0])


def test_changes_are_from_the_first_method(tmp_path):
    printed = {
        "objective_name": "seconds",
        "unit": "s",
        "dispatch": "exchange",
        "methods": [
            {"name": "first", "held_out_objective": 0.00125, "held_out": {"rows": {"exchange": 2}}},
            {"name": "second", "held_out": {"rows": {"exchange": 1.5}, **LOAD}},
            {"name": "third", "held_out": {"rows": {"coherent": 1.5}}},
        ],
    }
    (tmp_path / "compare.json").write_text(json.dumps(printed))
    table = comparison.read(tmp_path / "compare.json")
    assert table.rows == [
        ("first", "0.001250", "2.000", "+0.0 %", "-", "-"),
        ("second", "-", "1.500", "-25.0 %", "1.000", "2.000"),
        ("third", "-", "-", "-", "-", "-"),
    ]
    assert "Planned for the objective 'seconds' (s), dispatch exchange;" in table.notes[0]


LOAD = {"load_max_over_mean": {"mean": 1, "worst": 2}}


def test_what_the_compare_command_prints_is_understood(tmp_path, capsys):
    rng = np.random.default_rng(0)
    ids_TLK = rng.permuted(np.tile(np.arange(8, dtype=np.uint8), (40, 2, 1)), axis=2)[..., :2]
    trace.save(trace.Trace(ids_TLK, 8, np.full(4, 10)), tmp_path / "trace.npz")
    command = ["compare", f"{tmp_path}/trace.npz", "--devices=4", "--json"]
    assert placement_command.main(command) == 0
    (tmp_path / "compare.json").write_text(capsys.readouterr().out)
    table = comparison.read(tmp_path / "compare.json")
    names = [row[0] for row in table.rows]
    for part in ("contiguous", "random", "EPLB", "greedy", "ILP"):
        assert any(part in name for name in names)
    assert all("-" not in row[1:3] and "-" not in row[4:] for row in table.rows)


def test_a_comparison_without_methods_says_so(tmp_path):
    (tmp_path / "compare.json").write_text('{"nothing": 1}')
    table = comparison.read(tmp_path / "compare.json")
    assert table.rows == []
    assert "no method" in table.notes[0]


def test_the_answer_of_another_command_is_no_comparison(case, capsys):
    """Of `homes`: its rules have `rows`, too, of other things."""
    rule = {"rule": "prefill 16", "rows": {"before": {"value": 2.8}, "after": {"value": 2.7}}}
    path = case.folder / "homes.json"
    path.write_text(json.dumps({"plan_digest": "0", "rules": [rule, rule]}))
    assert case.run(f"--compare={path}") == 0
    text = capsys.readouterr().out
    assert "it is no answer of" in text
    assert "on held-out text" not in text
    html = (case.folder / "out" / "report.html").read_text()
    assert "it is no answer of" in html
    assert "rows, exchange" not in html


def test_a_comparison_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "compare.json").write_text("contiguous 1.5")
    with pytest.raises(Refused, match="--compare"):
        comparison.read(tmp_path / "compare.json")
