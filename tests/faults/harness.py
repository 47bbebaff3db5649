"""Real training processes that can be killed, and the judgement of what they leave behind."""

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moe_jax import checkpoint, metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
EVERY = 3  # steps between two saves
SIZES = {
    **{"model.num_layers": 1, "model.d_model": 16, "model.d_ff": 16, "data.seq_len": 16},
    **{"data.global_batch": 8, "data.max_bytes": 100_000, "train.eval_sequences": 8},
    **{"train.eval_every": 7, "train.log_every": 10, "train.checkpoint_every": EVERY},
    **{"train.checkpoints_kept": 3},
    # two devices: a state in shards, and a step that is compiled in little time
    **{"virtual_devices": 2, "mesh.data": 1, "mesh.expert": 2},
}


def told(faults: int, lost: int, identical: bool, kind: str) -> None:
    """The one line of a campaign."""
    word = "yes" if identical else "no"
    print(f"\n{kind}: {faults} faults, {lost} lost, identical {word}", flush=True)


def arguments(workdir: pathlib.Path, num_steps: int, **fields: object) -> list[str]:
    """Of train.py, for the small model; fields as `train__num_steps=3`."""
    named = {name.replace("__", "."): value for name, value in fields.items()}
    all_fields = {**SIZES, "train.num_steps": num_steps, **named}
    return [
        "--config=configs/quickstart.py:smoke",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in all_fields.items()),
    ]


@dataclasses.dataclass
class Process:
    """One training process; `code` is its exit status when it has ended."""

    pid: int
    workdir: pathlib.Path
    log: pathlib.Path
    _ended: queue.Queue

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> int:
        """Exit status; negative: the signal."""
        try:
            return self._ended.get(timeout=timeout)
        except queue.Empty:
            self.kill(signal.SIGKILL)
            raise AssertionError(f"does not end:\n{self.said()[-3000:]}") from None

    def ended(self) -> bool:
        return not self._ended.empty()

    def said(self) -> str:
        """stdout and stderr of all starts with this log."""
        return _text(self.log)


def log_of(workdir: pathlib.Path) -> pathlib.Path:
    """Of a run of one process."""
    return workdir.with_name(workdir.name + ".log")


def _text(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


class Starter:
    """Starts training processes by forking one that has imported everything."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        self._parent = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "faults" / "zygote.py")],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._started: queue.Queue[int] = queue.Queue()
        self._ended: dict[int, queue.Queue] = {}
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __call__(
        self,
        workdir: pathlib.Path,
        num_steps: int,
        *,
        log: pathlib.Path | None = None,
        more: Sequence[str] = (),
        **fields: object,
    ) -> Process:
        """Args: `log`: of its output, None = `log_of`; `more` arguments; `fields` of the config."""
        assert self._parent.stdin
        log = log or log_of(workdir)
        line = {"log": str(log), "arguments": [*arguments(workdir, num_steps, **fields), *more]}
        print(json.dumps(line), file=self._parent.stdin, flush=True)
        pid = self._started.get(timeout=120)
        return Process(pid, workdir, log, self._ended[pid])

    def close(self) -> None:
        self._parent.kill()
        self._parent.wait()
        self._parent.stdin.close()
        self._listener.join()
        self._parent.stdout.close()

    def _listen(self) -> None:
        assert self._parent.stdout
        for line in self._parent.stdout:
            message = json.loads(line)
            if "ended" in message:
                self._ended[message["pid"]].put(message["ended"])
            else:
                self._ended[message["pid"]] = queue.Queue()
                self._started.put(message["pid"])


def as_a_user(
    workdir: pathlib.Path,
    num_steps: int,
    *,
    log: pathlib.Path,
    more: Sequence[str] = (),
    **fields: object,
) -> Process:
    """As a `Starter` does, by a new interpreter, which does at its end what it does for users."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments(workdir, num_steps, **fields)]
    with open(log, "ab") as said:
        process = subprocess.Popen([*command, *more], cwd=ROOT, stdout=said, stderr=said)
    ended: queue.Queue[int] = queue.Queue()
    threading.Thread(target=lambda: ended.put(process.wait()), daemon=True).start()
    return Process(process.pid, workdir, log, ended)


def rows(workdir: pathlib.Path) -> list[tuple]:
    """What must have the same bits in every run: step, loss, gradient norm, held-out loss."""
    found = metrics.read(workdir / "metrics.jsonl")[1]
    return [(row["step"], row["loss"], row["grad_norm"], row.get("heldout_loss")) for row in found]


def last_step(workdir: pathlib.Path) -> int:
    """Of the metrics; 0 if there are none."""
    found = rows(workdir)
    return found[-1][0] if found else 0


def _beginnings(text: str) -> list[str]:
    """The line that a start says before its first step, of every start."""
    return [line for line in text.splitlines() if "GFLOP/s" in line]


def starts(workdir: pathlib.Path) -> int:
    """How often this run has begun to train."""
    return len(_beginnings(_text(log_of(workdir))))


def _wait(process: Process, reached: Callable[[], bool], *, may_end: bool = False) -> None:
    """Until `reached`; fails if the process ends before, unless it may."""
    deadline = time.monotonic() + 300
    while True:
        ended = process.ended()  # asked first: what it reached before it ended counts
        if (may_end and ended) or reached():
            return
        assert not ended, process.said()[-3000:]
        assert time.monotonic() < deadline, process.said()[-3000:]
        time.sleep(0.01)


def begins(process: Process, before: int) -> None:
    """Waits for the first step of a start after `before` others, or the end of the process."""
    _wait(process, lambda: starts(process.workdir) > before, may_end=True)
    # The line has been said with the metrics of later steps dropped: the next step is its own.
    _wait(process, lambda: last_step(process.workdir) > resumed_after(process), may_end=True)


def moves_on(process: Process, beyond: int) -> None:
    """Waits for a step after `beyond`. Fails if the process ended before."""
    _wait(process, lambda: last_step(process.workdir) > beyond)


def until(process: Process, words: str) -> None:
    """Waits until the process has said `words`. Fails if it ended before."""
    _wait(process, lambda: words in process.said())


def saves(process: Process, step: int) -> None:
    """Waits until a checkpoint of `step` or later is there. Fails if the process ended before."""
    _wait(process, lambda: newest_step(process.workdir) >= step)


def newest_step(workdir: pathlib.Path) -> int:
    """Of the complete checkpoints; 0 if there are none."""
    return max(checkpoint.steps(workdir / "checkpoints"), default=0)


def resumed_after(process: Process) -> int:
    """The step that the last start of this work directory went on from."""
    line = _beginnings(process.said())[-1]
    return int(line.rpartition("resuming after step ")[2]) if "resuming" in line else 0


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    folder = workdir / "checkpoints" / str(step)
    return checkpoint.restore_numpy(folder, checkpoint.read_contents(folder))


def same_end(workdir: pathlib.Path, expected: pathlib.Path) -> bool:
    """Curves and final states are equal in every bit, and nothing is left lying about."""
    ours, theirs = (arrays(where, newest_step(where)) for where in (workdir, expected))
    half = [path.name for path in (workdir / "checkpoints").iterdir() if path.name[0] == "."]
    return (
        rows(workdir) == rows(expected)
        and ours.keys() == theirs.keys()
        and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
        and not half
    )


@contextlib.contextmanager
def starter() -> Iterator[Starter]:
    made = Starter()
    try:
        yield made
    finally:
        made.close()
