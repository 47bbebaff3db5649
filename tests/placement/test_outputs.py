"""What the commands write: over no input, over one another, in the place of nothing but files."""

import os

import pytest

from moe_jax.placement import compare
from moe_jax.placement.plan import Placement, Plan
from tests.placement.test_commands import run

LIES, SAME = "lies in the folder that is the ", "is the {} as well"
TAKEN = {  # words, field, rule
    "solve, trace": ("solve t.npz --out=t.npz", "out", SAME.format("trace")),
    "solve, a trace by another name": ("solve t.npz --out=link", "out", SAME.format("trace")),
    "solve, the page": ("solve t.npz --out=new --report=new", "report", SAME.format("out")),
    "solve, pins": ("solve t.npz --pin=pins --out=pins", "out", SAME.format("pin")),
    "solve, topology": (
        "solve t.npz --topology=m.json --out=m.json",
        *("out", SAME.format("topology")),
    ),
    "solve, topology by its name": (
        "solve t.npz --topology=mine --out=configs/topology/mine.json",
        *("out", SAME.format("topology")),
    ),
    "solve, a new file of a folder": ("solve ranks --out=ranks/p.json", "out", LIES + "trace"),
    "homes, trace": ("homes t.npz --out=t.npz", "out", SAME.format("trace")),
    "homes, the plan": ("homes t.npz --out=new --out-plan=./new", "out_plan", SAME.format("out")),
    "homes, its plan": ("homes t.npz --plan=p.json --out=p.json", "out", SAME.format("plan")),
    "verdict, trace": ("verdict t.npz --out=t.npz", "out", SAME.format("trace")),
    "compare, trace": ("compare t.npz --report=t.npz", "report", SAME.format("trace")),
    "compare, plans over a topology": (
        "compare t.npz --topology=d/m.json --out-plans=d",
        *("out_plans", "is or holds the topology"),
    ),
    "compare, plans and the page": (
        "compare t.npz --out-plans=new --report=new",
        *("out_plans", "is or holds the report"),
    ),
    "compare, plans beside the page": (
        "compare t.npz --out-plans=d --report=d/greedy.json",
        *("out_plans", "is or holds the report"),
    ),
    "convert": ("convert p.json ./p.json --format=sglang", "out", SAME.format("in")),
    "convert, a file of a folder": ("convert ranks ranks/0.pt", "out", LIES + "in"),
}
FILES = ("pins", "m.json", "p.json", "ranks/0.pt", "d/m.json", "configs/topology/mine.json")


@pytest.mark.parametrize("name", TAKEN)
def test_outputs_replace_no_input_and_not_one_another(
    name, trace_path, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("t.npz")
    for other in FILES:
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("0:0:0")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    words, field, rule = TAKEN[name]
    assert run(*words.split()) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"refused: {field} = ")
    assert f": {rule}. Choose another." in said
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_the_name_of_a_machine_is_no_folder(trace_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "box2x4").mkdir()
    words = ("solve", trace_path, "--topology=box2x4", "--out=box2x4/p.json", "--time-limit=0")
    assert [run(*words), run(*words)] == [0, 0]


def test_a_plan_takes_the_place_of_the_one_that_it_began_with(trace_path, tmp_path, capsys):
    plan = tmp_path / "p.json"
    Plan(Placement.contiguous(3, 8, 4)).write(plan)
    words = (trace_path, "--devices=4", "--time-limit=0")
    assert run("solve", *words, f"--previous={plan}", f"--out={plan}") == 0
    assert run("verdict", *words, f"--before={plan}", f"--out={plan}") == 0
    assert run("homes", *words, f"--plan={plan}", f"--out-plan={plan}") == 0
    assert Plan.read(plan).provenance["homes"]


@pytest.mark.parametrize("command", ["solve", "homes"])
def test_an_output_takes_the_place_of_no_device(command, trace_path, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert run(command, trace_path, "--devices=4", f"--out={tmp_path / 'pipe'}") == 1
    assert "pipe': cannot be written (is no regular file)" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "pipe", trace_path]


@pytest.mark.parametrize("option", ["solve --out", "verdict --report", "compare --out-plans"])
def test_a_refused_command_leaves_no_folders(option, tmp_path, capsys):
    command, option = option.split()
    words = [command, tmp_path / "none.npz", "--devices=4", f"{option}={tmp_path}/new/er/p"]
    assert run(*words) == 1
    assert "the file does not exist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["t.npz", "t.npz/plans", "pipe"])
def test_compare_refuses_a_folder_of_plans_before_it_plans(place, trace_path, monkeypatch, capsys):
    monkeypatch.chdir(trace_path.parent)
    monkeypatch.setattr(compare, "methods", pytest.fail)
    os.mkfifo("pipe")
    assert run("compare", trace_path, "--devices=4", f"--out-plans={place}") == 1
    assert capsys.readouterr().err.startswith(f"refused: out_plans = '{place}")
