"""The first command of the README, at toy size: every line of it, in processes of their own.

Slow, as .ci/run runs the command at its real size and reads what it says.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_quickstart_smoke(tmp_path):
    run = tmp_path / "run"
    command = [
        "make",
        "quickstart-commands",
        f"RUN={run}",
        "CONFIG=configs/quickstart.py:smoke",
        "SEARCH=2",
        f"BIN={pathlib.Path(sys.executable).parent}",
    ]
    # without pytest's warnings-are-errors and this process' devices
    environment = {key: value for key, value in os.environ.items() if key != "MAKEFLAGS"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]

    for step in ("train.py", "infer.py", "placement compare", "placement apply", "sim.report"):
        assert step in ended.stdout  # echoed, so that people can repeat it
    assert re.search(r"Bit-identical answers: yes, in all [\d,]+ entries", ended.stdout)
    assert re.search(r"Measured = predicted rows: yes, in all [\d,]+ entries", ended.stdout)

    made = ["report.html", "plots/loss.png", "plots/traffic.png", "plots/load.png", "plan.json"]
    for name in [*made, "trace.npz", "metrics.jsonl", "placed/checkpoints/30/plan.json"]:
        assert (run / name).stat().st_size > 0
        assert name not in made[:4] or str(run / name) in ended.stdout

    compared = json.loads((run / "compare.json").read_text())
    names = [method["name"] for method in compared["methods"]]
    assert names[0] == "contiguous"
    assert any("random" in name for name in names)
    assert any("EPLB" in name for name in names)
    assert names[-1] == "greedy + ILP"
