"""Large pages are asked for where the system waits to be asked, by starting again once."""

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

from moe_jax import hugepages

ROOT = pathlib.Path(__file__).resolve().parents[1]
ASKED = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
PROGRAM = """
import json, os, pathlib, sys
from absl import flags
from moe_jax import entry, hugepages

hugepages._MODE = pathlib.Path({mode!r})
WORD = flags.DEFINE_string("word", "", "")
if {traced}:
    sys.settrace(lambda *_: None)
if {privileged}:
    os.environ.pop("GLIBC_TUNABLES", None)
print("started", file=sys.stderr)
setting = os.environ.get("GLIBC_TUNABLES")
entry.run(lambda: print(json.dumps([WORD.value, os.getpid(), setting])), "")
"""


@pytest.mark.parametrize(
    ("mode", "environment", "added"),
    [
        ("always [madvise] never", {"A": "1"}, ASKED),
        ("[always] madvise never", {}, {}),
        ("always madvise [never]", {}, {}),
        (None, {}, {}),
        ("always [madvise] never", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, {}),
        ("always [madvise] never", {"GLIBC_TUNABLES": ""}, {}),
    ],
)
def test_variables(tmp_path, monkeypatch, mode, environment, added):
    file = tmp_path / "enabled"
    if mode is not None:
        file.write_text(mode + "\n")
    monkeypatch.setattr(hugepages, "_MODE", file)
    assert hugepages.variables(environment) == added


def _inherited() -> dict[str, str]:
    of_ours = {*ASKED, "MOE_JAX_STARTED_AGAIN"}
    return {name: value for name, value in os.environ.items() if name not in of_ours}


def _run(
    folder: pathlib.Path,
    *words: str,
    traced: bool = False,
    privileged: bool = False,
    **environment: str,
):
    """(starts, (the flag's value, process id, setting), process id that was started)."""
    (folder / "enabled").write_text("always [madvise] never\n")
    program = folder / "program.py"
    program.write_text(
        PROGRAM.format(mode=str(folder / "enabled"), traced=traced, privileged=privileged)
    )
    started = subprocess.Popen(
        [sys.executable, str(program), *words],
        env={**_inherited(), "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = started.communicate(timeout=60)
    assert started.returncode == (0 if out else 1), err
    return err.count("started"), json.loads(out) if out else err, started.pid


def test_a_program_starts_again_once_with_the_same_words_in_the_same_process(tmp_path):
    starts, said, pid = _run(tmp_path, "--word=a b")
    assert (starts, said) == (2, ["a b", pid, ASKED["GLIBC_TUNABLES"]])


def test_what_is_set_stays(tmp_path):
    starts, said, pid = _run(tmp_path, "--word=a", GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert (starts, said) == (1, ["a", pid, "glibc.malloc.hugetlb=0"])


def test_a_debugger_keeps_its_program(tmp_path):
    starts, said, pid = _run(tmp_path, "--word=a", traced=True)
    assert (starts, said) == (1, ["a", pid, None])


@pytest.mark.parametrize(
    ("command", "arguments", "own"),
    [
        ("python train.py --a=1", "train.py --a=1", True),
        ("python -X dev -Wignore -u train.py", "train.py", True),
        ("python -m moe_jax.train.bench --a", "/x/moe_jax/train/bench.py --a", True),
        ("python -m moe_jax.train --a", "/x/moe_jax/train/__main__.py --a", True),
        ("python - --a", "- --a", False),
        ("python /dev/stdin --a", "/dev/stdin --a", False),
        ("python -m coverage run train.py --a", "train.py --a", False),
        ("python /x/bin/coverage run train.py --a", "train.py --a", False),
        ("python -m moe_jax.train.bench", "train.py", False),
        ("python -m pytest tests", "/x/train.py --config=c.py", False),
        ("python -m pytest", "/x/train.py", False),
        ("/x/bin/pytest tests", "/x/train.py --config=c.py", False),
        ("python -u -c pass", "/x/train.py", False),
        ("", "/x/train.py", False),
    ],
)
def test_only_a_process_that_began_as_this_program(command, arguments, own, monkeypatch):
    monkeypatch.chdir(ROOT)  # train.py is a file there
    assert hugepages._began_as_this(command.split(), arguments.split()) == own


def test_a_program_within_another_process_does_not_replace_it(tmp_path):
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    program = tmp_path / "program.py"
    mode = str(tmp_path / "enabled")
    program.write_text(PROGRAM.format(mode=mode, traced=False, privileged=False))
    outer = (
        "import runpy, sys; print('began', file=sys.stderr); "
        f"sys.argv = [{str(program)!r}, '--word=a']; "
        f"runpy.run_path({str(program)!r}, run_name='__main__')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", outer],
        env={**_inherited(), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert ended.stderr.splitlines() == ["began", "started"]
    assert json.loads(ended.stdout)[::2] == ["a", None]


def test_a_program_from_a_pipe_runs(tmp_path):
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    mode = str(tmp_path / "enabled")
    ended = subprocess.run(
        [sys.executable, "-", "--word=a"],
        input=PROGRAM.format(mode=mode, traced=False, privileged=False),
        env={**_inherited(), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert json.loads(ended.stdout)[::2] == ["a", None]


def test_where_the_setting_is_taken_away_there_is_no_third_start(tmp_path):
    starts, said, pid = _run(tmp_path, "--word=a", privileged=True)
    assert (starts, said) == (2, ["a", pid, None])


def test_debuggers_of_newer_pythons_are_seen(monkeypatch):
    """They are told of by `sys.monitoring`, and not by a trace function."""
    tools = {0: None}
    monitoring = types.SimpleNamespace(DEBUGGER_ID=0, get_tool=tools.get)
    monkeypatch.setattr(sys, "monitoring", monitoring, raising=False)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    assert not hugepages._debugged()
    tools[0] = "debugpy"
    assert hugepages._debugged()


def test_a_refusal_comes_from_the_first_start(tmp_path):
    starts, error, _ = _run(tmp_path, "--wrod=a")
    assert starts == 1
    assert "did you mean --word" in error
