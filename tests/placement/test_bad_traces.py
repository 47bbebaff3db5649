"""Bad input through the command line: one line that names the entry, the rule and the way out.

Where a message offers a way out (the nearest number of devices, the smallest cap), the tests take
it and see that it works.
"""

import itertools
import json
import re

import numpy as np
import pytest

from moe_jax.placement import __main__ as command_line
from moe_jax.placement.plan import Placement, Plan
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace

META = {"format": "moe_jax.trace", "version": 1, "num_experts": 8}


def run(*words) -> int:
    return command_line.main([str(word) for word in words])


def trace() -> Trace:
    return synthetic.realistic(
        num_tokens=240, num_layers=3, num_experts=8, top_k=2, seed=0, num_sequences=6
    )


def save(path, ids=None, seq_len=None, **more) -> None:
    ids = trace().expert_ids_TLK if ids is None else ids
    seq_len = trace().seq_len if seq_len is None else seq_len
    np.savez(path, expert_ids=ids, seq_len=seq_len, **more)


def out_of_range(path) -> None:
    ids = trace().expert_ids_TLK.copy()
    ids[7, 1, 0] = 9
    save(path, ids, meta=np.array(json.dumps(META)))


def twice(path) -> None:
    ids = trace().expert_ids_TLK.copy()
    ids[5, 2] = 3
    save(path, ids)


def not_a_number(path) -> None:
    weights = np.zeros(trace().expert_ids_TLK.shape, np.float16)
    weights[3, 0, 1] = np.nan
    save(path, expert_weights=weights)


def ragged_layers(path) -> None:
    path.write_text(json.dumps({"topk_ids_of_layer": [[[0, 1], [2, 3]], [[0, 1]]]}))


def ragged_records(path) -> None:
    lines = [
        {"step": 0, "rank": 0, "layer": layer, "num_tokens": layer + 1, "top_indices": ids}
        for layer, ids in enumerate([[[0]], [[0], [1]]])
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def objects(path) -> None:
    save(path, np.array([[[0, 1]], [[0]]], object))


def weights_of_another_shape(path) -> None:
    save(path, expert_weights=np.zeros((240, 3, 1), np.float16))


def lengths_disagree(path) -> None:
    save(path, seq_len=np.array([100, 100]))


def no_token(path) -> None:
    save(path, np.zeros((0, 3, 2), np.uint8), np.zeros(0, np.int32))


def no_expert(path) -> None:
    save(path, np.full((240, 3, 2), 255, np.uint8))


def no_record(path) -> None:
    path.write_text('{"records": []}')


def no_line(path) -> None:
    path.write_text("")


def not_a_number_json(path) -> None:
    path.write_text('{"topk_ids_of_layer": [[[NaN, 1]]]}')


# what it is -> (writer, file name, part of the message)
BAD = {
    "experts out of range": (out_of_range, "t.npz", r"expert_ids\[7\]\[1\]\[0\] = 9.*0 to 7"),
    "an expert twice": (twice, "t.npz", r"expert_ids\[5\]\[2\]\[1\] = 3.*once per layer"),
    "NaN weights": (not_a_number, "t.npz", "expert_weights = 'NaN or infinite'"),
    "NaN ids": (not_a_number_json, "t.json", "NaN is not a number"),
    "ragged layers": (ragged_layers, "t.json", r"topk_ids_of_layer\[1\] = '1 tokens'"),
    "ragged layers of a step": (ragged_records, "t.jsonl", "all layers see the same tokens"),
    "ragged arrays": (objects, "t.npz", "pickled objects are never loaded"),
    "weights of another shape": (weights_of_another_shape, "t.npz", "of the shape of expert_ids"),
    "lengths that disagree": (lengths_disagree, "t.npz", r"sum\(seq_len\) = 200"),
    "no token": (no_token, "t.npz", "an empty trace has nothing to plan on"),
    "no expert": (no_expert, "t.npz", "expert_ids = 255: no token of the trace has an expert"),
    "no record": (no_record, "t.json", "Record at least one token"),
    "no line": (no_line, "t.jsonl", "no token is recorded"),
}
COMMANDS = ("solve", "compare", "verdict", "homes", "evaluate")


@pytest.mark.filterwarnings("ignore::numpy.exceptions.VisibleDeprecationWarning")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", BAD)
def test_every_command_refuses_a_bad_trace_in_one_line(
    name, command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write, file_name, message = BAD[name]
    write(tmp_path / file_name)
    Plan(Placement.contiguous(3, 8, 4)).write("plan.json")
    words = {"solve": ["--devices=4", "--out=p.json"], "evaluate": ["plan.json"]}
    assert run(command, file_name, *words.get(command, ["--devices=4"])) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"refused: .*{message}.*\n", captured.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([file_name, "plan.json"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compare", "sequences that were not planned on"),
        ("verdict", "no held-out half"),
        ("homes", "judged on sequences of their own"),
    ],
)
def test_one_sequence_is_planned_on_and_not_judged(command, message, tmp_path, capsys):
    trace_lib.save(trace().select(np.array([0])), tmp_path / "t.npz")
    words = (tmp_path / "t.npz", "--devices=4", "--time-limit=1")
    assert run("solve", *words, f"--out={tmp_path / 'p.json'}") == 0
    captured = capsys.readouterr()
    assert "no held-out half" in captured.err
    assert "Judged" not in captured.out
    assert "Planned on all of the sequences: 1" in captured.out
    assert Plan.read(tmp_path / "p.json").provenance["planned_on"].startswith("all of the")
    assert run(command, *words) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--devices=3"], "devices"),
        (["--devices=5"], "devices"),
        (["--devices=4", "--slots=9"], "slots"),
        (["--devices=4", "--slots=15"], "slots"),
        (["--devices=4", "--nodes=3"], "nodes"),
    ],
)
def test_what_does_not_divide_is_answered_with_what_does(words, option, tmp_path, capsys):
    trace_lib.save(trace(), tmp_path / "t.npz")
    fixed = ("solve", tmp_path / "t.npz", f"--out={tmp_path / 'p.json'}", "--time-limit=0")
    assert run(*fixed, *words) == 1
    error = capsys.readouterr().err
    offered = [int(number) for number in re.findall(r"\d+", error.split("Use ")[1])]
    asked = int(words[-1].split("=")[1])
    for number in offered:
        assert run(*fixed, *words[:-1], f"--{option}={number}") == 0
    fit = {"devices": (1, 2, 4, 8), "slots": range(8, 33, 4), "nodes": (1, 2, 4)}[option]
    assert min(abs(n - asked) for n in offered) == min(abs(n - asked) for n in fit)


def least_caps(load_LE: np.ndarray, devices: int) -> list[float]:
    """The smallest cap of every layer, by trying every placement of its experts."""
    least = []
    size = load_LE.shape[1] // devices
    for load_E in load_LE:
        best = np.inf
        for order in itertools.permutations(range(len(load_E))):
            groups = np.array(order).reshape(devices, size)
            if (np.sort(groups, axis=1) == groups).all() and (np.diff(groups[:, 0]) > 0).all():
                best = min(best, load_E[groups].sum(axis=1).max())
        least.append(best / (load_E.sum() / devices))
    return least


@pytest.mark.parametrize("seed", range(5))
def test_a_cap_that_cannot_be_met_is_answered_with_the_smallest_that_can(seed, tmp_path, capsys):
    made = synthetic.realistic(
        num_tokens=60, num_layers=3, num_experts=6, top_k=2, seed=seed, num_sequences=1
    )
    trace_lib.save(Trace(made.expert_ids_TLK, 6, made.seq_len, layer_ids=(3, 4, 6)),
                   tmp_path / "t.npz")  # fmt: skip
    load_LE = np.stack(
        [np.bincount(made.expert_ids_TLK[:, n].ravel(), minlength=6) for n in (0, 1, 2)]
    )
    least_L = least_caps(load_LE, 3)
    fixed = ("solve", tmp_path / "t.npz", f"--out={tmp_path / 'p.json'}", "--devices=3",
             "--time-limit=1")  # fmt: skip
    assert run(*fixed, f"--load-cap={max(least_L) - 1e-3:.6f}") == 1
    error = capsys.readouterr().err
    assert f"layer {(3, 4, 6)[int(np.argmax(least_L))]} was not balanced better than" in error
    (offered,) = re.findall(r"Use ([\d.]+) or more", error)
    assert max(least_L) <= float(offered) <= max(least_L) + 1.01e-4
    assert run(*fixed, f"--load-cap={offered}") == 0


@pytest.mark.parametrize("objective", ["seconds", "rows", "exflow", "load"])
def test_time_limit_zero_is_the_greedy_plan_and_says_so(objective, tmp_path, capsys):
    trace_lib.save(trace(), tmp_path / "t.npz")
    words = (tmp_path / "t.npz", "--devices=4", "--time-limit=0", f"--objective={objective}")
    assert run("solve", *words, f"--out={tmp_path / 'p.json'}") == 0
    assert "time limit 0: this is the greedy placement" in capsys.readouterr().out
    assert run("compare", *words) == 0
    assert "time limit 0: this is the greedy placement" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more", [["--slots=12"], ["--pin=0:1:2"], ["--slots=12", "--pin=0:1:2"]], ids=" ".join
)
def test_time_limit_zero_says_so_within_limits_too(more, tmp_path, capsys):
    trace_lib.save(trace(), tmp_path / "t.npz")
    words = (tmp_path / "t.npz", "--devices=4", "--time-limit=0", f"--out={tmp_path / 'p.json'}")
    assert run("solve", *words, *more) == 0
    assert "time limit 0: this is where the search would have begun" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["nan", "inf", "-1"])
@pytest.mark.parametrize("command", ["solve", "compare", "verdict", "homes"])
def test_time_limits_that_are_none_are_refused(command, text, tmp_path, capsys):
    trace_lib.save(trace(), tmp_path / "t.npz")
    words = [f"--out={tmp_path / 'p.json'}"] if command == "solve" else []
    assert run(command, tmp_path / "t.npz", "--devices=4", f"--time-limit={text}", *words) == 1
    assert "refused: time_limit" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()
