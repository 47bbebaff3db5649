"""metrics.jsonl after damage, and the figure of uneven loads."""

import json

import numpy as np
import pytest

from moe_jax import metrics

DAMAGED = [
    b'{"step": 2, "lo',
    b"3",
    b'{"x": 1}',
    b"null",
    b"\xff\xfe",
    b'{"step": "2"}',
    b"[" * 10**5,
]


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: repr(line[:9]))
def test_a_damaged_line_takes_no_other_along(line, tmp_path, capsys):
    path, good = tmp_path / "metrics.jsonl", b'{"header": true}\n{"step": 1, "loss": 0.1}\n'
    path.write_bytes(good + line + b'\n{"step": 3, "loss": 0.3}\n{"step": 4}\n')
    metrics.Writer(tmp_path, {"run": "again"}, 4).close()
    written = [json.loads(text) for text in path.read_text().splitlines()]
    assert written[0] == {"header": True, "run": "again"}
    assert written[1:] == [{"step": 1, "loss": 0.1}, {"step": 3, "loss": 0.3}]
    assert capsys.readouterr().err == f"{path}: line 3 is no row of metrics, and is left out\n"


def test_a_line_that_was_cut_off_is_nothing_to_speak_of(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"header": true}\n{"step": 1, "loss": 0.1}\n{"step": 2, "lo')
    assert metrics.read(path) == ({"header": True}, [{"step": 1, "loss": 0.1}])
    assert capsys.readouterr().err == ""


def test_few_rows_are_as_uneven_as_many():
    assert metrics.load_imbalance(np.array([[1, 0, 0, 0, 1, 0, 0, 0]]), 4) == 2.0
    assert metrics.load_imbalance(np.array([[100, 0, 0, 0, 100, 0, 0, 0]]), 4) == 2.0
    assert metrics.load_imbalance(np.array([[0] * 8, [3, 0, 0, 0, 0, 0, 0, 0]]), 4) == 2.5
