"""transformers in a child process, asked one thing at a time; see worker.py."""

import contextlib
import json
import pathlib
import subprocess
import sys
from typing import Any

from moe_jax.errors import Refused

_WORKER = pathlib.Path(__file__).parent / "worker.py"
_PROBE = "import torch, transformers"


def check(python: str, flag: str = "--python") -> None:
    """Refuses an interpreter without torch and transformers. Takes a few seconds."""
    fix = "install torch and transformers in any environment, and name its interpreter"
    try:
        found = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=False)
    except OSError as error:
        raise Refused(flag, python, f"must be a Python interpreter ({error})", fix) from None
    if found.returncode:
        last = (found.stderr.strip() or "no message").splitlines()[-1]
        raise Refused(flag, python, f"must have torch and transformers ({last})", fix)


class Peer:
    """A child that waits while it is not asked. A context: it ends with it."""

    def __init__(self, python: str = sys.executable, worker: str | pathlib.Path = _WORKER):
        self._process = subprocess.Popen(
            [python, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """Raises RuntimeError with what went wrong on the other side."""
        assert self._process.stdin
        assert self._process.stdout
        line = ""
        with contextlib.suppress(BrokenPipeError):  # it has ended: said below
            self._process.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"transformers ended with {self._process.wait()} at {do!r}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"transformers, at {do!r}: {answer['error']}")
        return answer
