"""Is what is slow found in a real run, and named rightly? Hosts and links are slowed, one by one.

    python benchmarks/stragglers.py [--hosts=4 --mbit=200 --times=3]

A small model trains on hosts with limited links inside this machine (`train.py --distributed`, a
process a host), `train.probe_every=1`. First nothing is slow and every word is a false alarm; then
a host computes, receives or sends slowly, or one link is slow, each for a while. The table says
what the run said of it, after how many probes, and after how many it said that it was over.
Needs root.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.box import command, links
from benchmarks.box.hosts import PORT, Failed
from moe_jax import metrics
from moe_jax.errors import Refused

ROOT = pathlib.Path(__file__).resolve().parents[1]
SAID = re.compile(r"^step (\d+): (.+ slow.*|.+: [\d.]+ x)$", re.MULTILINE)
OVER = "nobody is slow any more"
TURN_SECONDS = 0.02  # of a host that gets a part of each
MOST_PROBES = 60  # until something has to be said
AFTER_PROBES = 10  # that it goes on, and that nothing else is said
START_SECONDS = 300.0
MODEL = {
    **{"model.num_layers": 1, "model.d_model": 16, "model.d_ff": 16, "data.seq_len": 16},
    "data.max_bytes": 100_000,
    **{"train.eval_every": 10**6, "train.log_every": 10**6, "train.checkpoint_every": 10**6},
    **{"train.num_steps": 10**6, "train.probe_every": 1, "virtual_devices": 1, "mesh.data": 1},
}
PER_HOST = ("model.num_experts", "data.global_batch", "train.eval_sequences")


class Run:
    """A training run, one process a host; a context manager."""

    def __init__(self, network: links.Network, folder: pathlib.Path):
        hosts = network.hosts
        self._workdir, self._logs = folder / "run", [folder / f"{host.name}.log" for host in hosts]
        fields = {**MODEL, "mesh.expert": len(hosts), **dict.fromkeys(PER_HOST, 2 * len(hosts))}
        words = [
            *(sys.executable, str(ROOT / "train.py"), "--config=configs/quickstart.py:smoke"),
            *(f"--workdir={self._workdir}", *(f"--config.{k}={v}" for k, v in fields.items())),
        ]
        self._processes = []
        self._cores = sorted(os.sched_getaffinity(0))  # hosts that share one get equal parts of it
        for number, host in enumerate(hosts):
            to = f"--distributed={hosts[0].name}:{PORT},{len(hosts)},{number}"
            with open(self._logs[number], "wb") as said:
                self._processes.append(
                    subprocess.Popen(
                        host.command("taskset", "-c", str(self._core(number)), *words, to),
                        cwd=ROOT,
                        env={**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
                        stdout=said,
                        stderr=said,
                        start_new_session=True,
                    )
                )

    def _core(self, host: int) -> int:
        return self._cores[host % len(self._cores)]

    def now(self) -> int:
        """The last step that anything is known of: metrics are written a step late."""
        return max([self.step(), *(step for step, _ in self.said(0))])

    def step(self) -> int:
        """The last one of the metrics: as many probes there were."""
        for number, process in enumerate(self._processes):
            if process.poll() is not None:
                raise self._failed(number, "ended")
        found = metrics.read(self._workdir / "metrics.jsonl")[1]
        return found[-1]["step"] if found else 0

    def said(self, after: int) -> list[tuple[int, str]]:
        """(step, words) that the run has said of slow hosts and links in later steps."""
        found = SAID.findall(self._logs[0].read_text(errors="replace"))
        return [(int(step), words) for step, words in found if int(step) > after]

    def seconds(self, name: str) -> list[float]:
        """Of every host, in the last step."""
        row = metrics.read(self._workdir / "metrics.jsonl")[1][-1]
        return [row[f"host_{p}_{name}_seconds"] for p in range(len(self._processes))]

    def wait(self, until: Callable[[], bool], seconds: float = 3600.0) -> None:
        """Raises `Failed` if a process ends first."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                raise self._failed(0, f"made no step in {seconds:.0f} s")
            time.sleep(0.1)

    def _failed(self, host: int, how: str) -> Failed:
        said = self._logs[host].read_text(errors="replace").strip().splitlines()[-12:]
        return Failed(f"host {host} {how}:\n" + "\n".join(said))

    @contextlib.contextmanager
    def slowed(self, host: int, times: float) -> Iterator[None]:
        """A host that runs for a part of every turn only, like one that others use too."""
        process, over = self._processes[host], threading.Event()
        on_core = [self._core(other) for other in range(len(self._processes))]
        part = 1 / times / on_core.count(self._core(host))  # what it leaves, those others take

        def take_turns() -> None:
            while not over.is_set():
                process.send_signal(signal.SIGSTOP)
                time.sleep(TURN_SECONDS * (1 - part))
                process.send_signal(signal.SIGCONT)
                time.sleep(TURN_SECONDS * part)

        taking = threading.Thread(target=take_turns)
        taking.start()
        try:
            yield
        finally:
            over.set()
            taking.join()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


@contextlib.contextmanager
def limited(network: links.Network, mbit: float, limit: Callable[[], None]) -> Iterator[None]:
    """Some limit; afterwards all links are as before."""
    limit()
    try:
        yield
    finally:
        network.limit(mbit)


def faults(
    network: links.Network, run: Run, mbit: float, times: float
) -> list[tuple[str, contextlib.AbstractContextManager[None]]]:
    """(what the run should say of it, the fault while it is entered)."""
    slow, hosts = mbit / times, len(network.hosts)
    made: list[tuple[str, contextlib.AbstractContextManager[None]]] = []
    for host in (0, hosts - 1):
        made.append((f"host {host} computes slowly", run.slowed(host, times)))
    if hosts > 2:  # of two hosts, a link and an end are one
        for kind, limit in (
            ("receives", network.limit_receiving),
            ("sends", network.limit_sending),
        ):
            for host in (0, hosts - 2):
                fault = limited(network, mbit, functools.partial(limit, host, slow))
                made.append((f"host {host} {kind} slowly", fault))
    for a, b in ((0, 1), (hosts - 1, hosts // 2 - 1)):
        fault = limited(network, mbit, functools.partial(network.limit_link, a, b, slow, mbit))
        made.append((f"the link from host {a} to {b}", fault))
    return made


@dataclasses.dataclass(frozen=True)
class Heard:
    """What a run said of a fault.

    Attributes:
      words: all of it, while the fault lasted.
      after: probes until the first of them; None = nothing was said.
      over: probes after its end until the run said that it was over; None = not in `MOST_PROBES`.
    """

    words: list[str]
    after: int | None
    over: int | None

    def judged(self, expected: str) -> str:
        """Whether it was named: yes, at last (after something else), or NO."""
        named = [{part.rpartition(":")[0] for part in words.split("; ")} for words in self.words]
        if not named or named[-1] != {expected}:
            return "NO"
        return "yes" if all(names == {expected} for names in named) else "at last"


def watched(run: Run, fault: contextlib.AbstractContextManager[None]) -> Heard:
    """Lets a fault come, last for `AFTER_PROBES` after the first word, and go."""
    began = run.now()
    with fault:
        run.wait(lambda: bool(run.said(began)) or run.step() > began + MOST_PROBES)
        until = run.step() + AFTER_PROBES
        run.wait(lambda: run.step() > until)
        heard = run.said(began)
    ended = run.now()
    after = heard[0][0] - began if heard else None

    def is_over() -> list[int]:
        return [step for step, words in run.said(ended) if words == OVER]

    run.wait(lambda: not heard or bool(is_over()) or run.step() > ended + MOST_PROBES)
    over = is_over()[0] - ended if heard and is_over() else None
    return Heard([words for _, words in heard], after, over)


def measure(hosts: int, mbit: float, times: float, quiet: int, folder: pathlib.Path) -> list[str]:
    """The lines of the report."""
    with links.Network(hosts) as network, Run(network, folder) as run:
        network.limit(mbit)
        run.wait(lambda: run.step() > 5, START_SECONDS)
        began = run.step()
        metrics.say(f"nothing is slow: {quiet} probes")
        run.wait(lambda: run.step() > began + quiet)
        alarms = [words for _, words in run.said(0) if words != OVER]
        lines = [
            f"{hosts} hosts, links of {mbit:g} Mbit/s, slowed {times:g} times; "
            f"{os.cpu_count()} cores",
            "a matmul {:.2f} to {:.2f} ms, a message {:.1f} to {:.1f} ms, where nothing is slow"
            "".format(
                *(1e3 * f(run.seconds(n)) for n in ("matmul", "message") for f in (min, max))
            ),
            f"nothing slow, {quiet} probes: {len(alarms)} alarms {'; '.join(alarms)}".rstrip(),
            "",
            f"{'slowed':32} {'named':>8} {'after':>6} {'over':>6}  said",
        ]
        found = []
        made = faults(network, run, mbit, times)
        for number, (expected, fault) in enumerate(made):
            metrics.say(f"{number + 1} of {len(made)}: {expected}")
            heard = watched(run, fault)
            found.append(heard.judged(expected))
            probes = [str(n) if n is not None else "-" for n in (heard.after, heard.over)]
            said = "; then ".join(heard.words) or "nothing"
            lines.append(f"{expected:32} {found[-1]:>8} {probes[0]:>6} {probes[1]:>6}  {said}")
        lines.append(
            f"{found.count('yes')} of {len(made)} named and nothing else said while they lasted; "
            f"{found.count('at last')} named after something else"
        )
    return lines


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--hosts", type=int, default=4)
    flags.add_argument("--mbit", type=float, default=200.0, help="10^6 bits per second of a link")
    flags.add_argument("--times", type=float, default=3.0, help="as slow as before")
    flags.add_argument("--quiet", type=int, default=200, help="probes with nothing slow")
    return flags


def check(flags: argparse.Namespace) -> None:
    """Raises `Refused`."""
    for flag, value, least in (
        *(("--hosts", flags.hosts, 2), ("--mbit", flags.mbit, 1)),
        *(("--times", flags.times, 1.1), ("--quiet", flags.quiet, 1)),
    ):
        if not value >= least:
            raise Refused(flag, value, f"must be at least {least}", f"use {least} or more")


def work() -> None:
    """What the flags ask for, on stdout."""
    flags = parser().parse_args()
    check(flags)
    links.check_machine()
    with tempfile.TemporaryDirectory(prefix="moe_jax-box-") as folder:
        sizes = (flags.hosts, flags.mbit, flags.times, flags.quiet)
        print("\n".join(measure(*sizes, pathlib.Path(folder))))


if __name__ == "__main__":
    sys.exit(command.run("stragglers.py", work))
