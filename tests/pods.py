"""Commands that compile for pods that are not here, each in a process of its own."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler for TPUs, is not installed (pip install libtpu; Linux x86-64)",
)


def run(module, config, *words):
    """The ended process; libtpu reads its environment once."""
    return subprocess.run(
        [sys.executable, "-m", module, "--json", f"--config=configs/{config}.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
