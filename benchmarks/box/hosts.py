"""Worker processes, one per host: started inside the hosts' namespaces, told everything at once."""

import dataclasses
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
from typing import Any

from benchmarks.box.links import Network
from moe_jax import hugepages

ROOT = pathlib.Path(__file__).resolve().parents[2]
PORT = 5577  # inside host 0's own namespace: nobody else's
START_SECONDS, ANSWER_SECONDS = 300.0, 600.0


class Failed(RuntimeError):
    """A host that ended or did not answer; the message ends with what it said last."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What all hosts compute on; fields as in `worker.Settings`."""

    run: str
    inputs: str
    decode_start: int
    devices_per_host: int


class Workers:
    """The processes; a context manager."""

    def __init__(self, network: Network, inputs: Inputs, logs: pathlib.Path):
        settings = {
            **dataclasses.asdict(inputs),
            "hosts": len(network.hosts),
            "coordinator": f"{network.hosts[0].name}:{PORT}",
        }
        environment = {
            **os.environ,
            **hugepages.variables(os.environ),
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
        }
        self._processes: list[subprocess.Popen[str]] = []
        self._answers: list[queue.Queue[str]] = []
        self._logs = [logs / f"{host.name}.log" for host in network.hosts]
        for number, (host, log) in enumerate(zip(network.hosts, self._logs, strict=True)):
            told = json.dumps({**settings, "number": number})
            with open(log, "w") as errors:
                process = subprocess.Popen(
                    host.command(sys.executable, "-m", "benchmarks.box.worker", told),
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for the one who started it
                )
            self._processes.append(process)
            self._answers.append(_lines(process))
        self._collect(START_SECONDS)

    def all(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """Tells every host the same; returns their answers in the order of hosts."""
        line = json.dumps({"do": do, **arguments}) + "\n"
        for number, process in enumerate(self._processes):
            assert process.stdin
            try:
                process.stdin.write(line)
                process.stdin.flush()
            except BrokenPipeError:
                raise self._failed(number, "ended") from None
        return self._collect(ANSWER_SECONDS)

    def _collect(self, seconds: float) -> list[dict[str, Any]]:
        answers = []
        for number, lines in enumerate(self._answers):
            try:
                line = lines.get(timeout=seconds)
            except queue.Empty:
                raise self._failed(number, f"did not answer in {seconds:.0f} s") from None
            if not line:
                raise self._failed(number, "ended")
            answers.append(json.loads(line))
        return answers

    def _failed(self, number: int, how: str) -> Failed:
        said = self._logs[number].read_text(errors="replace").strip().splitlines()[-12:]
        return Failed(f"host {number} {how}:\n" + "\n".join(said))

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lines(process: "subprocess.Popen[str]") -> "queue.Queue[str]":
    """Lines of its stdout as they come; an empty one when there will be no more."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stdout
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    return lines
