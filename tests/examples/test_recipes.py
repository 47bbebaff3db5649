"""The commands in examples/ parse with the programs' own flags and name a config that is valid."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPES = {"cloud_tpu_pod.sh": 32, "gke_xpk.sh": 32, "slurm.sh": 16}  # and their devices
PARSE = """
import sys, runpy
from absl import flags
program = sys.argv[1]
sys.argv = sys.argv[1:]
runpy.run_path(program, run_name="parsed")
from moe_jax import config as config_lib
from moe_jax import entry
entry._parse(sys.argv)
if "config" in flags.FLAGS and flags.FLAGS.config is not None:
    print(config_lib.from_config_dict(flags.FLAGS.config).mesh.num_devices)
"""


def commands(recipe: str) -> list[list[str]]:
    """Words of every call of train.py or infer.py, from the program's name on."""
    text = (ROOT / "examples" / recipe).read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = re.findall(r"\b(?:train|infer)\.py\b[^\"\n]*", joined)
    return [shlex.split(command) for command in found]


def parsed(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", PARSE, *words], cwd=ROOT, capture_output=True, text=True
    )


def test_every_recipe_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.sh")} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_flags_are_those_of_the_programs(recipe):
    subprocess.run(["sh", "-n", ROOT / "examples" / recipe], check=True)
    found = commands(recipe)
    assert found[0][0] == "train.py"
    for words in found:
        assert "--distributed=auto" in words
        done = parsed(words)
        assert done.returncode == 0, done.stderr
        if words[0] == "train.py":  # infer.py has the mesh of the run
            assert int(done.stdout) == RECIPES[recipe]


def test_a_wrong_flag_is_seen():
    done = parsed(["train.py", "--config=configs/moe_100m.py", "--distribute=auto"])
    assert done.returncode != 0
    assert "--distribute" in done.stderr
