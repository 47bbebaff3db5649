"""Notebooks of colab/: pairs in step, small outputs, names that exist. They run with `-m slow`."""

import ast
import importlib
import json
import os
import pathlib
import re
import shutil

import pytest

pytest.importorskip("jupytext")
pytest.importorskip("nbclient")

from colab import run
from moe_jax.placement import cost

NAMES = ("kernels", "placement", "quickstart")


def tree(name: str) -> ast.Module:
    return ast.parse((run.FOLDER / f"{name}.py").read_text("utf-8"))


def stored(name: str) -> dict:
    return json.loads((run.FOLDER / f"{name}.ipynb").read_text("utf-8"))


def imported(name: str) -> dict[str, object]:
    """What every imported name of a notebook is; fails where there is no such thing."""
    found: dict[str, object] = {}
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                found[alias.asname or alias.name] = module
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):  # a module of the package
                    importlib.import_module(f"{node.module}.{alias.name}")
                found[alias.asname or alias.name] = getattr(module, alias.name)
    return found


def test_all_notebooks_are_known():
    assert run.names() == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_pair_is_in_step(name):
    assert run.out_of_step(name) == ""


def test_a_changed_cell_is_noticed(tmp_path, monkeypatch):
    for suffix in ("py", "ipynb"):
        text = (run.FOLDER / f"kernels.{suffix}").read_text("utf-8")
        (tmp_path / f"kernels.{suffix}").write_text(text, "utf-8")
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    assert run.out_of_step("kernels") == ""
    changed = tmp_path / "kernels.py"
    changed.write_text(changed.read_text("utf-8").replace("## Gradients", "## Slopes"), "utf-8")
    assert "cell" in run.out_of_step("kernels")


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_library_exist(name):
    pytest.importorskip("IPython")
    found = imported(name)
    used = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute)]
    checked = 0
    for node in used:
        if isinstance(node.value, ast.Name) and node.value.id in found:
            assert hasattr(found[node.value.id], node.attr), f"{node.value.id}.{node.attr}"
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_small_and_name_no_place(name):
    notebook = stored(name)
    outputs = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    text = json.dumps(outputs)
    assert len(text) < 1.2 * run.MOST_BYTES
    assert any(outputs), "run `make notebooks-write`"
    assert '"output_type": "error"' not in text
    sources = (run.FOLDER / f"{name}.py").read_text("utf-8")
    for where in (sources, text):
        assert not re.search(r"(?<![\w.:/])/(home|root|tmp|work|usr|Users|content)/", where)


def test_every_dispatch_is_explained_and_counted():
    """Its outputs are those of a run that had all of them."""
    cells = stored("placement")["cells"]
    prose = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    outputs = json.dumps([cell["outputs"] for cell in cells if cell["cell_type"] == "code"])
    for dispatch in cost.DISPATCHES:
        assert f"| `{dispatch}` |" in prose
        assert f"`{dispatch}`: **" in outputs


@pytest.mark.parametrize(
    ("driver", "variable", "extra"),
    [
        (None, None, ""),
        (None, "TPU_WORKER_ID", "[tpu]"),
        (None, "COLAB_TPU_ADDR", "[tpu]"),
        ("nvidia-smi", None, "[cuda12]"),
    ],
)
def test_an_accelerator_brings_its_own_jax(driver, variable, extra, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("TPU_", "COLAB_TPU_")):
            monkeypatch.delenv(name)
    if variable is not None:
        monkeypatch.setenv(variable, "0")
    monkeypatch.setattr(shutil, "which", lambda program: driver)
    monkeypatch.setattr(pathlib.Path, "glob", lambda self, pattern: iter(()))  # no device files
    cells = [cell.source for cell in run.from_text("kernels").cells]
    install = next(source for source in cells if "EXTRA" in source)
    names: dict[str, object] = {}
    exec(install.split("# In a checkout")[0], names)
    assert names["EXTRA"] == extra


@pytest.mark.parametrize("name", NAMES)
def test_head_is_the_same_everywhere(name):
    """The badge opens this notebook; the install cell is one text."""
    cells = run.from_text(name).cells
    assert f"/blob/main/colab/{name}.ipynb)" in cells[0].source
    others = [cell.source for other in NAMES for cell in run.from_text(other).cells]
    install = next(cell.source for cell in cells if "pip" in cell.source and "EXTRA" in cell.source)
    assert others.count(install) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_figures_of_the_text_are_computed(name):
    """Prose outside of cells states no measured figure: those are written by cells."""
    for cell in run.from_text(name).cells:
        if cell.cell_type == "markdown":
            prose = cell.source.replace("95 % interval", "interval")
            assert not re.search(r"\d\s?%|\d+(\.\d+)? (ms|GB|MB|tokens/s)", prose)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name):
    assert run.main([name]) == 0
