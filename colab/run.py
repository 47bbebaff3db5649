"""Runs the notebooks, and holds each pair of files (.py, .ipynb) together.

    python colab/run.py [NAME ...]             runs, and refuses a pair that is not in step
    python colab/run.py --write [NAME ...]     runs, and writes the .ipynb with its new outputs

A notebook is its `.py` (jupytext, percent format): that one is edited. The `.ipynb` beside it is
what people open, with the outputs of one run. Prints the seconds of every notebook; the exit code
is 1 where a cell fails, outputs are too large, or a pair is not in step.
"""

import argparse
import os
import pathlib
import re
import sys
import time

import jupytext
import nbclient
import nbformat
from nbclient.exceptions import CellExecutionError

FOLDER = pathlib.Path(__file__).resolve().parent
MOST_BYTES = 200_000  # of the outputs of a notebook, as JSON
CELL_SECONDS = 600
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def names() -> list[str]:
    """All notebooks."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def from_text(name: str) -> nbformat.NotebookNode:
    """The notebook that the `.py` says, without outputs."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # jupytext draws them at random
    return notebook


def out_of_step(name: str) -> str:
    """What differs between the two files of a notebook; empty where nothing does."""
    path = FOLDER / f"{name}.ipynb"
    if not path.exists():
        return f"{path.name} is missing"
    here, there = from_text(name).cells, nbformat.read(path, as_version=4).cells
    for number, (one, other) in enumerate(zip(here, there, strict=False)):
        if (one.cell_type, one.source) != (other.cell_type, other.source):
            return f"cell {number} of {name}.py is not that of {path.name}"
    if len(here) != len(there):
        return f"{name}.py has {len(here)} cells, {path.name} {len(there)}"
    return ""


def output_bytes(notebook: nbformat.NotebookNode) -> int:
    """Bytes of all outputs together."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return sum(len(str(output)) for cell in cells for output in cell.outputs)


def execute(name: str) -> nbformat.NotebookNode:
    """Runs all cells in a kernel of their own, on the CPU."""
    notebook = from_text(name)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # kernels inherit it
    client = nbclient.NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        store_widget_state=False,
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    client.execute()
    del notebook.metadata["language_info"]  # names the Python that happened to run it
    return notebook


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    known = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "run")
    parser = argparse.ArgumentParser(prog="python colab/run.py")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--write", action="store_true", help="write the .ipynb with its outputs")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in known:
            parser.error(f"NAME {name!r}: must be one of {', '.join(known)}")
    failed = 0
    for name in options.names or known:
        problem = "" if options.write else out_of_step(name)
        if problem:
            print(f"{name}: {problem}; python colab/run.py --write {name}", file=sys.stderr)
            failed += 1
            continue
        start = time.perf_counter()
        try:
            notebook = execute(name)
        except CellExecutionError as error:
            print(f"{name}: {_COLOURS.sub('', str(error))}", file=sys.stderr)
            failed += 1
            continue
        size, seconds = output_bytes(notebook), time.perf_counter() - start
        print(f"{name}: {seconds:.0f} s, {size:,} bytes of outputs", flush=True)
        if size > MOST_BYTES:
            print(f"{name}: outputs above {MOST_BYTES:,} bytes; draw less", file=sys.stderr)
            failed += 1
        elif options.write:
            nbformat.write(notebook, FOLDER / f"{name}.ipynb")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
